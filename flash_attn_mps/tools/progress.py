"""A progress bar on stderr, where that is a terminal."""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType
from typing import TextIO

_CELLS = 24


class Progress:
    """`with Progress(total, "selftest") as progress: ... progress.step("what comes next")`."""

    def __init__(self, total: int, title: str, stream: TextIO | None = None) -> None:
        self.total, self.title = max(total, 1), title
        self.stream = sys.stderr if stream is None else stream
        self.shown = self.stream.isatty()
        self.done, self.note = 0, ""
        self.began = time.monotonic()
        self._drawn = float("-inf")

    def step(self, note: str = "", steps: int = 1) -> None:
        """`steps` more are done; `note` says what is under way."""
        self.done = min(self.done + steps, self.total)
        self.note = note or self.note
        now = time.monotonic()
        if self.shown and (now - self._drawn > 0.1 or self.done == self.total):
            self._drawn = now
            self._draw(now - self.began)

    def _draw(self, elapsed: float) -> None:
        filled = _CELLS * self.done // self.total
        left = elapsed * (self.total - self.done) / max(self.done, 1)
        line = (
            f"{self.title} [{'#' * filled}{'.' * (_CELLS - filled)}] {self.done}/{self.total}"
            f" {_clock(elapsed)}, {_clock(left)} left  {self.note}"
        )
        self.stream.write("\r" + line[: shutil.get_terminal_size().columns - 1] + "\x1b[K")
        self.stream.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, _type: type | None, _value: BaseException | None, _traceback: TracebackType | None) -> None:
        if self.shown:
            self.stream.write("\r\x1b[K")
            self.stream.flush()


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
