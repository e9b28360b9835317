"""``python -m conv2former SCRIPT.py ...``: a script of yours or of timm's, which then knows our models by name.

Everything else is the command line, as ``conv2former``.
"""

import os
import runpy
import sys


def main() -> None:
    """Runs the script of the first argument as ``python SCRIPT.py`` would, with the models registered."""
    arguments = sys.argv[1:]
    if not arguments or not arguments[0].endswith(".py"):
        from conv2former_cli import main as command_line

        command_line()
        return
    script = arguments[0]
    if not os.path.isfile(script):
        sys.exit(f"{script} does not exist: give the path of a Python script, `python -m conv2former SCRIPT.py ...`")
    sys.argv = arguments
    sys.path[0] = os.path.dirname(os.path.abspath(script))  # the script may import what lies beside it
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
