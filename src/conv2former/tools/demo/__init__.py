"""A page for trained models on one's own images, in the browser, on this computer.

- ``models``: the models that may be chosen, the few that are kept in memory, and what one makes of an image.
- ``about``: what a model is, from the files of its run or its card.
- ``options``: what the page's controls say. ``agreement``: where two models say the same.
- ``results``: all that as HTML. ``style``: how it looks.
- ``page``: the page, made with Gradio.
- ``gate``: what stands between the network and Gradio; it lets through what the page needs and nothing else.
- ``clients``: who looks at the page, and which uploads go when they do.
- ``server``: the port, the temporary folder, the end.
"""
