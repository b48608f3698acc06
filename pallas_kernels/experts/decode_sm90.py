"""The expert layer for a few tokens on Hopper: dense over the token tile, every active expert's weights read once.

One persistent launch in two phases. *Up*: for each active expert and tile of its width, `hidden = act(up @ x) * weight`
for all tokens, those that did not choose the expert having weight 0: no sort, no gather, no scatter. *Down*: for each
tile of the model width, the sum over active experts of `down @ hidden` in one accumulator, so that the combine costs
nothing. In both, weights are `wgmma`'s A operand (64 rows) and the tokens its N (8 to 64), and a producer warp streams
weights through a ring in shared memory. The ring fills with weights of the down phase while the block waits for the
others to finish the up phase, so memory does not notice the barrier.

Blocks take equal parts of the down phase, whatever the number of tiles: a part may begin and end inside a tile. Then the
block that holds the tile's beginning adds the others' sums to its own, in the order of the blocks: deterministic.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch, tuning
from pallas_kernels.experts.grouped_matmul_sm90 import activate
from pallas_kernels.experts.plan import decode_plan, padded_tokens
from pallas_kernels.experts.streaming_sm90 import (
    COMPILER,
    PIECES,
    ROWS,
    WeightTiles,
    add_to_rows,
    load_pieces,
    on_producer_warp,
    store_transposed,
)
from pallas_kernels.route.api import NUM_SIGNALS, DecodePlan, Routing

NAME = "decode"
MOST_TOKENS = 64


def experts(
    x_TD,
    routing: Routing,
    up_EGFD,
    down_EDF,
    *,
    activation,
    up_bias_EGF=None,
    down_bias_ED=None,
    first_expert=0,
    settings: dict[str, Any] | None = None,
):
    device = dispatch.current_device()
    num_experts = up_EGFD.shape[0]
    if settings is None:
        settings = tuning.lookup(f"experts.{NAME}", shape_key(routing, up_EGFD), x_TD.shape[0])
    if settings is None:
        settings = default_settings(x_TD)
    plan = routing.plan
    if plan is None or plan.combine_ET.shape[0] != num_experts:
        plan = decode_plan(routing, num_experts=num_experts, first_expert=first_expert)
    return _experts(
        x_TD,
        plan,
        up_EGFD,
        down_EDF,
        up_bias_EGF,
        down_bias_ED,
        activation=activation,
        most_active=min(num_experts, routing.experts_TA.size),
        depth=settings["depth"],
        stages=settings["stages"],
        num_sms=device.num_sms,
        is_interpreted=device.is_interpreted,
    )


@functools.partial(
    jax.jit, static_argnames=("activation", "most_active", "depth", "stages", "num_sms", "is_interpreted")
)
def _experts(
    x_TD,
    plan: DecodePlan,
    up_EGFD,
    down_EDF,
    up_bias_EGF,
    down_bias_ED,
    *,
    num_sms,
    is_interpreted,
    **static,
):
    num_tokens, padded = x_TD.shape[0], plan.combine_ET.shape[1]
    if (
        num_tokens > 8 and num_tokens % 8
    ):  # fewer than 8 rows or a multiple of 8: what a TMA copy can fill up with zeros
        x_TD = jnp.pad(x_TD, ((0, padded - num_tokens), (0, 0)))
    bias_TD = None
    if down_bias_ED is not None:
        bias_TD = jnp.einsum("ET,ED->TD", plan.combine_ET, down_bias_ED, precision=lax.Precision.HIGHEST)
    launch = functools.partial(_launch, x_TD, plan, up_EGFD, up_bias_EGF, down_EDF, bias_TD, **static)
    if is_interpreted:  # one block after another: none can wait for the next
        hidden_UTF, _ = launch(hidden=None, signals=None, phases=("up",), num_blocks=num_sms)
        _, y_TD = launch(hidden=hidden_UTF, signals=None, phases=("down",), num_blocks=1)
    else:
        zeros = jnp.zeros((NUM_SIGNALS,), jnp.int32) if plan.signals is None else plan.signals
        _, y_TD = launch(hidden=None, signals=jax.new_ref(zeros), phases=("up", "down"), num_blocks=num_sms)
    return y_TD[:num_tokens]


def _launch(
    x_TD,
    plan,
    up_EGFD,
    up_bias_EGF,
    down_EDF,
    bias_TD,
    *,
    hidden,
    signals,
    phases,
    activation,
    most_active,
    depth,
    stages,
    num_blocks,
):
    """The phases of one launch: (`[U, T, F]` hidden values by place in `plan.active_E`, `[T, D]` result)."""
    _, gates, width, model_width = up_EGFD.shape
    num_tokens, tokens = x_TD.shape[0], plan.combine_ET.shape[1]
    up_weights, down_weights = WeightTiles.of(up_EGFD), WeightTiles.of(down_EDF[:, None])
    up_rows, down_rows = up_weights.rows, down_weights.rows
    up_tiles, up_steps = pl.cdiv(width, up_rows), pl.cdiv(model_width, depth)
    down_tiles, steps_per_expert = pl.cdiv(model_width, down_rows), pl.cdiv(width, depth)
    is_fused = len(phases) == 2
    in_one_copy = up_weights.follow and down_weights.follow
    batch = max(1, 64 // tokens)  # partial sums of other blocks that are loaded together
    accumulators = [plgpu.ACC((ROWS, tokens))] * PIECES

    def kernel(x_gmem, combine_gmem, active_gmem, count_gmem, up_gmem, down_gmem, *rest, **scratch):
        inputs, (hidden_gmem, y_gmem, partials_gmem) = dict(zip(optional, rest, strict=False)), rest[-3:]
        hidden_gmem = inputs.get("hidden", hidden_gmem)
        weights_smem, tokens_smem, out_smem = (scratch[name] for name in ("weights_smem", "tokens_smem", "out_smem"))
        full, empty, hidden_ready = (scratch[name] for name in ("full", "empty", "hidden_ready"))
        block = lax.axis_index("block")
        num_active = count_gmem[0]

        def signal_of(index):
            return inputs["signals"].at[pl.ds(index, 1)]

        def partial_is_stored(block):
            return signal_of(1 + block)

        # The up phase: items are (active expert, tile of its width), every num_blocks-th of them this block's.
        my_items = pl.cdiv(lax.max(num_active * up_tiles - block, 0), num_blocks) if "up" in phases else 0
        up_loads = my_items * up_steps
        # The down phase: a line of all steps, tile after tile, cut into equal parts.
        steps_per_tile = lax.max(num_active * steps_per_expert, 1)
        all_steps = down_tiles * steps_per_tile

        part = functools.partial(part_of, all_steps=all_steps, num_blocks=num_blocks)
        my_begin, my_end = part(block)
        down_loads = jnp.where(num_active > 0, my_end - my_begin, 0) if "down" in phases else 0
        loads = up_loads + down_loads

        def up_item(i):
            item = block + i * num_blocks
            return item // up_tiles, lax.rem(item, up_tiles) * up_rows

        def columns_of(step):
            return pl.ds(step * depth, depth)

        def stream():
            def reserve(j):
                slot = lax.rem(j, stages)

                @pl.when(j >= stages)
                def _wait():
                    plgpu.barrier_wait(empty.at[slot])

                return slot

            def load_weights(slot, tiles_gmem, places, columns):
                load_pieces(tiles_gmem, places, columns, weights_smem.at[slot], full.at[slot], in_one_copy=in_one_copy)

            @pl.loop(0, my_items)
            def _item(i):
                u, row = up_item(i)
                expert = active_gmem[u]

                @pl.loop(0, up_steps)
                def _step(k):
                    slot, columns = reserve(i * up_steps + k), columns_of(k)
                    load_weights(slot, up_gmem, up_weights.places(expert, row), columns)
                    plgpu.copy_gmem_to_smem(x_gmem.at[_whole(tokens), columns], tokens_smem.at[slot], full.at[slot])

            def place(r):
                position = my_begin + r
                step = lax.rem(position, steps_per_tile)
                return position // steps_per_tile * down_rows, step // steps_per_expert, lax.rem(step, steps_per_expert)

            def load_down(r):
                row, u, k = place(r)
                expert = active_gmem[u]
                load_weights(reserve(up_loads + r), down_gmem, down_weights.places(expert, row), columns_of(k))

            def load_hidden(r):
                _, u, k = place(r)
                slot = lax.rem(up_loads + r, stages)
                plgpu.copy_gmem_to_smem(hidden_gmem.at[u, :, columns_of(k)], tokens_smem.at[slot], full.at[slot])

            ahead = lax.min(down_loads, stages)
            pl.loop(0, ahead)(load_down)
            plgpu.barrier_wait(hidden_ready)
            pl.loop(0, ahead)(load_hidden)

            @pl.loop(ahead, down_loads)
            def _both(r):
                load_down(r)
                load_hidden(r)

            @pl.loop(lax.max(loads - stages, 0), loads)
            def _drain(j):
                plgpu.barrier_wait(empty.at[lax.rem(j, stages)])

        on_producer_warp(stream, warpgroup=1)

        def multiply(first_load, steps):
            """Two `[64, T]` products, summed over `steps` slots of the ring."""

            def loop(*accs):
                @pl.loop(0, steps)
                def _step(k):
                    slot = lax.rem(first_load + k, stages)
                    plgpu.barrier_wait(full.at[slot])
                    for piece, acc in enumerate(accs):
                        plgpu.wgmma(acc, weights_smem.at[slot, piece], tokens_smem.at[slot].T)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(empty.at[slot])

                return [acc[...] for acc in accs]

            return pl.run_scoped(loop, *accumulators)

        def store(tiles, targets_gmem):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for n, tile in enumerate(tiles):
                store_transposed(tile.astype(out_smem.dtype), out_smem.at[n])
            plgpu.commit_smem()
            for n, target_gmem in enumerate(targets_gmem):
                plgpu.copy_smem_to_gmem(out_smem.at[n], target_gmem)

        def compute_up(i):
            u, row = up_item(i)
            expert = active_gmem[u]
            places = [(n, row) if gates == PIECES else (0, row + n * ROWS) for n in range(PIECES)]
            if "up_bias" in inputs:
                for n, (gate, first) in enumerate(places):
                    bias_gmem = inputs["up_bias"].at[expert, gate, pl.ds(first, ROWS)]
                    plgpu.copy_gmem_to_smem(bias_gmem, scratch["up_bias_smem"].at[n], scratch["up_bias_full"])
            weights_T = plgpu.load(combine_gmem.at[expert], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
            parts = multiply(i * up_steps, up_steps)
            if "up_bias" in inputs:
                plgpu.barrier_wait(scratch["up_bias_full"])
                parts = [add_to_rows(part, scratch["up_bias_smem"].at[n]) for n, part in enumerate(parts)]
            hidden = [activate(parts, activation)] if gates == PIECES else [activate([p], activation) for p in parts]
            weights_RT = lax.broadcast_in_dim(weights_T, (ROWS, tokens), (1,))
            targets = [hidden_gmem.at[u, :, pl.ds(row + n * ROWS, ROWS)] for n in range(len(hidden))]
            store([h * weights_RT for h in hidden], targets)

        def compute_down(i):
            tile = my_begin // steps_per_tile + i
            tile_begin, tile_end = tile * steps_per_tile, (tile + 1) * steps_per_tile
            begin, end = lax.max(my_begin, tile_begin), lax.min(my_end, tile_end)
            steps = jnp.where(num_active > 0, end - begin, 0)
            parts = multiply(up_loads + begin - my_begin, steps)

            if is_fused:

                @pl.when(begin > tile_begin)
                def _hand_over():
                    for n, part in enumerate(parts):
                        partials_gmem[block, n] = part
                    _signal(partial_is_stored(block))

            @pl.when(begin == tile_begin)
            def _finish():
                total = add_others(parts, tile_end) if is_fused else parts
                targets = []
                for n in range(PIECES):
                    columns = pl.ds(tile * down_rows + n * ROWS, ROWS)
                    targets.append(y_gmem.at[_whole(tokens), columns])
                    if "down_bias" in inputs:
                        bias_smem, bias_full = scratch["down_bias_smem"], scratch["down_bias_full"]
                        plgpu.copy_gmem_to_smem(inputs["down_bias"].at[:, columns], bias_smem.at[n], bias_full)
                if "down_bias" in inputs:
                    plgpu.barrier_wait(bias_full)
                    total = [part + _load_transposed(bias_smem.at[n]) for n, part in enumerate(total)]
                store(total, targets)

        def add_others(parts, tile_end):
            """Adds what the blocks after this one summed up of the tile that ends at `tile_end`."""
            last = last_block_before(tile_end, all_steps=all_steps, num_blocks=num_blocks)

            def has_part(other):
                begin, end = part(other)
                return (other <= last) & (begin < end)

            @pl.loop(block + 1, last + 1)
            def _wait(other):
                @pl.when(has_part(other))
                def _():
                    _wait_for_signals(partial_is_stored(other), 1)

            def add(i, total):
                for n in range(batch):  # loads that do not depend on each other overlap
                    other = block + 1 + i * batch + n
                    theirs = [_load_partial(partials_gmem.at[lax.min(other, last), piece]) for piece in range(PIECES)]
                    is_there = jnp.broadcast_to(has_part(other), (ROWS, tokens))
                    total = [t + jnp.where(is_there, p, jnp.zeros_like(p)) for t, p in zip(total, theirs, strict=True)]
                return total

            return lax.fori_loop(0, pl.cdiv(last - block, batch), add, parts)

        @pl.when(lax.axis_index("warpgroup") == 0)
        def _compute():
            pl.loop(0, my_items)(compute_up)
            plgpu.wait_smem_to_gmem(0)
            if is_fused:
                _signal(signal_of(0))
                _wait_for_signals(signal_of(0), num_blocks)
            plgpu.barrier_arrive(hidden_ready)
            if "down" in phases:
                num_parts = jnp.where(
                    my_end > my_begin, (my_end - 1) // steps_per_tile - my_begin // steps_per_tile + 1, 0
                )
                pl.loop(0, num_parts)(compute_down)
                plgpu.wait_smem_to_gmem(0)

    dtype = x_TD.dtype
    scratch = dict(
        weights_smem=plgpu.SMEM((stages, PIECES, ROWS, depth), dtype),
        tokens_smem=plgpu.SMEM((stages, tokens, depth), dtype),
        out_smem=plgpu.SMEM((PIECES, tokens, ROWS), dtype),
        full=plgpu.Barrier(num_arrivals=2 if in_one_copy else 1 + PIECES, num_barriers=stages),
        empty=plgpu.Barrier(num_barriers=stages),
        hidden_ready=plgpu.Barrier(),
    )
    optional = {}
    if hidden is not None:
        optional["hidden"] = hidden
    if signals is not None:
        optional["signals"] = signals
    if up_bias_EGF is not None:
        optional["up_bias"] = up_bias_EGF
        scratch |= dict(
            up_bias_smem=plgpu.SMEM((PIECES, ROWS), up_bias_EGF.dtype), up_bias_full=plgpu.Barrier(num_arrivals=PIECES)
        )
    if bias_TD is not None:
        optional["down_bias"] = bias_TD
        scratch |= dict(
            down_bias_smem=plgpu.SMEM((PIECES, tokens, ROWS), bias_TD.dtype),
            down_bias_full=plgpu.Barrier(num_arrivals=PIECES),
        )
    out_types = (
        jax.ShapeDtypeStruct((most_active, tokens, width), dtype),
        jax.ShapeDtypeStruct((num_tokens, model_width), dtype),
        jax.ShapeDtypeStruct((num_blocks, PIECES, ROWS, tokens), jnp.float32),
    )
    hidden_UTF, y_TD, _ = plgpu.kernel(
        kernel,
        out_type=out_types,
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=2,
        thread_name="warpgroup",
        kernel_name="experts_decode",
        scratch_types=scratch,
        compiler_params=COMPILER,
    )(
        x_TD,
        plan.combine_ET,
        plan.active_E,
        plan.num_active,
        up_weights.stack_XRI,
        down_weights.stack_XRI,
        *optional.values(),
    )
    return hidden_UTF, y_TD


def part_of(block, *, all_steps, num_blocks: int):
    """The steps (begin, end) that a block takes of the down phase; all blocks' parts are equal to within one."""
    return all_steps * block // num_blocks, all_steps * (block + 1) // num_blocks


