"""Runs every GPU kernel once on small awkward cases, for NVIDIA's compute-sanitizer to watch.

    compute-sanitizer --tool memcheck python scripts/sanitize_kernels.py
    compute-sanitizer --tool racecheck python scripts/sanitize_kernels.py --ops experts route

Prints a line for each case that has run; what the sanitizer finds it prints itself, and counts at the end.
"""

from __future__ import annotations

import argparse
import functools
import sys

import jax

from pallas_kernels import aot, dispatch
from pallas_kernels.experts import api as experts_api
from pallas_kernels.experts import cases as experts_cases
from pallas_kernels.matvec import api as matvec_api
from pallas_kernels.matvec import cases as matvec_cases
from pallas_kernels.route import api as route_api
from pallas_kernels.route import cases as route_cases

OPS = {
    "experts": (experts_api, experts_cases),
    "matvec": (matvec_api, matvec_cases),
    "route": (route_api, route_cases),
}
CPU = dispatch.Device("cpu", "cpu")


def run_cases(op: str, most: int) -> None:
    """The first `most` cases of each kernel of `op`: those that no CPU runs."""
    api, cases = OPS[op]
    for implementation in api._implementations():
        count = 0
        for case in cases.AWKWARD:
            operands, named = aot.shapes_of(functools.partial(cases.arguments, case))
            can_run = implementation.supports(dispatch.current_device(), *operands, **named) is None
            if count == most or not can_run or implementation.supports(CPU, *operands, **named) is None:
                continue
            operands, named = cases.arguments(case)
            arrays, static = aot.split_arrays(named)
            run = functools.partial(_run, implementation, static)
            jax.block_until_ready(jax.jit(run)(operands, arrays))
            print(f"{op}.{implementation.name} {case.name}", flush=True)
            count += 1


def _run(implementation: dispatch.Implementation, static: dict, operands: tuple, arrays: dict):
    return implementation.run(*operands, **static, **arrays)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", default=list(OPS), choices=list(OPS))
    parser.add_argument("--most", type=int, default=4, help="cases of each kernel")
    flags = parser.parse_args()

    if dispatch.current_device().platform != "gpu":
        print(f"needs a GPU; jax sees {dispatch.current_device().kind}", file=sys.stderr)
        return 2
    for op in flags.ops:
        run_cases(op, flags.most)
    return 0


if __name__ == "__main__":
    sys.exit(main())
