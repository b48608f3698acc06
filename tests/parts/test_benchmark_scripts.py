"""The scripts that measure whole models, from end to end at toy size on a CPU, and the arithmetic behind their figures."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax import memory, models, profiling, testing
from moe_jax.model import parameters
from pallas_kernels import aot, dispatch, timing, tuning
from pallas_kernels.dispatch import Device

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
CONFIG = dict(
    model_type="mixtral",
    vocab_size=96,
    hidden_size=32,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=256,
    eos_token_id=95,
)


@pytest.fixture(scope="module")
def load_script():
    """Imports a script; others import it by its name."""
    sys.path.insert(0, str(SCRIPTS))

    def load(name: str):
        spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    sys.path.remove(str(SCRIPTS))


@pytest.fixture
def config_path(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(CONFIG))
    return path


@pytest.fixture
def run(load_script, monkeypatch, capsys):
    """Runs a script's `main` with arguments; gives what it printed."""
    monkeypatch.setattr(os, "environ", os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"})

    def run_main(name: str, *arguments) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        assert not load_script(name).main()
        return capsys.readouterr().out

    return run_main


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_large_random_models_are_made_as_told():
    model = testing.large_random_model(CONFIG, dtype="float32", scale=0.5)
    again = testing.large_random_model(CONFIG, dtype="float32", scale=0.5)
    other = testing.large_random_model(CONFIG, dtype="float32", scale=0.5, seed=1)
    values = parameters(model.module)
    assert {path: leaf.shape for path, leaf in values.items()} == {
        path: leaf.shape for path, leaf in parameters(testing.random_model(CONFIG).module).items()
    }
    experts = [np.asarray(values[f"layers.{layer}.feed_forward.up_EGFD"]) for layer in (0, 1)]
    assert experts[0].std() == pytest.approx(0.5, rel=0.05)  # 4096 values: 3 standard errors are 3.3 %
    assert not np.array_equal(*experts), "layers differ"
    np.testing.assert_array_equal(values["norm.weight_D"], np.ones(32))
    for path, leaf in parameters(again.module).items():
        np.testing.assert_array_equal(leaf, values[path])
    assert not np.array_equal(parameters(other.module)["head.weight_VD"], values["head.weight_VD"])


def test_a_held_program_makes_the_tokens_of_generate():
    model = testing.large_random_model(CONFIG, dtype="float32", scale=0.5)
    abstract = testing.abstract_model(CONFIG, dtype="float32")
    program = profiling.compile_generate(abstract, batch=3, prompt=8, new_tokens=12, traces=True)
    leaves = profiling.parameters_of(model)
    _, state = program.run(leaves, program.new_cache(leaves), 12)
    experts_BLUA = program.traced_experts(leaves, program.new_cache(leaves), 12)
    want = moe_jax.generate(model, program.batch.prompts, max_new_tokens=12, stop_token_ids=(), routed_experts=True)
    np.testing.assert_array_equal(np.asarray(state.tokens_BU)[:, :12], want.tokens)
    np.testing.assert_array_equal(experts_BLUA[:, :, 1:], want.routing.experts_BLUA[:, :, 1:])
    times = profiling.measure(program, leaves, repeats=1)
    assert times.first_token_ms > 0 and times.repeats == 1
    with pytest.raises(ValueError, match="at least 2 new tokens"):
        profiling.measure(program, leaves, last=1)


def test_active_experts_are_counted_by_layer_and_step():
    experts_BLUA = np.array([[[[0, 1], [2, -1]]], [[[1, 3], [2, 2]]]])  # two requests, one layer, two steps
    np.testing.assert_array_equal(profiling.active_experts(experts_BLUA), [[3, 1]])


def test_floors_are_arithmetic_by_hand():
    """Mixtral-8x7B from its published numbers: 32 layers, width 4096, 8 experts of 14336, 32 heads of 128, 8 for keys."""
    config = json.loads((ROOT / "configs" / "mixtral-8x7b.json").read_text())
    sizes = profiling.sizes_of(config)
    expert = 3 * 4096 * 14336 * 2
    attention = (2 * 4096 * 4096 + 2 * 4096 * 1024) * 2
    head, norms, router = 32000 * 4096 * 2, (2 * 32 + 1) * 4096 * 2, 8 * 4096 * 2
    assert sizes.experts == 32 * 8 * expert and sizes.num_experts == 8 and sizes.sparse_layers == 32
    assert sizes.embedding == head
    assert sizes.rest == 32 * (attention + router) + norms + head
    assert sizes.cache_per_position == 2 * 32 * 8 * 128 * 2
    assert sizes.parameters == pytest.approx(46.7e9 * 2, rel=1e-3), "the published 46.7 G parameters"
    read = 32 * (attention + router + 2 * expert) + norms + head + 192 * sizes.cache_per_position
    floor = profiling.decode_floor_ms(sizes, batch=1, active_experts=2, positions=192)
    assert floor == pytest.approx(1e3 * read / 4.6e12)
    assert floor == pytest.approx(5.55, rel=0.01), "what others computed for it"
    active = 12.88e9 - 2 * 32000 * 4096  # the published active parameters, without embedding and head
    attended = 32 * 4096 * 2 * 4096 / 2  # products of queries and keys, and of scores and values; half is masked
    flops = 2 * 4096 * (active + attended)
    prefill = profiling.prefill_floor_ms(config, sizes, batch=1, length=4096)
    assert prefill == pytest.approx(1e3 * flops / 808e12, rel=0.005)


HLO = """HloModule toy, is_scheduled=true

FileNames
1 "a.py"

FunctionNames
1 "generate"
2 "CausalLM.decode"
3 "RMSNorm.__call__"
4 "Attention._project"

FileLocations
1 {file_name_id=1 function_name_id=1 line=1}
2 {file_name_id=1 function_name_id=2 line=2}
3 {file_name_id=1 function_name_id=3 line=3}
4 {file_name_id=1 function_name_id=4 line=4}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}
4 {file_location_id=4 parent_frame_id=3}

%fused (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  ROOT %mul = f32[2]{0} multiply(%p, %p), metadata={op_name="jit(f)/mul" stack_frame_id=3}
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %x = f32[2]{0} parameter(0)
  %loop_fusion = f32[2]{0} fusion(%x), kind=kLoop, calls=%fused
  %gemm.1 = f32[2]{0} custom-call(%x), custom_call_target="gemm", metadata={op_name="jit(f)/dot" stack_frame_id=4}
  ROOT %kernel = f32[2]{0} custom-call(%x), metadata={op_name="jit(f)/jit(_experts)/experts_decode/call" stack_frame_id=2}
}
"""


def test_instructions_are_traced_to_operators():
    found = profiling.instructions(HLO)
    assert found["gemm.1"].functions == ("generate", "CausalLM.decode", "Attention._project")
    operators = {name: profiling.operator_of(found[name]) for name in ("loop_fusion", "gemm.1", "kernel", "x")}
    assert operators == {"loop_fusion": "norms", "gemm.1": "projections", "kernel": "experts", "x": "other"}


def test_kernels_of_a_step_are_what_the_longer_run_has_more():
    def kernel(name: str, calls: int, total_us: float) -> profiling.KernelTime:
        return profiling.KernelTime(name, name, calls, total_us)

    before = [kernel("prefill", 2, 50.0), kernel("both", 1, 3.0)]
    after = [kernel("prefill", 2, 51.0), kernel("both", 5, 11.0), kernel("step", 8, 4.0)]
    assert profiling.per_step(before, after, steps=4) == [kernel("both", 1.0, 2.0), kernel("step", 2.0, 1.0)]


@pytest.mark.slow
def test_generation_is_measured_and_drawn(tmp_path, config_path, run):
    folder = tmp_path / "results"
    tiny = ("--config", config_path, "--dtype", "float32")
    output = run(
        "benchmark_generate", *tiny, "--batches", 2, "--prompt", 8, "--new-tokens", 16, "--prefills", "2x16",
        "--processes", 3, "--output", folder / "generate.jsonl",
    )  # fmt: skip
    assert "decode         2 x 8" in output
    points = records(folder / "generate.jsonl")
    assert {(p["kind"], p["batch"], p["prompt"]) for p in points} == {
        ("decode", 2, 8),
        ("prefill", 2, 16),
    }
    assert 2 <= next(p["active_experts"] for p in points if p["kind"] == "decode") <= 4
    assert {"device", "jax", "date"} <= points[0].keys()

    run("profile_step", *tiny, "--prompt", 8, "--output", folder / "profile.jsonl", "--trace", tmp_path / "trace")
    (profile,) = records(folder / "profile.jsonl")
    assert {"attention", "experts", "norms", "sampling", "gaps"} <= profile["operators_us"].keys()
    assert sum(profile["operators_us"].values()) == pytest.approx(profile["step_us"], abs=0.1)
    assert list((tmp_path / "trace").glob("plugins/profile/*/*.trace.json.gz"))
    read = tmp_path / "prefill.jsonl"
    run("profile_step", *tiny, "--phase", "prefill", "--batch", 2, "--prompt", 24, "--output", read)
    (prefill,) = records(read)
    assert {"attention", "experts", "norms", "routing"} <= prefill["operators_us"].keys()
    assert sum(prefill["operators_us"].values()) == pytest.approx(prefill["step_us"], abs=0.1)

    run("experts_sweep", *tiny, "--experts", 1, 4, "--new-tokens", 16, "--output", folder / "experts_sweep.jsonl")
    assert {(p["experts"], p["active"]) for p in records(folder / "experts_sweep.jsonl")} == {(1, 1), (4, 2)}

    # Times of toy models on a busy machine are too short, or negative, to draw.
    drawn = {"ms_per_token": 1.0, "floor_ms": 0.5, "step_us": 100.0}
    drawn["operators_us"] = dict.fromkeys(profile["operators_us"], 100.0 / len(profile["operators_us"]))
    for file in ("experts_sweep.jsonl", "generate.jsonl", "profile.jsonl"):
        made = [point | {key: drawn[key] for key in drawn if key in point} for point in records(folder / file)]
        (folder / file).write_text("".join(json.dumps(point) + "\n" for point in made))
    (folder / "anchors.jsonl").write_text((ROOT / "docs/benchmarks/h200/anchors.jsonl").read_text())
    run("plot_generate", folder)
    page = (folder / "generate.md").read_text()
    assert all(f"{name}.png" in page for name in ("generate", "operators", "experts_sweep"))
    assert all((folder / f"{name}.png").stat().st_size > 10_000 for name in ("generate", "operators", "experts_sweep"))


def test_a_point_that_fails_leaves_the_others(tmp_path, load_script, capfd, monkeypatch):
    """Decoding over its context, a model refuses; prefill of as long a prompt is measured all the same."""
    script = load_script("benchmark_generate")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    flags = script.parsed(
        ["--dtype", "float32", "--processes", "2", "--output", str(tmp_path / "out.jsonl"), "--new-tokens", "4"]
    )
    points = [script.Point("decode", "tiny", 1, 300, 4), script.Point("prefill", "tiny", 1, 300, 1)]
    made = script.run(points, {"tiny": CONFIG}, flags, deadline_s=script.time.monotonic() + 120)
    assert sorted("error" in record for record in made) == [False, True]
    assert "context of 256 positions" in next(record["error"] for record in made if "error" in record)
    assert len(records(tmp_path / "out.jsonl")) == 2
    assert script.run(points, {"tiny": CONFIG}, flags, deadline_s=0.0) == []
    assert "2 points left out, --seconds are over" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("benchmark_generate", ["--batches", "0"], "expected a whole number of at least 1, got '0'"),
        ("benchmark_generate", ["--new-tokens", "1"], "expected a whole number of at least 2, got '1'"),
        ("benchmark_generate", ["--prefills", "8"], "expected a whole number of at least 1, got ''"),
        ("benchmark_generate", ["--processes", "0"], "expected a whole number of at least 1, got '0'"),
        ("benchmark_generate", ["--seconds", "nan"], "expected seconds above 0, got 'nan'"),
        (
            "benchmark_generate",
            ["--config", "nowhere.json"],
            "expected nowhere.json to be the config.json of a supported",
        ),
        (
            "benchmark_generate",
            ["--models", "gpt-oss-20b"],
            "gpt-oss-20b.json to be the config.json of a supported model",
        ),
        ("benchmark_generate", ["--batches", "--prefills", "--models", "olmoe-1b-7b"], "expected at least one point"),
        ("benchmark_generate", ["--output", "/dev/null/a"], "expected a file that can be written for the records, got"),
        ("experts_sweep", ["--experts", "0"], "expected a whole number of at least 1, got '0'"),
        ("experts_sweep", ["--config", str(ROOT / "configs/olmoe-1b-7b.json")], "expected --config to be a mixtral"),
        ("profile_step", ["--batch", "-1"], "expected a whole number of at least 1, got '-1'"),
        ("profile_step", ["--output", "/dev/null/a"], "expected a file that can be written for the records, got"),
    ],
)
def test_wrong_flags_end_a_script_before_it_measures(name, arguments, message, load_script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    script = load_script(name)
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert message in capsys.readouterr().err + str(ended.value)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_control_c_ends_a_benchmark_and_its_processes(tmp_path, config_path, heeds_control_c):
    output = tmp_path / "out.jsonl"
    command = [sys.executable, SCRIPTS / "benchmark_generate.py", "--config", config_path, "--output", output]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        deadline_s = time.monotonic() + 90
        while len(children(process.pid)) < 3 and time.monotonic() < deadline_s:
            time.sleep(0.1)
        started = children(process.pid)
        assert len(started) >= 3, "multiprocessing's own, and two that compile"
        os.kill(started[-1], signal.SIGSTOP)  # as those that wait for another to be timed
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"stopped; what was measured is in {output}" in stderr
    while (left := [child for child in started if is_running(child)]) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert not left


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"  # dead, and nobody asked
    except OSError:
        return False


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_baseline_is_compared_token_by_token(load_script, monkeypatch):
    """Without torch: what stands for transformers makes tokens of its own, and one variant fails."""

    def measured(model, variant, prompts, *, new_tokens, first, seconds):
        if variant == "eager":
            raise RuntimeError("out of memory")
        return {"ms_per_token": 7.0}, [[1] * new_tokens for _ in prompts]

    baseline = types.SimpleNamespace(
        build=lambda config: types.SimpleNamespace(state_dict=lambda: {"model.norm.weight": None}),
        fill=lambda model, values, places: None,
        measured=measured,
        disagreement=lambda model, prompt, theirs, ours: None if theirs == ours else {"token": 0},
        released=contextlib.nullcontext,
        transformers=types.SimpleNamespace(__version__="5"),
        torch=types.SimpleNamespace(__version__="2"),
    )
    script = load_script("benchmark_generate")
    monkeypatch.setitem(sys.modules, "hf_baseline", baseline)
    flags = script.parsed(["--dtype", "float32", "--baseline", "hf"])
    point = script.Point("decode", "tiny", 2, 8, 4, ("eager", "grouped_mm"))
    bench = script.Bench(point, CONFIG, flags, contextlib.nullcontext)
    bench.compile()
    decode, eager, grouped = bench.records()
    assert decode["kind"] == "decode" and decode["batch"] == 2
    assert eager == point.record() | {
        "kind": "baseline", "variant": "eager", "dtype": "float32", "error": "RuntimeError: out of memory"
    }  # fmt: skip
    assert (grouped["variant"], grouped["requests_compared"]) == ("grouped_mm", 2)
    assert grouped["source"] == "transformers 5, torch 2"
    assert grouped["requests_equal"] + len(grouped["partings"]) == 2


def test_a_line_that_is_not_whole_is_told(tmp_path, load_script):
    (tmp_path / "generate.jsonl").write_text('{"kind": "decode"}\n{"kind": "pre')
    with pytest.raises(ValueError, match=r"generate.jsonl, line 2: expected a JSON object, got '{\"kind\": \"pre'"):
        load_script("plot_generate").read(tmp_path / "generate.jsonl")


def test_the_most_telling_points_come_first(load_script):
    script = load_script("benchmark_generate")
    flags = script.parsed(["--models", "mixtral-8x7b"])
    config = json.loads((ROOT / "configs" / "mixtral-8x7b.json").read_text())
    points = script.points_of("mixtral-8x7b", config, flags)
    assert [point.batch for point in points[:3]] == [1, 8, 64]
    (large,) = (point for point in points if point.kind == "large_cache")
    assert large.batch * (128 + 4096) * 131072 >= 16e9 > (large.batch - 1) * (128 + 4096) * 131072
    assert [point.kind for point in script.points_of("tinymistral-6x248m", config, flags)].count("end_to_end") == 1


def test_generation_that_has_its_lines_is_not_measured_again(load_script):
    script = load_script("benchmark_generate")
    bare, compared = (script.Point("decode", "tiny", batch, 8, 4, ("eager",) * (batch - 1)) for batch in (1, 2))
    prefill = script.Point("prefill", "tiny", 1, 8, 1)
    lines = [point.record() | {"dtype": "float32", "ms": 1.0} for point in (bare, compared)]
    assert script.not_measured([bare, compared, prefill], "float32", lines) == [compared, prefill]
    lines.append(lines[1] | {"kind": "baseline", "variant": "eager"})
    assert script.not_measured([bare, compared, prefill], "float32", lines) == [prefill]
    assert script.not_measured([bare], "bfloat16", lines) == [bare]
    failed = prefill.record() | {"dtype": "float32", "error": "no memory"}
    assert script.not_measured([prefill], "float32", [failed]) == [prefill]


def test_what_has_a_line_is_not_measured_again(load_script, tmp_path):
    script, plot = load_script("benchmark_kernels"), load_script("plot_kernels")
    path = tmp_path / "kernels.jsonl"
    lines = [
        {"shape": "mixtral", "tokens": 1, "time_us": 4.0, "floor_us": 2.0, "baselines_us": {"xla": 9.0}},
        {"shape": "mixtral", "tokens": 2, "error": "no memory"},
        {"shape": "mixtral", "tokens": 1, "baselines_us": {"torch": 6.0}},
    ]
    for line in lines:
        timing.append_record(path, line)
    path.write_text(path.read_text() + json.dumps(lines[0] | {"tokens": 8, "device": "another", "jax": "0.1"}) + "\n")
    wanted = (["mixtral"], [2, 1, 8], ["xla", "ragged_dot", "torch"])
    tasks = [(task.tokens, task.what) for task in script.tasks_of(*wanted, timing.records_of_here(path))]
    assert tasks == [(8, "ours"), (2, "ours"), (1, "ragged_dot"), (8, "ragged_dot"), (8, "torch")]
    ours, *_ = script.tasks_of(*wanted, [])
    assert (ours.tokens, ours.what) == (1, "ours")
    drawn = plot.read(path)["mixtral"]
    assert drawn[1]["time_us"] == 4.0 and drawn[1]["baselines_us"] == {"xla": 9.0, "torch": 6.0}
    assert list(drawn) == [1, 8], "a point that failed is not drawn"


def test_kernels_are_timed_where_they_can_run(load_script):
    script = load_script("benchmark_kernels")
    with dispatch.compiling_for(H200):
        tasks = script.tasks_of(["qwen3-30b"], [16, 32, 64, 2048], list(script.KERNELS), [])
        others = [(task.what, task.tokens) for task in tasks if task.what != script.OURS]
        assert sorted(others) == [
            ("compact", 16), ("compact", 32), ("compact", 64),
            ("decode", 16),
            ("grouped", 16), ("grouped", 32), ("grouped", 64), ("grouped", 2048),
        ]  # fmt: skip
        weights = jax.eval_shape(functools.partial(script.make_weights, script.LAYERS["qwen3-30b"],
                                                   script.ROUTERS["qwen3-30b"]), script.SEED)  # fmt: skip
        x_TD = jax.ShapeDtypeStruct((64, 2048), jnp.bfloat16)
        layer = script.layer_function("qwen3-30b", run_experts=script.KERNELS["compact"].run)
        assert jax.eval_shape(layer, x_TD, weights)[0] == x_TD


H200 = Device("gpu", "NVIDIA H200", 132)


@pytest.fixture(scope="module")
def tuned_points(load_script):
    """What scripts/tune_kernels.py measures on an H200: its points by key, with their candidates."""
    script = load_script("tune_kernels")
    shapes = {script.shape_of(case) for op in script.OPS.values() for case in op.cases.REAL}
    with dispatch.compiling_for(H200):
        points = script.points(list(script.OPS), shapes, range(1, 10_000))
        return {point.key: script.candidates_of(point) for point in points}


def test_defaults_are_within_a_tenth_of_the_best(tuned_points):
    """As an H200 measured them; what no table knows, and other GPUs, take the default."""
    records = [json.loads(line) for line in (ROOT / "docs/benchmarks/h200/tuning.jsonl").read_text().splitlines()]
    assert {(record["op"], record["shape_key"], record["tokens"]) for record in records} == tuned_points.keys()
    for record in records:
        key = record["op"], record["shape_key"], record["tokens"]
        timed = zip(record["candidates"], record["times_us"], strict=True)
        offered = [(time_us, settings) for settings, time_us in timed if time_us and settings in tuned_points[key]]
        best_us = min(time_us for time_us, _ in offered)
        default_us = next(time_us for time_us, settings in offered if settings == tuned_points[key][0])
        assert default_us <= 1.1 * best_us, key


def test_settings_of_the_shipped_table_are_candidates(tuned_points):
    """A table is older than its kernels: what they no longer offer may not fit into shared memory."""
    table = tuning.parse(tuning.table_path(H200.kind).read_text(), source="the table")
    for op, shapes in table.items():
        for shape_key, buckets in shapes.items():
            for tokens, settings in buckets.items():
                assert settings in tuned_points[op, shape_key, tokens], (op, shape_key, tokens)


def test_candidates_differ_and_kernels_are_those_that_run(tuned_points):
    for key, candidates in tuned_points.items():
        assert len({json.dumps(each, sort_keys=True) for each in candidates}) == len(candidates) > 1, key
    chosen = {
        tokens: {op for op, _, n in tuned_points if n == tokens and op.startswith("experts")}
        for tokens in (8, 64, 4096)
    }
    assert chosen == {8: {"experts.decode"}, 64: {"experts.compact"}, 4096: {"experts.grouped"}}


@pytest.mark.aot
@pytest.mark.parametrize(
    ("shape", "tokens"), [("gpt-oss", 32), ("qwen3-30b", 512), ("gpt-oss", 4096), ("deepseek-v3-shared-up", 64)]
)
def test_candidates_compile(load_script, shape, tokens):
    """Of each kernel, where it needs most shared memory."""
    script = load_script("tune_kernels")
    with dispatch.compiling_for(H200):
        (point,) = script.points(list(script.OPS), [shape], [tokens])
        candidates = script.candidates_of(point)
    operands, named = aot.shapes_of(functools.partial(script.OPS[point.op].cases.arguments, point.case))
    arrays, static = aot.split_arrays(named)
    for settings in candidates:
        run = functools.partial(script.implementation_of(point).run, **static, settings=settings)
        program = aot.compile_for_h200(lambda operands, arrays, run=run: run(*operands, **arrays), operands, arrays)
        for kernel in program.kernels:
            assert kernel.spill_bytes == 0, (settings, kernel)
            assert kernel.shared_memory_bytes <= aot.SHARED_MEMORY_BYTES, (settings, kernel)


def test_the_sanitizer_sees_every_kernel(load_script):
    script = load_script("sanitize_kernels")
    with dispatch.compiling_for(H200):
        tasks = script.tasks_of(["memcheck", "racecheck"], list(script.OPS), most=2)
    kernels = {"decode", "compact", "grouped", "decode_sm90", "prefill_sm90", "mosaic_sm90"}
    assert {task.kernel for task in tasks} == kernels
    first = tasks[: len(tasks) // 4]
    assert {task.tool for task in first} == {"memcheck"}
    assert len({(task.op, task.kernel) for task in first}) == len(first), "one case of each kernel before the second"


@pytest.mark.parametrize(
    ("says", "status", "found"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, 0),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)", 0, 2),
        ("========= ERROR SUMMARY: 0 errors", 1, None),
        ("========= Error: Device not supported", 0, None),
    ],
)
def test_what_the_sanitizer_says_is_counted(load_script, tmp_path, says, status, found):
    script = load_script("sanitize_kernels")
    sanitizer = tmp_path / "sanitizer"
    sanitizer.write_text(f"#!/bin/sh\necho '{says}'\nexit {status}\n")
    sanitizer.chmod(0o755)
    record = script.check(script.Task("memcheck", "experts", "compact", "one_token"), sanitizer=str(sanitizer))
    assert record["found"] == found
    assert ("said" in record) is (found != 0) is (says in script.line(record))


