"""The expert layer for a few tokens on Hopper: dense over the token tile, every active expert's weights read once.

One persistent launch in two phases. *Up*: for each active expert and tile of its width, `hidden = act(up @ x) * weight`
for all tokens, those that did not choose the expert having weight 0: no sort, no gather, no scatter. *Down*: for each
tile of the model width, the sum over active experts of `down @ hidden` in one accumulator, so that the combine costs
nothing. In both, weights are `wgmma`'s A operand (64 rows) and the tokens its N (8 to 64), and a producer warp streams
weights through a ring in shared memory. The ring fills with weights of the down phase while the block waits for the
others to finish the up phase, so memory does not notice the barrier.

Blocks take equal parts of each phase, whatever the number of tiles: a part may begin and end inside a tile. Then the block
that holds the tile's beginning adds the others' sums to its own, in the order of the blocks: deterministic.

Measured on an H200, and why it looks like this: at one token two launches lost about 7 us to gaps and ramps; whole tiles
on 96 of 132 multiprocessors lost a third of the up phase; waiting for the others one by one took 4 to 6 us.
"""

from __future__ import annotations

import dataclasses
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
ADDENDS = {"down_bias", "residual"}  # of the down phase
MOST_TOKENS = 32  # with 33 to 64, `compact` was 3 to 10 % faster in every layer but narrow ones, where they were equal


def experts(
    x_TD,
    routing: Routing,
    up_EGFD,
    down_EDF,
    *,
    activation,
    up_bias_EGF=None,
    down_bias_ED=None,
    residual_TD=None,
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
        residual_TD,
        activation=activation,
        most_active=min(num_experts, routing.experts_TA.size),
        depth=settings["depth"],
        stages=settings["stages"],
        num_sms=1 if device.is_interpreted else device.num_sms,  # interpreted blocks cannot wait for each other
    )


@functools.partial(jax.jit, static_argnames=("activation", "most_active", "depth", "stages", "num_sms"))
def _experts(
    x_TD,
    plan: DecodePlan,
    up_EGFD,
    down_EDF,
    up_bias_EGF,
    down_bias_ED,
    residual_TD,
    *,
    num_sms,
    **static,
):
    num_tokens, padded = x_TD.shape[0], plan.combine_ET.shape[1]
    if num_tokens > 8 and num_tokens % 8:  # copies fill up fewer than 8 rows with zeros, or whole eights
        pad = functools.partial(jnp.pad, pad_width=((0, padded - num_tokens), (0, 0)))
        x_TD, residual_TD = jax.tree.map(pad, (x_TD, residual_TD))
    bias_TD = None
    if down_bias_ED is not None:
        bias_TD = jnp.einsum("ET,ED->TD", plan.combine_ET, down_bias_ED, precision=lax.Precision.HIGHEST)
    signals = None
    if num_sms > 1:
        signals = jax.new_ref(jnp.zeros((NUM_SIGNALS,), jnp.int32) if plan.signals is None else plan.signals)
    y_TD = _launch(
        x_TD, plan, up_EGFD, up_bias_EGF, down_EDF, bias_TD, residual_TD, signals, num_blocks=num_sms, **static
    )
    return y_TD[:num_tokens]


