"""Routing a few tokens in one launch: gate matmul, choice and decode plan, in one cluster of blocks on Hopper.

The gate's columns are dealt out to the blocks of the cluster, so that together they read it quickly. Each multiplies its
columns by the tokens' (the gate is `wgmma`'s A, the tokens are N) and pushes the partial logits into the shared memory of
the block that owns the tokens: groups of eight, one owner each. The owner adds the parts in a fixed order. An RMSNorm in
front costs an exchange of sums of squares, while the gate is on its way.

Choosing needs neither a sort nor a loop over the choices. A warpgroup has one token; an expert's rank is the number of
experts that beat it, counted on a 64 x 64 tile of comparisons at a time: E squared comparisons, but no chain of
dependent reductions.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Device, Implementation
from pallas_kernels.route import reference
from pallas_kernels.route.api import NUM_SIGNALS, DecodePlan, Routing, RoutingRule

MAX_TOKENS = 64
MAX_EXPERTS = 384
MAX_EXPERTS_BESIDE_NORM = (
    128  # with more, registers spill when the kernel normalises as well: XLA does it in a launch before
)
TILE = 64  # rows of a wgmma operand; columns of 128 bytes
GROUP = 8  # tokens that one block owns
MAX_BLOCKS = 8  # the largest portable cluster
LEAST_SMS = 8  # fewer are the interpreter's, which has no access to the shared memory of other blocks
RING_BYTES = 96 * 1024  # at most, of the ring that the gate streams through
SHARED_BYTES = 224 * 1024  # of a block; barriers and alignment take the rest

_OPERAND = (plgpu.TilingTransform((8, TILE)), plgpu.SwizzleTransform(128))
_PART = (plgpu.TilingTransform((8, GROUP)), plgpu.SwizzleTransform(32))
ROWS = plgpu.Layout.WGMMA.reduce(1)  # a vector that varies along the rows of a tile
COLUMNS = plgpu.Layout.WGMMA.reduce(0)  # one that varies along its columns


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """What the kernel is compiled for. `experts` are real ones, `rows` those of the gate array, `tiles` of 64 cover them."""

    tokens: int
    experts: int
    rows: int
    width: int
    blocks: int
    has_norm: bool

    @property
    def token_tile(self) -> int:
        return max(GROUP, 1 << (self.tokens - 1).bit_length())

    @property
    def groups(self) -> int:
        return self.token_tile // GROUP

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.rows, TILE)

    @property
    def width_tiles(self) -> int:
        return self.width // TILE

    @property
    def workers(self) -> int:
        """Warpgroups that multiply and choose; one more loads. With many experts, each needs more registers."""
        return 4 if self.tiles <= 2 else 2 if self.tiles <= 4 else 1

    @property
    def multipliers(self) -> int:
        """Workers that have a row tile of the gate."""
        return min(self.workers, self.tiles)

    @property
    def owned(self) -> int:
        """Groups of tokens that a block chooses for."""
        return pl.cdiv(self.groups, self.blocks)

    @property
    def replicas(self) -> int:
        """Blocks that share a group, each choosing for every so many-th token of it."""
        return max(1, self.blocks // self.groups)

    @property
    def places(self) -> int:
        """Tokens of a group that one block chooses for."""
        return GROUP // self.replicas

    def owners(self, group: int) -> list[int]:
        """The blocks that choose for the tokens of a group, without those that would find none."""
        if self.owned > 1:
            return [group % self.blocks]
        num_tokens = max(0, self.tokens - group * GROUP)
        return [group * self.replicas + replica for replica in range(min(self.replicas, num_tokens))]

    @property
    def choosers(self) -> int:
        """Blocks that have tokens; the first of them is block 0."""
        return len({owner for group in range(self.groups) for owner in self.owners(group)})

    @property
    def steps(self) -> int:
        """Tiles of the width that a block multiplies, at most."""
        return pl.cdiv(self.width_tiles, self.blocks)

    @property
    def stages(self) -> int:
        ring_bytes = min(RING_BYTES, SHARED_BYTES - self.other_bytes)
        return min(self.steps, ring_bytes // (2 * self.tiles * TILE * TILE))

    @property
    def other_bytes(self) -> int:
        """Shared memory beside the ring."""
        tokens_bytes = 2 * self.steps * self.token_tile * TILE
        parts_bytes = 4 * self.owned * self.blocks * self.tiles * TILE * GROUP
        choice_bytes = 4 * self.tiles * TILE * (2 * self.owned * GROUP + _Choice.NUM_SCORES * self.workers + 4)
        flags_bytes = 4 * self.blocks * TILE * GROUP
        norm_bytes = 4 * TILE * (TILE + self.workers + self.steps) if self.has_norm else 0
        return tokens_bytes + parts_bytes + choice_bytes + flags_bytes + norm_bytes + 8 * TILE * self.workers


def route(
    x_TD,
    gate_ED,
    *,
    rule: RoutingRule,
    gate_bias_E=None,
    selection_bias_E=None,
    norm_weight_D=None,
    norm_epsilon: float = 1e-6,
) -> Routing:
    if norm_weight_D is not None and gate_ED.shape[0] > MAX_EXPERTS_BESIDE_NORM:
        biases = dict(gate_bias_E=gate_bias_E, selection_bias_E=selection_bias_E)
        norm = dict(norm_weight_D=norm_weight_D, norm_epsilon=norm_epsilon)
        return reference.normalising(route)(x_TD, gate_ED, rule=rule, **biases, **norm)
    blocks = _blocks(dispatch.current_device().num_sms, x_TD, gate_ED)
    arrays = (x_TD, gate_ED, gate_bias_E, selection_bias_E, norm_weight_D)
    return _route(*arrays, rule=rule, norm_epsilon=norm_epsilon, blocks=blocks)


def _blocks(num_sms: int, x_TD, gate_ED) -> int:
    """Blocks in the cluster: a power of two, each with something to multiply."""
    if num_sms < LEAST_SMS:
        return 1
    # 32 tokens among 256 experts: registers spill with eight blocks, not with four.
    largest = MAX_BLOCKS // 2 if gate_ED.shape[0] > 2 * TILE and x_TD.shape[0] > GROUP else MAX_BLOCKS
    return min(largest, 1 << ((x_TD.shape[1] // TILE).bit_length() - 1))


@functools.partial(jax.jit, static_argnames=("rule", "norm_epsilon", "blocks"))
def _route(
    x_TD, gate_ED, gate_bias_E, selection_bias_E, norm_weight_D, *, rule: RoutingRule, norm_epsilon: float, blocks: int
) -> Routing:
    sizes = _sizes(x_TD, gate_ED, blocks, has_norm=norm_weight_D is not None)
    num_tokens, num_experts = sizes.tokens, sizes.experts
    x_TD, gate_ED = _rows_for_tma(x_TD), _rows_for_tma(gate_ED)
    biases = {"gate": gate_bias_E, "selection": selection_bias_E}
    biases = {name: bias_E.astype(jnp.float32) for name, bias_E in biases.items() if bias_E is not None}
    norm_arrays = () if norm_weight_D is None else (norm_weight_D,)
    weights_TA, experts_TA, logits_TE, combine_ET, active_E, num_active, signals, *normed_TD = plgpu.kernel(
        functools.partial(_route_kernel, sizes=sizes, rule=rule, norm_epsilon=norm_epsilon, bias_names=tuple(biases)),
        out_type=(
            jax.ShapeDtypeStruct((num_tokens, rule.top_k), jnp.float32),
            jax.ShapeDtypeStruct((num_tokens, rule.top_k), jnp.int32),
            jax.ShapeDtypeStruct((num_tokens, num_experts), jnp.float32),
            jax.ShapeDtypeStruct((num_experts, sizes.token_tile), jnp.float32),
            jax.ShapeDtypeStruct((num_experts,), jnp.int32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
            jax.ShapeDtypeStruct((NUM_SIGNALS,), jnp.int32),
            *(jax.ShapeDtypeStruct(x_TD.shape, x_TD.dtype) for _ in norm_arrays),
        ),
        cluster=(blocks,),
        cluster_names=("block",),
        num_threads=sizes.workers + 1,
        thread_name="warpgroup",
        kernel_name="route_decode",
        scratch_types=_scratch(sizes, num_biases=len(biases), norm_dtype=norm_arrays[0].dtype if norm_arrays else None),
        compiler_params=plgpu.CompilerParams(approx_math=False, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(x_TD, gate_ED, *norm_arrays, *biases.values())
    plan = DecodePlan(combine_ET, active_E, num_active, signals)
    return Routing(weights_TA, experts_TA, logits_TE, plan, normed_TD=normed_TD[0][:num_tokens] if normed_TD else None)


def _sizes(x_TD, gate_ED, blocks: int, *, has_norm: bool) -> _Sizes:
    (num_tokens, width), num_experts = x_TD.shape, gate_ED.shape[0]
    rows = num_experts if num_experts < 8 else num_experts + -num_experts % 8
    return _Sizes(num_tokens, num_experts, rows, width, blocks, has_norm)


def _rows_for_tma(array_RD: jax.Array) -> jax.Array:
    """TMA wants fewer than 8 rows or a multiple of 8. Rows past the end of an array read as zeros."""
    rows = array_RD.shape[0]
    return array_RD if rows < 8 else jnp.pad(array_RD, ((0, -rows % 8), (0, 0)))


def _scratch(sizes: _Sizes, *, num_biases: int, norm_dtype) -> dict[str, Any]:
    tiles, stages, owned = sizes.tiles, sizes.stages, sizes.owned
    return dict(
        gate_smem=plgpu.SMEM((stages, tiles, TILE, TILE), jnp.bfloat16, transforms=_OPERAND),
        x_smem=plgpu.SMEM((sizes.steps, sizes.token_tile, TILE), jnp.bfloat16, transforms=_OPERAND),
        bias_smem=plgpu.SMEM((max(1, num_biases), tiles, TILE), jnp.float32),
        parts_smem=plgpu.SMEM((owned, sizes.blocks, tiles, TILE, GROUP), jnp.float32, transforms=_PART),
        logits_smem=plgpu.SMEM((owned, tiles, GROUP, TILE), jnp.float32),
        ranks_smem=plgpu.SMEM((owned, tiles, GROUP, TILE), jnp.int32),
        # For each block: its sums of squares, and once the tokens are normalised, the experts that its tokens chose.
        flags_smem=plgpu.SMEM((sizes.blocks, TILE, GROUP), jnp.float32, transforms=_PART),
        # One token's numbers on their way from rows to columns, for each worker.
        scores_smem=plgpu.SMEM((sizes.workers, _Choice.NUM_SCORES, tiles, TILE), jnp.float32),
        chosen_weights_smem=plgpu.SMEM((sizes.workers, TILE), jnp.float32),
        chosen_experts_smem=plgpu.SMEM((sizes.workers, TILE), jnp.int32),
        counts_smem=plgpu.SMEM((2, tiles * TILE), jnp.int32),
        full=plgpu.Barrier(num_arrivals=tiles, num_barriers=stages),
        empty=plgpu.Barrier(num_arrivals=sizes.multipliers, num_barriers=stages),
        x_loaded=plgpu.Barrier(num_arrivals=1 + sizes.has_norm, num_barriers=sizes.steps),
        biases_loaded=plgpu.Barrier(num_arrivals=max(1, num_biases * tiles)),
        parts_received=plgpu.Barrier(num_arrivals=owned * sizes.blocks * tiles),
        logits_done=plgpu.Barrier(num_arrivals=sizes.workers),
        tokens_done=plgpu.Barrier(num_arrivals=sizes.workers),
        flags_received=plgpu.Barrier(num_arrivals=max(1, sizes.choosers - 1)),
        **(_norm_scratch(sizes, norm_dtype) if sizes.has_norm else {}),
    )


def _norm_scratch(sizes: _Sizes, dtype) -> dict[str, Any]:
    return dict(
        norm_weight_smem=plgpu.SMEM((sizes.steps, TILE), dtype),
        squares_smem=plgpu.SMEM(
            (TILE, TILE), jnp.float32
        ),  # rows of tokens, summed over the block's tiles of the width
        inverse_smem=plgpu.SMEM((sizes.workers, TILE), jnp.float32),
        sums_received=plgpu.Barrier(num_arrivals=sizes.blocks),
        x_normed=plgpu.Barrier(num_arrivals=sizes.workers),
    )


def _route_kernel(
    x_gmem, gate_gmem, *refs, sizes: _Sizes, rule: RoutingRule, norm_epsilon: float, bias_names: tuple[str, ...],
    **scratch,
):  # fmt: skip
    norm_weight_gmem, normed_gmem = None, None
    if sizes.has_norm:
        norm_weight_gmem, normed_gmem, refs = refs[0], refs[-1], refs[1:-1]
    bias_gmems, outputs = refs[: len(bias_names)], refs[len(bias_names) :]
    *choice_gmems, active_gmem, num_active_gmem, signals_gmem = outputs
    smem = types.SimpleNamespace(**scratch)
    block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    group, replica = block // sizes.replicas, lax.rem(block, sizes.replicas)
    has_tokens = group * GROUP + replica < sizes.tokens

    @pl.when(warpgroup == sizes.workers)
    def _load_all():
        @plgpu.warp_map
        def _(warp):
            @pl.when(warp == 0)
            def _():
                _load(sizes, x_gmem, gate_gmem, bias_gmems, norm_weight_gmem, smem, block)

    @pl.when((warpgroup == sizes.workers - 1) & (block == sizes.blocks - 1))
    def _clear_signals():
        zeros = jnp.zeros((NUM_SIGNALS,), jnp.int32)
        signals_gmem[...] = plgpu.layout_cast(zeros, plgpu.Layout.WG_STRIDED((NUM_SIGNALS,), vec_size=4))

    if sizes.has_norm:

        @pl.when(warpgroup < sizes.workers)
        def _normalise_rows():
            _normalise(sizes, norm_epsilon, smem, block, warpgroup, normed_gmem)

    @pl.when(warpgroup < sizes.multipliers)
    def _multiply_all():
        _multiply(sizes, smem, block, warpgroup)

    @pl.when((warpgroup < sizes.workers) & has_tokens)
    def _finish_logits():
        if bias_names:
            plgpu.barrier_wait(smem.biases_loaded)
        plgpu.barrier_wait(smem.parts_received)
        _add_parts(sizes, smem, warpgroup)
        plgpu.barrier_arrive(smem.logits_done)
        plgpu.barrier_wait(smem.logits_done)

    @pl.when(warpgroup < sizes.workers)
    def _choose_all():
        choice = _Choice(sizes, rule, bias_names, smem, warpgroup, *choice_gmems)

        @pl.loop(warpgroup, sizes.owned * sizes.places, step=sizes.workers)
        def _(turn):
            owned, place = turn // sizes.places, replica + lax.rem(turn, sizes.places) * sizes.replicas
            token = (group + owned * sizes.blocks) * GROUP + place

            @pl.when(token < sizes.tokens)
            def _():
                choice.choose(owned, place, token)

            @pl.when(token >= sizes.tokens)
            def _():
                choice.choose_nothing(owned, place, token)

        plgpu.barrier_arrive(smem.tokens_done)
        if sizes.has_norm:
            plgpu.wait_smem_to_gmem(0)

    @pl.when((warpgroup == 0) & has_tokens)
    def _tell_active():
        plgpu.barrier_wait(smem.tokens_done)
        flags = _own_flags(sizes, rule, smem, replica)
        if sizes.choosers > 1:
            _send_flags(sizes, smem, flags, block)

        @pl.when(block == 0)
        def _():
            _write_active(sizes, rule, smem, _all_flags(sizes, smem, flags), active_gmem, num_active_gmem)


def _load(sizes: _Sizes, x_gmem, gate_gmem, bias_gmems, norm_weight_gmem, smem, block) -> None:
    """One warp streams the block's columns of gate and tokens through the ring."""
    for index, bias_gmem in enumerate(bias_gmems):
        for i in range(sizes.tiles):
            source = bias_gmem.at[pl.ds(_traced(i * TILE), TILE)]
            plgpu.copy_gmem_to_smem(source, smem.bias_smem.at[index, i], smem.biases_loaded)

    @pl.loop(0, _num_steps(sizes, block))
    def _(step):
        source = x_gmem.at[_all_tokens(sizes), _columns(sizes, block, step)]
        plgpu.copy_gmem_to_smem(source, smem.x_smem.at[step], smem.x_loaded.at[step])
        if norm_weight_gmem is not None:
            source = norm_weight_gmem.at[_columns(sizes, block, step)]
            plgpu.copy_gmem_to_smem(source, smem.norm_weight_smem.at[step], smem.x_loaded.at[step])

    @pl.loop(0, _num_steps(sizes, block))
    def _(step):
        slot = lax.rem(step, sizes.stages)

        @pl.when(step >= sizes.stages)
        def _():
            plgpu.barrier_wait(smem.empty.at[slot])

        for i in range(sizes.tiles):
            source = gate_gmem.at[pl.ds(_traced(i * TILE), TILE), _columns(sizes, block, step)]
            plgpu.copy_gmem_to_smem(source, smem.gate_smem.at[slot, i], smem.full.at[slot])