def last_block_before(step, *, all_steps, num_blocks: int):
    """The last block whose part begins before `step`."""
    return (step * num_blocks + all_steps - 1) // all_steps - 1


def _whole(tokens: int):
    """The token tile of an array with perhaps fewer tokens: copies fill with zeros what is missing, or leave it out."""
    return pl.ds(lax.axis_index("warpgroup") * 0, tokens)


def _load_partial(partial_gmem):
    return plgpu.load(partial_gmem, layout=plgpu.Layout.WGMMA, optimized=False)


def _load_transposed(tile_smem):
    tile_RT = plgpu.load(tile_smem.T, layout=plgpu.Layout.WGMMA_TRANSPOSED)
    return plgpu.layout_cast(tile_RT, plgpu.Layout.WGMMA)


def _signal(signal_gmem) -> None:
    """Adds one to a number in global memory, after all that the warpgroup's threads have stored there before."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def signal(ctx, signal_gmem):
        del ctx
        utils.warpgroup_barrier()
        utils.SemaphoreRef(utils.memref_ptr(signal_gmem)).signal(1, memory_scope="gpu")

    signal(signal_gmem)


def _wait_for_signals(signal_gmem, count: int) -> None:
    """Waits for `count` signals. What was stored before them is then visible to loads and asynchronous copies."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def wait(ctx, signal_gmem):
        del ctx
        utils.SemaphoreRef(utils.memref_ptr(signal_gmem)).wait(count, decrement=False, memory_scope="gpu")
        utils.inline_ptx("fence.proxy.async.global;", has_side_effects=True)

    wait(signal_gmem)