def _launch(
    x_TD,
    plan,
    up_EGFD,
    up_bias_EGF,
    down_EDF,
    bias_TD,
    residual_TD,
    signals,
    *,
    activation,
    most_active,
    depth,
    stages,
    num_blocks,
):
    _, gates, width, model_width = up_EGFD.shape
    num_tokens, tokens = x_TD.shape[0], plan.combine_ET.shape[1]
    up_weights, down_weights = WeightTiles.of(up_EGFD), WeightTiles.of(down_EDF[:, None])
    up_tiles, up_steps = pl.cdiv(width, up_weights.rows), pl.cdiv(model_width, depth)
    down_tiles, down_steps = pl.cdiv(model_width, down_weights.rows), pl.cdiv(width, depth)  # of one expert
    in_one_copy = up_weights.follow and down_weights.follow
    batch = max(1, 64 // tokens)  # partial sums of other blocks that are loaded together
    accumulators = [plgpu.ACC((ROWS, tokens))] * PIECES

    def kernel(x_gmem, combine_gmem, active_gmem, count_gmem, up_gmem, down_gmem, *rest, **scratch):
        inputs, (hidden_gmem, y_gmem, partials_gmem) = dict(zip(optional, rest, strict=False)), rest[-3:]
        weights_smem, tokens_smem, out_smem = (scratch[name] for name in ("weights_smem", "tokens_smem", "out_smem"))
        full, empty, hidden_ready = (scratch[name] for name in ("full", "empty", "hidden_ready"))
        block = lax.axis_index("block")
        num_active = count_gmem[0]

        up = Line.cut(num_active * up_tiles, up_steps, block=block, num_blocks=num_blocks)
        down = Line.cut(down_tiles, lax.max(num_active * down_steps, 1), block=block, num_blocks=num_blocks)
        up_loads = up.end - up.begin
        down_loads = jnp.where(num_active > 0, down.end - down.begin, 0)
        loads = up_loads + down_loads

        def place_of_up(tile):
            return tile // up_tiles, lax.rem(tile, up_tiles) * up_weights.rows

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

            @pl.loop(0, up_loads)
            def _up(r):
                slot, position = reserve(r), up.begin + r
                u, row = place_of_up(position // up_steps)
                columns = columns_of(lax.rem(position, up_steps))
                load_weights(slot, up_gmem, up_weights.places(active_gmem[u], row), columns)
                plgpu.copy_gmem_to_smem(x_gmem.at[_whole(tokens), columns], tokens_smem.at[slot], full.at[slot])

            def place_of_down(r):
                position = down.begin + r
                step = lax.rem(position, down.steps_per_tile)
                row = position // down.steps_per_tile * down_weights.rows
                return row, step // down_steps, columns_of(lax.rem(step, down_steps))

            def load_down(r):
                row, u, columns = place_of_down(r)
                load_weights(reserve(up_loads + r), down_gmem, down_weights.places(active_gmem[u], row), columns)

            def load_hidden(r):
                _, u, columns = place_of_down(r)
                slot = lax.rem(up_loads + r, stages)
                plgpu.copy_gmem_to_smem(hidden_gmem.at[u, :, columns], tokens_smem.at[slot], full.at[slot])

            ahead = lax.min(down_loads, stages)
            pl.loop(0, ahead)(load_down)
            plgpu.barrier_wait(hidden_ready)
            pl.loop(0, ahead)(load_hidden)

            @pl.loop(ahead, down_loads)
            def _down(r):
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

        def compute(line, first_load, prepare, finish, first_signal):
            """For each tile in this block's part: `finish` it, or hand what there is to the block that does."""

            @pl.loop(0, line.num_tiles_touched)
            def _tile(i):
                tile = line.begin // line.steps_per_tile + i
                tile_begin, tile_end = tile * line.steps_per_tile, (tile + 1) * line.steps_per_tile
                begin, end = lax.max(line.begin, tile_begin), lax.min(line.end, tile_end)
                is_mine = begin == tile_begin
                prepared = prepare(tile, is_mine)
                parts = multiply(first_load + begin - line.begin, jnp.where(num_active > 0, end - begin, 0))
                if signals is not None:

                    @pl.when(jnp.logical_not(is_mine))
                    def _hand_over():
                        for n, part in enumerate(parts):
                            partials_gmem[block, n] = part
                        owner = line.last_block_before(tile_begin + 1)
                        _signal(inputs["signals"].at[pl.ds(first_signal + owner, 1)])

                @pl.when(is_mine)
                def _finish():
                    total = parts
                    if signals is not None:
                        last = line.last_block_before(tile_end)
                        total = add_others(parts, last, inputs["signals"].at[pl.ds(first_signal + block, 1)])
                    finish(tile, total, prepared)

        def add_others(parts, last, signal_gmem):
            """Adds what the blocks after this one, up to `last`, summed up of the same tile."""

            @pl.when(last > block)
            def _wait():
                _wait_for_signals(signal_gmem, last - block)

            def add(i, total):
                for n in range(batch):  # loads that do not depend on each other overlap
                    other = block + 1 + i * batch + n
                    theirs = [_load_partial(partials_gmem.at[lax.min(other, last), piece]) for piece in range(PIECES)]
                    is_there = jnp.broadcast_to(other <= last, (ROWS, tokens))
                    total = [t + jnp.where(is_there, p, jnp.zeros_like(p)) for t, p in zip(total, theirs, strict=True)]
                return total

            return lax.fori_loop(0, pl.cdiv(last - block, batch), add, parts)

        def store(tiles, targets_gmem):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for n, tile in enumerate(tiles):
                store_transposed(tile.astype(out_smem.dtype), out_smem.at[n])
            plgpu.commit_smem()
            for n, target_gmem in enumerate(targets_gmem):
                plgpu.copy_smem_to_gmem(out_smem.at[n], target_gmem)

        def prepare_up(tile, is_mine):
            u, row = place_of_up(tile)
            expert = active_gmem[u]
            if "up_bias" in inputs:

                @pl.when(is_mine)
                def _load_bias():
                    for n in range(PIECES):
                        gate, first = (n, row) if gates == PIECES else (0, row + n * ROWS)
                        bias_gmem = inputs["up_bias"].at[expert, gate, pl.ds(first, ROWS)]
                        plgpu.copy_gmem_to_smem(bias_gmem, scratch["up_bias_smem"].at[n], scratch["up_bias_full"])

            return plgpu.load(combine_gmem.at[expert], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)

        def finish_up(tile, parts, weights_T):
            u, row = place_of_up(tile)
            if "up_bias" in inputs:
                plgpu.barrier_wait(scratch["up_bias_full"])
                parts = [add_to_rows(part, scratch["up_bias_smem"].at[n]) for n, part in enumerate(parts)]
            hidden = [activate(parts, activation)] if gates == PIECES else [activate([p], activation) for p in parts]
            weights_RT = lax.broadcast_in_dim(weights_T, (ROWS, tokens), (1,))
            targets = [hidden_gmem.at[u, :, pl.ds(row + n * ROWS, ROWS)] for n in range(len(hidden))]
            store([h * weights_RT for h in hidden], targets)

        def columns_of_y(tile):
            return [pl.ds(tile * down_weights.rows + n * ROWS, ROWS) for n in range(PIECES)]

        def prepare_down(tile, is_mine):
            for name in sorted(ADDENDS & inputs.keys()):

                @pl.when(is_mine)
                def _load(name=name):
                    for n, columns in enumerate(columns_of_y(tile)):
                        addend_gmem, addend_smem = (
                            inputs[name].at[_whole(tokens), columns],
                            scratch[name + "_smem"].at[n],
                        )
                        plgpu.copy_gmem_to_smem(addend_gmem, addend_smem, scratch[name + "_full"])

        def finish_down(tile, parts, _):
            def add(name, parts):
                plgpu.barrier_wait(scratch[name + "_full"])
                return [part + _load_transposed(scratch[name + "_smem"].at[n]) for n, part in enumerate(parts)]

            if "down_bias" in inputs:
                parts = add("down_bias", parts)
            if "residual" in inputs:
                parts = add("residual", [part.astype(out_smem.dtype).astype(part.dtype) for part in parts])
            store(parts, [y_gmem.at[_whole(tokens), columns] for columns in columns_of_y(tile)])

        @pl.when(lax.axis_index("warpgroup") == 0)
        def _compute():
            compute(up, 0, prepare_up, finish_up, first_signal=1)
            plgpu.wait_smem_to_gmem(0)
            if signals is not None:
                up_done = inputs["signals"].at[pl.ds(0, 1)]
                _signal(up_done)
                _wait_for_signals(up_done, num_blocks)
            plgpu.barrier_arrive(hidden_ready)
            compute(down, up_loads, prepare_down, finish_down, first_signal=1 + num_blocks)
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
    if signals is not None:
        optional["signals"] = signals
    if up_bias_EGF is not None:
        optional["up_bias"] = up_bias_EGF
        scratch |= dict(
            up_bias_smem=plgpu.SMEM((PIECES, ROWS), up_bias_EGF.dtype), up_bias_full=plgpu.Barrier(num_arrivals=PIECES)
        )
    for name, addend_TD in (("down_bias", bias_TD), ("residual", residual_TD)):
        if addend_TD is not None:
            optional[name] = addend_TD
            scratch[name + "_smem"] = plgpu.SMEM((PIECES, tokens, ROWS), addend_TD.dtype)
            scratch[name + "_full"] = plgpu.Barrier(num_arrivals=PIECES)
    out_types = (
        jax.ShapeDtypeStruct((most_active, tokens, width), dtype),  # hidden values by place in `plan.active_E`
        jax.ShapeDtypeStruct((num_tokens, model_width), dtype),
        jax.ShapeDtypeStruct((num_blocks, PIECES, ROWS, tokens), jnp.float32),  # partial sums
    )
    _, y_TD, _ = plgpu.kernel(
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
    return y_TD


@dataclasses.dataclass(frozen=True)
class Line:
    """The steps of all tiles, one tile after the other, cut into equal parts for the blocks. This block's is [begin, end).

    With fewer steps than blocks, the first `num_parts` blocks have one each.
    """

    steps_per_tile: Any
    all_steps: Any
    num_parts: Any
    begin: Any
    end: Any

    @classmethod
    def cut(cls, num_tiles, steps_per_tile, *, block, num_blocks: int) -> Line:
        all_steps = jnp.asarray(num_tiles * steps_per_tile, jnp.int32)
        num_parts = lax.max(lax.min(all_steps, num_blocks), 1)
        begin, end = (lax.min(all_steps * b // num_parts, all_steps) for b in (block, block + 1))
        return cls(steps_per_tile, all_steps, num_parts, begin, end)

    @property
    def num_tiles_touched(self):
        touched = (self.end - 1) // self.steps_per_tile - self.begin // self.steps_per_tile + 1
        return jnp.where(self.end > self.begin, touched, 0)

    def last_block_before(self, step):
        """The last block whose part begins before `step`."""
        return (step * self.num_parts + self.all_steps - 1) // self.all_steps - 1


def _whole(tokens: int):
    """The token tile of an array with perhaps fewer tokens: copies fill with zeros what is missing, or leave it out."""
    return pl.ds(lax.axis_index("warpgroup") * 0, tokens)


def _load_partial(partial_gmem):
    return plgpu.load(partial_gmem, layout=plgpu.Layout.WGMMA, optimized=False)


def _load_transposed(tile_smem):
    tile_RT = plgpu.load(tile_smem.T, layout=plgpu.Layout.WGMMA_TRANSPOSED)
    return plgpu.layout_cast(tile_RT, plgpu.Layout.WGMMA).astype(jnp.float32)


def _signal(signal_gmem) -> None:
    """Adds one to a number in global memory, after all that the warpgroup's threads have stored there before.

    Released even where only copies that have ended came before: relaxed, 201 of 4000 runs on an H200 read old values.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def signal(ctx, signal_gmem):
        del ctx
        utils.warpgroup_barrier()
        utils.SemaphoreRef(utils.memref_ptr(signal_gmem)).signal(1, memory_scope="gpu")

    signal(signal_gmem)


def _wait_for_signals(signal_gmem, count) -> None:
    """Waits for `count` signals. What was stored before them is then visible to loads and asynchronous copies."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(())))
    def wait(ctx, signal_gmem, count):
        del ctx
        signal = utils.SemaphoreRef(utils.memref_ptr(signal_gmem))
        signal.wait(count.registers.item(), decrement=False, memory_scope="gpu")
        utils.inline_ptx("fence.proxy.async.global;", has_side_effects=True)

    wait(signal_gmem, jnp.asarray(count, jnp.int32))


def default_settings(x_TD) -> dict[str, int]:
    """A ring that fills shared memory."""
    tokens = padded_tokens(x_TD.shape[0])
    return _settings(128 if tokens <= 16 else 64, tokens)


def _settings(depth: int, tokens: int) -> dict[str, int]:
    slot_bytes = 2 * depth * (PIECES * ROWS + tokens)
    other_bytes = PIECES * ROWS * tokens * (2 + 4 + 2)  # results on their way out, biases and residual on their way in
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