def _num_steps(sizes: _Sizes, block):
    return (sizes.width_tiles - block + sizes.blocks - 1) // sizes.blocks


def _columns(sizes: _Sizes, block, step):
    return pl.ds((block + step * sizes.blocks) * TILE, TILE)


def _all_tokens(sizes: _Sizes):
    return pl.ds(_traced(0), sizes.token_tile)


def _traced(start: int):
    """A start that Pallas does not compare with the array's size: TMA fills what lies outside with zeros."""
    return lax.axis_index("block") * 0 + start


def _normalise(sizes: _Sizes, epsilon: float, smem, block, warpgroup, normed_gmem) -> None:
    """Replaces the block's columns of the tokens by normalised ones, and writes them."""
    num_steps = _num_steps(sizes, block)

    @pl.when(warpgroup == 0)
    def _():
        total = _sum_of_squares(sizes, smem, num_steps)
        for other in range(sizes.blocks):
            _push(sizes, total, smem.flags_smem.at[block], smem.sums_received, other)

    plgpu.barrier_wait(smem.sums_received)
    totals = functools.reduce(jnp.add, [smem.flags_smem[other] for other in range(sizes.blocks)])
    inverse_smem = smem.inverse_smem.at[warpgroup]
    inverse_smem[...] = lax.rsqrt(jnp.max(totals, axis=1) / sizes.width + epsilon)
    inverse_T = plgpu.load(inverse_smem.at[pl.ds(0, sizes.token_tile)], layout=COLUMNS, optimized=False)

    @pl.loop(warpgroup, num_steps, step=sizes.workers)
    def _(step):
        columns = _columns(sizes, block, step)

        @pl.when(warpgroup > 0)  # the first one has waited: a second time would be for the next load
        def _():
            plgpu.barrier_wait(smem.x_loaded.at[step])

        weight_D = plgpu.load(smem.norm_weight_smem.at[step], layout=ROWS, optimized=False).astype(jnp.float32)
        x_DT = _load_transposed(smem.x_smem.at[step])
        inverse_DT, weight_DT = (
            lax.broadcast_in_dim(vector, x_DT.shape, (dim,)) for vector, dim in ((inverse_T, 1), (weight_D, 0))
        )
        normed_DT = (x_DT * inverse_DT * weight_DT).astype(jnp.bfloat16)
        smem.x_smem.at[step].T[...] = plgpu.layout_cast(normed_DT, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem.x_smem.at[step], normed_gmem.at[_all_tokens(sizes), columns])

    plgpu.barrier_arrive(smem.x_normed)
    plgpu.barrier_wait(smem.x_normed)


