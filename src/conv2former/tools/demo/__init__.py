"""A page for trained models on one's own images, in the browser, on this computer.

- ``models``: the models that may be chosen, the few that are kept in memory, and what one makes of an image.
- ``results``: that as HTML.
- ``page``: the page, made with Gradio.
- ``gate``: what stands between the network and Gradio; it lets through what the page needs and nothing else.
- ``server``: the port, the temporary folder, the end.
"""
