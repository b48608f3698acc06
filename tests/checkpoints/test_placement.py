"""Placement on eight devices and host memory, measured in a process of its own."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_jax.checkpoints import save_parameters

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the script reads /proc/self/status")

SCRIPT = Path(__file__).with_name("loads_in_a_process.py")


@pytest.fixture(scope="module")
def measurements(tmp_path_factory) -> list[dict]:
    """150 MB of float32, in both spellings, loaded onto eight CPU devices in several ways."""
    spec = importlib.util.spec_from_file_location("loads_in_a_process", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    directory = tmp_path_factory.mktemp("large")
    parameters = {path: script.expected(path) for path in script.abstract(None, "float32")}
    for spelling, rules in (("one_by_one", script.RULES), ("fused", script.FUSED)):
        save_parameters(directory / spelling, parameters, rules, config={})
    # Freed buffers go back to the system at once, so that what one case leaves is not counted as what the next needs.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, str(SCRIPT), str(directory)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""  # no progress bar: not a terminal
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_every_device_gets_its_own_values(measurements):
    assert len(measurements) == 10
    for measured in measurements:
        assert measured["is_right"], measured
        assert measured["is_placed"], measured


def test_host_memory_stays_below_two_of_the_largest_parameters(measurements):
    for measured in measurements:
        above_model = measured["peak_bytes"] - measured["model_bytes"]
        assert above_model < 2 * measured["largest_bytes"], measured
