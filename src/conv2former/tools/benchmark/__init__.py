"""``conv2former benchmark``: how fast models of timm compute, measured fairly.

    options.py    what the user asks for, checked, as groups of configurations
    modes.py      a configuration's step: eager, compiled, exported; inference or training
    worker.py     the process that holds one configuration, times and profiles its steps
    measure.py    workers in turn, statistics, rows
    report.py     the rows as a table and in files; plots.py draws them
    frontier.py   our models beside today's models for CPUs

Each worker imports this package, so nothing is imported here: the entry is ``measure.benchmark``.
"""
