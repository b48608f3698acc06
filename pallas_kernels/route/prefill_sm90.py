"""Routing many tokens in two launches: XLA's gate matmul, then one kernel that chooses and counts, on Hopper.

A block of the kernel has 64 tokens, the rows of its tiles; experts run along the columns, dealt out to the block's
warpgroups, whose share fits into registers. For each choice every warpgroup finds its best, and they agree on the best of
all through shared memory. How many earlier tokens of the block chose the same expert is a product with a lower triangle of
ones, exact on the matrix unit, less one.
"""

from __future__ import annotations

import dataclasses
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
COUNTED = 16  # experts whose tokens are counted at a time
MAX_EXPERTS = 384
MAX_CHOICES = 16
MAX_COLUMNS = 192  # of a warpgroup: more do not fit into its registers
WGMMA = plgpu.Layout.WGMMA
ROWS, COLUMNS = WGMMA.reduce(1), WGMMA.reduce(0)
NOTHING = jnp.iinfo(jnp.int32).max  # an id above all experts'


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """What the kernel is compiled for. Each warpgroup has `chunks` tiles of `chunk` columns; the last may have no experts."""

    tokens: int
    experts: int
    chunk: int
    chunks: int
    warpgroups: int

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.tokens, BLOCK)

    @property
    def columns(self) -> int:
        return self.warpgroups * self.chunks * self.chunk


def _sizes(tokens: int, experts: int, rule: RoutingRule) -> _Sizes:
    """As many warpgroups as have something to do, up to four; all of a group's experts with one warpgroup."""
    chunk = 8 if experts <= 16 else 32 if experts <= 256 else 16
    for warpgroups in (4, 2, 1) if chunk >= COUNTED and experts <= 128 else (2, 1) if chunk >= COUNTED else (1,):
        chunks = pl.cdiv(experts, chunk * warpgroups)
        columns, group_size = chunks * chunk, experts // rule.num_groups
        is_split_by_groups = rule.num_groups == 1 or (columns % group_size == 0 and experts == columns * warpgroups)
        if is_split_by_groups and (warpgroups - 1) * columns < experts:
            break
    return _Sizes(tokens, experts, chunk, chunks, warpgroups)


@reference.normalising
def route(x_TD, gate_ED, *, rule: RoutingRule, gate_bias_E=None, selection_bias_E=None) -> Routing:
    return _route(x_TD, gate_ED, gate_bias_E, selection_bias_E, rule=rule)


