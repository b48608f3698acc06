"""Several processes over loopback: the tokens of the unsharded model, and what happens when something is wrong."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import moe_jax

sys.path.insert(0, str(Path(__file__).parent))
import families

ROOT = Path(__file__).parents[2]
WORKER, SCRIPT = Path(__file__).with_name("generates_in_a_process.py"), ROOT / "scripts" / "generate.py"
TIMEOUT_S = 600  # a hang; alone on two cores no test here takes a minute
# Processes x devices: every family, every strategy, prefill and decode alike or not.
CASES = {
    (2, 4): (
        "mixtral:ep=4,tp=2:ep_agrs/ep_ragged",
        "olmoe:dp=2,ep=2,tp=2:eptp_dp",
        "qwen2_moe:ep=8:ep_ragged/ep_a2a",
        "qwen3_moe:tp=8:tp",
        "switch_transformers:ep=2,tp=4:eptp_psum",
    ),
    (4, 2): (
        "olmoe:ep=8:ep_psum/ep_agrs",
        "qwen3_moe:ep=4,tp=2:ep_a2a/ep_ragged",
        "mixtral:ep=2,tp=4:eptp_dp/eptp_psum",
    ),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """The families' checkpoints, and beside each the logits of the model on one device."""
    directory = families.saved(tmp_path_factory.mktemp("families"))
    for model_type in families.CONFIGS:
        np.save(
            directory / f"{model_type}.npy",
            families.logits(moe_jax.load(directory / model_type, dtype="float32")),
        )
    return directory


def together(commands: list[list[str]], *, devices: int = 2, slurm: bool = False) -> list[tuple[int, str, str]]:
    """Runs processes at the same time; exit status, output and errors of each. None may outlive the time limit."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}
    with contextlib.ExitStack() as stack:
        processes = []
        for process_id, command in enumerate(commands):
            process = subprocess.Popen(
                [sys.executable, *command],
                env=environment | (slurm_variables(process_id, len(commands)) if slurm else {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(process)  # waits for it, after the next line's kill
            stack.callback(process.kill)
            processes.append(process)
        deadline_s = time.monotonic() + TIMEOUT_S
        results = []
        for process in processes:
            out, errors = process.communicate(timeout=deadline_s - time.monotonic())
            results.append((process.returncode, out, errors))
    return results


def slurm_variables(process_id: int, processes: int) -> dict[str, str]:
    """What srun sets on one node. JAX makes the port of the job's number."""
    return dict(
        SLURM_JOB_ID=str(os.getpid()),
        SLURM_STEP_NODELIST="localhost",
        SLURM_STEP_NUM_NODES="1",
        SLURM_NTASKS=str(processes),
        SLURM_PROCID=str(process_id),
        SLURM_LOCALID=str(process_id),
    )


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def generating(directory: Path, processes: int, *cases: str) -> list[list[str]]:
    shared = [str(WORKER), str(directory), free_port(), str(processes)]
    return [[*shared, str(process_id), *cases] for process_id in range(processes)]


@pytest.mark.parametrize("shape", CASES, ids="{0[0]}x{0[1]}".format)
def test_processes_give_the_unsharded_tokens(directory, shape):
    processes, devices = shape
    results = together(generating(directory, processes, *CASES[shape]), devices=devices)
    want = {}
    for case in CASES[shape]:
        model = moe_jax.load(directory / case.split(":")[0], dtype="float32")
        want[case] = families.generated(model)
    for status, out, errors in results:
        assert status == 0, errors
        lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]  # gloo writes there too
        assert [line["case"] for line in lines] == list(CASES[shape])
        for line in lines:
            assert line["error"] <= 1e-6, line  # as in test_families
            np.testing.assert_array_equal(line["tokens"], want[line["case"]].tokens)
            np.testing.assert_array_equal(line["experts"], want[line["case"]].routing.experts_BLUA)


def test_the_script_over_loopback(directory):
    """The example in scripts/generate.py, with a small model."""
    options = ["--model", str(directory / "olmoe"), "--prompts", "5 9 3", "7", "--max-new-tokens", "5", "--json"]
    split = ["--mesh", "ep=4", "--strategy", "ep_agrs/ep_psum"]
    hosts = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2", "--process-id"]
    results = together([[str(SCRIPT), *options, *split, *hosts, str(process_id)] for process_id in range(2)])
    assert [status for status, _, _ in results] == [0, 0], results
    printed = [[line for line in out.splitlines() if line.startswith("{")] for _, out, _ in results]
    assert printed[1] == []
    model = moe_jax.load(directory / "olmoe", dtype="float32")
    want = moe_jax.generate(model, [[5, 9, 3], [7]], max_new_tokens=5)
    (line,) = printed[0]
    assert json.loads(line) == dict(tokens=want.tokens.tolist(), dropped=0, choices=(3 + 1 + 5 + 5) * 3)


def test_when_a_process_dies_the_others_end(directory):
    started_s = time.monotonic()
    commands = generating(directory, 2, "die:1", "olmoe:ep=4:ep_psum")
    (status, _, errors), (killed, _, _) = together(commands)
    assert killed == -9
    assert status != 0
    # Either our own words, or those of JAX's runtime, which ends a process whose peer has no heartbeat any more.
    assert "process 0: " in errors or "JAX distributed service" in errors
    assert time.monotonic() - started_s < TIMEOUT_S


@pytest.mark.parametrize(
    "meshes, message",
    [
        (("ep=3", "ep=3"), r"mesh: expected all 4 devices of the 2 processes, got {'ep': 3}"),
        (("ep=4", "tp=4"), "expected the same arguments on every process; those of 1 differ"),
    ],
    ids=["wrong mesh", "different meshes"],
)
def test_every_process_says_what_is_wrong(directory, meshes, message):
    """Started as by srun, whose variables JAX reads."""
    options = [str(SCRIPT), "--multi-host", "--model", str(directory / "olmoe"), "--prompts", "5"]
    results = together([[*options, "--mesh", mesh] for mesh in meshes], slurm=True)
    for process_id, (status, _, errors) in enumerate(results):
        assert status == 2
        assert f"process {process_id}: " in errors
        assert message in errors


def test_a_process_that_never_comes(directory):
    hosts = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2", "--process-id", "0"]
    ((status, _, errors),) = together([[str(SCRIPT), "--mesh", "ep=4", *hosts, "--timeout-s", "3"]])
    assert status != 0
    assert "DEADLINE_EXCEEDED" in errors