def test_no_sanitizer_outlives_its_script(load_script, tmp_path, monkeypatch):
    script = load_script("sanitize_kernels")
    sanitizer = tmp_path / "sanitizer"
    sanitizer.write_text("#!/bin/sh\nsleep 600\n")
    sanitizer.chmod(0o755)
    statuses: list[int] = []
    monkeypatch.setattr(script.os, "_exit", statuses.append)
    task = script.Task("memcheck", "experts", "compact", "one_token")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        record = pool.submit(script.check, task, sanitizer=str(sanitizer))
        while not script.RUNNING:
            time.sleep(0.01)
        script.stop(signal.SIGTERM, None)
        assert record.result(timeout=30)["found"] is None
    assert statuses == [143]


@pytest.mark.parametrize("fixture", [CONFIG | {"tie_word_embeddings": True}, CONFIG])
def test_places_of_the_baselines_tensors(load_script, fixture):
    """Slices of our parameters, reshaped, are the tensors that a saved checkpoint holds."""
    script = load_script("benchmark_generate")
    model = testing.random_model(fixture)
    values = {path: np.asarray(leaf) for path, leaf in parameters(model.module).items()}
    rules = models.family_of(fixture).rules(model.config)
    wanted = {
        "model.embed_tokens.weight",
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.0.self_attn.q_proj.weight",
    }
    places = script.places(values, rules, wanted)
    path, at, shape = places["model.layers.1.mlp.experts.gate_up_proj"]
    np.testing.assert_array_equal(
        values[path][at].reshape(shape)[:, :16], values["layers.1.feed_forward.up_EGFD"][:, 0]
    )
    path, at, shape = places["model.layers.0.self_attn.q_proj.weight"]
    assert values[path][at].reshape(shape).shape == (32, 32)
    with pytest.raises(ValueError, match=r"no parameter makes transformers' \['other'\]"):
        script.places(values, rules, {"other"})


