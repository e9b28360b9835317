"""A stand-in for the Hugging Face hub: a folder behind the few of its addresses that uploads and downloads need."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

TOKEN = "hf_standin"


class Hub(ThreadingHTTPServer):
    """Serves ``root`` at 127.0.0.1; a repository is a folder OWNER/NAME in it.

    Attributes:
        commits: Messages of what was uploaded.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.commits: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, status: int, content: Any = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, dict(error="Invalid username or password."))
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            name = json.loads(body)["organization"] + "/" + json.loads(body)["name"]
            (self.server.root / name).mkdir(parents=True, exist_ok=True)
            return self._answer(200, dict(url=f"{self.server.address}/{name}", name=name, id=name))
        repository = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            files = [
                dict(path=file["path"], uploadMode="regular", shouldIgnore=False) for file in json.loads(body)["files"]
            ]
            return self._answer(200, dict(files=files))
        if "/commit/" in path:
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "header":
                    self.server.commits.append(line["value"]["summary"])
                elif line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    (self.server.root / repository / line["value"]["path"]).write_bytes(content)
            oid = "0" * 40
            return self._answer(200, dict(commitUrl=f"{self.server.address}/{repository}/commit/{oid}", commitOid=oid))
        return self._answer(200 if "yaml" in path else 404, dict(errors=[], warnings=[]))

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        owner, name, _, _, *rest = self.path.partition("?")[0].strip("/").split("/") + [""] * 4
        file = self.server.root / owner / name / "/".join(part for part in rest if part)
        if not (self.server.root / owner / name).is_dir():
            return self._answer(404, dict(error="Repository not found"), X_Error_Code="RepoNotFound")
        if not file.is_file():
            return self._answer(404, dict(error="Entry not found"), X_Error_Code="EntryNotFound")
        content = file.read_bytes()
        self._answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit="0" * 40)