def _sum_of_squares(sizes: _Sizes, smem, num_steps):
    """Each token's, over the block's columns: `[64, 8]`, a row for each token, all of it the same number."""

    def add(step, total):
        plgpu.barrier_wait(smem.x_loaded.at[step])
        x_DT = _load_transposed(smem.x_smem.at[step])
        return total + x_DT * x_DT

    zeros = plgpu.layout_cast(jnp.zeros((TILE, sizes.token_tile), jnp.float32), plgpu.Layout.WGMMA)
    squares_DT = lax.fori_loop(0, num_steps, add, zeros)
    target = smem.squares_smem.at[pl.ds(0, sizes.token_tile)]
    target.T[...] = plgpu.layout_cast(squares_DT, plgpu.Layout.WGMMA_TRANSPOSED)
    squares_TD = plgpu.load(smem.squares_smem, layout=plgpu.Layout.WGMMA, optimized=False)
    return lax.broadcast_in_dim(jnp.sum(squares_TD, axis=1), (TILE, GROUP), (0,))


def _load_transposed(tile_smem):
    tile = plgpu.load(tile_smem.T, layout=plgpu.Layout.WGMMA_TRANSPOSED)
    return plgpu.layout_cast(tile, plgpu.Layout.WGMMA).astype(jnp.float32)


