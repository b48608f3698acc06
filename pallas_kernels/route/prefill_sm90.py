"""Routing many tokens in two launches: XLA's gate matmul, then one kernel that chooses and counts, on Hopper.

A block of the kernel has 64 tokens, the rows of its tiles; experts run along the columns, 32 at a time, and stay in shared
memory, so that their number does not matter to the registers. Each choice is the best of what comes after the choice
before it in the order (falling score, rising id): nothing is ever marked as taken. How many earlier tokens of the block
chose the same expert is a product with a strictly lower triangle of ones, exact on the matrix unit.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import Device, Implementation
from pallas_kernels.route import reference
from pallas_kernels.route.api import Places, Routing, RoutingRule

BLOCK = 64  # tokens of a block, rows of its tiles
COUNTED = 32  # experts whose tokens are counted at a time
MAX_EXPERTS = 384
MAX_CHOICES = 16
WGMMA = plgpu.Layout.WGMMA
ROWS, COLUMNS = WGMMA.reduce(1), WGMMA.reduce(0)
NOTHING = jnp.iinfo(jnp.int32).max  # an id above all experts'


def route(x_TD, gate_ED, *, rule: RoutingRule, gate_bias_E=None, selection_bias_E=None) -> Routing:
    return _route(x_TD, gate_ED, gate_bias_E, selection_bias_E, rule=rule)


@functools.partial(jax.jit, static_argnames=("rule",))
def _route(x_TD, gate_ED, gate_bias_E, selection_bias_E, *, rule: RoutingRule) -> Routing:
    num_tokens, num_experts = x_TD.shape[0], gate_ED.shape[0]
    logits_TE = _logits(x_TD, gate_ED, gate_bias_E)
    chunk = 32 if num_experts > 16 else 8
    columns, blocks = pl.cdiv(num_experts, chunk) * chunk, pl.cdiv(num_tokens, BLOCK)
    padded_TE = logits_TE
    if (blocks * BLOCK, columns) != logits_TE.shape:
        padding = ((0, blocks * BLOCK - num_tokens), (0, columns - num_experts))
        padded_TE = jnp.pad(logits_TE, padding, constant_values=-jnp.inf)
    biases = () if selection_bias_E is None else (jnp.pad(selection_bias_E, (0, columns - num_experts)),)
    weights_TA, experts_TA, ranks_TA, counts_BE = plgpu.kernel(
        functools.partial(_choose_kernel, num_tokens=num_tokens, num_experts=num_experts, chunk=chunk, rule=rule),
        out_type=(
            jax.ShapeDtypeStruct((blocks * BLOCK, rule.top_k), jnp.float32),
            jax.ShapeDtypeStruct((blocks * BLOCK, rule.top_k), jnp.int32),
            jax.ShapeDtypeStruct((blocks * BLOCK, rule.top_k), jnp.int32),
            jax.ShapeDtypeStruct((blocks, num_experts), jnp.int32),
        ),
        grid=(blocks,),
        grid_names=("block",),
        kernel_name="route_prefill",
        scratch_types=_scratch(columns // chunk, chunk),
        compiler_params=plgpu.CompilerParams(
            approx_math=False, reduction_scratch_bytes=4096, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(padded_TE, *biases)
    places = Places(ranks_TA[:num_tokens], counts_BE)
    return Routing(weights_TA[:num_tokens], experts_TA[:num_tokens], logits_TE, places=places)


def _logits(x_TD, gate_ED, gate_bias_E) -> jax.Array:
    if x_TD.dtype != jnp.bfloat16 or gate_ED.dtype != jnp.bfloat16:
        return reference.router_logits(x_TD, gate_ED, gate_bias_E)
    # Products of bfloat16 are exact in float32: no need for the slow float32 matmul of the definition.
    logits_TE = lax.dot_general(x_TD, gate_ED, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return logits_TE if gate_bias_E is None else logits_TE + gate_bias_E.astype(jnp.float32)


def _scratch(chunks: int, chunk: int) -> dict[str, Any]:
    def tiled(shape: tuple[int, ...], dtype, columns: int):
        swizzle = plgpu.SwizzleTransform(columns * jnp.dtype(dtype).itemsize)
        return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, columns)), swizzle))

    return dict(
        scores_smem=tiled((chunks, BLOCK, chunk), jnp.float32, chunk),
        selection_smem=tiled((chunks, BLOCK, chunk), jnp.float32, chunk),
        chosen_smem=tiled((BLOCK, COUNTED), jnp.bfloat16, COUNTED),
        earlier_smem=tiled((BLOCK, BLOCK), jnp.bfloat16, COUNTED),
        counts_smem=plgpu.SMEM((COUNTED,), jnp.int32),
        loaded=plgpu.Barrier(num_arrivals=chunks),
    )


def _choose_kernel(
    logits_gmem, *refs, num_tokens: int, num_experts: int, chunk: int, rule: RoutingRule,
    scores_smem, selection_smem, chosen_smem, earlier_smem, counts_smem, loaded,
):  # fmt: skip
    bias_gmem = refs[:-4]
    weights_gmem, experts_gmem, ranks_gmem, counts_gmem = refs[-4:]
    block = lax.axis_index("block")
    rows, chunks = pl.ds(block * BLOCK, BLOCK), scores_smem.shape[0]
    group_size = num_experts // rule.num_groups

    for c in range(chunks):
        plgpu.copy_gmem_to_smem(logits_gmem.at[rows, pl.ds(c * chunk, chunk)], scores_smem.at[c], loaded)
    plgpu.barrier_wait(loaded)

    def iota(shape: tuple[int, int], dim: int):
        return plgpu.broadcasted_iota(jnp.int32, shape, dim, layout=WGMMA)

    def ids(c):
        return iota((BLOCK, chunk), 1) + c * chunk

    def across(vector):
        return lax.broadcast_in_dim(vector, (BLOCK, chunk), (0,))

    def filled(value):
        return plgpu.layout_cast(jnp.full((BLOCK, chunk), value), WGMMA)

    def score() -> None:
        """Logits become scores, in place."""
        if rule.score == "topk_softmax":
            return
        if rule.score == "softmax":
            largest = lax.fori_loop(0, chunks, lambda c, tile: jnp.maximum(tile, scores_smem[c]), filled(-jnp.inf))
            peak = across(jnp.max(largest, axis=1))
            total = lax.fori_loop(0, chunks, lambda c, tile: tile + jnp.exp(scores_smem[c] - peak), filled(0.0))
            total = across(jnp.sum(total, axis=1))

        @pl.loop(0, chunks)
        def _(c):
            if rule.score == "softmax":
                scores_smem[c] = jnp.exp(scores_smem[c] - peak) / total
            else:
                scores_smem[c] = 1.0 / (1.0 + jnp.exp(-scores_smem[c]))

    def select() -> None:
        """Scores, biased, are what the choice is made by. Columns without an expert cannot be chosen."""

        @pl.loop(0, chunks)
        def _(c):
            selection = scores_smem[c]
            if bias_gmem:
                bias = plgpu.load(bias_gmem[0].at[pl.ds(c * chunk, chunk)], layout=COLUMNS, optimized=False)
                selection = selection + lax.broadcast_in_dim(bias, (BLOCK, chunk), (1,))
            selection_smem[c] = jnp.where(ids(c) < num_experts, selection, -jnp.inf)

    def chunks_of(group: int):
        return range(group * group_size // chunk, pl.cdiv((group + 1) * group_size, chunk))

    def group_score(group: int):
        best, second = filled(-jnp.inf), filled(-jnp.inf)
        for c in chunks_of(group):
            values = jnp.where(ids(c) // group_size == group, selection_smem[c], -jnp.inf)
            second = jnp.maximum(second, jnp.minimum(best, values))
            best = jnp.maximum(best, values)
        largest = jnp.max(best, axis=1)
        if rule.group_score == "max":
            return largest
        place = jnp.min(jnp.where(best == across(largest), ids(0), NOTHING), axis=1)
        return largest + jnp.max(jnp.where(ids(0) == across(place), second, best), axis=1)

    def keep_best_groups() -> None:
        scores = [group_score(group) for group in range(rule.num_groups)]
        for group, mine in enumerate(scores):
            beaten_by = [scores[o] > mine if o > group else scores[o] >= mine for o in range(len(scores)) if o != group]
            num_better = across(sum(jnp.where(is_better, 1.0, 0.0) for is_better in beaten_by))
            for c in chunks_of(group):
                is_out = (ids(c) // group_size == group) & (num_better >= rule.top_groups)
                selection_smem[c] = jnp.where(is_out, -jnp.inf, selection_smem[c])

    def next_best(score_before, id_before):
        """The largest score that comes after another in the order (falling score, rising id), and its expert."""

        def look(c, best):
            values, (best_values, best_ids) = selection_smem[c], best
            is_after = (values < across(score_before)) | (
                (values == across(score_before)) & (ids(c) > across(id_before))
            )
            is_better = is_after & (values > best_values)
            return jnp.where(is_better, values, best_values), jnp.where(is_better, ids(c), best_ids)

        best_values, best_ids = lax.fori_loop(0, chunks, look, (filled(-jnp.inf), filled(jnp.int32(NOTHING))))
        largest = jnp.max(best_values, axis=1)
        return largest, jnp.min(jnp.where(best_values == across(largest), best_ids, NOTHING), axis=1)

    def score_of(expert):
        def look(c, tile):
            return tile + jnp.where(ids(c) == across(expert), scores_smem[c], 0.0)

        return jnp.sum(lax.fori_loop(0, chunks, look, filled(0.0)), axis=1)

    def choose():
        score_before = plgpu.layout_cast(jnp.full((BLOCK,), jnp.inf), ROWS)
        id_before = plgpu.layout_cast(jnp.full((BLOCK,), -1, jnp.int32), ROWS)
        weights, experts = [], []
        for _ in range(rule.top_k):
            score_before, id_before = next_best(score_before, id_before)
            weights.append(score_of(id_before) if bias_gmem else score_before)
            experts.append(id_before)
        return weights, experts

    def normalise(weights):
        if rule.score == "topk_softmax":
            exps = [jnp.exp(weight - weights[0]) for weight in weights]
            weights = [value / sum(exps) for value in exps]
        if rule.renormalize:
            total = sum(weights) + rule.epsilon
            weights = [weight / total for weight in weights]
        return [weight * rule.scale for weight in weights]

    def rank(experts):
        """Counts each expert's tokens, and for each choice the earlier tokens of its expert."""
        shape = chosen_smem.shape
        square = earlier_smem.shape
        is_earlier = iota(square, 1) < iota(square, 0)
        earlier_smem[...] = jnp.where(is_earlier, 1.0, 0.0).astype(jnp.bfloat16)
        is_token = block * BLOCK + iota(shape, 0) < num_tokens

        def is_of(expert, c):
            return lax.broadcast_in_dim(expert, shape, (0,)) == iota(shape, 1) + c * COUNTED

        def add(c, ranks):
            is_chosen = functools.reduce(jnp.logical_or, [is_of(expert, c) for expert in experts])
            chosen = jnp.where(is_chosen & is_token, 1.0, 0.0)
            chosen_smem[...] = chosen.astype(jnp.bfloat16)
            plgpu.commit_smem()

            def multiply(acc):
                plgpu.wgmma(acc, earlier_smem, chosen_smem)
                return acc[...]

            num_earlier = pl.run_scoped(multiply, plgpu.ACC(shape))
            write_counts(c, jnp.sum(chosen, axis=0).astype(jnp.int32))
            return tuple(
                before + jnp.sum(jnp.where(is_of(expert, c), num_earlier, 0.0), axis=1)
                for before, expert in zip(ranks, experts, strict=True)
            )

        zeros = plgpu.layout_cast(jnp.zeros((BLOCK,), jnp.float32), ROWS)
        return lax.fori_loop(0, pl.cdiv(num_experts, COUNTED), add, (zeros,) * len(experts))

    def write_counts(c, counts) -> None:
        if num_experts % COUNTED == 0:
            counts_gmem[block, pl.ds(c * COUNTED, COUNTED)] = counts
            return
        counts_smem[...] = counts

        @pl.loop(0, lax.min(num_experts - c * COUNTED, COUNTED))
        def _(place):
            counts_gmem[block, c * COUNTED + place] = counts_smem[place]

    score()
    select()
    if rule.num_groups > 1:
        keep_best_groups()
    weights, experts = choose()
    ranks = rank(experts)
    for a, (weight, expert, earlier) in enumerate(zip(normalise(weights), experts, ranks, strict=True)):
        weights_gmem[rows, a] = weight
        experts_gmem[rows, a] = expert
        ranks_gmem[rows, a] = earlier.astype(jnp.int32)


def _supports(device: Device, x_TD, gate_ED, *, rule: RoutingRule, gate_bias_E=None, selection_bias_E=None):
    num_experts = gate_ED.shape[0]
    if not device.is_hopper:
        return f"it is written for Hopper GPUs, not for {device.platform} {device.kind}"
    if num_experts > MAX_EXPERTS:
        return f"it chooses among up to {MAX_EXPERTS} experts, not {num_experts}"
    if rule.top_k > MAX_CHOICES:
        return f"it chooses up to {MAX_CHOICES} experts per token, not {rule.top_k}"
    if rule.dtype != "float32":
        return f"its scores are float32, not {rule.dtype}"
    return None


IMPLEMENTATION = Implementation("prefill_sm90", supports=_supports, run=route)