@dataclasses.dataclass(frozen=True)
class FakeGPU:
    """An H200 by its memory."""

    free_bytes: float
    device_kind: str = "NVIDIA H200"
    id: int = 0

    def memory_stats(self):
        limit = int(139.8 * 2**30 * 0.95)
        return {"bytes_limit": limit, "bytes_in_use": limit - int(self.free_bytes)}


def test_mixtral_fits_beside_its_cache_and_twice_does_not(monkeypatch):
    """93.4 GB and a cache of 16 GB fit in the 142.6 GB that JAX may use of an H200; in float32 it is refused."""
    monkeypatch.setattr(jax, "local_devices", lambda *args: [FakeGPU(139.8 * 2**30 * 0.95)])
    config = json.loads((ROOT / "configs" / "mixtral-8x7b.json").read_text())
    half = jax.ShapeDtypeStruct((profiling.sizes_of(config).parameters // 2,), jnp.bfloat16)
    cache = jax.ShapeDtypeStruct((8_000_000_000,), jnp.bfloat16)
    memory.require([half, cache], what="mixtral", remedy="none")
    with pytest.raises(ValueError) as error:
        memory.require([jax.ShapeDtypeStruct(half.shape, jnp.float32)], what="mixtral in float32", remedy="use dtype")
    assert "mixtral in float32 takes 173.98 GiB on each device (46,702,792,704 x 4 bytes)" in str(error.value)
    assert "NVIDIA H200 has 132.81 GiB free of 132.81 GiB that JAX may use, 0.00 being in use" in str(error.value)


def test_checkpoints_are_converted_and_back_bit_by_bit(tmp_path, load_script):
    script = load_script("convert_checkpoint")
    source = tmp_path / "hf"
    moe_jax.save(testing.random_model(CONFIG, dtype="bfloat16"), source)
    (source / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    script.convert(str(source), tmp_path / "orbax")
    said = script.convert(str(tmp_path / "orbax"), tmp_path / "again")
    assert said.endswith("parameters in bfloat16") and "(Orbax)" in said
    assert {file.name for file in source.iterdir()} == {file.name for file in (tmp_path / "again").iterdir()}
    for file in source.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name
    split = script.convert(str(source), tmp_path / "split", mesh="ep=2,tp=2")
    assert split.endswith("parameters in bfloat16")
    script.convert(str(tmp_path / "split"), tmp_path / "again", overwrite=True)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_conversions_that_would_lose_something_are_refused(tmp_path, load_script, monkeypatch):
    from safetensors.numpy import load_file, save_file

    script = load_script("convert_checkpoint")
    source = tmp_path / "hf"
    moe_jax.save(testing.random_model(CONFIG), source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float16)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"to be of one dtype .* got float16, float32: choose one with --dtype"):
        script.convert(str(source), tmp_path / "orbax")
    script.convert(str(source), tmp_path / "orbax", dtype="float32")
    with pytest.raises(ValueError, match="new or empty directory"):
        script.convert(str(source), tmp_path / "orbax", dtype="float32")
    with pytest.raises(ValueError, match="expected a target that is not the source"):
        script.convert(str(source), source)
