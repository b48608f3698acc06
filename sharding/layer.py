"""One MoE layer under a strategy, to be traced and compiled for accounting; it computes what balanced routing would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from sharding.axes import MESH_AXES
from sharding.formulas import Split
from sharding.layout import Exchange

UP = ("experts", None, "expert_mlp", "embed")
DOWN = ("experts", "embed", "expert_mlp")


def abstract_mesh(split: Split) -> AbstractMesh:
    """As many devices as the split wants, none of which need exist."""
    sizes = tuple(split.sizes[axis] for axis in MESH_AXES)
    return AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def rows_per_expert(tokens: int, experts: int, active: int) -> int:
    """Of a copy's tokens, under balanced routing; at least one."""
    return max(1, -(-tokens * active // experts))


def moe_layer(
    split: Split,
    mesh: Mesh | AbstractMesh,
    *,
    tokens: int,
    width: int,
    expert_width: int,
    experts: int,
    active: int,
    capacity_factor: float | None = None,
    dtype: Any = jnp.bfloat16,
    expert_fn: Callable[..., jax.Array] | None = None,
) -> tuple[Callable[..., jax.Array], tuple[jax.ShapeDtypeStruct, ...]]:
    """The layer from tokens and their routing to its result, and the shapes of its arguments; `tokens` of one copy.

    Unless an `expert_fn` is given (as `Exchange.experts` takes it), every local expert multiplies an equal share of the rows
    in place of those that routing chose, so that FLOPs do not depend on how a backend implements ragged multiplication. The
    collectives are those of the strategy.
    """
    num_local, share = split.local_experts(experts), rows_per_expert(tokens, experts, active)
    exchange = Exchange(mesh, split.row, split.row, capacity_factor)

    def balanced(x_XD, experts_XA, weights_XA, up_EGFD, down_EDF):
        place_M = jnp.arange(num_local * share) % x_XD.shape[0]
        x_ECD = x_XD[place_M].reshape(num_local, share, -1)
        up_EGCF = jnp.einsum("ecd,egfd->egcf", x_ECD, up_EGFD)
        hidden_ECF = jax.nn.silu(up_EGCF[:, 0]) * up_EGCF[:, 1]
        y_ECD = jnp.einsum("ecf,edf->ecd", hidden_ECF, down_EDF)
        weight_X1 = jnp.where(experts_XA >= 0, weights_XA, 0.0).sum(axis=1, keepdims=True)
        summed_XD = jnp.zeros_like(x_XD).at[place_M].add(y_ECD.reshape(num_local * share, -1))
        return (summed_XD * weight_X1).astype(x_XD.dtype)

    def layer(x_TD, experts_TA, weights_TA, up_EGFD, down_EDF):
        operands = (x_TD, experts_TA, weights_TA, up_EGFD, down_EDF)
        return exchange.experts(expert_fn or balanced, *operands, dimensions=(UP, DOWN), is_decode=True)[0]

    row = PartitionSpec(("dp", *split.row.tokens))
    axes = {"experts": split.row.experts or None, "expert_mlp": split.row.expert_mlp or None}
    up_spec, down_spec = (PartitionSpec(*(axes.get(str(name)) for name in names)) for names in (UP, DOWN))

    def shape(sizes: tuple[int, ...], spec: PartitionSpec, dtype: Any) -> jax.ShapeDtypeStruct:
        placed = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=placed)

    total, held = split.dp * tokens, num_local * split.expert_parts
    arguments = (
        shape((total, width), row, dtype),
        shape((total, active), row, jnp.int32),
        shape((total, active), row, jnp.float32),
        shape((held, 2, expert_width, width), up_spec, dtype),
        shape((held, width, expert_width), down_spec, dtype),
    )
    return layer, arguments


def layer_flops(split: Split, *, tokens: int, width: int, expert_width: int, experts: int, active: int) -> float:
    """Of one device: three multiplications for each row of each of its experts."""
    rows = split.local_experts(experts) * rows_per_expert(tokens, experts, active)
    return 6.0 * rows * width * (expert_width // split.column_parts)


def layer_hbm_bytes(
    split: Split, *, tokens: int, width: int, expert_width: int, experts: int, active: int, item_bytes: int = 2
) -> float:
    """Of one device: its experts' weights once, and each multiplication's operand and result rows."""
    num_local, columns = split.local_experts(experts), expert_width // split.column_parts
    rows = num_local * rows_per_expert(tokens, experts, active)
    return item_bytes * (num_local * 3 * width * columns + rows * (2 * width + 3 * columns))


def layer_argument_bytes(
    split: Split, *, tokens: int, width: int, expert_width: int, experts: int, active: int, item_bytes: int = 2
) -> int:
    """Of one device: its experts' weights, its tokens and their routing."""
    weights = split.local_experts(experts) * 3 * width * (expert_width // split.column_parts) * item_bytes
    own = tokens // split.size(split.row.tokens)
    return weights + own * (width * item_bytes + 8 * active)
