"""Work for one GPU, each piece in a process of its own.

Lowering a Mosaic kernel is Python: processes do it side by side, threads do not. A process takes its memory with it, and
one whose CUDA context broke takes nothing else; what they time, they time in turn.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from pallas_kernels import timing

LONGEST_TURN_S = 90


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a task: its result, or the error that ended it."""

    task: Any
    result: Any = None
    error: str | None = None


def share_gpu() -> None:
    """Settings that JAX reads when it starts, here and in processes that start from here: several on one GPU.

    XLA would measure alternatives while it compiles: that takes longer than all the rest, and disturbs measurements.
    Without it XLA's own Triton products are slow, cuBLAS's as fast as ever.
    """
    flags = " --xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + flags
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"


@contextlib.contextmanager
def turn_on_gpu() -> Iterator[None]:
    """`timing.gpu_to_oneself`, for `LONGEST_TURN_S` at most: a kernel that never ends is ended with its process."""
    with timing.gpu_to_oneself():
        signal.alarm(LONGEST_TURN_S)
        try:
            yield
        finally:
            signal.alarm(0)


def outcomes(
    work: Callable[[Any], Any], tasks: Sequence[Any], *, processes: int, deadline_s: float
) -> Iterator[Outcome]:
    """`work(task)` of each task, begun in their order, at most `processes` at once; outcomes as they come.

    At `deadline_s` of `time.monotonic` whatever still runs is stopped, and has no outcome.
    """
    spawn = multiprocessing.get_context("spawn")
    waiting = list(tasks)
    running: dict[Any, tuple[Any, Any]] = {}  # task and process, by the pipe that brings its result
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                ours, theirs = spawn.Pipe()
                process = spawn.Process(target=_send, args=(work, waiting[0], theirs), daemon=True)
                process.start()
                theirs.close()
                running[ours] = (waiting.pop(0), process)
            left_s = max(0.0, deadline_s - time.monotonic())
            ended: list[Any] = multiprocessing.connection.wait(list(running), timeout=left_s)
            if not ended:
                return
            for pipe in ended:
                task, _ = running.pop(pipe)
                try:
                    result, error = pipe.recv()
                except EOFError:
                    result, error = None, "its process died"
                yield Outcome(task, result, error)
    finally:
        for _, process in running.values():
            process.kill()


def _send(work: Callable[[Any], Any], task: Any, pipe: Connection) -> None:
    sent: tuple[Any, str | None]
    try:
        sent = work(task), None
    except Exception as error:
        sent = None, f"{type(error).__name__}: {error}"[:500]
    pipe.send(sent)
