"""The scripts run: a small comparison at the levels that need no devices, with its table, lines and pictures."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from sharding import machines
from sharding.formulas import Split
from sharding.strategies import STRATEGIES

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs" / "pictures"


def _run(*arguments: str) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env={"PYTHONPATH": ".", "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress bar: not a terminal
    return done.stdout


@pytest.mark.parametrize("level", ["analytic", "jaxpr"])
def test_comparing(level, tmp_path):
    printed = _run(
        "scripts/compare_sharding.py", "--model", "configs/mixtral-8x7b.json", "--devices", "8", "--batch", "16",
        "--phase", "decode,prefill", "--level", level, "--output", str(tmp_path),
    )  # fmt: skip
    assert "times are predicted" in printed
    assert (
        sum(line.startswith("* ") for line in printed.splitlines()) == 2
    )  # one recommended for decode, one for prefill
    rows = [json.loads(line) for line in (tmp_path / "mixtral-8x7b_h200.jsonl").read_text().splitlines()]
    assert {row["level"] for row in rows if row["is_feasible"]} >= {level}
    assert all(row["reason"] for row in rows if not row["is_feasible"])
    best = [row for row in rows if row["is_recommended"]]
    for row in best:
        others = (each for each in rows if each["phase"] == row["phase"] and each["is_feasible"])
        counted = [each["tokens_per_s_per_device"] for each in others if each["level"] == level]
        assert row["tokens_per_s_per_device"] == max(counted)
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_running_and_calibrating(tmp_path):
    script = runpy.run_path(str(ROOT / "scripts" / "compare_sharding.py"))
    machine, options = machines.load("cpu"), script["Options"](run=True, hardware="cpu")
    splits = [Split("tp", dp=2), Split("ep_a2a", ep=2), Split("eptp_psum", ep=2, tp=2)]
    records = [script["layer_record"](split, tokens, machine, options) for split in splits for tokens in (1, 2, 4)]
    records += [script["link_record"](kind, 1 << 12) for kind in script["links"]()]
    assert len(script["RUN_TOKENS"]) >= 3, "or what --run writes could not be calibrated from"
    printed = script["run_table"](records)
    assert printed.count("\n") == 10 and "ep=2,tp=2" in printed
    assert "predicted for cpu" in printed.splitlines()[0]

    lines = tmp_path / "run.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in records))
    fitted = script["calibrated"](machine, lines)
    assert {name for name in machines.CONSTANTS if fitted.is_measured(name)} == {
        "expert_hbm_fraction", "expert_flops_fraction", "expert_us", "within_us", "within_fraction"
    }  # fmt: skip
    assert fitted.within_fraction <= 1, (
        "measured at one size, with noise: no reason to believe in links above their rate"
    )
    lines.write_text(json.dumps({"shape": "nobody's"}))
    with pytest.raises(ValueError, match="expected lines of --run or of scripts/benchmark_kernels"):
        script["calibrated"](machine, lines)
    with pytest.raises(ValueError, match="expected --model to be a config"):
        script["described"](tmp_path / "nothing.json")


def test_drawing(tmp_path):
    _run("scripts/draw_strategies.py", "--output", str(tmp_path))
    drawn, kept = (sorted(path.name for path in folder.glob("strategy_*.svg")) for folder in (tmp_path, PICTURES))
    assert drawn == kept == sorted(f"strategy_{name}.svg" for name in STRATEGIES)
