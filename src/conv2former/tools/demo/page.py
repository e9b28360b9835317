"""The page: choosers, images in, answers out.

Gradio gets images to the server and HTML back to the page, and nothing more: what the browser sends is taken raw
(``preprocess=False``), else Gradio would have Pillow open a file before ``conv2former.data.images`` has looked at it.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from conv2former.data.images import BadImage, decode
from conv2former.errors import UserError, say
from conv2former.tools.demo import results
from conv2former.tools.demo.models import Models

MOST_IMAGES = 16  # of one answer
KEPT_SECONDS = 1800  # that an upload is kept
SWEEP_SECONDS = 60  # between two looks for older ones
WAITING = 500  # requests, before others are turned away; the page shows everyone's place
SESSIONS = 8  # that Gradio remembers the page's values of; 10,000 unless told, and nothing here needs any
OUR_FAULT = "Something went wrong here: the terminal that runs the demo says what."
UNUSABLE = "This model cannot be used: the terminal that runs the demo says why."
FONTS = dict(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # Gradio's are on the network


class Answers:
    """From what the page sends to HTML.

    ``folder`` is where uploads lie; no other file is read. ``file_bytes`` and ``pixels`` are the most of an image.
    """

    def __init__(self, models: Models, *, folder: Path, file_bytes: int, pixels: int) -> None:
        self.models, self.folder, self.file_bytes, self.pixels = models, folder.resolve(), file_bytes, pixels

    def __call__(self, files: Any, camera: Any, first: Any, second: Any, maps: Any) -> str:
        """HTML for what the page's components hold; whatever goes wrong is a sentence in it."""
        try:
            return "".join(self._parts(files, camera, [first, second], maps=bool(maps)))
        except Exception:
            return results.paragraph("notice", _reported())

    def _parts(self, files: Any, camera: Any, names: list[Any], *, maps: bool) -> Iterator[str]:
        given = [*(files if isinstance(files, list) else [files]), camera]
        uploads = [upload for upload in given if isinstance(upload, dict)]
        if not uploads:
            yield results.paragraph("hint", "Choose images or take one with the camera: the answers appear here.")
            return
        if len(uploads) > MOST_IMAGES:
            yield results.paragraph("notice", f"These are {len(uploads)} images: the first {MOST_IMAGES} are shown.")
        chosen = [name for name in dict.fromkeys(names) if isinstance(name, str) and name]
        for upload in uploads[:MOST_IMAGES]:
            name = "camera" if upload is camera else str(upload.get("orig_name") or "image")[:200]
            try:
                image = self._image(upload.get("path"))
            except BadImage as error:
                sentence = f"{error.reason[:1].upper()}{error.reason[1:]}."
                yield results.card(name, None, [results.paragraph("error", sentence)])
            else:
                yield results.card(name, image.size, [self._answer(model, image, maps=maps) for model in chosen])

    def _image(self, path: Any) -> Image.Image:
        """The image of an upload; raises BadImage."""
        try:
            file = Path(path).resolve()
            known = file.is_relative_to(self.folder) and file.is_file()
        except (TypeError, ValueError, OSError):  # no path, or one with a null in it
            known = False
        if not known:
            raise BadImage("upload", "it is not here any more: choose it again")
        size, most = file.stat().st_size, self.file_bytes
        if size > most:
            raise BadImage("upload", f"its {size / 1e6:.1f} MB are more than the limit of {most / 1e6:g} MB")
        return decode(file.read_bytes(), max_pixels=self.pixels)

    def _answer(self, name: str, image: Image.Image, *, maps: bool) -> str:
        try:
            try:
                model = self.models.get(name)
            except UserError as error:  # which says where the model lies
                say(f"error: {error}")
                return results.paragraph("error", UNUSABLE)
            return results.answer(name, model.note, model.look(image, maps=maps))
        except Exception:
            return results.paragraph("error", _reported())


def _reported() -> str:
    """Prints the error of now for whoever runs the demo, and gives a sentence for who looks at the page."""
    say(*traceback.format_exc().split("\n"))
    return OUR_FAULT


def build_page(answers: Answers) -> gr.Blocks:
    """The page with its one action, which every change starts."""
    names = answers.models.names
    # Gradio's threads come and go, and each leaves memory behind that the next cannot use
    worker = ThreadPoolExecutor(1, "answers")

    async def answer(*inputs: Any) -> str:
        return await asyncio.get_running_loop().run_in_executor(worker, answers, *inputs)

    words = f"up to {MOST_IMAGES} images of {answers.file_bytes / 1e6:g} MB and {answers.pixels / 1e6:g} megapixels"
    with gr.Blocks(
        analytics_enabled=False, title="Conv2Former", fill_width=True, delete_cache=(SWEEP_SECONDS, KEPT_SECONDS)
    ) as page:
        gr.HTML("<h1>Conv2Former</h1>", elem_id="heading")
        with gr.Row(equal_height=True):
            with gr.Column(min_width=240):
                first = gr.Dropdown(names, value=names[0], label="Model", elem_id="first")
                second = gr.Dropdown([("none", ""), *names], value="", label="Compare with", elem_id="second")
                maps = gr.Checkbox(True, label="Modulation maps", elem_id="maps")
            with gr.Column(scale=2, min_width=300):
                files = gr.File(file_count="multiple", label=f"Images: {words}", height=214, elem_id="files")
            with gr.Column(min_width=240):
                camera = gr.Image(
                    sources=["webcam"], type="filepath", label="Camera", height=214, elem_id="camera", buttons=[]
                )
        inputs = [files, camera, first, second, maps]
        answered = gr.HTML(answers(None, None, None, None, None), elem_id="answers")
        gr.on(
            [files.change, camera.change, first.input, second.input, maps.input],
            answer,
            inputs=inputs,
            outputs=answered,
            preprocess=False,
            api_visibility="private",
            trigger_mode="always_last",
            concurrency_limit=1,  # two at a time would spoil each other's times
        )
        page.unload(_nothing)  # for which the page keeps a stream open, by which the gate knows that it is there
        page.queue(max_size=WAITING)
        page.state_session_capacity = SESSIONS
    return page


def _nothing() -> None:
    pass


def mounted(page: gr.Blocks) -> Any:
    """The page as an ASGI application."""
    from fastapi import FastAPI

    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path="/",
        theme=gr.themes.Default(**FONTS),  # type: ignore[arg-type]
        css=results.STYLE,
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
    )
    app.state.functions = {index: len(fn.inputs) for index, fn in page.fns.items() if fn.inputs}  # for the gate
    page.has_launched = True  # else Gradio's own check of which files a request may name is off
    return app
