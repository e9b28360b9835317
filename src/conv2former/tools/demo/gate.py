"""What stands between the network and Gradio: the page's own requests pass, everything else is turned away.

Gradio answers many more requests than this page makes: it runs functions by name, fetches addresses, converts
recordings, keeps histories. None of that is wanted, so what passes is listed. Every answer gets headers by which the
browser itself loads nothing from elsewhere.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

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
FILE_POLICY = "default-src 'none'; sandbox"  # an upload is shown as a picture or not at all
HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"), (b"x-frame-options", b"DENY")]


class Gate:
    """An ASGI application around another.

    Args:
        app: The one that is guarded.
        folder: Of the uploads, the only one that files are served from.
        upload_bytes: The most that an upload may have.
        local: Whether only this computer can connect. A browser's request then has to name it, which a page that
            has its own name point here cannot do.
    """

    def __init__(self, app: App, *, folder: Path, upload_bytes: int, local: bool) -> None:
        self.app, self.folder, self.upload_bytes, self.local = app, folder.resolve(), upload_bytes, local

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Passes a request on or answers it with one line."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # websockets, which this page has none of
            await send(dict(type="websocket.close", code=1008))
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refused = self._refused(scope, headers)
        policy = (FILE_POLICY if scope["path"].startswith(FILE) else POLICY).encode()

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [*HEADERS, (b"content-security-policy", policy)]
                names = {name for name, _ in own}
                kept = [pair for pair in message.get("headers", []) if pair[0].lower() not in names]
                message = {**message, "headers": [*kept, *own]}
            await send(message)

        if refused is None and scope["path"] == JOIN:
            body = await _body(receive)
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
        fields = [(b"content-type", b"text/plain; charset=utf-8")]
        await guarded(dict(type="http.response.start", status=status, headers=fields))
        await guarded(dict(type="http.response.body", body=text.encode()))

    def _refused(self, scope: Message, headers: dict[str, str]) -> tuple[int, str] | None:
        """Status and line for a request that does not pass."""
        host = headers.get("host", "")
        if self.local and not _is_loopback(_hostname(f"//{host}")):
            return 421, "This page is for the computer that it runs on."
        if "origin" in headers and _netloc(headers["origin"]) != host:
            return 403, "This request comes from another page."
        method, path = scope["method"], scope["path"]
        if method in ("GET", "HEAD") and path.startswith(FILE):
            return None if self._is_upload(path.removeprefix(FILE)) else (404, "There is no such file.")
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

    def _is_upload(self, path: str) -> bool:
        try:
            return self._is_inside(path) and Path(path).is_file()
        except (OSError, ValueError):  # too long, or with a null in it
            return False

    def _is_inside(self, path: str) -> bool:
        try:
            return Path(path).resolve().is_relative_to(self.folder)
        except (OSError, ValueError, RuntimeError):
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


async def _body(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


def _again(body: bytes, receive: Receive) -> Receive:
    """Gives a body that has been read once more, and then what follows."""
    waiting = [dict(type="http.request", body=body, more_body=False)]

    async def first() -> Message:
        return waiting.pop() if waiting else await receive()

    return first


def _hostname(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


def _netloc(address: str) -> str | None:
    try:
        return urlsplit(address).netloc
    except ValueError:
        return None


def _is_loopback(host: str | None) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False
