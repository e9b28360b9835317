"""``conv2former demo``: the port, the temporary folder of the uploads, and a clean end."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import signal
import socket
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from conv2former.errors import UserError, one_line

LAST_WORDS = 1  # seconds that open requests have at the end


def run_demo(
    sources: Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    max_upload_mb: float = 20,
    max_pixels: int = 25_000_000,
    device: str = "auto",
    open_browser: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Serves the page until Ctrl-C or SIGTERM, and tells ``say`` where it is.

    ``sources`` are run folders, saved models, folders of these, and timm's models (``NAME:key=value,...``). Port 0 is
    any free one.

    Raises:
        UserError: Gradio is missing, a model cannot be used, the address cannot be listened at.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # it is read while Gradio is imported
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise UserError(f"the demo needs Gradio ({one_line(error)}): pip install gradio") from None
    from conv2former.tools.demo.gate import Gate
    from conv2former.tools.demo.models import Models
    from conv2former.tools.demo.page import MOST_IMAGES, Answers, build_page, mounted

    with listen(host, port) as listening, TemporaryDirectory(prefix="conv2former-demo-") as temporary:
        os.environ["GRADIO_TEMP_DIR"], folder = temporary, Path(temporary)
        models = Models(sources, device=device)
        models.get(models.names[0])  # what is wrong with it is said now, not on the page
        file_bytes = round(max_upload_mb * 1e6)
        page = mounted(build_page(Answers(models, folder=folder, file_bytes=file_bytes, pixels=max_pixels)))
        address = listening.getsockname()
        local = ipaddress.ip_address(address[0]).is_loopback
        gate = Gate(page, folder=folder, upload_bytes=MOST_IMAGES * file_bytes, local=local)
        # its own logging would close the handlers of the whole process; without it, warnings go to stderr
        quiet: Any = dict(log_config=None, log_level="warning", access_log=False)
        config = uvicorn.Config(gate, **quiet, server_header=False, timeout_graceful_shutdown=LAST_WORDS)
        url = f"http://{f'[{address[0]}]' if ':' in address[0] else address[0]}:{address[1]}/"

        def ready() -> None:
            say(f"the demo is at {url} (Ctrl-C ends it)")
            if not local:
                say("everyone who reaches this address can use it")
            if open_browser:
                webbrowser.open(url)

        _serve(uvicorn, config, listening, ready)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at an address; raises UserError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=128)
    except socket.gaierror:
        raise UserError(f"{host!r} is no address of this computer: leave --host out, or use 0.0.0.0") from None
    except OSError as error:
        raise UserError(
            f"cannot listen at {host}, port {port} ({error.strerror or one_line(error)}): give another --port or --host"
        ) from None


def _serve(uvicorn: Any, config: Any, listening: socket.socket, ready: Callable[[], None]) -> None:
    """Until one of the signals comes; the handlers of before are put back."""

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            if not self.should_exit:
                ready()

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:  # uvicorn's raises the signal once more at the end
            def stop(*signal_: Any) -> None:
                # a page that is still open is no error
                logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL + 1)
                self.should_exit = True

            before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    Server(config).run(sockets=[listening])
