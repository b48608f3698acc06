"""The tools around kernels: tuned settings, timings, records, reports on compiled programs, the race detector."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import time
import types

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import aot, dispatch, interpret, processes, timing, tuning
from pallas_kernels.dispatch import Device


def _table(settings: dict) -> str:
    return json.dumps({"settings": settings})


def test_lookup_takes_the_nearest_lower_bucket(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    buckets = {"4": {"stages": 4}, "16": {"stages": 6}}
    (tmp_path / "nvidia_toy_9.json").write_text(_table({"experts.decode": {"E8": buckets}}))
    with dispatch.compiling_for(Device("gpu", "NVIDIA Toy-9")):
        found = [tuning.lookup("experts.decode", "E8", tokens) for tokens in (3, 4, 15, 16, 9000)]
        assert found == [None, {"stages": 4}, {"stages": 4}, {"stages": 6}, {"stages": 6}]
        assert tuning.lookup("experts.decode", "E9", 16) is None
        by_tile = [tuning.lookup("experts.decode", "E8", tokens, tile=lambda n: n // 8) for tokens in (5, 8, 16, 24)]
        assert by_tile == [{"stages": 4}, None, {"stages": 6}, None], "settings of another tile may not fit"
        assert tuning.lookup("route.prefill", "E8", 16) is None
    assert tuning.lookup("experts.decode", "E8", 16) is None, "this device has no table"


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        _table({"op": 3}),
        _table({"op": {"E8": {"0": {}}}}),
        _table({"op": {"E8": {"1": {"stages": None}}}}),
    ],
)
def test_broken_tables_are_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=r"toy.json: expected .* Write it anew with scripts/tune_kernels.py"):
        tuning.parse(text, source="toy.json")


def test_every_shipped_table_parses() -> None:
    for path in tuning.FOLDER.glob("*.json"):
        tuning.parse(path.read_text(), source=str(path))


def test_timings_are_medians_over_calls() -> None:
    launches = [("a", 0.001), ("b", 0.002), ("a", 0.003), ("b", 0.002), ("a", 0.002), ("b", 0.009)]
    assert timing._summarise(launches, calls=3) == timing.Measurement(5.0, (("a", 2.0), ("b", 2.0)))
    with pytest.raises(RuntimeError, match="expected a multiple of 4 kernel launches"):
        timing._summarise(launches, calls=4)


def test_records_say_where_they_come_from(tmp_path: pathlib.Path) -> None:
    timing.append_record(tmp_path / "a" / "b.jsonl", {"tokens": 3})
    timing.append_record(tmp_path / "a" / "b.jsonl", {"tokens": 4})
    records = [json.loads(line) for line in (tmp_path / "a" / "b.jsonl").read_text().splitlines()]
    assert [record["tokens"] for record in records] == [3, 4]
    assert set(records[0]) == {"tokens", "device", "jax", "date"}


def test_floors_and_folders_are_the_device_s(monkeypatch) -> None:
    assert timing.ceilings("NVIDIA H100 80GB HBM3").read_bytes_per_s < timing.ceilings("NVIDIA H200").read_bytes_per_s
    assert timing.ceilings("cpu") == timing.ceilings("NVIDIA H200")
    assert timing.results_path("x.jsonl") == pathlib.Path("docs/benchmarks/cpu/x.jsonl")
    for kind, folder in (("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA L4", "nvidia_l4")):
        monkeypatch.setattr(jax, "devices", lambda kind=kind: [types.SimpleNamespace(device_kind=kind)])
        assert timing.results_path("x.jsonl").parent.name == folder


def test_tasks_run_in_processes_that_fail_alone() -> None:
    def told(work, tasks, *, seconds: float = 60.0) -> dict:
        found = processes.outcomes(work, tasks, processes=2, deadline_s=time.monotonic() + seconds)
        return {outcome.task: outcome.error or outcome.result for outcome in found}

    assert told(int, ["4", "x", "9"]) == {
        "4": 4,
        "x": "ValueError: invalid literal for int() with base 10: 'x'",
        "9": 9,
    }
    assert told(os._exit, [3]) == {3: "its process died"}
    assert told(time.sleep, [600.0], seconds=0.1) == {}


def test_a_turn_on_the_gpu_has_an_end() -> None:
    with processes.turn_on_gpu():
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= processes.LONGEST_TURN_S
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def _add_one(x_WD: jax.Array, *, waits: bool) -> jax.Array:
    """A toy kernel: copy in, add one, copy out. Without its wait it reads what is still on its way."""

    def body(x_gmem, y_gmem, x_smem, y_smem, arrived):
        plgpu.copy_gmem_to_smem(x_gmem, x_smem, arrived)
        if waits:
            plgpu.barrier_wait(arrived)
        y_smem[...] = x_smem[...] + 1
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(y_smem, y_gmem)
        plgpu.wait_smem_to_gmem(0)

    tile = plgpu.SMEM(x_WD.shape, x_WD.dtype)
    kernel = plgpu.kernel(
        body, out_type=jax.ShapeDtypeStruct(x_WD.shape, x_WD.dtype), scratch_types=[tile, tile, plgpu.Barrier()]
    )
    return kernel(x_WD)


@pytest.mark.parametrize("waits", [True, False])
def test_race_detector_sees_a_missing_wait(waits: bool) -> None:
    x_WD = jnp.ones((64, 64))
    with interpret.interpreting(detect_races=True) as detector:
        y_WD = jax.block_until_ready(_add_one(x_WD, waits=waits))
    assert detector.races_found is not waits
    if waits:
        assert (y_WD == 2).all()


@pytest.mark.aot
def test_report_of_a_compiled_program() -> None:
    def program(x_WD, big_XY):
        return _add_one(x_WD, waits=True).sum(), big_XY.T

    shapes = jax.ShapeDtypeStruct((64, 64), jnp.float32), jax.ShapeDtypeStruct((1024, 2048), jnp.float32)
    report = aot.compile_for_h200(program, *shapes)
    (kernel,) = report.kernels
    assert 64 * 64 * 4 * 2 <= kernel.shared_memory_bytes <= 64 * 64 * 4 * 2 + 4096
    assert kernel.spill_bytes == 0 and 0 < kernel.registers < 256
    assert kernel.name in report.launches
    assert len(report.large_copies) == 1
