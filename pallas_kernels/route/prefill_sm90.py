"""Routing many tokens in two launches: XLA's gate matmul, then one kernel that chooses and counts, on Hopper.

A block of the kernel has 64 tokens, the rows of its tiles; experts run along the columns, dealt out to the block's
warpgroups, whose share fits into registers. For each choice every warpgroup finds its best, and they agree on the best of
all through shared memory. How many earlier tokens of the block chose the same expert is a product with a lower triangle of
ones, exact on the matrix unit, less one.
"""

from __future__ import annotations

import dataclasses
import functools
import types
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


def _choose_kernel(logits_gmem, *refs, sizes: _Sizes, rule: RoutingRule, **scratch):
    *bias_gmem, weights_gmem, experts_gmem, ranks_gmem, counts_gmem = refs
    smem = types.SimpleNamespace(**scratch)
    block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    rows = pl.ds(block * BLOCK, BLOCK)
    choice = _Choice(sizes, rule, smem, warpgroup, *bias_gmem)
    choice.load(logits_gmem, rows)
    choice.score()
    selection = choice.select()
    if rule.num_groups > 1:
        selection = choice.only_best_groups(selection)
    weights, experts = choice.choose(selection)
    ranks = _Counts(choice, block, counts_gmem).count(experts)
    for a, rank in enumerate(ranks):
        smem.ranks_smem[warpgroup, a] = rank
    choice.wait_for_all()

    @pl.when(warpgroup == 0)
    def _write():
        for a, (weight, expert) in enumerate(zip(_normalised(weights, rule), experts, strict=True)):
            parts = [
                plgpu.load(smem.ranks_smem.at[w, a], layout=ROWS, optimized=False) for w in range(sizes.warpgroups)
            ]
            weights_gmem[rows, a] = weight
            experts_gmem[rows, a] = expert
            ranks_gmem[rows, a] = sum(parts).astype(jnp.int32)


