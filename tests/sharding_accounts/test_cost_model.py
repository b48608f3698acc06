"""Shapes of models against the models themselves, predictions against arithmetic by hand, fits against what made the data."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest

from moe_jax import models
from moe_jax.model import abstract_parameters
from sharding import account, cost_model, layer, machines, plan_layout
from sharding.account import Collective
from sharding.cost_model import DECODE, PREFILL, ExpertPoint, Work
from sharding.describe import model_shape
from sharding.formulas import Split

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.json"))
H200 = machines.load("h200")
B200 = machines.load("b200")


def _config(name: str):
    return json.loads(next(path for path in CONFIGS if path.stem == name).read_text())


def _shape(name: str):
    return model_shape(_config(name), name)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_parameters_are_those_of_the_model(path):
    config = json.loads(path.read_text())
    counted = model_shape(config, path.stem).matrix_parameters
    if config["model_type"] not in models.FAMILIES:
        known = {"deepseek_v2": 15.7e9, "gpt_oss": 20.9e9}[config["model_type"]]  # as their cards say
        assert counted == pytest.approx(known, rel=5e-3)
        return
    family = models.family_of(config)
    _, abstract = abstract_parameters(family, family.Config.from_hf(config), dtype="bfloat16")
    # Norms and biases are left out.
    assert counted == pytest.approx(sum(leaf.size for leaf, _ in abstract.values()), rel=1e-3)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"model_type": "switch_transformers"}, "expected a decoder"),
        ({"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}, "num_local_experts or num_experts"),
    ],
)
def test_configs_that_cannot_be_described(config, message):
    with pytest.raises(ValueError, match=message):
        model_shape(config)


def test_one_device_by_hand():
    # Mixtral, one token at 4096 positions: two experts of 3 x 4096 x 14336, attention's 41.9 M, 32 layers, head.
    shape, work = _shape("mixtral-8x7b"), Work(DECODE, batch=1, context=4096)
    predicted = cost_model.predict(shape, H200, Split("ep_psum"), work)
    rate = H200.hbm_bytes_per_s * H200.expert_hbm_fraction
    rows = 2 * 2 * (2 * 4096 + 3 * 14336)
    by_hand_ms = 32 * (H200.expert_us / 1e3 + 1e3 * (2 * 2 * 3 * 4096 * 14336 + rows) / rate)
    assert predicted.experts_ms == pytest.approx(by_hand_ms)
    assert predicted.communication_ms == predicted.between_bytes == predicted.within_bytes == 0
    assert predicted.memory.weights == pytest.approx(2 * shape.matrix_parameters)
    assert predicted.memory.cache == 2 * 4096 * 32 * 2 * 8 * 128
    assert predicted.tokens_per_s_per_device == pytest.approx(1e3 / predicted.total_ms)


def test_collectives_by_hand():
    # 64 MiB gathered on 16 devices of two nodes: 56 over NVLink, 4 over the network, which is slower.
    gather = Collective(account.ALL_GATHER, devices=16, local=8, in_bytes=4 << 20, out_bytes=64 << 20)
    between_us = 1e6 * (4 << 20) / (H200.between_bytes_per_s * H200.between_fraction)
    within_us = 1e6 * (56 << 20) / (H200.within_bytes_per_s * H200.within_fraction)
    expected = H200.within_us + H200.between_us + max(between_us, within_us)
    assert cost_model.collective_us(gather, H200) == pytest.approx(expected)


def test_splitting_experts_divides_their_memory_and_more_devices_move_more():
    shape, work = _shape("qwen3-30b-a3b"), Work(DECODE, batch=32, context=1024)
    of = [cost_model.predict(shape, H200, Split("ep_agrs", ep=ep), work) for ep in (1, 8, 64)]
    experts = 2 * 48 * 128 * 3 * 2048 * 768
    assert of[0].memory.weights - of[1].memory.weights == pytest.approx(experts * 7 / 8)
    assert of[1].between_bytes == 0 < of[2].between_bytes
    assert of[1].within_bytes < of[2].within_bytes


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b"])
def test_weights_and_cache_are_those_of_the_layout(name):
    """On devices that divide the key/value heads or do not: 8 and 4 of them here."""
    config = _config(name) | {"num_hidden_layers": 2}
    shape, work = model_shape(config), Work(DECODE, batch=2, context=64)
    family = models.family_of(config)
    _, abstract = abstract_parameters(family, family.Config.from_hf(config), dtype="bfloat16")
    splits = [split for devices in (6, 8, 32) for split in cost_model.splits(devices, kv_heads=shape.kv_heads)]
    splits += [Split("ep_psum", ep=devices, attention="tp") for devices in (8, 32)]  # not the ep that divides them best
    counted = 0
    for split in splits:
        layout = plan_layout(layer.abstract_mesh(split), strategy=split.strategy, attention=split.attention)
        try:
            places = [layout.placement(path, names, leaf.shape) for path, (leaf, names) in abstract.items()]
        except ValueError:
            assert cost_model.problems(shape, B200, split, work), split
            continue
        weights = sum(2 * math.prod(place.sharding.shard_shape(place.padded_shape)) for place in places)
        keys = (work.batch * split.devices, shape.kv_heads, work.context, shape.head_width)
        cache = 2 * 2 * shape.layers * math.prod(layout.cache_sharding(keys).shard_shape(keys))
        estimated = cost_model.memory(shape, split, work)
        assert estimated.weights == pytest.approx(weights, rel=1e-3), split  # norms and biases are left out
        assert estimated.cache == cache, split
        counted += 1
    assert counted > 50


def test_every_factorisation_once():
    found = cost_model.splits(8)
    assert len(set(found)) == len(found)
    assert all(split.devices == 8 for split in found)
    assert {(split.ep, split.tp) for split in found if split.strategy == "eptp_dp"} == {
        (1, 2), (1, 4), (1, 8), (2, 2), (2, 4), (4, 2)
    }  # fmt: skip
    by_heads = {(split.ep, split.tp) for split in cost_model.splits(8, ["tp"], kv_heads=4) if split.attention == "tp"}
    assert by_heads == {(2, 1), (4, 1), (4, 2)}
    with pytest.raises(ValueError, match="at least 1 device, got 0"):
        cost_model.splits(0)


@pytest.mark.parametrize(
    "model, split, reason",
    [
        ("qwen3-30b-a3b", Split("ep_agrs", ep=256), "256 devices for 128 experts"),
        ("qwen3-30b-a3b", Split("tp", ep=8), "96 columns of an expert on a device, fewer than 128"),
        ("qwen3-30b-a3b", Split("tp", ep=5), "expert width 768 does not divide by 5"),
        ("qwen3-30b-a3b", Split("ep_psum", ep=64, attention="tp"), "32 query heads do not divide by 64"),
        ("mixtral-8x7b", Split("ep_psum", dp=8), "GB.*of 72"),
    ],
)
def test_reasons_why_not(model, split, reason):
    found = cost_model.problems(_shape(model), machines.load("h100"), split, Work(DECODE, batch=1, context=1024))
    assert len(found) == 1
    assert re.search(reason, found[0])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(phase="train", batch=1, context=1), "phase"),
        (dict(phase=PREFILL, batch=0, context=1), "batch"),
        (dict(phase=PREFILL, batch=1, context=1, imbalance=0.5), "imbalance"),
    ],
)
def test_work_is_checked(arguments, message):
    with pytest.raises(ValueError, match=f"expected {message}"):
        Work(**arguments)


def test_the_fit_finds_the_constants_that_made_the_data():
    truth = dataclasses.replace(B200, expert_hbm_fraction=0.9, expert_flops_fraction=0.6, expert_us=5.0)

    def time_us(read: float, flops: float) -> float:
        return cost_model.roofline_us(
            read,
            flops,
            hbm=truth.hbm_bytes_per_s * truth.expert_hbm_fraction,
            flops_per_s=truth.flops_per_s * truth.expert_flops_fraction,
            start_us=truth.expert_us,
        )

    sizes = [(read, flops) for read in (1e6, 1e8, 1e9) for flops in (1e8, 1e11, 5e12)]
    points = [ExpertPoint(*size, time_us(*size)) for size in sizes]
    fitted, error = cost_model.fit_experts(B200, points, "measured: here")
    assert error < 0.03
    assert fitted.expert_hbm_fraction == pytest.approx(0.9, abs=0.03)
    assert fitted.expert_flops_fraction == pytest.approx(0.6, abs=0.03)
    assert fitted.is_measured("expert_us") and not B200.is_measured("expert_us")


def test_links_are_fitted_too():
    truth = dataclasses.replace(H200, within_us=12.0, within_fraction=0.6)
    found = [
        Collective(kind, 8, 8, size, size * (8 if kind == account.ALL_GATHER else 1))
        for kind in (account.ALL_REDUCE, account.ALL_GATHER)
        for size in (1 << 12, 1 << 20, 1 << 26)
    ]
    fitted = cost_model.fit_links(H200, [(each, cost_model.collective_us(each, truth)) for each in found], "measured")
    assert fitted.within_us == pytest.approx(12, rel=1e-3)
    assert fitted.within_fraction == pytest.approx(0.6, rel=1e-3)


def test_too_little_to_fit_is_refused():
    with pytest.raises(ValueError, match="at least 3 measured layers"):
        cost_model.fit_experts(H200, [ExpertPoint(1, 1, 1)], "measured")
    with pytest.raises(ValueError, match="at least 2 measured collectives"):
        cost_model.fit_links(H200, [], "measured")


@pytest.mark.parametrize("name", machines.names())
def test_machines_survive_writing_and_say_where_constants_come_from(name, tmp_path):
    machine = machines.load(name)
    machines.save(machine, tmp_path / "copy.json")
    assert machines.load(tmp_path / "copy.json") == machine
    assert all(source.split(":")[0].split(",")[0] for source in machine.sources.values())
    assert all(getattr(machine, constant) > 0 for constant in machines.CONSTANTS)


def test_machine_files_are_checked(tmp_path):
    content = json.loads((machines.FOLDER / "h200.json").read_text())
    content["constants"].pop("expert_us")
    (tmp_path / "odd.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="lacks constants: expert_us"):
        machines.load(tmp_path / "odd.json")
    with pytest.raises(ValueError, match=r"expected a machine among b200, .*h200.*, got tpu"):
        machines.load("tpu")


def test_the_names_of_tensorrt():
    assert Split("eptp_dp", ep=8, tp=4).tensorrt_name == "DTP4EP8"
    assert Split("ep_psum", ep=8, attention="tp").tensorrt_name == "TEP8"
    assert Split("eptp_psum", ep=8, tp=4, attention="tp").tensorrt_name == "TTP4EP8"


def test_uniform_routing_visits_the_experts_that_it_should():
    shape = _shape("qwen3-30b-a3b")
    assert shape.active_experts(1) == pytest.approx(8)
    assert math.isclose(shape.active_experts(10**6), 128)
