"""Progress for runs of more than two seconds: on a terminal's standard error, and nowhere else."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

DELAY_S = 2.0


@contextlib.contextmanager
def status(message: str) -> Iterator[None]:
    """Shows a spinner with the message once the work inside has taken two seconds."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    spinner = console.status(message)
    timer = threading.Timer(DELAY_S, spinner.start)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        spinner.stop()


@contextlib.contextmanager
def bar(message: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Gives a function to call with the bytes just done; after two seconds shows how far it is, and how fast."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done_bytes: None
        return
    shown = Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), console=console
    )
    task = shown.add_task(message, total=total_bytes)
    begin_s = time.monotonic()

    def advance(done_bytes: int) -> None:
        shown.advance(task, done_bytes)
        if time.monotonic() - begin_s > DELAY_S:
            shown.start()  # again and again: only the first time counts

    try:
        yield advance
    finally:
        shown.stop()
