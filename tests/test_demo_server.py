"""The demo over real HTTP: slow, large and broken requests, clients that leave, and many at a time."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conv2former.tools.demo.server import listen
from digits import one_picture

pytest.importorskip("gradio", reason="needs gradio: pip install 'conv2former[demo]'")
import httpx
import uvicorn

from conv2former.tools.demo import clients, gate
from conv2former.tools.demo.page import SESSIONS
from pages import META, NUMBER_OF_INPUTS, UPLOAD_BYTES, gated, inputs


@dataclass
class Served:
    """A running page."""

    port: int
    folder: Path
    app: gate.Gate

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/gradio_api"

    def files(self) -> list[Path]:
        """The uploads on the disk."""
        return [path for path in self.folder.rglob("*") if path.is_file()]

    def start(self, length: int, part: bytes) -> socket.socket:
        """A connection with the beginning of an upload."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {length}\r\n"
        connection.sendall(head.encode() + b"Content-Type: multipart/form-data; boundary=xx\r\n\r\n" + part)
        return connection

    def ask(self, client: httpx.Client, session: str, path: str | None, **changes: Any) -> httpx.Response:
        files = [dict(path=path, orig_name="a.png") | META] if path else None
        body = dict(data=inputs(files), fn_index=0, session_hash=session) | changes
        return client.post(f"{self.url}/queue/join", json=body)

    def messages(self, client: httpx.Client, session: str) -> list[dict[str, Any]]:
        """What the server says until the answer is there."""
        found = []
        with client.stream("GET", f"{self.url}/queue/data", params=dict(session_hash=session)) as stream:
            for line in stream.iter_lines():
                found += [json.loads(line.removeprefix("data: "))] if line else []
        return found


@pytest.fixture
def served(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    folder = tmp_path / "uploads"
    monkeypatch.setattr(gate, "GRACE_SECONDS", 1)
    monkeypatch.setattr(clients, "UNUSED_SECONDS", 5)
    app = gated(finished, folder, monkeypatch)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, log_level="warning", timeout_graceful_shutdown=1))
    with listen("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, kwargs=dict(sockets=[listening]))
        thread.start()
        eventually(lambda: server.started)
        yield Served(listening.getsockname()[1], folder, app)
        server.should_exit = True
        thread.join(30)


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=120, trust_env=False) as client:
        yield client


def eventually(holds: Callable[[], Any]) -> None:
    """Waits until something holds."""
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def sent(served: Served, client: httpx.Client, content: bytes) -> str:
    """The path of an upload on the server."""
    answer = client.post(f"{served.url}/upload", files=dict(files=("a.png", content)))
    assert answer.status_code == 200, answer.text
    return answer.json()[0]


PART = b'--xx\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + bytes(1000)


@pytest.mark.parametrize("head", [PART, b""])
def test_a_slow_upload_is_cut_off(served: Served, head: bytes) -> None:
    with served.start(500_000, head) as connection:
        connection.settimeout(0.2)
        answer = b""
        deadline = time.monotonic() + 60
        while b"\r\n\r\n" not in answer and time.monotonic() < deadline:  # a byte now and then
            try:
                connection.sendall(b"x")
                answer += connection.recv(1000)
            except TimeoutError:
                continue
        assert answer.startswith(b"HTTP/1.1 408") and b"connection: close" in answer
    assert served.files() == []


def test_nothing_stays_of_an_upload_whose_client_leaves(served: Served, client: httpx.Client) -> None:
    for _ in range(3):
        served.start(500_000, PART + bytes(200_000)).close()
    assert client.get(served.url.removesuffix("gradio_api")).status_code == 200
    assert served.files() == []


