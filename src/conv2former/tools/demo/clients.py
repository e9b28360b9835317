"""Who looks at the page: how many answers each waits for, and which uploads go when they do."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

MOST_WAITING = 2  # answers that one client may wait for; the page itself asks for one at a time
UNUSED_SECONDS = 60  # that an upload stays which nobody asks about


class Clients:
    """The sessions of the page. A client is there while one of its streams is open: the page keeps one open always."""

    def __init__(self) -> None:
        self._streams: Counter[str] = Counter()
        self._waiting: Counter[str] = Counter()
        self._files: dict[str, set[Path]] = {}

    def knows(self, session: str) -> bool:
        """Whether the client has asked for an answer."""
        return session in self._files

    def may_wait(self, session: str) -> bool:
        """Whether the client may ask for another answer; nobody fills the queue alone."""
        return self._waiting[session] < MOST_WAITING

    def asks(self, session: str, files: Iterable[Path]) -> None:
        """Another request of the client's, about some uploads."""
        self._waiting[session] += 1
        self._files.setdefault(session, set()).update(files)
        asyncio.get_running_loop().call_later(UNUSED_SECONDS, self._leaves_unless_there, session)

    def uploads(self, files: Iterable[Path]) -> None:
        """New files, which somebody will ask about."""
        asyncio.get_running_loop().call_later(UNUSED_SECONDS, self._delete, [*files])

    @contextlib.contextmanager
    def stream(self, session: str, *, answers: bool) -> Iterator[None]:
        """While a client listens; Gradio drops the requests of one that stops listening for its ``answers``."""
        self._streams[session] += 1
        try:
            yield
        finally:
            self._streams[session] -= 1
            if answers:
                self._waiting.pop(session, None)
            self._leaves_unless_there(session)

    def _leaves_unless_there(self, session: str) -> None:
        if self._streams[session] <= 0:
            del self._streams[session]
            self._waiting.pop(session, None)
            self._delete(self._files.pop(session, ()))

    def _delete(self, files: Iterable[Path]) -> None:
        held = {file for own in self._files.values() for file in own}  # the same image of two clients is one file
        for file in {*files} - held:
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
                file.parent.rmdir()  # Gradio makes one for each
