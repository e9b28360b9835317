"""The page: choosers, images in, answers out.

Gradio gets images to the server and HTML back to the page, and nothing more: what the browser sends is taken raw
(``preprocess=False``), else Gradio would have Pillow open a file before ``conv2former.data.images`` has looked at it.
"""

from __future__ import annotations

import asyncio
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from PIL import Image

from conv2former.data.images import BadImage, decode
from conv2former.errors import UserError, say
from conv2former.tools.demo import results, style
from conv2former.tools.demo.about import in_python
from conv2former.tools.demo.agreement import Agreement, agreement, total
from conv2former.tools.demo.models import Look, Model, Models
from conv2former.tools.demo.options import LAYERS, MOST_CLASSES, Options

MOST_IMAGES = 16  # of one answer
KEPT_SECONDS = 1800  # that an upload is kept
SWEEP_SECONDS = 60  # between two looks for older ones
WAITING = 500  # requests, before others are turned away; the page shows everyone's place
SESSIONS = 8  # that Gradio remembers the page's values of; 10,000 unless told, and nothing here needs any
OUR_FAULT = "Something went wrong here: the terminal that runs the demo says what."
UNUSABLE = "This model cannot be used: the terminal that runs the demo says why."
HINT = "Choose images, or take one with the camera: the answers appear here."


class Page(NamedTuple):
    """The HTML of the parts of the page."""

    answers: str
    status: str
    code: str
    about: str
    examples: str


class Answers:
    """From what the page sends to HTML.

    ``folder`` is where uploads lie; no other file is read. ``file_bytes`` and ``pixels`` are the most of an image.
    """

    def __init__(self, models: Models, *, folder: Path, file_bytes: int, pixels: int) -> None:
        self.models, self.folder, self.file_bytes, self.pixels = models, folder.resolve(), file_bytes, pixels

    def __call__(self, files: Any, camera: Any, first: Any, second: Any, *options: Any) -> Page:
        """HTML for what the page's components hold; whatever goes wrong is a sentence in it."""
        names = dict.fromkeys(name for name in (first, second) if isinstance(name, str) and name)
        try:
            asked = Options.read(*options) if options else Options()
            models = {name: self._model(name) for name in names}  # one that is broken is opened once
            about, examples, code = self._about(models, asked)
            answers, status = self._answers(_uploads(files, camera), camera, models, asked)
            return Page(answers, status, code, about, examples)
        except Exception:
            return Page(results.paragraph("notice", _reported()), "", "", "", "")

    def _about(self, chosen: dict[str, Model | None], options: Options) -> tuple[str, str, str]:
        """What the models are, their examples, and the lines of Python."""
        models = [(name, model) for name, model in chosen.items() if model]
        abouts = [(name, model.about) for name, model in models]
        uses = {use for _, model in models for use in (*model.task.options, *model.task.layers)}
        snippets = [in_python(name, model.source, model.task, options.of(model.task)) for name, model in models]
        return (
            results.title(abouts, sorted(uses)),
            results.examples([about for _, about in abouts]),
            results.code(snippets),
        )

    def _answers(
        self, uploads: list[dict[str, Any]], camera: Any, models: dict[str, Model | None], options: Options
    ) -> tuple[str, str]:
        """A card for each upload, and a sentence on all of them."""
        if not uploads:
            return results.paragraph("hint", HINT), ""
        cards, agreements = [], []
        if len(uploads) > MOST_IMAGES:
            sentence = f"These are {len(uploads)} images: the first {MOST_IMAGES} are shown."
            cards.append(results.paragraph("notice", sentence))
        for upload in uploads[:MOST_IMAGES]:
            name = "camera" if upload is camera else str(upload.get("orig_name") or "image")[:200]
            try:
                image = self._image(upload.get("path"))
            except BadImage as error:
                sentence = f"{error.reason[:1].upper()}{error.reason[1:]}."
                cards.append(results.card(name, None, [results.paragraph("error", sentence)]))
                continue
            found = [self._answer(*chosen, image, options, name) for chosen in models.items()]
            agreed = _agreement([look for _, look in found])
            agreements += [agreed] if agreed else []
            cards.append(results.card(name, image.size, [html for html, _ in found], str(agreed or "")))
        return "".join(cards), results.status(min(len(uploads), MOST_IMAGES), total(agreements))

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

    def _model(self, name: str) -> Model | None:
        """None where it cannot be used, which the terminal says more of."""
        try:
            return self.models.get(name)
        except UserError as error:  # which says where the model lies
            say(f"error: {error}")
        except Exception:  # of one model: the other answers
            _reported()
        return None

    def _answer(
        self, name: str, model: Model | None, image: Image.Image, options: Options, file: str
    ) -> tuple[str, Look | None]:
        if model is None:
            return results.paragraph("error", UNUSABLE), None
        try:
            look = model.look(image, options)
            return results.answer(name, model.about, look, file), look
        except Exception:
            return results.paragraph("error", _reported()), None


def _uploads(files: Any, camera: Any) -> list[dict[str, Any]]:
    given = [*(files if isinstance(files, list) else [files]), camera]
    return [upload for upload in given if isinstance(upload, dict)]