@functools.partial(jax.jit, static_argnames=("rule",))
def _route(x_TD, gate_ED, gate_bias_E, selection_bias_E, *, rule: RoutingRule) -> Routing:
    num_tokens, num_experts = x_TD.shape[0], gate_ED.shape[0]
    logits_TE = _logits(x_TD, gate_ED, gate_bias_E)
    sizes = _sizes(num_tokens, num_experts, rule)
    columns, blocks = pl.cdiv(num_experts, sizes.chunk) * sizes.chunk, sizes.blocks
    padded_TE = logits_TE
    if (blocks * BLOCK, columns) != logits_TE.shape:
        padding = ((0, blocks * BLOCK - num_tokens), (0, columns - num_experts))
        padded_TE = jnp.pad(logits_TE, padding, constant_values=-jnp.inf)
    biases: tuple[jax.Array, ...] = ()
    if selection_bias_E is not None:
        biases = (jnp.pad(selection_bias_E.astype(jnp.float32), (0, sizes.columns - num_experts)),)
    weights_TA, experts_TA, ranks_TA, counts_BE = plgpu.kernel(
        functools.partial(_choose_kernel, sizes=sizes, rule=rule),
        out_type=(
            jax.ShapeDtypeStruct((blocks * BLOCK, rule.top_k), jnp.float32),
            jax.ShapeDtypeStruct((blocks * BLOCK, rule.top_k), jnp.int32),
            jax.ShapeDtypeStruct((blocks * BLOCK, rule.top_k), jnp.int32),
            jax.ShapeDtypeStruct((blocks, num_experts), jnp.int32),
        ),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=sizes.warpgroups,
        thread_name="warpgroup",
        kernel_name="route_prefill",
        scratch_types=_scratch(sizes, rule),
        compiler_params=plgpu.CompilerParams(approx_math=False, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(padded_TE, *biases)
    places = Places(ranks_TA[:num_tokens], counts_BE)
    return Routing(weights_TA[:num_tokens], experts_TA[:num_tokens], logits_TE, places=places)


def _logits(x_TD, gate_ED, gate_bias_E) -> jax.Array:
    if x_TD.dtype != jnp.bfloat16 or gate_ED.dtype != jnp.bfloat16:
        return reference.router_logits(x_TD, gate_ED, gate_bias_E)
    # Products of bfloat16 are exact in float32: no need for the slow float32 matmul of the definition.
    logits_TE = lax.dot_general(x_TD, gate_ED, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return logits_TE if gate_bias_E is None else logits_TE + gate_bias_E.astype(jnp.float32)


def _scratch(sizes: _Sizes, rule: RoutingRule) -> dict[str, Any]:
    def tiled(shape: tuple[int, ...], dtype, columns: int):
        swizzle = plgpu.SwizzleTransform(columns * jnp.dtype(dtype).itemsize)
        return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, columns)), swizzle))

    warpgroups = sizes.warpgroups
    return dict(
        logits_smem=tiled((warpgroups, sizes.chunks, BLOCK, sizes.chunk), jnp.float32, sizes.chunk),
        # What warpgroups tell each other: twice, so that one need not wait until the others have read what it said before.
        scores_smem=plgpu.SMEM((2, warpgroups, BLOCK), jnp.float32),
        experts_smem=plgpu.SMEM((2, warpgroups, BLOCK), jnp.int32),
        groups_smem=plgpu.SMEM((rule.num_groups, BLOCK), jnp.float32),
        ranks_smem=plgpu.SMEM((warpgroups, rule.top_k, BLOCK), jnp.float32),
        chosen_smem=tiled((warpgroups, BLOCK, COUNTED), jnp.bfloat16, COUNTED),
        until_smem=tiled((warpgroups, BLOCK, BLOCK), jnp.bfloat16, COUNTED),
        total_smem=plgpu.SMEM((warpgroups, BLOCK, COUNTED), jnp.float32),
        counts_smem=plgpu.SMEM((warpgroups, COUNTED), jnp.int32),
        loaded=plgpu.Barrier(num_arrivals=sizes.chunks, num_barriers=warpgroups),
        said=plgpu.Barrier(num_arrivals=warpgroups),
    )