def _multiply(sizes: _Sizes, smem, block, warpgroup) -> None:
    """A worker's row tiles of the gate times all tokens, pushed to the tokens' owners."""
    num_steps = _num_steps(sizes, block)

    def accumulate(*accumulators):
        @pl.loop(0, num_steps)
        def _(step):
            slot = lax.rem(step, sizes.stages)
            plgpu.barrier_wait(smem.full.at[slot])
            if not sizes.has_norm:
                plgpu.barrier_wait(smem.x_loaded.at[step])
            for turn, acc in enumerate(accumulators):
                tile = lax.min(warpgroup + turn * sizes.workers, sizes.tiles - 1)
                plgpu.wgmma(acc, smem.gate_smem.at[slot, tile], smem.x_smem.at[step].T)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(smem.empty.at[slot])

        return tuple(acc[...] for acc in accumulators)

    turns = pl.cdiv(sizes.tiles, sizes.workers)
    parts = pl.run_scoped(accumulate, *[plgpu.ACC((TILE, sizes.token_tile))] * turns)

    for turn, part in enumerate(parts):
        tile = warpgroup + turn * sizes.workers

        @pl.when(tile < sizes.tiles)
        def _(part=part, tile=tile):
            for group in range(sizes.groups):
                values = part[:, group * GROUP : (group + 1) * GROUP]
                target = smem.parts_smem.at[group // sizes.blocks if sizes.owned > 1 else 0, block, tile]
                for owner in sizes.owners(group):
                    _push(sizes, values, target, smem.parts_received, owner)


def _push(sizes: _Sizes, values, part_smem, received, owner: int) -> None:
    if sizes.blocks > 1:
        plgpu.async_store_smem(
            values, part_smem, received, cluster_idx=jnp.int32(owner), cluster_dim="block", optimized=False
        )
    else:
        part_smem[...] = values
        plgpu.barrier_arrive(received)


def _add_parts(sizes: _Sizes, smem, warpgroup) -> None:
    """Adds the blocks' parts, in the order of the blocks, for all tokens that this block owns."""
    for owned in range(sizes.owned):
        for turn in range(pl.cdiv(sizes.tiles, sizes.workers)):
            tile = warpgroup + turn * sizes.workers

            @pl.when(tile < sizes.tiles)
            def _(owned=owned, tile=tile):
                total = smem.parts_smem[owned, 0, tile]
                for part in range(1, sizes.blocks):
                    total = total + smem.parts_smem[owned, part, tile]
                smem.logits_smem.at[owned, tile].T[...] = plgpu.layout_cast(total, plgpu.Layout.WGMMA_TRANSPOSED)


class _Choice:
    """One worker's choice of experts for one token after the other.

    Scores live in vectors of 64 that vary along the rows of a tile, one vector for each tile of experts; comparing all
    with all takes them through shared memory, to read them back varying along the columns.
    """

    NUM_SCORES = 6
    EXPS, SELECTION, GROUP_PARTS, GROUP_SCORES, MASKED, WEIGHTS = range(NUM_SCORES)

    def __init__(
        self, sizes: _Sizes, rule: RoutingRule, bias_names: tuple[str, ...], smem, warpgroup,
        weights_gmem, experts_gmem, logits_gmem, combine_gmem,
    ):  # fmt: skip
        self.weights_gmem, self.experts_gmem = weights_gmem, experts_gmem
        self.logits_gmem, self.combine_gmem = logits_gmem, combine_gmem
        self.sizes, self.rule, self.bias_names, self.smem, self.warpgroup = sizes, rule, bias_names, smem, warpgroup
        self.tiles = range(sizes.tiles)
        # Columns compared at a time: with more, the vectors of many experts would not fit into registers.
        self.chunk = min(32 if sizes.tiles <= 2 else 16, max(8, 1 << (sizes.experts - 1).bit_length()))
        self.num_chunks = pl.cdiv(sizes.experts, self.chunk)

    def choose(self, owned, place, token) -> None:
        logits = self.logits(owned, place)
        self.write(self.logits_gmem, logits, lambda experts: (token, experts))
        scores, exps = self.scores(logits)
        selection = [self.if_real(i, score) for i, score in enumerate(self.plus_bias("selection", scores))]
        if self.rule.num_groups > 1:
            selection = self.only_best_groups(selection)
        ranks = self.ranks(selection)
        for i in self.tiles:
            self.smem.ranks_smem[owned, i, place] = ranks[i]
        weights = self.weights(scores, exps, ranks)
        self.publish(self.WEIGHTS, weights)
        self.write_choices(owned, place, token)
        self.write(self.combine_gmem, weights, lambda experts: (experts, token))

    def choose_nothing(self, owned, place, token) -> None:
        zeros = plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), ROWS)
        self.write(self.combine_gmem, [zeros for _ in self.tiles], lambda experts: (experts, token))
        for i in self.tiles:
            self.smem.ranks_smem[owned, i, place] = self.row_ids(0) * 0 + self.rule.top_k

    def logits(self, owned, place):
        """Experts that do not exist get -inf."""
        logits = [self.rows(self.smem.logits_smem.at[owned, i, place]) for i in self.tiles]
        return [self.if_real(i, logit) for i, logit in enumerate(self.plus_bias("gate", logits))]

    def plus_bias(self, name: str, values):
        if name not in self.bias_names:
            return values
        bias_smem = self.smem.bias_smem.at[self.bias_names.index(name)]
        return [value + self.rows(bias_smem.at[i]) for i, value in enumerate(values)]

    def if_real(self, i: int, values):
        if (i + 1) * TILE <= self.sizes.experts:
            return values
        return jnp.where(self.row_ids(i) < self.sizes.experts, values, -jnp.inf)

    def scores(self, logits):
        """What the choice is made by, and the exponentials of the logits where the rule has a softmax."""
        if self.rule.score == "sigmoid":
            return [1.0 / (1.0 + jnp.exp(-logit)) for logit in logits], None
        peak = jnp.max(self.over_experts(self.SELECTION, logits, jnp.maximum, start=-jnp.inf), axis=1)
        exps = [jnp.exp(logit - peak) for logit in logits]
        if self.rule.score == "topk_softmax":
            return logits, exps
        total = self.total(self.EXPS, exps)
        return [value / total for value in exps], exps

    def only_best_groups(self, selection):
        """Selection scores with -inf in place of the experts outside the best groups."""
        best = 1 if self.rule.group_score == "max" else 2
        self.publish(self.SELECTION, selection)
        parts = [
            jnp.where(self.count(self.SELECTION, selection, i, self.is_same_group) < best, selection[i], 0.0)
            for i in self.tiles
        ]
        self.publish(self.GROUP_PARTS, parts)
        group_scores = [self.group_total(self.GROUP_PARTS, i) for i in self.tiles]
        self.publish(self.GROUP_SCORES, group_scores)
        kept = []
        for i in self.tiles:
            num_better = self.count(self.GROUP_SCORES, group_scores, i, self.is_first_of_other_group)
            kept.append(jnp.where(num_better < self.rule.top_groups, selection[i], -jnp.inf))
        return kept

    def group_total(self, name: int, i: int):
        """The sum of the scores in each expert's group. At most two of a group are not zero, so that any order is exact."""
        tile = self.over_chunks(lambda c, tile: tile + jnp.where(self.is_same_group(i, c), self.columns(name, c), 0.0))
        return jnp.sum(tile, axis=1)

    def is_same_group(self, i: int, c):
        return self.group(self.row_tile_ids(i)) == self.group(self.column_ids(c))

    def is_first_of_other_group(self, i: int, c):
        """A group counts once, through its first expert, whose order among the others is its group's."""
        group_size = self.sizes.experts // self.rule.num_groups
        is_first = lax.rem(self.column_ids(c), group_size) == 0
        return is_first & ~self.is_same_group(i, c) & (self.column_ids(c) < self.sizes.experts)

    def group(self, ids):
        return ids // (self.sizes.experts // self.rule.num_groups)

    def ranks(self, selection):
        self.publish(self.SELECTION, selection)
        return [self.count(self.SELECTION, selection, i) for i in self.tiles]

    def count(self, name: int, values, i: int, condition: Callable[[int, Any], Any] | None = None):
        """For each row of tile i: how many columns, on `condition`, are larger, or equal and of a lower id."""
        mine = lax.broadcast_in_dim(values[i], (TILE, self.chunk), (0,))

        def counting(is_better):
            def add(c, tile):
                counted = is_better(c, self.columns(name, c))
                if condition is not None:
                    counted = counted & condition(i, c)
                return tile + jnp.where(counted, 1.0, 0.0)

            return add

        def is_better_near(c, others):
            return (others > mine) | ((others == mine) & (self.column_ids(c) < self.row_tile_ids(i)))

        first, last = i * TILE // self.chunk, min(self.num_chunks, pl.cdiv((i + 1) * TILE, self.chunk))
        tile = self.over_chunks(counting(lambda c, others: others >= mine), stop=first)
        for c in range(first, last):
            tile = counting(is_better_near)(c, tile)
        tile = self.over_chunks(counting(lambda c, others: others > mine), first=last, start=tile)
        return jnp.sum(tile, axis=1).astype(jnp.int32)

    def over_chunks(self, add, *, first: int = 0, stop: int | None = None, start: Any = 0.0):
        """Folds `add(chunk of columns, tile)` over chunks, from a tile filled with `start`."""
        if isinstance(start, float):
            start = plgpu.layout_cast(jnp.full((TILE, self.chunk), start, jnp.float32), plgpu.Layout.WGMMA)
        return _fold(first, self.num_chunks if stop is None else stop, add, start)

    def weights(self, scores, exps, ranks):
        """The chosen experts' weights, zero elsewhere."""
        values = exps if self.rule.score == "topk_softmax" else scores
        weights = [jnp.where(rank < self.rule.top_k, value, 0.0) for rank, value in zip(ranks, values, strict=True)]
        if self.rule.score == "topk_softmax":
            total = self.total(self.MASKED, weights)
            weights = [weight / total for weight in weights]
        if self.rule.renormalize:
            total = self.total(self.MASKED, weights) + self.rule.epsilon
            weights = [weight / total for weight in weights]
        return [weight * self.rule.scale for weight in weights]

    def write_choices(self, owned, place, token) -> None:
        """Rows are now the places 0 to 63 of the token's choices; each takes the column of its rank."""

        def add(c, tiles):
            is_mine = self.chunk_of(self.smem.ranks_smem.at[owned], c, place) == self.row_tile_ids(0)
            weights = self.columns(self.WEIGHTS, c)
            ids = self.column_ids(c).astype(jnp.float32)
            return tiles[0] + jnp.where(is_mine, weights, 0.0), tiles[1] + jnp.where(is_mine, ids, 0.0)

        zeros = plgpu.layout_cast(jnp.zeros((TILE, self.chunk), jnp.float32), plgpu.Layout.WGMMA)
        weight, expert = (jnp.sum(tile, axis=1) for tile in _fold(0, self.num_chunks, add, (zeros, zeros)))
        self.smem.chosen_weights_smem[self.warpgroup] = weight
        self.smem.chosen_experts_smem[self.warpgroup] = expert.astype(jnp.int32)

        @pl.loop(0, self.rule.top_k)
        def _(place):
            self.weights_gmem[token, place] = self.smem.chosen_weights_smem[self.warpgroup, place]
            self.experts_gmem[token, place] = self.smem.chosen_experts_smem[self.warpgroup, place]

    def write(self, array_gmem, values, index: Callable[[Any], tuple[Any, ...]]) -> None:
        for i, tile in enumerate(values):
            staging = self.smem.scores_smem.at[self.warpgroup, self.MASKED, i]
            _write_tile(array_gmem, self.sizes.experts, i, tile, index, staging)

    def publish(self, name: int, values) -> None:
        for i in self.tiles:
            self.smem.scores_smem[self.warpgroup, name, i] = values[i]

    def total(self, name: int, values):
        return jnp.sum(self.over_experts(name, values, jnp.add), axis=1)

    def over_experts(self, name: int, values, combine, *, start: float = 0.0):
        """A tile of which each row is, combined along it, all experts' values combined."""
        self.smem.scores_smem[self.warpgroup, name, 0] = functools.reduce(combine, values)
        stop = min(self.num_chunks, TILE // self.chunk)
        return self.over_chunks(lambda c, tile: combine(tile, self.columns(name, c)), stop=stop, start=start)

    def rows(self, ref):
        return plgpu.load(ref, layout=ROWS, optimized=False)

    def columns(self, name: int, c):
        return self.chunk_of(self.smem.scores_smem.at[self.warpgroup], c, name, is_leading=True)

    def chunk_of(self, ref, c, index, *, is_leading: bool = False):
        """Chunk c of a vector in shared memory, varying along the columns of a tile of 64 rows."""
        per_tile = TILE // self.chunk
        tile, columns = c // per_tile, pl.ds(c % per_tile * self.chunk, self.chunk)
        vector = plgpu.load(
            ref.at[index, tile, columns] if is_leading else ref.at[tile, index, columns],
            layout=COLUMNS,
            optimized=False,
        )
        return lax.broadcast_in_dim(vector, (TILE, self.chunk), (1,))

    def column_ids(self, c):
        return self.iota(1) + c * self.chunk

    def row_tile_ids(self, i: int):
        return self.iota(0) + i * TILE

    def iota(self, dim: int):
        return plgpu.broadcasted_iota(jnp.int32, (TILE, self.chunk), dim, layout=plgpu.Layout.WGMMA)

    def row_ids(self, i: int):
        return _row_ids() + i * TILE


def _fold(first: int, stop: int, add, start):
    """`lax.fori_loop`, without the loop where it would be short."""
    if stop - first > 4:
        return lax.fori_loop(first, stop, add, start)
    return functools.reduce(lambda value, index: add(index, value), range(first, stop), start)


def _row_ids():
    return plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=ROWS)