def _agreement(looks: list[Look | None]) -> Agreement | None:
    """Of two models that answered in the same kind."""
    if len(looks) != 2 or looks[0] is None or looks[1] is None or looks[0].kind != looks[1].kind or not looks[0].kind:
        return None
    return agreement(looks[0].kind, looks[0].lines, looks[1].lines)


def _reported() -> str:
    """Prints the error of now for whoever runs the demo, and gives a sentence for who looks at the page."""
    say(*traceback.format_exc().split("\n"))
    return OUR_FAULT


def build_page(answers: Answers) -> gr.Blocks:
    """The page with its one action, which every change starts, for another model with more of the page."""
    # Gradio's threads come and go, and each leaves memory behind that the next cannot use
    worker = ThreadPoolExecutor(1, "answers")

    async def answer(*inputs: Any) -> Page:
        return await asyncio.get_running_loop().run_in_executor(worker, answers, *inputs)

    async def answer_alone(*inputs: Any) -> tuple[str, ...]:
        return (await answer(*inputs))[:3]

    names = answers.models.names
    start = answers(None, None, names[0], None)
    with gr.Blocks(
        analytics_enabled=False, title="Conv2Former", fill_width=True, delete_cache=(SWEEP_SECONDS, KEPT_SECONDS)
    ) as page:
        about = gr.HTML(start.about, elem_id="about", js_on_load=None)
        with gr.Column(elem_id="layout"):
            with gr.Column(elem_id="input"):
                first = gr.Dropdown(names, value=names[0], label="Model", elem_id="first")
                files = gr.File(file_count="multiple", label="Images", height=150, elem_id="files")
                gr.HTML(_limits(answers), elem_id="limits", js_on_load=style.MEND_UPLOAD)
                examples = gr.HTML(start.examples, elem_id="examples", js_on_load=style.TAKE_EXAMPLE)
            with gr.Column(elem_id="results"):
                status = gr.HTML("", elem_id="status", js_on_load=style.SAY_STATUS)
                answered = gr.HTML(start.answers, elem_id="answers", js_on_load=style.GIVE_IMAGE)
                with gr.Accordion("Use it in Python", open=False, elem_id="code-part"):
                    code = gr.HTML(start.code, elem_id="code", js_on_load=None)
            with gr.Column(elem_id="options"):
                second = gr.Dropdown([("none", ""), *names], value="", label="Compare with", elem_id="second")
                sliders, boxes = _controls()
                with gr.Accordion("Camera", open=False, elem_id="camera-part"):
                    camera = gr.Image(
                        sources=["webcam"], type="filepath", label="Camera", height=214, elem_id="camera", buttons=[]
                    )
        action: Any = dict(
            inputs=[files, camera, first, second, *sliders, *boxes],
            preprocess=False,
            api_visibility="private",
            trigger_mode="always_last",
            concurrency_limit=1,  # two at a time would spoil each other's times
            concurrency_id="answers",
        )
        gr.on([first.input, second.input], answer, outputs=[answered, status, code, about, examples], **action)
        # the rest changes neither what the models are nor their examples, which are large
        changes = [control.input for control in (*sliders, *boxes)]  # not release, which the keyboard does not cause
        gr.on([files.change, camera.change, *changes], answer_alone, outputs=[answered, status, code], **action)
        page.unload(_nothing)  # for which the page keeps a stream open, by which the gate knows that it is there
        page.queue(max_size=WAITING)
        page.state_session_capacity = SESSIONS
    return page


def _controls() -> tuple[list[gr.Slider], list[gr.CheckboxGroup | gr.Checkbox]]:
    """In the order of ``Options.read``."""
    start = Options()
    options: Any = dict(buttons=[])
    sliders = [
        gr.Slider(1, MOST_CLASSES, start.top_k, step=1, label="Top classes", elem_id="top_k", **options),
        gr.Slider(0.05, 0.95, start.threshold, step=0.05, label="Lowest score", elem_id="threshold", **options),
        gr.Slider(0, 1, start.opacity, step=0.05, label="Opacity of masks", elem_id="opacity", **options),
    ]
    layers = gr.CheckboxGroup(
        [(layer.capitalize(), layer) for layer in LAYERS], value=[*LAYERS], label="Show", elem_id="layers"
    )
    cam = gr.Checkbox(
        start.cam, label="Class activation", info="Where the image speaks for the top class.", elem_id="cam"
    )
    maps = gr.Checkbox(
        start.maps,
        label="Modulation maps",
        info="Where each stage of a Conv2Former strengthens its features.",
        elem_id="maps",
    )
    return sliders, [layers, cam, maps]


def _limits(answers: Answers) -> str:
    file, pixels = answers.file_bytes / 1e6, answers.pixels / 1e6
    return results.paragraph("limits", f"Up to {MOST_IMAGES} images of {file:g} MB and {pixels:g} megapixels.")


def _nothing() -> None:
    pass


def mounted(page: gr.Blocks) -> Any:
    """The page as an ASGI application."""
    from fastapi import FastAPI

    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path="/",
        theme=gr.themes.Default(**style.FONTS),  # type: ignore[arg-type]
        css=style.STYLE,
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
