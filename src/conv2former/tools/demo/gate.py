"""What stands between the network and Gradio: the page's own requests pass, everything else is turned away.

Gradio answers many more requests than this page makes: it runs functions by name, fetches addresses, converts
recordings, keeps histories. None of that is wanted, so what passes is listed. Every answer gets headers by which the
browser itself loads nothing from elsewhere.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

API = "/gradio_api"
FILE = f"{API}/file="
JOIN = f"{API}/queue/join"
PASSING = {
    "GET": re.compile(
        rf"/|/config|/theme\.css|/favicon\.ico|/manifest\.json|/(assets|static)/[\w./+-]+"
        rf"|{API}/(theme\.css|startup-events|queue/data|upload_progress|heartbeat/\w+)"
    ),
    "POST": re.compile(rf"{API}/(upload|queue/join|cancel|reset)"),
}
MESSAGE_BYTES = 1 << 20  # of a request that is no upload

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

    It is plain ASGI and no middleware of Starlette's: those that read a request's body keep it whole in memory, and
    here an upload has to stream, while a refused one is read to its end and kept nowhere.

    Args:
        app: The one that is guarded.
        folder: Of the uploads, the only one that files are served from.
        upload_bytes: The most that an upload may have.
        local: Whether only this computer can connect. A browser's request then has to name it, which a page that
            has its own name point here cannot do.
    """

    def __init__(self, app: ASGIApp, *, folder: Path, upload_bytes: int, local: bool) -> None:
        self.app, self.folder, self.upload_bytes, self.local = app, folder.resolve(), upload_bytes, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on or answers it with one line."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # websockets, which this page has none of
            await send(dict(type="websocket.close", code=1008))
            return
        policy = FILE_POLICY if scope["path"].startswith(FILE) else POLICY

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {"headers": [], **message}
                MutableHeaders(scope=message).update(HEADERS | {"content-security-policy": policy})
            await send(message)

        refused = self._refused(scope)
        if refused is None and scope["path"] == JOIN:
            body, more = b"", True
            while more:
                message = await receive()
                body, more = body + message.get("body", b""), message.get("more_body", False)
            receive = _again(body, receive)
            if not self._names_uploads(body):
                refused = 400, "The request names a file that was not uploaded."
        if refused is None:
            await self.app(scope, receive, guarded)
            return
        # to the end, keeping nothing: a browser that is still sending would not see the answer
        while (message := await receive())["type"] == "http.request" and message.get("more_body"):
            pass
        status, text = refused
        await PlainTextResponse(text, status)(scope, receive, guarded)

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
        if method == "POST":
            length = headers.get("content-length", "")
            # both at once is a trick: the server would go by the chunks, which say no length
            if not length.isdecimal() or "transfer-encoding" in headers:
                return 411, "The request has to say how long it is."
            most = self.upload_bytes if path == f"{API}/upload" else MESSAGE_BYTES
            if int(length) > most:
                return 413, f"This is more than the {most / 1e6:g} MB that are taken at once: choose fewer or smaller."
        return None

    def _is_inside(self, path: str) -> bool:
        try:
            return Path(path).resolve().is_relative_to(self.folder)
        except (OSError, ValueError, RuntimeError):  # too long, with a null in it, or a loop of links
            return False

    def _names_uploads(self, body: bytes) -> bool:
        """Whether all files in a request are uploads: Gradio would copy others to these, and fetch addresses."""
        try:
            waiting = [json.loads(body)]
        except RecursionError:
            return False
        except ValueError:  # Gradio says so
            return True
        while waiting:
            part = waiting.pop()
            if isinstance(part, dict):
                if isinstance(part.get("path"), str) and not self._is_inside(part["path"]):
                    return False
                waiting += part.values()
            elif isinstance(part, list):
                waiting += part
        return True


def _again(body: bytes, receive: Receive) -> Receive:
    """Gives a body that has been read once more, and then what follows."""
    waiting = [dict(type="http.request", body=body, more_body=False)]

    async def first() -> Message:
        return waiting.pop() if waiting else await receive()

    return first


def _is_loopback(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