def _write_tile(array_gmem, num_experts: int, i: int, values, index: Callable[[Any], tuple], staging_smem) -> None:
    """Writes the values of tile i's experts, as far as there are any, to the places that `index` gives for them."""
    left = num_experts - i * TILE
    if left >= TILE:
        array_gmem[index(pl.ds(i * TILE, TILE))] = values
        return
    staging_smem[...] = values

    @pl.loop(0, left)
    def _(place):
        array_gmem[index(i * TILE + place)] = staging_smem[place]


def _send_flags(sizes: _Sizes, smem, flags, block) -> None:
    @pl.when(block > 0)
    def _():
        _push(sizes, _packed(flags), smem.flags_smem.at[block], smem.flags_received, 0)


def _all_flags(sizes: _Sizes, smem, flags):
    """Block 0's flags and those of the others together."""
    if sizes.choosers == 1:
        return flags
    plgpu.barrier_wait(smem.flags_received)
    all_flags = _packed(flags)
    for other in range(1, sizes.choosers):
        all_flags = all_flags + smem.flags_smem[other]
    return _unpacked(all_flags, sizes.tiles)


def _packed(flags):
    """The vectors of up to eight tiles as the columns of one array."""
    column = plgpu.broadcasted_iota(jnp.int32, (TILE, GROUP), 1, layout=plgpu.Layout.WGMMA)
    spread = [lax.broadcast_in_dim(vector.astype(jnp.float32), (TILE, GROUP), (0,)) for vector in flags]
    return sum(jnp.where(column == i, vector, 0.0) for i, vector in enumerate(spread))


