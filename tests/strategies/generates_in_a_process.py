"""One of several processes that generate together: run by test_processes.py.

python generates_in_a_process.py <directory> <port> <processes> <process id> <case>...

A case is "family:mesh:strategy"; "die:1" is the end of process 1. Prints a line of JSON for each case.
"""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import families

import moe_jax
from moe_jax import multihost


def main() -> None:
    directory, port, processes, process_id, *cases = sys.argv[1:]
    coordinator, timeout_s = f"127.0.0.1:{port}", 20 if cases[0].startswith("die") else 120
    multihost.join(
        coordinator=coordinator, num_processes=int(processes), process_id=int(process_id), timeout_s=timeout_s
    )
    for case in cases:
        if case.startswith("die:"):
            if case == f"die:{process_id}":
                os.kill(os.getpid(), signal.SIGKILL)
            continue
        model_type, mesh, strategy = case.split(":")
        model = moe_jax.load(Path(directory) / model_type, dtype="float32", mesh=mesh, strategy=strategy)
        want_XV = np.load(Path(directory) / f"{model_type}.npy")
        error = np.abs(families.logits(model) - want_XV).max() / np.abs(want_XV).max()
        out = families.generated(model)
        experts = out.routing.experts_BLUA
        line = dict(case=case, error=float(error), tokens=out.tokens.tolist(), experts=experts.tolist())
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    multihost.run(main)
