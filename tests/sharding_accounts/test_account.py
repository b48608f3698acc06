"""Formula, trace, compiled CPU program and compiled GPU program count the same bytes and FLOPs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from sharding import account, layer, machines
from sharding.account import Collective
from sharding.formulas import Split, mean_visits, moe_collectives
from sharding.strategies import STRATEGIES

NODE = 4  # two nodes of four devices, so that both kinds of links are used
SHAPE = dict(tokens=64, width=128, expert_width=256, experts=16, active=4)
SPLITS = [
    *(Split(name, ep=4, tp=2) for name in STRATEGIES),
    Split("ep_agrs", ep=8),
    Split("ep_a2a", dp=2, ep=4),
    Split("eptp_dp", ep=2, tp=4),
    Split("eptp_psum", dp=2, ep=2, tp=2),
]
FACTORS = [None, 1.5]
WIRE = ("within_bytes", "between_bytes")


def _ids(value):
    return f"{value.strategy}-{value.mesh}" if isinstance(value, Split) else f"factor-{value}"


def _by_formula(split: Split, factor, item_bytes: int) -> dict[str, float]:
    shape = {key: SHAPE[key] for key in ("tokens", "width", "active")}
    found = moe_collectives(split, **shape, capacity_factor=factor, item_bytes=item_bytes, devices_per_node=NODE)
    return {name: sum(getattr(each, name) for each in found) for name in WIRE}


def _wire(counted: account.Account) -> dict[str, float]:
    return {name: getattr(counted, name) for name in WIRE}


def _mesh(split: Split):
    return jax.make_mesh(tuple(split.sizes.values()), tuple(split.sizes), axis_types=(jax.sharding.AxisType.Auto,) * 3)


@pytest.mark.parametrize("factor", FACTORS, ids=_ids)
@pytest.mark.parametrize("split", SPLITS, ids=_ids)
def test_the_trace_has_what_the_formula_says(split, factor):
    function, shapes = layer.moe_layer(split, layer.abstract_mesh(split), **SHAPE, capacity_factor=factor)
    counted = account.from_jaxpr(function, *shapes, devices_per_node=NODE)
    assert _wire(counted) == pytest.approx(_by_formula(split, factor, item_bytes=2))
    assert counted.flops == layer.layer_flops(split, **SHAPE)
    assert counted.hbm_bytes == layer.layer_hbm_bytes(split, **SHAPE)


@pytest.mark.parametrize("split", SPLITS, ids=_ids)
def test_the_compiled_cpu_program_has_what_the_trace_has(split):
    # Compiled in float32: bfloat16 would travel as float32, which the next test is about.
    function, shapes = layer.moe_layer(split, _mesh(split), **SHAPE, capacity_factor=1.5, dtype=jnp.float32)
    traced = account.from_jaxpr(function, *shapes, devices_per_node=NODE, platform="cpu")
    compiled = account.from_compiled(jax.jit(function).lower(*shapes).compile(), devices=8, devices_per_node=NODE)
    assert _wire(compiled) == pytest.approx(_wire(traced))
    assert compiled.flops == traced.flops
    assert compiled.argument_bytes == layer.layer_argument_bytes(split, **SHAPE, item_bytes=4)
    assert compiled.temporary_bytes > 0


def test_bfloat16_travels_as_float32_on_cpu_and_counts_half():
    split = Split("ep_a2a", ep=4, tp=2)
    function, shapes = layer.moe_layer(split, _mesh(split), **SHAPE, capacity_factor=1.5)
    compiled = jax.jit(function).lower(*shapes).compile()
    halved = account.from_compiled(compiled, devices=8, devices_per_node=NODE, width=SHAPE["width"])
    assert _wire(halved) == pytest.approx(_by_formula(split, 1.5, item_bytes=2))


@pytest.mark.aot
@pytest.mark.parametrize("machine", ["h100", "h200", "b200"])
@pytest.mark.parametrize("split", SPLITS[: len(STRATEGIES)], ids=_ids)
def test_the_compiled_gpu_program_has_what_the_formula_says(split, machine):
    mesh = account.gpu_mesh(machines.load(machine), split.sizes)
    function, shapes = layer.moe_layer(split, mesh, **SHAPE, capacity_factor=1.5)
    compiled = account.from_compiled(jax.jit(function).lower(*shapes).compile(), devices=8, devices_per_node=NODE)
    assert _wire(compiled) == pytest.approx(_by_formula(split, 1.5, item_bytes=2))
    assert compiled.flops == layer.layer_flops(split, **SHAPE)
    assert compiled.argument_bytes == layer.layer_argument_bytes(split, **SHAPE)


def test_links_by_hand():
    # 16 devices on 2 nodes of 8. The gathered 64 MiB: 15/16 arrive; this device's own 4 MiB leave the node once.
    gather = Collective(account.ALL_GATHER, devices=16, local=8, in_bytes=4, out_bytes=64)
    assert (gather.within_bytes, gather.between_bytes) == (56, 4)
    reduce = Collective(account.ALL_REDUCE, devices=16, local=8, in_bytes=64, out_bytes=64)
    assert (reduce.within_bytes, reduce.between_bytes) == (112, 8)
    # 64 B to 16 devices, 4 each: 7 neighbours, 8 on the other node.
    exchange = Collective(account.ALL_TO_ALL, devices=16, local=8, in_bytes=64, out_bytes=64)
    assert (exchange.within_bytes, exchange.between_bytes) == (28, 32)


@pytest.mark.parametrize("axes, expected", [(("tp",), 2), (("ep",), 2), (("ep", "tp"), 4)])
def test_devices_that_share_a_node(axes, expected):
    # ep=4, tp=2 in row order on nodes of four: tp partners are neighbours, ep partners are two apart.
    groups = account.mesh_groups({"dp": 1, "ep": 4, "tp": 2}, axes)
    assert account.local_devices(groups, NODE) == expected


def test_a_group_across_nodes_counts_not_the_one_inside():
    """Two copies on six devices each: on nodes of eight the first stays on one node, the second does not."""
    groups = account.mesh_groups({"dp": 2, "ep": 6, "tp": 1}, ("ep", "tp"))
    assert account.local_devices(groups[:1], 8) == 6
    assert account.local_devices(groups, 8) == 4


def test_loops_count_as_often_as_they_run():
    split = Split("tp", ep=8)
    mesh = _mesh(split)

    def body(x_TD):
        return lax.fori_loop(0, 5, lambda _, y: lax.psum(y @ y, "ep") / 8, x_TD)

    function = jax.shard_map(body, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    x = jax.ShapeDtypeStruct((16, 16), jnp.float32)
    by_hand = 5 * 2 * 7 / 8 * 16 * 16 * 4
    compiled = account.from_compiled(jax.jit(function).lower(x).compile(), devices=8)
    assert account.from_jaxpr(function, x).wire_bytes == by_hand == compiled.wire_bytes
    assert account.from_jaxpr(function, x).flops == 5 * 2 * 16**3 == compiled.flops


def test_collectives_of_the_partitioner_are_seen():
    mesh = _mesh(Split("tp", tp=8))

    def placed(shape, *spec):
        where = jax.sharding.NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)

    function = jax.jit(lambda a, b: a @ b, out_shardings=jax.sharding.NamedSharding(mesh, PartitionSpec()))
    operands = placed((32, 64), None, "tp"), placed((64, 32), "tp", None)
    compiled = account.from_compiled(function.lower(*operands).compile(), devices=8)
    assert compiled.bytes_by_kind() == {account.ALL_REDUCE: 2 * 7 / 8 * 32 * 32 * 4}
    assert compiled.flops == 2 * 32 * 8 * 32


@pytest.mark.parametrize(
    "written, expected",
    [
        ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['ep'=2,'tp'=2] {'ep'}", [[0, 2], [1, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_groups_of_hlo(written, expected):
    assert account._groups(f"all-reduce(%x), {written}, to_apply=%add", 4).tolist() == expected


def test_unknown_groups_are_refused():
    with pytest.raises(ValueError, match="replica groups of a known form"):
        account._groups("all-reduce(%x), replica_groups=spiral", 4)


def test_visits_by_simulation():
    drawn = np.random.default_rng(0).integers(0, 8, size=(100_000, 8))
    simulated = np.mean([len(set(row)) for row in drawn.tolist()])
    # The mean of 100,000 draws of deviation 0.8 is within 0.01 in all but one of a thousand runs.
    assert mean_visits(8, 8) == pytest.approx(simulated, abs=0.01)


@pytest.mark.parametrize("arguments, message", [(("ring",), "strategy"), (("tp", 1, 1, 1, "pp"), "attention")])
def test_splits_are_checked(arguments, message):
    with pytest.raises(ValueError, match=f"expected {message} to be"):
        Split(*arguments)
