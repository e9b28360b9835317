"""What stands between the network and Gradio: the page's own requests pass, everything else is turned away.

Gradio answers many more requests than this page makes: it runs functions by name, fetches addresses, converts
recordings, keeps histories. None of that is wanted, so what passes is listed. Every answer gets headers by which the
browser itself loads nothing from elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import ipaddress
import os
import re
import tempfile
import time
from pathlib import Path
from typing import IO, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, Field
from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from conv2former.files import parse_json
from conv2former.tools.demo.clients import Clients

API = "/gradio_api"
FILE = f"{API}/file="
JOIN, DATA = f"{API}/queue/join", f"{API}/queue/data"
UPLOAD, HEARTBEAT = f"{API}/upload", f"{API}/heartbeat/"
PASSING = {
    "GET": re.compile(
        rf"/|/config|/theme\.css|/favicon\.ico|/manifest\.json|/(assets|static)/[\w./+-]+"
        rf"|{API}/(theme\.css|startup-events|queue/data|upload_progress|heartbeat/\w+)"
    ),
    "POST": re.compile(rf"{API}/(upload|queue/join|cancel|reset)"),
}
MESSAGE_BYTES = 1 << 20  # of a request that is no upload
GRACE_SECONDS, SLOWEST = 10, 20_000  # that a request's body may take, and one for each so many bytes
MOST_UNWANTED = 1 << 30  # bytes of a refused request that are read

# Gradio's page has scripts and styles in its HTML, and makes functions of the templates of its HTML components
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
FILE_POLICY = "default-src 'none'; sandbox"  # an upload is shown as an image or not at all
HEADERS = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "x-frame-options": "DENY"}


class Gate:
    """An ASGI application around another.

    It is plain ASGI and no middleware of Starlette's: those that read a request's body keep it whole in memory. Here it
    goes to a file without a name, and to Gradio once it is complete: of an upload that is cut off, or whose client
    leaves, nothing stays.

    Args:
        app: The one that is guarded.
        folder: Of the uploads, the only one that files are served from.
        upload_bytes: The most that an upload may have.
        local: Whether only this computer can connect. A browser's request then has to name it, which a page that
            has its own name point here cannot do.
    """

    def __init__(self, app: ASGIApp, *, folder: Path, upload_bytes: int, local: bool) -> None:
        self.app, self.folder, self.upload_bytes, self.local = app, folder.resolve(), upload_bytes, local
        # the page's own functions, with the numbers of their inputs: see ``page.mounted``
        self.functions: dict[int, int] = getattr(getattr(app, "state", None), "functions", {})
        self.clients = Clients()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on or answers it with one line."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # websockets, which this page has none of
            await send(dict(type="websocket.close", code=1008))
            return
        policy = FILE_POLICY if scope["path"].startswith(FILE) else POLICY
        answer = bytearray()  # to an upload: the names of the files

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {"headers": [], **message}
                MutableHeaders(scope=message).update(HEADERS | {"content-security-policy": policy})
            elif scope["path"] == UPLOAD:
                answer.extend(message.get("body", b"")[:MESSAGE_BYTES])
            await send(message)

        refused = self._refused(scope)
        with tempfile.SpooledTemporaryFile(MESSAGE_BYTES, dir=str(self.folder)) as body:  # it goes when it is closed
            # what is refused is read, too, and kept nowhere: a browser that is still sending would not see the answer
            keep = refused is None and scope["method"] == "POST"
            late = await _received(receive, body if keep else None) if keep or refused else None
            if late == "gone":
                return
            refused = (408, "This takes too long: try again with fewer or smaller images.") if late else refused
            if refused is None and keep:
                refused, content = (None, body) if scope["path"] == UPLOAD else self._asked(scope["path"], body.read())
                receive = _again(content, receive)
            if refused is not None:
                close = {"connection": "close"} if late else None
                await PlainTextResponse(refused[1], refused[0], headers=close)(scope, receive, guarded)
                return
            with self._listening(scope):
                await self.app(scope, receive, guarded)
        if scope["path"] == UPLOAD:
            with contextlib.suppress(ValueError):
                names = parse_json(bytes(answer))
                self.clients.uploads([Path(name) for name in names] if isinstance(names, list) else [])

    def _listening(self, scope: Scope) -> contextlib.AbstractContextManager[None]:
        """Notes that a client is there, while a stream of the page's is open."""
        path, session = scope["path"], _session(scope)
        if path not in (DATA, HEARTBEAT + session):
            return contextlib.nullcontext()
        return self.clients.stream(session, answers=path == DATA)

    def _asked(self, path: str, body: bytes) -> tuple[tuple[int, str] | None, IO[bytes]]:
        """Why a request in JSON does not pass, and what of it is passed on."""
        nothing = io.BytesIO()
        try:
            said = parse_json(body)
            if path != JOIN and isinstance(said, dict):
                return None, io.BytesIO(body)
            asked = Question.model_validate(said)
        except ValueError:
            return (400, "This is no request of the page."), nothing
        if asked.fn_index not in self.functions:
            return (404, "There is no such function."), nothing
        if len(asked.data) != self.functions[asked.fn_index]:
            return (400, "This is no request of the page."), nothing
        files = _files(asked.data)
        if not all(map(self._is_inside, files)):  # Gradio would copy others to these, and fetch addresses
            return (400, "The request names a file that was not uploaded."), nothing
        if not self.clients.may_wait(asked.session_hash):
            return (429, "You are waiting for an answer already: it comes first."), nothing
        self.clients.asks(asked.session_hash, [Path(file).resolve() for file in files])
        return None, io.BytesIO(asked.model_dump_json().encode())

    def _refused(self, scope: Scope) -> tuple[int, str] | None:
        """Status and line for a request that does not pass."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self.local and not _is_loopback(host):
            return 421, "This page is for the computer that it runs on."
        if "origin" in headers and headers["origin"].partition("://")[2] != host:
            return 403, "This request comes from another page."
        method, path = scope["method"], scope["path"]
        if method in ("GET", "HEAD") and path.startswith(FILE):
            file = path.removeprefix(FILE)
            return None if self._is_inside(file) and os.path.isfile(file) else (404, "There is no such file.")
        passing = PASSING.get("GET" if method == "HEAD" else method)
        if passing is None or ".." in path or not passing.fullmatch(path):
            return 404, "There is no such page."
        if path == DATA and not self.clients.knows(_session(scope)):
            return 404, "Nothing was asked."
        if method == "POST":
            length = headers.get("content-length", "")
            # both at once is a trick: the server would go by the chunks, which say no length
            if not length.isdecimal() or "transfer-encoding" in headers:
                return 411, "The request has to say how long it is."
            most = self.upload_bytes if path == UPLOAD else MESSAGE_BYTES
            if int(length) > most:
                return 413, f"This is more than the {most / 1e6:g} MB that are taken at once: choose fewer or smaller."
        return None

    def _is_inside(self, path: str) -> bool:
        try:
            return Path(path).resolve().is_relative_to(self.folder)
        except (OSError, ValueError, RuntimeError):  # too long, with a null in it, or a loop of links
            return False


class Question(BaseModel):
    """What the page sends for an answer; whatever else a request holds is not passed on."""

    data: list[Any]
    fn_index: int
    session_hash: str = Field(pattern=r"^\w{1,64}$")
    trigger_id: int | None = None


def _files(data: list[Any]) -> list[str]:
    """The paths in a request, wherever in it."""
    found, waiting = [], [*data]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            found += [part["path"]] if isinstance(part.get("path"), str) else []
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part
    return found


def _session(scope: Scope) -> str:
    """The client that a request is of; empty where it does not say so."""
    if scope["path"].startswith(HEARTBEAT):
        return scope["path"].removeprefix(HEARTBEAT)
    return QueryParams(scope["query_string"]).get("session_hash", "")


async def _received(receive: Receive, file: IO[bytes] | None) -> Literal["gone", "slow"] | None:
    """Reads a request's body into a file, if there is one, and says why it does not come to its end."""
    began, count = time.monotonic(), 0
    while True:
        left = GRACE_SECONDS + count / SLOWEST - (time.monotonic() - began)
        try:
            message = await asyncio.wait_for(receive(), max(left, 0.01))
        except TimeoutError:
            return "slow"
        if message["type"] != "http.request":
            return "gone"
        part = message.get("body", b"")
        count += len(part)
        if file is not None:
            file.write(part)
        if not message.get("more_body"):
            if file is not None:
                file.seek(0)
            return None
        if file is None and count > MOST_UNWANTED:
            return "slow"


def _again(body: IO[bytes], receive: Receive) -> Receive:
    """Gives a body that has been read once more, and then what follows."""
    ended = False

    async def first() -> Message:
        nonlocal ended
        if ended:
            return await receive()
        part = body.read(MESSAGE_BYTES)
        ended = len(part) < MESSAGE_BYTES
        return dict(type="http.request", body=part, more_body=not ended)

    return first


def _is_loopback(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
