"""Runs every GPU kernel on small awkward cases while NVIDIA's compute-sanitizer watches.

    python scripts/sanitize_kernels.py --tools memcheck racecheck --seconds 300

Each case has a process of its own, several at once, the first case of every kernel before the second of any. Prints a
line for each, and what was found; appends a JSON line to --output. What was clean on this device is left out, so that
a run can be stopped and taken up again. Inputs are made on the CPU: the sanitizer watches kernels, not XLA's generator.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from typing import Any

import jax

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from flags import count, require_writable, seconds

from pallas_kernels import aot, dispatch, processes, timing
from pallas_kernels.decode_attention import api as attention_api
from pallas_kernels.decode_attention import cases as attention_cases
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
    "decode_attention": (attention_api, attention_cases),
}
CPU = dispatch.Device("cpu", "cpu")
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FOUND = re.compile(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", re.MULTILINE)
LONGEST_S = 180  # of one case
RUNNING: set[int] = set()  # sanitizers, each the first of its process group


@dataclasses.dataclass(frozen=True)
class Task:
    tool: str
    op: str
    kernel: str
    case: str


def tasks_of(tools: list[str], ops: list[str], most: int) -> list[Task]:
    """The first `most` cases of each kernel: those that no CPU runs."""
    found = []
    for op in ops:
        api, cases = OPS[op]
        for implementation in api._implementations():
            names = []
            for case in cases.AWKWARD:
                operands, named = aot.shapes_of(functools.partial(cases.arguments, case))
                can_run = implementation.supports(dispatch.current_device(), *operands, **named) is None
                if can_run and implementation.supports(CPU, *operands, **named) is not None:
                    names.append(case.name)
            found += [(index, op, implementation.name, name) for index, name in enumerate(names[:most])]
    in_turn = sorted(found, key=lambda each: each[0])
    return [Task(tool, *names) for tool in tools for _, *names in in_turn]


def run_case(op: str, kernel: str, name: str) -> None:
    """One case in this process, for the sanitizer to watch."""
    api, cases = OPS[op]
    implementation = next(each for each in api._implementations() if each.name == kernel)
    case = next(each for each in cases.AWKWARD if each.name == name)
    with jax.default_device(jax.devices("cpu")[0]):
        operands, named = cases.arguments(case)
    arrays, static = aot.split_arrays(named)
    operands, arrays = jax.device_put((operands, arrays), jax.devices()[0])
    run = jax.jit(lambda operands, arrays: implementation.run(*operands, **static, **arrays))
    jax.block_until_ready(run(operands, arrays))


def check(task: Task, *, sanitizer: str) -> dict[str, Any]:
    """The record of a case: how much the sanitizer found and, if that is not nothing, what it said."""
    script = [sys.executable, __file__, "--run", task.op, task.kernel, task.case]
    begin_s = time.monotonic()
    process = subprocess.Popen(
        [sanitizer, "--tool", task.tool, *script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # the sanitizer starts Python in turn: both have to end
    )
    RUNNING.add(process.pid)
    try:
        said, _ = process.communicate(timeout=LONGEST_S)
    except subprocess.TimeoutExpired:
        end(process.pid)
        said = f"{process.communicate()[0]}\nended after {LONGEST_S} s"
    RUNNING.discard(process.pid)
    summary = FOUND.search(said)
    found = int(summary[1]) if summary and process.returncode == 0 else None
    record = dataclasses.asdict(task) | {"found": found, "seconds": round(time.monotonic() - begin_s, 1)}
    told = said if len(said) < 4000 else f"{said[:2000]}\n[...]\n{said[-2000:]}"
    return record if found == 0 else record | {"said": told}


def end(pid: int) -> None:
    """Ends a sanitizer and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def stop(number: int, frame: Any) -> None:
    """Ends this process and all sanitizers: they would hold the GPU and go on after it."""
    for pid in list(RUNNING):
        end(pid)
    print("stopped; what was checked is in the records", file=sys.stderr, flush=True)
    os._exit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", default=["memcheck", "racecheck"], choices=TOOLS)
    parser.add_argument("--ops", nargs="+", default=list(OPS), choices=list(OPS))
    parser.add_argument("--most", type=count, default=4, help="cases of each kernel")
    parser.add_argument("--processes", type=count, default=os.cpu_count())
    parser.add_argument("--seconds", type=seconds, default=600.0, help="start no further case after this long")
    parser.add_argument("--sanitizer", default="compute-sanitizer", help="the program")
    parser.add_argument("--output", type=pathlib.Path, help="docs/benchmarks/<device>/sanitizer.jsonl by default")
    parser.add_argument("--run", nargs=3, metavar=("OP", "KERNEL", "CASE"), help="run this case, for a sanitizer")
    flags = parser.parse_args()
    deadline_s = time.monotonic() + flags.seconds

    processes.share_gpu()
    if dispatch.current_device().platform != "gpu":
        print(f"needs a GPU; jax sees {dispatch.current_device().kind}", file=sys.stderr)
        return 2
    if flags.run:
        run_case(*flags.run)
        return 0
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    output = flags.output or timing.results_path("sanitizer.jsonl")
    require_writable(output)
    clean = {_key(record) for record in timing.records_of_here(output) if record["found"] == 0}
    tasks = [task for task in tasks_of(flags.tools, flags.ops, flags.most) if dataclasses.astuple(task) not in clean]

    def check_in_time(task: Task) -> dict[str, Any] | None:
        return check(task, sanitizer=flags.sanitizer) if time.monotonic() < deadline_s else None

    records = []
    with concurrent.futures.ThreadPoolExecutor(flags.processes) as pool:
        for done in concurrent.futures.as_completed([pool.submit(check_in_time, task) for task in tasks]):
            record = done.result()
            if record is not None:
                timing.append_record(output, record)
                records.append(record)
                print(line(record), flush=True)
    not_clean = sum(record["found"] != 0 for record in records)
    print(f"{len(records) - not_clean} cases clean, {not_clean} not, {len(tasks) - len(records)} left out")
    return int(not_clean > 0 or len(records) < len(tasks))


def _key(record: dict[str, Any]) -> tuple[str, ...]:
    return tuple(record[field.name] for field in dataclasses.fields(Task))


def line(record: dict[str, Any]) -> str:
    """A record for the terminal."""
    told = {0: "clean", None: "did not run to its end"}.get(record["found"], f"{record['found']} found")
    start = f"{record['tool']:10} {record['op']}.{record['kernel']} {record['case']}: {told}, {record['seconds']} s"
    return start if record["found"] == 0 else f"{start}\n{record['said']}"


if __name__ == "__main__":
    sys.exit(main())
