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
import types
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch, tuning
from pallas_kernels.experts.grouped_matmul_sm90 import activate
from pallas_kernels.experts.plan import decode_plan, padded_tokens
from pallas_kernels.experts.signals_sm90 import send_signal, wait_for_signals
from pallas_kernels.experts.streaming_sm90 import (
    COMPILER,
    PIECES,
    ROWS,
    WeightTiles,
    add_to_rows,
    are_swizzled,
    load_pieces,
    on_producer_warp,
    store_transposed,
)
from pallas_kernels.route.api import NUM_SIGNALS, DecodePlan, Routing

NAME = "decode"
MOST_TOKENS = 16  # at 32, `compact` took 4 to 10 % less in every layer that was measured


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
        settings = tuning.lookup(f"experts.{NAME}", shape_key(routing, up_EGFD), x_TD.shape[0], tile=padded_tokens)
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


def _launch(x_TD, plan, up_EGFD, up_bias_EGF, down_EDF, bias_TD, residual_TD, signals, *, most_active, **static):
    _, gates, width, model_width = up_EGFD.shape
    num_tokens, tokens = x_TD.shape[0], plan.combine_ET.shape[1]
    up, down = WeightTiles.of(up_EGFD), WeightTiles.of(down_EDF[:, None])
    sizes = _Sizes(tokens, gates, width, model_width, up, down, **static)
    optional = dict(signals=signals, up_bias=up_bias_EGF, down_bias=bias_TD, residual=residual_TD)
    optional = {name: array for name, array in optional.items() if array is not None}
    outputs = dict(
        hidden=jax.ShapeDtypeStruct((most_active, tokens, width), x_TD.dtype),  # by place in `plan.active_E`
        y=jax.ShapeDtypeStruct((num_tokens, model_width), x_TD.dtype),
        partials=jax.ShapeDtypeStruct((sizes.num_blocks, PIECES, ROWS, tokens), jnp.float32),  # sums for other blocks
    )
    arrays = dict(
        x=x_TD,
        combine=plan.combine_ET,
        active=plan.active_E,
        num_active=plan.num_active,
        up=up.stack_XRI,
        down=down.stack_XRI,
        **optional,
    )

    def kernel(*refs, **scratch):
        gmem = dict(zip((*arrays, *outputs), refs, strict=True))
        _Block(sizes, types.SimpleNamespace(**gmem), types.SimpleNamespace(**scratch), optional.keys()).run()

    _, y_TD, _ = plgpu.kernel(
        kernel,
        out_type=tuple(outputs.values()),
        grid=(sizes.num_blocks,),
        grid_names=("block",),
        num_threads=2,
        thread_name="warpgroup",
        kernel_name="experts_decode",
        scratch_types=_scratch(sizes, x_TD.dtype, optional),
        compiler_params=COMPILER,
    )(*arrays.values())
    return y_TD


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """What the kernel is compiled for: `tokens` of a tile, `depth` columns of a step, `stages` of the ring."""

    tokens: int
    gates: int
    width: int
    model_width: int
    up: WeightTiles
    down: WeightTiles
    activation: str
    depth: int
    stages: int
    num_blocks: int

    @property
    def up_tiles(self) -> int:
        """Of one expert."""
        return pl.cdiv(self.width, self.up.rows)

    @property
    def up_steps(self) -> int:
        return pl.cdiv(self.model_width, self.depth)

    @property
    def down_tiles(self) -> int:
        return pl.cdiv(self.model_width, self.down.rows)

    @property
    def down_steps(self) -> int:
        """Of one expert in one tile."""
        return pl.cdiv(self.width, self.depth)

    @property
    def in_one_copy(self) -> bool:
        return self.up.follow and self.down.follow