class _Choice:
    """How a warpgroup chooses for the tokens of its block, from its share of the experts and what the others tell it.

    A tile of it, `[64, chunk]`, has tokens in rows and experts in columns; a vector has a number for each token.
    """

    def __init__(self, sizes: _Sizes, rule: RoutingRule, smem, warpgroup, bias_gmem=None):
        self.sizes, self.rule, self.smem, self.warpgroup, self.bias_gmem = sizes, rule, smem, warpgroup, bias_gmem
        self.shape = BLOCK, sizes.chunk
        self.group_size = sizes.experts // rule.num_groups
        self.first_chunk, self.chunks = warpgroup * sizes.chunks, range(sizes.chunks)
        self.said_before = 0  # how often the warpgroups have told each other something

    # Logits, scores, and what is chosen by.

    def load(self, logits_gmem, rows) -> None:
        loaded = self.smem.loaded.at[self.warpgroup]
        for n in self.chunks:
            window = logits_gmem.at[rows, self.columns(n)]
            plgpu.copy_gmem_to_smem(window, self.smem.logits_smem.at[self.warpgroup, n], loaded)
        plgpu.barrier_wait(loaded)

    def score(self) -> None:
        """Logits become scores."""
        scores_smem = self.smem.scores_smem
        if self.rule.score == "sigmoid":
            self.in_place(lambda n, logits: 1.0 / (1.0 + jnp.exp(-logits)))
        elif self.rule.score == "softmax":
            self.in_place(lambda n, logits: jnp.where(self.ids(n) < self.sizes.experts, logits, -jnp.inf))
            row_max = _row_max(self.tiles())
            peak = self.across(functools.reduce(jnp.maximum, self.told(scores_smem, row_max)))
            self.in_place(lambda n, logits: jnp.exp(logits - peak))
            row_sum = jnp.sum(sum(self.tiles()), axis=1)
            total = self.across(sum(self.told(scores_smem, row_sum)))
            self.in_place(lambda n, exps: exps / total)

    def in_place(self, change) -> None:
        """A loop even over few chunks: equal logits become equal scores, whatever the compiler does."""
        logits_smem, warpgroup = self.smem.logits_smem, self.warpgroup

        @pl.loop(0, self.sizes.chunks)
        def _(n):
            logits_smem[warpgroup, n] = change(n, logits_smem[warpgroup, n])

    def select(self):
        """What the choice is made by: scores with their bias. Columns without an expert cannot be chosen."""
        selection = self.tiles() if self.bias_gmem is None else [self.biased(n) for n in self.chunks]
        return [jnp.where(self.ids(n) < self.sizes.experts, tile, -jnp.inf) for n, tile in enumerate(selection)]

    def biased(self, n: int):
        bias = plgpu.load(self.bias_gmem.at[self.columns(n)], layout=COLUMNS, optimized=False)
        return self.smem.logits_smem[self.warpgroup, n] + lax.broadcast_in_dim(bias, self.shape, (1,))

    # Groups of experts.

    def only_best_groups(self, selection):
        """Leaves only experts of the best groups to choose from: of equal groups, the first ones."""
        groups_smem, own_groups = self.smem.groups_smem, self.rule.num_groups // self.sizes.warpgroups
        first_group = self.warpgroup * own_groups
        for group in range(own_groups):
            groups_smem[first_group + group] = self.group_score(selection, first_group, group)
        self.wait_for_all()
        scores = [plgpu.load(groups_smem.at[g], layout=ROWS, optimized=False) for g in range(self.rule.num_groups)]
        kept = list(selection)
        for group in range(own_groups):
            mine = plgpu.load(groups_smem.at[first_group + group], layout=ROWS, optimized=False)
            num_better = self.across(
                sum(
                    jnp.where((other > mine) | ((other == mine) & (g < first_group + group)), 1.0, 0.0)
                    for g, other in enumerate(scores)
                )
            )
            for n in self.chunks_of(group):
                is_out = (self.groups_of(n) == first_group + group) & (num_better >= self.rule.top_groups)
                kept[n] = jnp.where(is_out, -jnp.inf, kept[n])
        return kept

    def group_score(self, selection, first_group, group: int):
        """The largest score in a group, or the sum of the largest two."""
        best = plgpu.layout_cast(jnp.full(self.shape, -jnp.inf), WGMMA)
        second = best
        for n in self.chunks_of(group):
            values = jnp.where(self.groups_of(n) == first_group + group, selection[n], -jnp.inf)
            second = jnp.maximum(second, jnp.minimum(best, values))
            best = jnp.maximum(best, values)
        largest = jnp.max(best, axis=1)
        if self.rule.group_score == "max":
            return largest
        columns = functools.partial(_iota, self.shape, 1)
        place = jnp.min(jnp.where(best == self.across(largest), columns(), NOTHING), axis=1)
        return largest + jnp.max(jnp.where(columns() == self.across(place), second, best), axis=1)

    def chunks_of(self, group: int) -> range:
        """Of a group of this warpgroup's, counted from 0."""
        begin, end = group * self.group_size, (group + 1) * self.group_size
        return range(begin // self.sizes.chunk, pl.cdiv(end, self.sizes.chunk))

    def groups_of(self, n: int):
        return self.ids(n) // self.group_size

    # Choosing.

    def choose(self, selection):
        """Weights and experts of each choice, as vectors."""
        weights, experts = [], []
        for _ in range(self.rule.top_k):
            best, expert = self.next_best(selection)
            selection = [
                jnp.where(self.ids(n) == self.across(expert), -jnp.inf, tile) for n, tile in enumerate(selection)
            ]
            weights.append(best if self.bias_gmem is None else self.score_of(expert))
            experts.append(expert)
        return weights, experts

    def next_best(self, selection):
        """The largest score of all warpgroups, and its expert: the lowest among equals."""
        largest = _row_max(selection)
        places = [jnp.where(tile == self.across(largest), self.ids(n), NOTHING) for n, tile in enumerate(selection)]
        expert = jnp.min(functools.reduce(jnp.minimum, places), axis=1)
        slot, experts_smem = self.said_before % 2, self.smem.experts_smem
        experts_smem[slot, self.warpgroup] = expert
        all_scores = self.told(self.smem.scores_smem, largest)
        best, chosen = all_scores[0], plgpu.load(experts_smem.at[slot, 0], layout=ROWS, optimized=False)
        for w in range(1, self.sizes.warpgroups):
            other = plgpu.load(experts_smem.at[slot, w], layout=ROWS, optimized=False)
            chosen = jnp.where(all_scores[w] > best, other, chosen)
            best = jnp.maximum(best, all_scores[w])
        return best, chosen

    def score_of(self, expert):
        """Without the bias."""
        logits_smem, warpgroup = self.smem.logits_smem, self.warpgroup
        found = sum(jnp.where(self.ids(n) == self.across(expert), logits_smem[warpgroup, n], 0.0) for n in self.chunks)
        return sum(self.told(self.smem.scores_smem, jnp.sum(found, axis=1)))

    # Between warpgroups.

    def told(self, values_smem, vector):
        """Every warpgroup's vector, in their order."""
        slot = self.said_before % 2
        values_smem[slot, self.warpgroup] = vector
        self.wait_for_all()
        warpgroups = range(self.sizes.warpgroups)
        return [plgpu.load(values_smem.at[slot, w], layout=ROWS, optimized=False) for w in warpgroups]

    def wait_for_all(self) -> None:
        self.said_before += 1
        plgpu.barrier_arrive(self.smem.said)
        plgpu.barrier_wait(self.smem.said)

    # Tiles.

    def tiles(self):
        return [self.smem.logits_smem[self.warpgroup, n] for n in self.chunks]

    def columns(self, n: int):
        return pl.ds((self.first_chunk + n) * self.sizes.chunk, self.sizes.chunk)

    def ids(self, n: int):
        return _iota(self.shape, 1) + (self.first_chunk + n) * self.sizes.chunk

    def across(self, vector):
        return lax.broadcast_in_dim(vector, self.shape, (0,))


class _Counts:
    """The tokens of a warpgroup's experts in its block, counted 16 experts at a time."""

    def __init__(self, choice: _Choice, block, counts_gmem):
        self.sizes, self.smem, self.warpgroup = choice.sizes, choice.smem, choice.warpgroup
        self.first_chunk, self.block, self.counts_gmem = choice.first_chunk, block, counts_gmem

    def count(self, experts):
        """Writes how many tokens chose each expert. Returns, for choices of them, the earlier tokens of the same expert."""
        square, shape = (BLOCK, BLOCK), (BLOCK, COUNTED)
        is_until = _iota(square, 1) <= _iota(square, 0)
        self.smem.until_smem[self.warpgroup] = jnp.where(is_until, 1.0, 0.0).astype(jnp.bfloat16)
        is_token = self.block * BLOCK + _iota(shape, 0) < self.sizes.tokens

        def add(turn, ranks):
            first = self.first_chunk * self.sizes.chunk + turn * COUNTED
            is_of = [lax.broadcast_in_dim(expert, shape, (0,)) == _iota(shape, 1) + first for expert in experts]
            num_until = self.num_until(functools.reduce(jnp.logical_or, is_of) & is_token)
            # The last row counts them all. A sum over rows would go through scratch memory that warpgroups share.
            self.smem.total_smem[self.warpgroup] = num_until
            last_smem = self.smem.total_smem.at[self.warpgroup, BLOCK - 1]
            total = plgpu.load(last_smem, layout=COLUMNS, optimized=False)
            self.write(first, total.astype(jnp.int32))
            return tuple(
                before + jnp.sum(jnp.where(is_here, num_until - 1.0, 0.0), axis=1)
                for before, is_here in zip(ranks, is_of, strict=True)
            )

        zeros = plgpu.layout_cast(jnp.zeros((BLOCK,), jnp.float32), ROWS)
        turns = pl.cdiv(self.sizes.chunks * self.sizes.chunk, COUNTED)
        return lax.fori_loop(0, turns, add, (zeros,) * len(experts))

    def num_until(self, is_chosen):
        """`[64, 16]`: up to each token, how many chose the expert."""
        chosen_smem = self.smem.chosen_smem.at[self.warpgroup]
        chosen_smem[...] = jnp.where(is_chosen, 1.0, 0.0).astype(jnp.bfloat16)
        plgpu.commit_smem()

        def multiply(acc):
            plgpu.wgmma(acc, self.smem.until_smem.at[self.warpgroup], chosen_smem)
            return acc[...]

        return pl.run_scoped(multiply, plgpu.ACC((BLOCK, COUNTED)))

    def write(self, first, counts) -> None:
        counts_gmem, block, num_experts = self.counts_gmem, self.block, self.sizes.experts
        if num_experts % COUNTED == 0:

            @pl.when(first < num_experts)
            def _():
                counts_gmem[block, pl.ds(first, COUNTED)] = counts

            return
        counts_smem, warpgroup = self.smem.counts_smem, self.warpgroup
        counts_smem[warpgroup] = counts

        @pl.loop(0, lax.clamp(0, num_experts - first, COUNTED))
        def _(place):
            counts_gmem[block, first + place] = counts_smem[warpgroup, place]


def _normalised(weights, rule: RoutingRule):
    if rule.score == "topk_softmax":
        exps = [jnp.exp(weight - weights[0]) for weight in weights]
        weights = [value / sum(exps) for value in exps]
    if rule.renormalize:
        total = sum(weights) + rule.epsilon
        weights = [weight / total for weight in weights]
    return [weight * rule.scale for weight in weights]


def _row_max(tiles):
    return jnp.max(functools.reduce(jnp.maximum, tiles), axis=1)


def _iota(shape: tuple[int, int], dim: int):
    return plgpu.broadcasted_iota(jnp.int32, shape, dim, layout=WGMMA)


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