def default_settings(x_TD) -> dict[str, int]:
    """A ring that fills shared memory."""
    tokens = padded_tokens(x_TD.shape[0])
    return _settings(128 if tokens <= 16 else 64, tokens)


def _settings(depth: int, tokens: int) -> dict[str, int]:
    slot_bytes = 2 * depth * (PIECES * ROWS + tokens)
    other_bytes = PIECES * ROWS * tokens * (2 + 4)  # results on their way out, biases on their way in
    return dict(depth=depth, stages=((222 << 10) - other_bytes) // slot_bytes)


def candidates(x_TD, routing: Routing, up_EGFD, down_EDF, **arguments) -> list[dict[str, int]]:
    """Settings worth trying, the default first."""
    default, tokens = default_settings(x_TD), padded_tokens(x_TD.shape[0])
    others = [_settings(depth, tokens) for depth in (64, 128, 256) if depth != default["depth"]]
    return [default, default | dict(stages=default["stages"] - 1), *(each for each in others if each["stages"] > 1)]


def shape_key(routing: Routing, up_EGFD) -> str:
    num_experts, gates, width, model_width = up_EGFD.shape
    suffix = "" if gates == 2 else " G1"
    return f"E{num_experts} A{routing.experts_TA.shape[1]} F{width} D{model_width}{suffix}"


def _supports(device: dispatch.Device, x_TD, routing: Routing, up_EGFD, down_EDF, **arguments) -> str | None:
    if not device.is_hopper:
        return f"it needs a Hopper GPU, and this is {device.kind}"
    dtypes = dict(x_TD=x_TD.dtype, up_EGFD=up_EGFD.dtype, down_EDF=down_EDF.dtype)
    for name, dtype in dtypes.items():
        if dtype != jnp.bfloat16:
            return f"it multiplies bfloat16, and {name} is {dtype}"
    width, model_width = up_EGFD.shape[2:]
    if model_width % 16 or width % 16:
        return f"it needs widths that are multiples of 16, and these are D={model_width}, F={width}"
    if x_TD.shape[0] > MOST_TOKENS:
        return f"it applies every active expert to all tokens: at most {MOST_TOKENS}, got {x_TD.shape[0]}"
    return None


IMPLEMENTATION = dispatch.Implementation(NAME, supports=_supports, run=experts, candidates=candidates)