def _choose_kernel(
    logits_gmem, *refs, sizes: _Sizes, rule: RoutingRule, logits_smem, scores_smem, experts_smem, groups_smem,
    ranks_smem, chosen_smem, until_smem, total_smem, counts_smem, loaded, said,
):  # fmt: skip
    bias_gmem = refs[:-4]
    weights_gmem, experts_gmem, ranks_gmem, counts_gmem = refs[-4:]
    block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    rows, shape = pl.ds(block * BLOCK, BLOCK), (BLOCK, sizes.chunk)
    group_size = sizes.experts // rule.num_groups
    first_chunk, chunks = warpgroup * sizes.chunks, range(sizes.chunks)
    said_before = [0]  # how often the warpgroups have told each other something

    def iota(shape: tuple[int, int], dim: int):
        return plgpu.broadcasted_iota(jnp.int32, shape, dim, layout=WGMMA)

    def ids(n: int):
        return iota(shape, 1) + (first_chunk + n) * sizes.chunk

    def across(vector):
        return lax.broadcast_in_dim(vector, shape, (0,))

    def told(values_smem, vector):
        """Every warpgroup's vector, in their order."""
        slot = said_before[0] % 2
        values_smem[slot, warpgroup] = vector
        return [plgpu.load(values_smem.at[slot, w], layout=ROWS, optimized=False) for w in wait_for_all()]

    def wait_for_all():
        said_before[0] += 1
        plgpu.barrier_arrive(said)
        plgpu.barrier_wait(said)
        return range(sizes.warpgroups)

    def load() -> None:
        for n in chunks:
            columns = pl.ds((first_chunk + n) * sizes.chunk, sizes.chunk)
            plgpu.copy_gmem_to_smem(logits_gmem.at[rows, columns], logits_smem.at[warpgroup, n], loaded.at[warpgroup])
        plgpu.barrier_wait(loaded.at[warpgroup])

    def in_place(change) -> None:
        """A loop even over few chunks: equal logits become equal scores, whatever the compiler does."""

        @pl.loop(0, sizes.chunks)
        def _(n):
            logits_smem[warpgroup, n] = change(n, logits_smem[warpgroup, n])

    def tiles():
        return [logits_smem[warpgroup, n] for n in chunks]

    def row_max(tiles):
        return jnp.max(functools.reduce(jnp.maximum, tiles), axis=1)

    def score() -> None:
        """Logits become scores."""
        if rule.score == "sigmoid":
            in_place(lambda n, logits: 1.0 / (1.0 + jnp.exp(-logits)))
        elif rule.score == "softmax":
            in_place(lambda n, logits: jnp.where(ids(n) < sizes.experts, logits, -jnp.inf))
            peak = across(functools.reduce(jnp.maximum, told(scores_smem, row_max(tiles()))))
            in_place(lambda n, logits: jnp.exp(logits - peak))
            total = across(sum(told(scores_smem, jnp.sum(sum(tiles()), axis=1))))
            in_place(lambda n, exps: exps / total)

    def select():
        """What the choice is made by: scores with their bias. Columns without an expert cannot be chosen."""

        def biased(n: int):
            columns = pl.ds((first_chunk + n) * sizes.chunk, sizes.chunk)
            bias = plgpu.load(bias_gmem[0].at[columns], layout=COLUMNS, optimized=False)
            return logits_smem[warpgroup, n] + lax.broadcast_in_dim(bias, shape, (1,))

        selection = [biased(n) for n in chunks] if bias_gmem else tiles()
        return [jnp.where(ids(n) < sizes.experts, tile, -jnp.inf) for n, tile in enumerate(selection)]

    def chunks_of(group: int):
        """Of a group of this warpgroup's, counted from 0."""
        return range(group * group_size // sizes.chunk, pl.cdiv((group + 1) * group_size, sizes.chunk))

    def group_score(selection, first_group, group: int):
        best = plgpu.layout_cast(jnp.full(shape, -jnp.inf), WGMMA)
        second = best
        for n in chunks_of(group):
            values = jnp.where(ids(n) // group_size == first_group + group, selection[n], -jnp.inf)
            second = jnp.maximum(second, jnp.minimum(best, values))
            best = jnp.maximum(best, values)
        largest = jnp.max(best, axis=1)
        if rule.group_score == "max":
            return largest
        place = jnp.min(jnp.where(best == across(largest), iota(shape, 1), NOTHING), axis=1)
        return largest + jnp.max(jnp.where(iota(shape, 1) == across(place), second, best), axis=1)

    def only_best_groups(selection):
        own_groups = rule.num_groups // sizes.warpgroups
        first_group = warpgroup * own_groups
        for group in range(own_groups):
            groups_smem[first_group + group] = group_score(selection, first_group, group)
        wait_for_all()
        scores = [plgpu.load(groups_smem.at[g], layout=ROWS, optimized=False) for g in range(rule.num_groups)]
        kept = list(selection)
        for group in range(own_groups):
            mine = plgpu.load(groups_smem.at[first_group + group], layout=ROWS, optimized=False)
            num_better = across(
                sum(
                    jnp.where((other > mine) | ((other == mine) & (g < first_group + group)), 1.0, 0.0)
                    for g, other in enumerate(scores)
                )
            )
            for n in chunks_of(group):
                is_out = (ids(n) // group_size == first_group + group) & (num_better >= rule.top_groups)
                kept[n] = jnp.where(is_out, -jnp.inf, kept[n])
        return kept

    def next_best(selection):
        """The largest score of all warpgroups, and its expert: the lowest among equals."""
        largest = row_max(selection)
        places = [jnp.where(tile == across(largest), ids(n), NOTHING) for n, tile in enumerate(selection)]
        expert = jnp.min(functools.reduce(jnp.minimum, places), axis=1)
        slot = said_before[0] % 2
        experts_smem[slot, warpgroup] = expert
        all_scores = told(scores_smem, largest)
        best, chosen = all_scores[0], plgpu.load(experts_smem.at[slot, 0], layout=ROWS, optimized=False)
        for w in range(1, sizes.warpgroups):
            other = plgpu.load(experts_smem.at[slot, w], layout=ROWS, optimized=False)
            chosen = jnp.where(all_scores[w] > best, other, chosen)
            best = jnp.maximum(best, all_scores[w])
        return best, chosen

    def score_of(expert):
        found = sum(jnp.where(ids(n) == across(expert), logits_smem[warpgroup, n], 0.0) for n in chunks)
        return sum(told(scores_smem, jnp.sum(found, axis=1)))

    def choose(selection):
        weights, experts = [], []
        for _ in range(rule.top_k):
            best, expert = next_best(selection)
            selection = [jnp.where(ids(n) == across(expert), -jnp.inf, tile) for n, tile in enumerate(selection)]
            weights.append(score_of(expert) if bias_gmem else best)
            experts.append(expert)
        return weights, experts

    def normalise(weights):
        if rule.score == "topk_softmax":
            exps = [jnp.exp(weight - weights[0]) for weight in weights]
            weights = [value / sum(exps) for value in exps]
        if rule.renormalize:
            total = sum(weights) + rule.epsilon
            weights = [weight / total for weight in weights]
        return [weight * rule.scale for weight in weights]

    def count(experts):
        """Counts the tokens of this warpgroup's experts, and for choices of them the earlier tokens of the same expert."""
        shape, mine = (BLOCK, COUNTED), chosen_smem.at[warpgroup]
        square = (BLOCK, BLOCK)
        is_until = iota(square, 1) <= iota(square, 0)
        until_smem[warpgroup] = jnp.where(is_until, 1.0, 0.0).astype(jnp.bfloat16)
        is_token = block * BLOCK + iota(shape, 0) < sizes.tokens

        def add(turn, ranks):
            first = first_chunk * sizes.chunk + turn * COUNTED
            is_of = [lax.broadcast_in_dim(expert, shape, (0,)) == iota(shape, 1) + first for expert in experts]
            chosen = jnp.where(functools.reduce(jnp.logical_or, is_of) & is_token, 1.0, 0.0)
            mine[...] = chosen.astype(jnp.bfloat16)
            plgpu.commit_smem()

            def multiply(acc):
                plgpu.wgmma(acc, until_smem.at[warpgroup], mine)
                return acc[...]

            num_until = pl.run_scoped(multiply, plgpu.ACC(shape))
            # The last row counts them all. A sum over rows would go through scratch memory that warpgroups share.
            total_smem[warpgroup] = num_until
            total = plgpu.load(total_smem.at[warpgroup, BLOCK - 1], layout=COLUMNS, optimized=False)
            write_counts(first, total.astype(jnp.int32))
            return tuple(
                before + jnp.sum(jnp.where(is_here, num_until - 1.0, 0.0), axis=1)
                for before, is_here in zip(ranks, is_of, strict=True)
            )

        zeros = plgpu.layout_cast(jnp.zeros((BLOCK,), jnp.float32), ROWS)
        return lax.fori_loop(0, pl.cdiv(sizes.chunks * sizes.chunk, COUNTED), add, (zeros,) * len(experts))

    def write_counts(first, counts) -> None:
        if sizes.experts % COUNTED == 0:

            @pl.when(first < sizes.experts)
            def _():
                counts_gmem[block, pl.ds(first, COUNTED)] = counts

            return
        counts_smem[warpgroup] = counts

        @pl.loop(0, lax.clamp(0, sizes.experts - first, COUNTED))
        def _(place):
            counts_gmem[block, first + place] = counts_smem[warpgroup, place]

    load()
    score()
    selection = select()
    if rule.num_groups > 1:
        selection = only_best_groups(selection)
    weights, experts = choose(selection)
    for a, rank in enumerate(count(experts)):
        ranks_smem[warpgroup, a] = rank
    wait_for_all()

    @pl.when(warpgroup == 0)
    def _():
        for a, (weight, expert) in enumerate(zip(normalise(weights), experts, strict=True)):
            parts = [plgpu.load(ranks_smem.at[w, a], layout=ROWS, optimized=False) for w in range(sizes.warpgroups)]
            weights_gmem[rows, a] = weight
            experts_gmem[rows, a] = expert
            ranks_gmem[rows, a] = sum(parts).astype(jnp.int32)


def _supports(device: Device, x_TD, gate_ED, *, rule: RoutingRule, **arguments):
    num_experts = gate_ED.shape[0]
    if not device.is_hopper:
        return f"it is written for Hopper GPUs, not for {device.platform} {device.kind}"
    if num_experts > MAX_EXPERTS:
        return f"it chooses among up to {MAX_EXPERTS} experts, not {num_experts}"
    sizes = _sizes(x_TD.shape[0], num_experts, rule)
    if sizes.columns > MAX_COLUMNS * sizes.warpgroups:
        return f"{num_experts} experts in {rule.num_groups} groups do not split evenly over two warpgroups"
    if rule.top_k > MAX_CHOICES:
        return f"it chooses up to {MAX_CHOICES} experts per token, not {rule.top_k}"
    if rule.dtype != "float32":
        return f"its scores are float32, not {rule.dtype}"
    return None


IMPLEMENTATION = Implementation("prefill_sm90", supports=_supports, run=route)