def _scratch(sizes: _Sizes, dtype, optional: dict[str, Any]) -> dict[str, Any]:
    stages, tokens, depth = sizes.stages, sizes.tokens, sizes.depth
    scratch = dict(
        weights_smem=plgpu.SMEM((stages, PIECES, ROWS, depth), dtype),
        tokens_smem=plgpu.SMEM((stages, tokens, depth), dtype),
        out_smem=plgpu.SMEM((PIECES, tokens, ROWS), dtype),
        full=plgpu.Barrier(num_arrivals=2 if sizes.in_one_copy else 1 + PIECES, num_barriers=stages),
        empty=plgpu.Barrier(num_barriers=stages),
        hidden_ready=plgpu.Barrier(),
    )
    shapes = dict(up_bias=(PIECES, ROWS), down_bias=(PIECES, tokens, ROWS), residual=(PIECES, tokens, ROWS))
    for name in shapes.keys() & optional.keys():
        scratch[name + "_smem"] = plgpu.SMEM(shapes[name], optional[name].dtype)
        scratch[name + "_full"] = plgpu.Barrier(num_arrivals=PIECES)
    return scratch


class _Block:
    """One block's part of both phases: a warp that streams weights, a warpgroup that multiplies and finishes tiles."""

    def __init__(self, sizes: _Sizes, gmem, scratch, optional: Collection[str]):
        self.sizes, self.gmem, self.scratch, self.optional = sizes, gmem, scratch, optional
        self.block = lax.axis_index("block")
        self.num_active = gmem.num_active[0]
        cut = functools.partial(Line.cut, block=self.block, num_blocks=sizes.num_blocks)
        self.up = cut(self.num_active * sizes.up_tiles, sizes.up_steps)
        self.down = cut(sizes.down_tiles, lax.max(self.num_active * sizes.down_steps, 1))
        self.up_loads = self.up.end - self.up.begin
        self.down_loads = jnp.where(self.num_active > 0, self.down.end - self.down.begin, 0)

    def run(self) -> None:
        on_producer_warp(self.stream, warpgroup=1)

        @pl.when(lax.axis_index("warpgroup") == 0)
        def _compute():
            self.compute(self.up, 0, self.prepare_up, self.finish_up, first_signal=1)
            plgpu.wait_smem_to_gmem(0)
            self.wait_for_all_hidden()
            plgpu.barrier_arrive(self.scratch.hidden_ready)
            first_signal = 1 + self.sizes.num_blocks
            self.compute(self.down, self.up_loads, self.prepare_down, self.finish_down, first_signal=first_signal)
            plgpu.wait_smem_to_gmem(0)

    def wait_for_all_hidden(self) -> None:
        if "signals" in self.optional:
            send_signal(self.signal(0))
            wait_for_signals(self.signal(0), self.sizes.num_blocks)

    def signal(self, index):
        return self.gmem.signals.at[pl.ds(index, 1)]

    # The stream of weights and tokens.

    def stream(self) -> None:
        pl.loop(0, self.up_loads)(self.load_up)
        ahead = lax.min(self.down_loads, self.sizes.stages)
        pl.loop(0, ahead)(self.load_down)
        plgpu.barrier_wait(self.scratch.hidden_ready)
        pl.loop(0, ahead)(self.load_hidden)

        @pl.loop(ahead, self.down_loads)
        def _down(r):
            self.load_down(r)
            self.load_hidden(r)

        loads = self.up_loads + self.down_loads

        @pl.loop(lax.max(loads - self.sizes.stages, 0), loads)
        def _drain(j):
            plgpu.barrier_wait(self.scratch.empty.at[lax.rem(j, self.sizes.stages)])

    def load_up(self, r) -> None:
        slot, position = self.reserve(r), self.up.begin + r
        u, row = self.place_of_up(position // self.sizes.up_steps)
        columns = self.columns_of(lax.rem(position, self.sizes.up_steps))
        self.load_weights(slot, self.gmem.up, self.sizes.up.places(self.gmem.active[u], row), columns)
        self.load_tokens(slot, self.gmem.x.at[_whole(self.sizes.tokens), columns])

    def load_down(self, r) -> None:
        row, u, columns = self.place_of_down(r)
        places = self.sizes.down.places(self.gmem.active[u], row)
        self.load_weights(self.reserve(self.up_loads + r), self.gmem.down, places, columns)

    def load_hidden(self, r) -> None:
        _, u, columns = self.place_of_down(r)
        slot = lax.rem(self.up_loads + r, self.sizes.stages)
        self.load_tokens(slot, self.gmem.hidden.at[u, :, columns])

    def reserve(self, j):
        """The slot of load j, once it is empty."""
        slot = lax.rem(j, self.sizes.stages)

        @pl.when(j >= self.sizes.stages)
        def _wait():
            plgpu.barrier_wait(self.scratch.empty.at[slot])

        return slot

    def load_weights(self, slot, weights_gmem, places, columns) -> None:
        slot_smem, full = self.scratch.weights_smem.at[slot], self.scratch.full.at[slot]
        load_pieces(weights_gmem, places, columns, slot_smem, full, in_one_copy=self.sizes.in_one_copy)

    def load_tokens(self, slot, tokens_gmem) -> None:
        plgpu.copy_gmem_to_smem(tokens_gmem, self.scratch.tokens_smem.at[slot], self.scratch.full.at[slot])

    def place_of_up(self, tile):
        """Of a tile of the up phase: place of its expert in the active list, first row."""
        return tile // self.sizes.up_tiles, lax.rem(tile, self.sizes.up_tiles) * self.sizes.up.rows

    def place_of_down(self, r):
        """Of a load of the down phase: first row, place of the expert in the active list, columns."""
        position = self.down.begin + r
        step = lax.rem(position, self.down.steps_per_tile)
        row = position // self.down.steps_per_tile * self.sizes.down.rows
        return row, step // self.sizes.down_steps, self.columns_of(lax.rem(step, self.sizes.down_steps))

    def columns_of(self, step):
        return pl.ds(step * self.sizes.depth, self.sizes.depth)

    # Multiplying, and sharing tiles with other blocks.

    def compute(self, line: Line, first_load, prepare, finish, *, first_signal: int) -> None:
        """For each tile in this block's part: `finish` it, or hand what there is to the block that does."""

        @pl.loop(0, line.num_tiles_touched)
        def _tile(i):
            tile = line.begin // line.steps_per_tile + i
            tile_begin, tile_end = tile * line.steps_per_tile, (tile + 1) * line.steps_per_tile
            begin, end = lax.max(line.begin, tile_begin), lax.min(line.end, tile_end)
            is_mine = begin == tile_begin
            prepared = prepare(tile, is_mine)
            parts = self.multiply(first_load + begin - line.begin, jnp.where(self.num_active > 0, end - begin, 0))
            if "signals" in self.optional:

                @pl.when(jnp.logical_not(is_mine))
                def _hand_over():
                    for n, part in enumerate(parts):
                        self.gmem.partials[self.block, n] = part
                    send_signal(self.signal(first_signal + line.last_block_before(tile_begin + 1)))

            @pl.when(is_mine)
            def _finish():
                total = parts
                if "signals" in self.optional:
                    total = self.add_others(
                        parts, line.last_block_before(tile_end), self.signal(first_signal + self.block)
                    )
                finish(tile, total, prepared)

    def multiply(self, first_load, steps):
        """Two `[64, T]` products, summed over `steps` slots of the ring."""
        scratch = self.scratch

        def loop(*accs):
            @pl.loop(0, steps)
            def _step(k):
                slot = lax.rem(first_load + k, self.sizes.stages)
                plgpu.barrier_wait(scratch.full.at[slot])
                for piece, acc in enumerate(accs):
                    plgpu.wgmma(acc, scratch.weights_smem.at[slot, piece], scratch.tokens_smem.at[slot].T)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(scratch.empty.at[slot])

            return [acc[...] for acc in accs]

        return pl.run_scoped(loop, *[plgpu.ACC((ROWS, self.sizes.tokens))] * PIECES)

    def add_others(self, parts, last, signal_gmem):
        """Adds what the blocks after this one, up to `last`, summed up of the same tile."""
        tokens, block = self.sizes.tokens, self.block
        batch = max(1, 64 // tokens)  # partial sums that are loaded together

        @pl.when(last > block)
        def _wait():
            wait_for_signals(signal_gmem, last - block)

        def add(i, total):
            for n in range(batch):  # loads that do not depend on each other overlap
                other = block + 1 + i * batch + n
                theirs = [_load_partial(self.gmem.partials.at[lax.min(other, last), piece]) for piece in range(PIECES)]
                is_there = jnp.broadcast_to(other <= last, (ROWS, tokens))
                total = [t + jnp.where(is_there, p, jnp.zeros_like(p)) for t, p in zip(total, theirs, strict=True)]
            return total

        return lax.fori_loop(0, pl.cdiv(last - block, batch), add, parts)

    # What comes before and after a tile's multiplication.

    def prepare_up(self, tile, is_mine):
        u, row = self.place_of_up(tile)
        expert = self.gmem.active[u]
        if "up_bias" in self.optional:
            is_gated = self.sizes.gates == PIECES
            windows = [(expert, n, pl.ds(row, ROWS)) for n in range(PIECES)]
            if not is_gated:
                windows = [(expert, 0, pl.ds(row + n * ROWS, ROWS)) for n in range(PIECES)]
            self.load_addend("up_bias", windows, is_mine)
        return plgpu.load(self.gmem.combine.at[expert], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)

    def finish_up(self, tile, parts, weights_T) -> None:
        u, row = self.place_of_up(tile)
        if "up_bias" in self.optional:
            plgpu.barrier_wait(self.scratch.up_bias_full)
            parts = [add_to_rows(part, self.scratch.up_bias_smem.at[n]) for n, part in enumerate(parts)]
        activated = [parts] if self.sizes.gates == PIECES else [[part] for part in parts]
        hidden = [activate(each, self.sizes.activation) for each in activated]
        weights_RT = lax.broadcast_in_dim(weights_T, (ROWS, self.sizes.tokens), (1,))
        firsts = [row + n * ROWS for n in range(len(hidden))]
        targets = [(first < self.sizes.width, self.gmem.hidden.at[u, :, pl.ds(first, ROWS)]) for first in firsts]
        self.store([h * weights_RT for h in hidden], targets)

    def prepare_down(self, tile, is_mine) -> None:
        windows = [(_whole(self.sizes.tokens), columns) for columns in self.columns_of_y(tile)]
        for name in ("down_bias", "residual"):
            if name in self.optional:
                self.load_addend(name, windows, is_mine)

    def finish_down(self, tile, parts, prepared) -> None:
        del prepared
        dtype = self.scratch.out_smem.dtype
        if "down_bias" in self.optional:
            parts = self.plus_addend("down_bias", parts)
        if "residual" in self.optional:
            parts = self.plus_addend("residual", [part.astype(dtype).astype(part.dtype) for part in parts])
        targets = [
            (columns.start < self.sizes.model_width, self.gmem.y.at[_whole(self.sizes.tokens), columns])
            for columns in self.columns_of_y(tile)
        ]
        self.store(parts, targets)

    def columns_of_y(self, tile):
        return [pl.ds(tile * self.sizes.down.rows + n * ROWS, ROWS) for n in range(PIECES)]

    def load_addend(self, name: str, windows, is_mine) -> None:
        """Starts to load what `finish` adds to the two products."""
        addend_gmem = getattr(self.gmem, name)
        addend_smem, full = getattr(self.scratch, name + "_smem"), getattr(self.scratch, name + "_full")

        @pl.when(is_mine)
        def _load():
            for n, window in enumerate(windows):
                plgpu.copy_gmem_to_smem(addend_gmem.at[window], addend_smem.at[n], full)

    def plus_addend(self, name: str, parts):
        plgpu.barrier_wait(getattr(self.scratch, name + "_full"))
        addend_smem = getattr(self.scratch, name + "_smem")
        return [part + _load_transposed(addend_smem.at[n]) for n, part in enumerate(parts)]

    def store(self, tiles, targets) -> None:
        """Each tile to its target, if that `is_there`."""
        out_smem = self.scratch.out_smem
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for n, tile in enumerate(tiles):
            store_transposed(tile.astype(out_smem.dtype), out_smem.at[n])
        plgpu.commit_smem()
        for n, (is_there, target_gmem) in enumerate(targets):
            # Past the end of an array of one tile of columns, a copy would go to its beginning.
            @pl.when(is_there)
            def _copy(n=n, target_gmem=target_gmem):
                plgpu.copy_smem_to_gmem(out_smem.at[n], target_gmem)


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
    if not (are_swizzled(model_width) and are_swizzled(width)):
        return (
            f"it copies 64 columns at a time: widths are multiples, or 16, 32, 48; these are D={model_width}, F={width}"
        )
    if x_TD.shape[0] > MOST_TOKENS:
        return f"it applies every active expert to all tokens: at most {MOST_TOKENS}, got {x_TD.shape[0]}"
    return None


IMPLEMENTATION = dispatch.Implementation(NAME, supports=_supports, run=experts, candidates=candidates)