def _unpacked(array, tiles: int):
    column = plgpu.broadcasted_iota(jnp.int32, (TILE, GROUP), 1, layout=plgpu.Layout.WGMMA)
    return [jnp.sum(jnp.where(column == i, array, 0.0), axis=1).astype(jnp.int32) for i in range(tiles)]


def _own_flags(sizes: _Sizes, rule: RoutingRule, smem, replica):
    """For each tile: 1 where some token of this block chose the expert."""
    flags = []
    for i in range(sizes.tiles):
        ranks = [
            plgpu.load(smem.ranks_smem.at[owned, i, replica + turn * sizes.replicas], layout=ROWS, optimized=False)
            for owned in range(sizes.owned)
            for turn in range(sizes.places)
        ]
        lowest = functools.reduce(jnp.minimum, ranks)
        flags.append(jnp.where(lowest < rule.top_k, 1, 0))
    return flags


def _write_active(sizes: _Sizes, rule: RoutingRule, smem, flags, active_gmem, num_active_gmem) -> None:
    """The flagged experts in ascending order: place r belongs to the expert up to which more than r are flagged."""
    tiles, chunk = range(sizes.tiles), 32

    def ids(start, dim: int):
        return plgpu.broadcasted_iota(jnp.int32, (TILE, chunk), dim, layout=plgpu.Layout.WGMMA) + start

    def count(kind: int, first: int, stop: int, is_counted):
        def add(c, tile):
            vector = plgpu.load(smem.counts_smem.at[kind, pl.ds(c * chunk, chunk)], layout=COLUMNS, optimized=False)
            columns = lax.broadcast_in_dim(vector, (TILE, chunk), (1,))
            return tile + jnp.where(is_counted(columns, ids(c * chunk, 1)), 1.0, 0.0)

        zeros = plgpu.layout_cast(jnp.zeros((TILE, chunk), jnp.float32), plgpu.Layout.WGMMA)
        return jnp.sum(_fold(first // chunk, stop // chunk, add, zeros), axis=1).astype(jnp.int32)

    for i in tiles:
        smem.counts_smem[0, pl.ds(i * TILE, TILE)] = flags[i]
    for i in tiles:
        first, stop = i * TILE, (i + 1) * TILE
        up_to = count(0, first, stop, lambda flag, id, first=first: (flag > 0) & (id <= ids(first, 0)))
        smem.counts_smem[1, pl.ds(first, TILE)] = up_to + (smem.counts_smem[1, first - 1] if i else 0)
    for i in tiles:
        active = _row_ids() * 0 + sizes.experts
        if i * TILE < sizes.tokens * rule.top_k:
            active = count(1, 0, sizes.tiles * TILE, lambda up_to, id, i=i: up_to <= ids(i * TILE, 0))
        staging = smem.counts_smem.at[0, pl.ds(i * TILE, TILE)]
        _write_tile(active_gmem, sizes.experts, i, jnp.minimum(active, sizes.experts), lambda place: (place,), staging)
    num_active_gmem[0] = smem.counts_smem[1, sizes.tiles * TILE - 1]


def _supports(device: Device, x_TD, gate_ED, *, rule: RoutingRule, **arguments):
    num_tokens, width = x_TD.shape
    num_experts = gate_ED.shape[0]
    has_norm = arguments.get("norm_weight_D") is not None and num_experts <= MAX_EXPERTS_BESIDE_NORM
    if not device.is_hopper:
        return f"it is written for Hopper GPUs, not for {device.platform} {device.kind}"
    if num_tokens > MAX_TOKENS:
        return f"it routes up to {MAX_TOKENS} tokens at a time, not {num_tokens}"
    if num_experts > MAX_EXPERTS:
        return f"it chooses among up to {MAX_EXPERTS} experts, not {num_experts}"
    if rule.top_k > TILE:
        return f"it chooses up to {TILE} experts per token, not {rule.top_k}"
    if width % TILE:
        return f"the model width {width} is not a multiple of {TILE}"
    if _sizes(x_TD, gate_ED, _blocks(device.num_sms, x_TD, gate_ED), has_norm=has_norm).stages < 1:
        return f"{num_tokens} tokens and {num_experts} experts seen from a width of {width} exceed shared memory"
    if x_TD.dtype != jnp.bfloat16 or gate_ED.dtype != jnp.bfloat16:
        return f"it multiplies bfloat16, not {x_TD.dtype} by {gate_ED.dtype}"
    if rule.dtype != "float32":
        return f"its scores are float32, not {rule.dtype}"
    return None


IMPLEMENTATION = Implementation("decode_sm90", supports=_supports, run=route)
