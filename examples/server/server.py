"""A small HTTP server for an exported classifier: FastAPI, no PyTorch.

    python server.py model.safetensors --port 8000
    curl --data-binary @photo.jpg http://127.0.0.1:8000/predict

The model is a file of ``conv2former export RUN --format runtime``, or of ``--format onnx`` for ONNX Runtime. Requests
that come together are computed together: the network takes whatever waits, up to ``--batch`` images.
"""

import argparse
import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from starlette.requests import ClientDisconnect

from conv2former_runtime.classifier import prepare, top_classes
from conv2former_runtime.errors import UserError
from conv2former_runtime.images import BadImage, decode
from conv2former_runtime.model import Model

Network = Callable[[np.ndarray], np.ndarray]  # (B, 3, H, W) -> logits


def open_network(path: Path, threads: int) -> tuple[Network, dict[str, Any]]:
    """The network, and what the file says of it."""
    if path.suffix == ".onnx":
        try:
            import onnxruntime
        except ImportError:
            raise UserError(f"{path} needs ONNX Runtime: pip install onnxruntime") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            facts = json.loads(session.get_modelmeta().custom_metadata_map["conv2former"])
        except Exception as error:  # the runtime has many
            raise UserError(f"{path} is no file of `conv2former export --format onnx`: {error}") from None
        if facts.get("crop_mode") not in ("center", "squash"):
            raise UserError(f"{path}: images cannot be prepared as its crop_mode {facts.get('crop_mode')!r} says")
        return lambda images: session.run(None, {"images": images})[0], facts
    model = Model(path, threads=threads)
    if model.steps[-1] != "head":
        raise UserError(f"{path} holds a network without a classifier")
    return model, model.facts


class Batcher:
    """Computes the images that wait, together."""

    def __init__(self, network: Network, *, most: int, waiting: int) -> None:
        self.network, self.most = network, most
        self.queue: asyncio.Queue[tuple[np.ndarray, asyncio.Future]] = asyncio.Queue(waiting)
        self.thread = ThreadPoolExecutor(1)

    async def logits(self, image: np.ndarray) -> np.ndarray:
        """Those of one image; asyncio.QueueFull where too many wait."""
        answer: asyncio.Future = asyncio.get_running_loop().create_future()
        self.queue.put_nowait((image, answer))
        return await answer

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            taken = [await self.queue.get()]
            while len(taken) < self.most and not self.queue.empty():
                taken.append(self.queue.get_nowait())
            taken = [(image, answer) for image, answer in taken if not answer.cancelled()]
            try:
                rows = [*await loop.run_in_executor(self.thread, self.network, np.stack([image for image, _ in taken]))]
                assert len(rows) == len(taken)
            except Exception as error:  # memory, most likely: the next batch may be smaller
                rows = [error] * len(taken)
            for (_, answer), row in zip(taken, rows, strict=True):
                if not answer.cancelled():
                    answer.set_exception(row) if isinstance(row, Exception) else answer.set_result(row)


def make_app(path: Path, given: argparse.Namespace) -> FastAPI:
    network, facts = open_network(path, given.threads)
    batcher = Batcher(network, most=given.batch, waiting=given.waiting)
    readers = ThreadPoolExecutor(given.threads)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(batcher.run())
        yield
        task.cancel()

    app = FastAPI(title="Conv2Former", lifespan=lifespan)

    def read(content: bytes) -> np.ndarray:
        return prepare(decode(content, name="the image", max_pixels=given.max_pixels), facts)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Whether it serves, what, and how many images wait."""
        return dict(ok=True, architecture=facts["architecture"], waiting=batcher.queue.qsize())

    @app.post("/predict")
    async def predict(request: Request, top_k: int = 5) -> dict[str, Any]:
        """The top classes of the image in the request's body."""
        if top_k < 1:
            raise HTTPException(422, "top_k must be 1 or more")
        content = bytearray()
        try:
            async with asyncio.timeout(given.timeout):
                async for part in request.stream():
                    content += part
                    if len(content) > given.max_upload_mb * 1e6:
                        raise HTTPException(413, f"the image is larger than {given.max_upload_mb:g} MB")
                image = await asyncio.get_running_loop().run_in_executor(readers, read, bytes(content))
                logits = await batcher.logits(image)
        except BadImage as error:
            wrapped = request.headers.get("content-type", "").startswith("multipart/")
            hint = "; send the file's bytes themselves: curl --data-binary @photo.jpg" * wrapped
            raise HTTPException(422, f"{error}{hint}") from None
        except ClientDisconnect:
            raise HTTPException(400, "the client has left") from None
        except (asyncio.QueueFull, TimeoutError, MemoryError):
            said = "the upload is too slow, or too many images wait: try again later"
            raise HTTPException(503, said, {"Retry-After": "1"}) from None
        return dict(top=top_classes(logits, facts["labels"], top_k))

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description="Serves an exported classifier.")
    parser.add_argument("model", type=Path, help="a file of --format runtime or onnx")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="that compute")
    parser.add_argument("--batch", type=int, default=8, help="images computed together, at most")
    parser.add_argument("--waiting", type=int, default=256, help="images that may wait; more get 503")
    parser.add_argument("--timeout", type=float, default=30, help="seconds for an upload and its answer; then 503")
    parser.add_argument("--max-upload-mb", type=float, default=20)
    parser.add_argument("--max-pixels", type=int, default=25_000_000)
    given = parser.parse_args()
    try:
        app = make_app(given.model, given)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"serving {given.model} at http://{given.host}:{given.port}/predict; Ctrl-C ends it", flush=True)
    uvicorn.run(app, host=given.host, port=given.port, log_level="warning", limit_concurrency=given.waiting + 32)


if __name__ == "__main__":
    main()