def test_a_large_body_is_refused_before_it_is_written(served: Served, client: httpx.Client) -> None:
    with served.start(UPLOAD_BYTES + 1, PART) as connection:
        connection.settimeout(0.2)
        for _ in range(UPLOAD_BYTES // 50_000):
            assert served.files() == []
            connection.sendall(bytes(50_000))
        connection.settimeout(30)
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    answer = client.post(f"{served.url}/upload", content=iter([bytes(1000)]))
    assert answer.status_code == 411 and served.files() == []


def test_what_is_no_request_of_the_page_is_a_line(
    served: Served, client: httpx.Client, capfd: pytest.CaptureFixture[str]
) -> None:
    for changes, status in (
        *((dict(fn_index=number), 404) for number in (2, 3, 99, -1)),
        *((dict(fn_index=value), 400) for value in (None, "x", [0], {}, 10**30)),
        *((dict(data=value), 400) for value in (None, [], {}, 1)),
        *((dict(data=[None] * (NUMBER_OF_INPUTS + more)), 400) for more in (-1, 1)),
        *((dict(session_hash=value), 400) for value in (None, 1, "", "../x", "x" * 1000)),
        (dict(trigger_id="x"), 400),
    ):
        answer = served.ask(client, "someone", None, **changes)
        assert (answer.status_code, "\n" in answer.text) == (status, False), (changes, answer.text)
    deep = b'{"data": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    multipart = "multipart/form-data; boundary=x"
    kinds = ("application/json", "multipart/form-data", multipart, "text/plain")
    bodies = (b"", b"{", b"[]", b"null", b"\xff", deep, b'{"fn_index": ' + b"9" * 6000 + b"}")
    for path in ("queue/join", "upload", "cancel", "reset"):
        own = multipart if path == "upload" else kinds[0]
        asked = [*((body, own) for body in bodies), *((b"", kind) for kind in kinds if kind != own)]
        for body, kind in asked:
            answer = client.post(f"{served.url}/{path}", content=body, headers={"content-type": kind})
            assert answer.status_code < 500, (path, body[:20], kind, answer.text)
            assert "Traceback" not in answer.text
    for path in ("queue/data", "queue/data?session_hash=nobody", "heartbeat/", "upload_progress?upload_id=none"):
        with client.stream("GET", f"{served.url}/{path}") as answer:
            assert answer.status_code in (404, 422), path
    output = capfd.readouterr()
    assert "Traceback" not in output.out + output.err


@pytest.mark.slow
def test_uploads_go_when_their_client_does(served: Served, client: httpx.Client, tmp_path: Path) -> None:
    picture = one_picture(tmp_path / "digit.png").read_bytes()
    path = Path(sent(served, client, picture))
    with client.stream("GET", f"{served.url}/heartbeat/first"), httpx.Client(trust_env=False) as other:
        with other.stream("GET", f"{served.url}/heartbeat/second"):
            for session in ("first", "second"):
                assert served.ask(client, session, str(path)).status_code == 200
                answer = served.messages(client, session)[-2]["output"]["data"][0]
                assert "ms in the network" in answer
            time.sleep(clients.UNUSED_SECONDS + 1)
            assert path.is_file(), "both are still there"
        time.sleep(1)
        assert path.is_file(), "the first is still there"
    eventually(lambda: not path.exists() and not path.parent.exists())
    path = Path(sent(served, client, picture))
    eventually(lambda: not path.exists())  # nobody asked about it


def test_fifty_clients_get_their_answers_in_turn(served: Served, client: httpx.Client, tmp_path: Path) -> None:
    pictures = [one_picture(tmp_path / f"{number}.png", number).read_bytes() for number in range(50)]
    paths = [sent(served, client, picture) for picture in pictures]
    everyone = threading.Barrier(50)

    def visit(number: int) -> tuple[list[dict[str, Any]], float]:
        with httpx.Client(timeout=120, trust_env=False) as own:
            everyone.wait(60)
            assert served.ask(own, f"client{number}", paths[number]).status_code == 200
            return served.messages(own, f"client{number}"), time.monotonic()

    with ThreadPoolExecutor(50) as pool:
        found = list(pool.map(visit, range(50)))
    assert all("ms in the network" in messages[-2]["output"]["data"][0] for messages, _ in found)
    places = [[m["rank"] for m in messages if m["msg"] == "estimation"] for messages, _ in found]
    assert all(places) and max(max(own) for own in places) > 10, "they are told their places"
    assert all(own == sorted(own, reverse=True) for own in places), "nobody is overtaken"
    pages: Any = served.app.app
    kept = next(route.app.state_holder for route in pages.routes if hasattr(route.app, "state_holder"))
    assert 0 < len(kept.session_data) <= SESSIONS, "Gradio keeps the newest clients' values alone"


def test_nobody_fills_the_queue_alone(served: Served, client: httpx.Client) -> None:
    answers = [served.ask(client, "greedy", None).status_code for _ in range(10)]
    assert answers[:2] == [200, 200] and set(answers[2:]) == {429}
    assert served.ask(client, "modest", None).status_code == 200
    assert served.messages(client, "modest")[-2]["msg"] == "process_completed"
    served.messages(client, "greedy")
    assert served.ask(client, "greedy", None).status_code == 200
