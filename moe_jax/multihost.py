"""Several processes, on one machine or many, that run the same program on their devices together.

JAX's own runtime connects them: they wait for each other at the start, watch each other's heartbeats, and end when one dies.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

FAILED = 1
REFUSED = 2


def join(
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout_s: int = 60,
) -> None:
    """Connects this process with the others; call it before anything else asks JAX for devices.

    Without arguments JAX reads them from SLURM's, Open MPI's or Kubernetes' variables.

    Args:
      coordinator: "address:port" of process 0, which listens there.
      timeout_s: how long to wait for the others at the start, and for the heartbeat of a process that died.

    Raises:
      ValueError: only some of the three are given, or none and no cluster is found; or the process id is out of range.
      RuntimeError: not all processes came in time.
    """
    given = dict(coordinator=coordinator, num_processes=num_processes, process_id=process_id)
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise ValueError(f"expected coordinator, num_processes and process_id together, got no {', '.join(missing)}")
    if num_processes is not None and not (process_id is not None and 0 <= process_id < num_processes):
        raise ValueError(f"expected process_id from 0 to {num_processes - 1}, got {process_id}")
    try:
        jax.distributed.initialize(
            coordinator_address=coordinator,
            num_processes=num_processes,
            process_id=process_id,
            initialization_timeout=timeout_s,
            heartbeat_timeout_seconds=timeout_s,
            shutdown_timeout_seconds=timeout_s,
        )
    except ValueError as error:
        raise ValueError(
            f"no cluster found in the environment ({error}); pass coordinator, num_processes and process_id"
        ) from None


def require_same(arguments: Any) -> None:
    """Refuses processes that were started with other arguments than process 0: together they would wait for ever.

    Raises:
      ValueError: on every process, naming those that differ.
    """
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(json.dumps(arguments, sort_keys=True, default=str).encode()).digest()
    digests_PX = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    different = [index for index, digest_X in enumerate(digests_PX) if (digest_X != digests_PX[0]).any()]
    if different:
        raise ValueError(
            f"expected the same arguments on every process; those of {', '.join(map(str, different))} differ from "
            f"those of process 0. This is process {jax.process_index()}, with {arguments}"
        )


def run(main: Callable[[], None]) -> None:
    """Runs `main` and ends the process, with what went wrong on standard error.

    A process that failed ends at once instead of waiting for the others, so that they notice and end too.
    """
    try:
        main()
        return
    except ValueError as error:
        message, code = str(error), REFUSED
    except Exception as error:
        traceback.print_exc()
        message, code = f"{type(error).__name__}: {error}. If another process ended first, its message says why", FAILED
    print(f"process {_index()}: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


def _index() -> int:
    return jax.process_index() if jax.distributed.is_initialized() else 0
