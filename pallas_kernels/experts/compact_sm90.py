"""The expert layer for tens to hundreds of tokens on Hopper: an expert's few tokens against its weights, read once.

One persistent launch. Weights are `wgmma`'s A operand, 64 rows, and an expert's tokens its N: 8, 16, 32 or 64 columns, as many
as it has, so that memory streams weights and little else. One warpgroup multiplies, one streams weights, one streams
tokens, through a ring that never drains:

1. Each block plans for itself (`compact_plan_sm90`), and the ring begins to fill with weights of the up phase.
2. Tokens are spread: a block copies its tokens' rows to where their experts want them.
3. Up: `hidden = act(up @ rows)`, for each tile of an expert's tokens and tile of its width.
4. Down: `out = down @ hidden` in float32, for each tile of tokens, of the model width, and part of the sum; it begins with the
   experts whose hidden values were finished long ago, and waits for each by its own signal.
5. Combine: a block sums its tokens' rows by weight, in order of choice: deterministic.

5 adds the residual as well. Other blocks are waited for in 2, 4 and 5, and only there by warpgroups that do not stream
weights.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch, tuning
from pallas_kernels.experts.compact_plan_sm90 import GRAIN, Plan, Sizes
from pallas_kernels.experts.compact_schedule import Deal, chunks_of_down
from pallas_kernels.experts.decode_sm90 import shape_key
from pallas_kernels.experts.grouped_matmul_sm90 import activate
from pallas_kernels.experts.grouped_rows_sm90 import LARGEST_BARRIER, LARGEST_BOX
from pallas_kernels.experts.plan import padded_tokens
from pallas_kernels.experts.signals_sm90 import send_signal, wait_for_signals
from pallas_kernels.experts.streaming_sm90 import (
    COMPILER,
    PIECES,
    ROWS,
    WeightTiles,
    add_to_rows,
    load_pieces,
    store_transposed,
)
from pallas_kernels.route.api import Routing

NAME = "compact"
TOKEN_TILES = (8, 16, 32, 64)
MOST_TOKENS_OF_AN_EXPERT = 31  # on average; with more, tokens load as many bytes as weights, and `grouped` does better
MULTIPLY, WEIGHTS, TOKENS = range(3)  # what each warpgroup does
ROWS_SPREAD, DOWN_DONE, UP_DONE = range(3)  # signals; from `UP_DONE` on, one for each tile of tokens
SHARED_BYTES = 222 << 10
LEAST_STAGES = 3
COMBINED = 1024  # columns that are combined together


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
    if settings is None:
        settings = tuning.lookup(f"experts.{NAME}", shape_key(routing, up_EGFD), x_TD.shape[0], tile=padded_tokens)
    if settings is None:
        settings = default_settings(x_TD, routing, up_EGFD)
    return _experts(
        x_TD,
        routing,
        up_EGFD,
        down_EDF,
        up_bias_EGF,
        down_bias_ED,
        residual_TD,
        activation=activation,
        first_expert=first_expert,
        num_blocks=1 if device.is_interpreted else device.num_sms,  # interpreted blocks cannot wait for each other
        **settings,
    )


@functools.partial(
    jax.jit, static_argnames=("activation", "first_expert", "num_blocks", "most_tokens", "depth", "stages")
)
def _experts(
    x_TD,
    routing: Routing,
    up_EGFD,
    down_EDF,
    up_bias_EGF,
    down_bias_ED,
    residual_TD,
    *,
    activation,
    first_expert,
    num_blocks,
    most_tokens,
    depth,
    stages,
):
    num_tokens, active = routing.experts_TA.shape
    sizes = Sizes(num_tokens, active, first_expert, len(up_EGFD), most_tokens, num_blocks)
    operands = dict(
        x=x_TD,
        experts=routing.experts_TA.reshape(-1),
        weights=routing.weights_TA.reshape(-1),
        up=up_EGFD,
        down=down_EDF[:, None],
        up_bias=up_bias_EGF,
        down_bias=None if down_bias_ED is None else down_bias_ED[:, None],
        residual=residual_TD,
    )
    if num_blocks > 1:
        num_signals, ready = UP_DONE + sizes.tiles, None if routing.plan is None else routing.plan.signals
        is_enough = ready is not None and len(ready) >= num_signals
        operands["signals"] = jax.new_ref(ready if is_enough else jnp.zeros((num_signals,), jnp.int32))
    return _launch(operands, sizes, activation=activation, depth=depth, stages=stages)


def _launch(operands: dict[str, Any], sizes: Sizes, *, activation: str, depth: int, stages: int) -> jax.Array:
    _, gates, width, model_width = operands["up"].shape
    tiles = {name: WeightTiles.of(operands[name]) for name in ("up", "down")}
    operands = operands | {name: each.stack_XRI for name, each in tiles.items()}
    operands = {name: array for name, array in operands.items() if array is not None}
    shape = Shape.of(sizes, tiles, width=width, model_width=model_width, depth=depth)
    dtype, most = operands["x"].dtype, sizes.most_tokens

    def kernel(*refs, **scratch):
        inputs, outputs = dict(zip(operands, refs, strict=False)), refs[-4:]
        block = Block(
            inputs,
            dict(zip(("rows", "hidden", "out", "y"), outputs, strict=True)),
            scratch,
            shape,
            sizes,
            Plan(sizes, inputs["experts"], **{name: scratch[name] for name in sizes.scratch()}),
            functools.partial(activate, activation=activation),
            stages,
        )
        block.run()

    in_one_copy = all(each.follow for each in tiles.values())
    scratch = sizes.scratch() | dict(
        weights_smem=plgpu.SMEM((stages, PIECES, ROWS, depth), dtype),
        tokens_smem=plgpu.SMEM((stages, most, depth), dtype),
        hidden_smem=plgpu.SMEM((PIECES // gates, most, ROWS), dtype),
        out_smem=plgpu.SMEM((PIECES, most, ROWS), jnp.float32),
        row_smem=plgpu.SMEM((shape.out_width,), dtype),
        full=plgpu.Barrier(num_arrivals=2 if in_one_copy else 1 + PIECES, num_barriers=stages),
        empty=plgpu.Barrier(num_barriers=stages),
        keys_ready=plgpu.Barrier(),
        table_ready=plgpu.Barrier(),
        row_loaded=plgpu.Barrier(num_arrivals=shape.row_box[0]),
        residual_loaded=plgpu.Barrier(num_arrivals=shape.row_box[0]),
        rows_spread=plgpu.Barrier(),
        up_done=plgpu.Barrier(),
    )
    if "up_bias" in operands or "down_bias" in operands:
        scratch |= dict(bias_smem=plgpu.SMEM((PIECES, ROWS), dtype), bias_full=plgpu.Barrier(num_arrivals=PIECES))
    *_, y_TD = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((sizes.rows, model_width), dtype),
            jax.ShapeDtypeStruct((sizes.rows, pl.cdiv(width, ROWS) * ROWS), dtype),  # zeros past `width`
            jax.ShapeDtypeStruct((shape.chunks, sizes.rows, shape.out_width), jnp.float32),
            jax.ShapeDtypeStruct((sizes.num_tokens, model_width), dtype),
        ),
        grid=(sizes.num_blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="experts_compact",
        scratch_types=scratch,
        compiler_params=COMPILER,
    )(*operands.values())
    return y_TD


@dataclasses.dataclass(frozen=True)
class Shape:
    """Static sizes of the two multiplications. An item of up is `up_steps` slots of the ring, one of down `down_steps` or,
    at the end of a sum of `all_down_steps`, fewer; `chunks` of them make the whole sum. `row_box`: the
    pieces that a row is copied in, and the columns of each.
    """

    tiles: dict[str, WeightTiles]
    depth: int
    up_tiles: int
    up_steps: int
    down_tiles: int
    all_down_steps: int
    down_steps: int
    chunks: int
    out_width: int
    row_box: tuple[int, int]

    @classmethod
    def of(cls, sizes: Sizes, tiles: dict[str, WeightTiles], *, width: int, model_width: int, depth: int) -> Shape:
        down_tiles, all_down_steps = pl.cdiv(model_width, tiles["down"].rows), pl.cdiv(width, depth)
        wanted = chunks_of_down(
            all_down_steps, down_tiles * sizes.tiles, depth=depth, num_blocks=sizes.num_blocks
        )  # fmt: skip
        down_steps = pl.cdiv(all_down_steps, wanted)
        out_width = down_tiles * tiles["down"].rows
        pieces = row_box(model_width)
        assert pieces is not None  # `supports` has seen to it
        return cls(
            tiles,
            depth,
            pl.cdiv(width, tiles["up"].rows),
            pl.cdiv(model_width, depth),
            down_tiles,
            all_down_steps,
            down_steps,
            pl.cdiv(all_down_steps, down_steps),
            out_width if out_width < COMBINED else pl.cdiv(out_width, COMBINED) * COMBINED,
            pieces,
        )

    def columns(self, step):
        return pl.ds(step * self.depth, self.depth)


def row_box(model_width: int) -> tuple[int, int] | None:
    """A row in equal pieces of at most 256 columns, each of whole 128 bytes if there are several; None if there are none.

    Equal, because where a copy of one row went past its end (D = 320, D = 2880), results were wrong on a GPU.
    """
    if model_width <= LARGEST_BOX:
        return 1, model_width
    for piece in range(LARGEST_BOX, 0, -ROWS):
        if model_width % piece == 0:
            return model_width // piece, piece
    return None


@dataclasses.dataclass(frozen=True)
class Item:
    """A tile of tokens against a tile of weights, from row `row`: slots `first_load` up to `first_load + steps` of the ring's
    whole sequence, columns from step `first_step`. `chunk`: which part of the sum."""

    tile: Any
    row: Any
    first_load: Any
    steps: Any
    first_step: Any
    chunk: Any


@dataclasses.dataclass(frozen=True)
class Block:
    """The device code of one block; `run` is what its three warpgroups do."""

    inputs: dict[str, Any]
    outputs: dict[str, Any]
    scratch: dict[str, Any]
    shape: Shape
    sizes: Sizes
    plan: Plan
    activate: Any
    stages: int

    def __getattr__(self, name: str):
        return self.scratch[name]

    def run(self) -> None:
        @pl.when(lax.axis_index("warpgroup") == MULTIPLY)
        def _multiply():
            self.plan.write_keys()
            plgpu.barrier_arrive(self.keys_ready)
            self.plan.write_table()
            plgpu.barrier_arrive(self.table_ready)
            self.multiply_all()
            plgpu.barrier_wait(self.rows_spread)
            self.combine()

        # A whole warpgroup: a single warp cannot read the plan in shared memory.
        pl.when(lax.axis_index("warpgroup") == WEIGHTS)(self.stream_weights)

        @pl.when(lax.axis_index("warpgroup") == TOKENS)
        def _tokens():
            plgpu.barrier_wait(self.keys_ready)
            self.plan.write_places(self.first_token)
            plgpu.barrier_wait(self.table_ready)
            self.spread()
            plgpu.barrier_arrive(self.rows_spread)
            self.stream_tokens()

    # What to do

    @property
    def first_token(self):
        return lax.min(lax.axis_index("block"), self.sizes.blocks_with_tokens - 1) * self.sizes.tokens_per_block

    def for_each_token(self, do) -> None:
        """`do(token, rows)` for this block's tokens; `rows()` are those of its choices, -1 for experts elsewhere."""
        sizes, first = self.sizes, self.first_token
        has_tokens = lax.axis_index("block") < sizes.blocks_with_tokens
        count = lax.select(has_tokens, lax.min(sizes.num_tokens - first, sizes.tokens_per_block), first * 0)

        @pl.loop(0, count)
        def _token(t):
            do(first + t, [self.plan.row_of(first + t, t * sizes.active + a, a) for a in range(sizes.active)])

    def for_each_item(self, up, down, *, between=None) -> Any:
        """Calls `up(item)`, `between()` and `down(item)` in the order of the ring; returns how many slots they fill."""
        shape = self.shape
        num_tiles = self.plan.num_tiles
        deal = Deal.of(
            num_tiles * shape.up_tiles,
            num_tiles * shape.chunks * shape.down_tiles,
            head_starts=max(1, shape.up_steps // shape.down_steps),
            block=lax.axis_index("block"),
            num_blocks=self.sizes.num_blocks,
        )

        @pl.loop(0, deal.num_up)
        def _up(i):
            item = deal.up(i)
            tile = lax.div(item, shape.up_tiles)
            row = (item - tile * shape.up_tiles) * shape.tiles["up"].rows
            up(Item(tile, row, i * shape.up_steps, shape.up_steps, 0, 0))

        if between is not None:
            between()

        def do_down(i, first_load):
            part, column = _divmod(deal.down(i), shape.down_tiles)
            tile, chunk = _divmod(part, shape.chunks)
            first_step = chunk * shape.down_steps
            steps = lax.min(shape.all_down_steps - first_step, shape.down_steps)
            down(Item(tile, column * shape.tiles["down"].rows, first_load, steps, first_step, chunk))
            return first_load + steps

        return lax.fori_loop(0, deal.num_down, do_down, deal.num_up * shape.up_steps)

    # Streaming

    def fill(self, item: Item, load) -> None:
        """Calls `load(step, slot)` for each step of the item as slots fall empty."""

        @pl.loop(0, item.steps)
        def _step(k):
            j = item.first_load + k
            slot = lax.rem(j, self.stages)

            @pl.when(j >= self.stages)
            def _reuse():
                plgpu.barrier_wait(self.empty.at[slot])

            load(item.first_step + k, slot)

    def drain(self, loads) -> None:
        """Waits until the last loads were consumed."""

        @pl.loop(lax.max(loads - self.stages, 0), loads)
        def _wait(j):
            plgpu.barrier_wait(self.empty.at[lax.rem(j, self.stages)])

    def stream_weights(self) -> None:
        plgpu.barrier_wait(self.table_ready)
        in_one_copy = all(each.follow for each in self.shape.tiles.values())

        def stream(name, item):
            places = self.shape.tiles[name].places(self.plan.expert_of(item.tile), item.row)

            def load(step, slot):
                slot_smem, columns = self.weights_smem.at[slot], self.shape.columns(step)
                load_pieces(self.inputs[name], places, columns, slot_smem, self.full.at[slot], in_one_copy=in_one_copy)

            self.fill(item, load)

        self.drain(self.for_each_item(functools.partial(stream, "up"), functools.partial(stream, "down")))

    def load_row(self, name: str, token, loaded) -> None:
        """A token's row into `row_smem`, complete when this returns."""
        pieces, columns = self.shape.row_box

        @pl.loop(0, pieces)
        def _load(i):
            part = pl.ds(i * columns, columns)
            plgpu.copy_gmem_to_smem(self.inputs[name].at[token, part], self.row_smem.at[part], loaded)

        plgpu.barrier_wait(loaded)

    def spread(self) -> None:
        pieces, columns = self.shape.row_box

        def copy(token, rows):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            self.load_row("x", token, self.row_loaded)
            for row in rows:

                @pl.when(row >= 0)
                def _copy(row=row):
                    @pl.loop(0, pieces)
                    def _piece(i):
                        part = pl.ds(i * columns, columns)
                        plgpu.copy_smem_to_gmem(self.row_smem.at[part], self.outputs["rows"].at[row, part])

        self.for_each_token(copy)
        plgpu.wait_smem_to_gmem(0)
        self.signal(ROWS_SPREAD)
        self.wait_for(ROWS_SPREAD, self.sizes.num_blocks)

    def stream_tokens(self) -> None:
        def stream(name, item):
            first, size = self.plan.rows_of(item.tile)

            def load(step, slot):
                for rows in range(GRAIN, self.sizes.most_tokens + 1, GRAIN):

                    @pl.when((size > rows - GRAIN) & (size <= rows))
                    def _load(rows=rows):
                        window = self.outputs[name].at[pl.ds(first, rows), self.shape.columns(step)]
                        plgpu.copy_gmem_to_smem(window, self.tokens_smem.at[slot, pl.ds(0, rows)], self.full.at[slot])

            self.fill(item, load)

        def stream_hidden(item):
            self.wait_for(UP_DONE + item.tile, self.shape.up_tiles)
            stream("hidden", item)

        stream_rows = functools.partial(stream, "rows")
        self.drain(self.for_each_item(stream_rows, stream_hidden, between=lambda: plgpu.barrier_wait(self.up_done)))

    # Multiplying

    def multiply_all(self) -> None:
        def up(item):
            self.load_bias("up_bias", item)
            self.with_token_tile(item, lambda tokens: self.up(item, tokens))
            plgpu.wait_smem_to_gmem(0)
            self.signal(UP_DONE + item.tile)

        def down(item):
            self.load_bias("down_bias", item)
            self.with_token_tile(item, lambda tokens: self.down(item, tokens))

        self.for_each_item(up, down, between=lambda: plgpu.barrier_arrive(self.up_done))
        plgpu.wait_smem_to_gmem(0)
        self.signal(DOWN_DONE)
        self.wait_for(DOWN_DONE, self.sizes.num_blocks)

    def with_token_tile(self, item: Item, do) -> None:
        """`do` with the smallest tile that holds the item's tokens."""
        _, size = self.plan.rows_of(item.tile)
        tiles = [tokens for tokens in TOKEN_TILES if tokens <= self.sizes.most_tokens]
        for lower, tokens in zip((0, *tiles), tiles, strict=False):
            pl.when((size > lower) & (size <= tokens))(functools.partial(do, tokens))

    def up(self, item: Item, tokens: int) -> None:
        parts = self.add_bias("up_bias", self.multiply(item, tokens))
        is_gated = self.hidden_smem.shape[0] == 1
        hidden = [self.activate(parts)] if is_gated else [self.activate([part]) for part in parts]
        self.store(hidden, item, self.hidden_smem, self.outputs["hidden"], tokens)

    def down(self, item: Item, tokens: int) -> None:
        parts = self.add_bias("down_bias", self.multiply(item, tokens), is_added=item.chunk == 0)
        self.store(parts, item, self.out_smem, self.outputs["out"].at[item.chunk], tokens)

    def multiply(self, item: Item, tokens: int):
        """Two `[64, tokens]` products."""

        def loop(*accumulators):
            @pl.loop(0, item.steps)
            def _step(k):
                slot = lax.rem(item.first_load + k, self.stages)
                plgpu.barrier_wait(self.full.at[slot])
                tokens_smem = self.tokens_smem.at[slot, pl.ds(0, tokens)].T
                for piece, acc in enumerate(accumulators):
                    plgpu.wgmma(acc, self.weights_smem.at[slot, piece], tokens_smem)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(self.empty.at[slot])

            return [acc[...] for acc in accumulators]

        return pl.run_scoped(loop, *[plgpu.ACC((ROWS, tokens))] * PIECES)

    def load_bias(self, name: str, item: Item) -> None:
        if name in self.inputs:
            bias_gmem = self.inputs[name].at[self.plan.expert_of(item.tile)]
            gates = bias_gmem.shape[0]
            for n in range(PIECES):
                gate, first = (n, item.row) if gates == PIECES else (0, item.row + n * ROWS)
                window = bias_gmem.at[gate, pl.ds(first, ROWS)]
                plgpu.copy_gmem_to_smem(window, self.bias_smem.at[n], self.bias_full)

    def add_bias(self, name: str, parts, *, is_added=None):
        if name not in self.inputs:
            return parts
        plgpu.barrier_wait(self.bias_full)
        sums = [add_to_rows(part, self.bias_smem.at[n]) for n, part in enumerate(parts)]
        if is_added is None:
            return sums
        return [jnp.where(jnp.broadcast_to(is_added, part.shape), s, part) for s, part in zip(sums, parts, strict=True)]

    def store(self, results, item: Item, results_smem, target_gmem, tokens: int) -> None:
        """The rows of the item's tokens, by eights: what follows belongs to the next expert."""
        first, size = self.plan.rows_of(item.tile)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for n, result in enumerate(results):
            store_transposed(result.astype(results_smem.dtype), results_smem.at[n, pl.ds(0, tokens)])
        plgpu.commit_smem()

        @pl.loop(0, lax.div(size + (GRAIN - 1), GRAIN))
        def _store(i):
            rows = pl.ds(pl.multiple_of(i * GRAIN, GRAIN), GRAIN)
            for n in range(len(results)):
                column = item.row + n * ROWS

                @pl.when(column < target_gmem.shape[-1])
                def _piece(n=n, column=column):
                    window = target_gmem.at[pl.ds(first + i * GRAIN, GRAIN), pl.ds(column, ROWS)]
                    plgpu.copy_smem_to_gmem(results_smem.at[n, rows], window)

    # Combining

    def combine(self) -> None:
        shape, (pieces, piece) = self.shape, self.shape.row_box
        columns = min(shape.out_width, COMBINED)

        def combine_token(token, rows):
            first_choice = token * self.sizes.active
            weights = [self.inputs["weights"][first_choice + a] for a in range(self.sizes.active)]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if "residual" in self.inputs:
                self.load_row("residual", token, self.residual_loaded)  # to be replaced by the sum

            @pl.loop(0, shape.out_width // columns)
            def _columns(i):
                part = pl.ds(i * columns, columns)
                total = jnp.zeros((columns,), jnp.float32)
                for row, weight in zip(rows, weights, strict=True):
                    there = lax.max(row, 0)
                    value = sum(self.outputs["out"][chunk, there, part] for chunk in range(shape.chunks))
                    # Selected after the product: a row that was never written may hold anything.
                    weighted = jnp.full((columns,), weight) * value
                    total = total + jnp.where(jnp.full((columns,), row >= 0), weighted, 0.0)
                total = total.astype(self.row_smem.dtype)
                # Rounded before and after: as Hugging Face's layers add it.
                self.row_smem[part] = total + self.row_smem[part] if "residual" in self.inputs else total

            plgpu.commit_smem()

            @pl.loop(0, pieces)
            def _store(i):
                part = pl.ds(i * piece, piece)
                plgpu.copy_smem_to_gmem(self.row_smem.at[part], self.outputs["y"].at[token, part])

        self.for_each_token(combine_token)
        plgpu.wait_smem_to_gmem(0)

    # Between blocks

    def signal(self, index) -> None:
        if "signals" in self.inputs:
            send_signal(self.inputs["signals"].at[pl.ds(index, 1)])

    def wait_for(self, index, count) -> None:
        if "signals" in self.inputs:
            wait_for_signals(self.inputs["signals"].at[pl.ds(index, 1)], count)


def _divmod(value, divisor: int):
    quotient = lax.div(value, divisor)
    return quotient, value - quotient * divisor


def default_settings(x_TD, routing: Routing, up_EGFD) -> dict[str, int]:
    """A tile with room for all tokens, or for the twofold mean and more: an expert's weights are read once for each tile.

    To have more room than is used costs less than 1 % up to 64 tokens (measured); an expert that is read twice costs its
    bytes, and real routing is uneven.
    """
    num_experts = routing.logits_TE.shape[1]
    wanted = len(x_TD) if len(x_TD) <= TOKEN_TILES[-1] else 2 * routing.experts_TA.size // num_experts + 8
    most_tokens = next((tokens for tokens in TOKEN_TILES if tokens >= wanted), TOKEN_TILES[-1])
    settings = _settings(x_TD, routing, up_EGFD, most_tokens=most_tokens, depth=128)
    if settings["stages"] >= LEAST_STAGES:
        return settings
    return _settings(x_TD, routing, up_EGFD, most_tokens=most_tokens, depth=64)


def _settings(x_TD, routing: Routing, up_EGFD, *, most_tokens: int, depth: int) -> dict[str, int]:
    num_experts, gates, width, model_width = up_EGFD.shape
    if width % ROWS or model_width % ROWS:  # a swizzled copy wants an array whose width it divides
        depth = math.gcd(width, model_width, ROWS)
    num_tokens, active = routing.experts_TA.shape
    plan = Sizes(num_tokens, active, 0, num_experts, most_tokens, 1)
    plan_bytes = 4 * (plan.choices + 5 * num_experts + plan.tiles + 20 * ROWS)
    result_bytes = most_tokens * ROWS * (4 * PIECES + 2 * (PIECES // gates)) + 2 * (model_width + PIECES * ROWS)
    slot_bytes = 2 * depth * (PIECES * ROWS + most_tokens)
    stages = min((SHARED_BYTES - plan_bytes - result_bytes) // slot_bytes, LARGEST_BARRIER)
    return dict(most_tokens=most_tokens, depth=depth, stages=stages)


def candidates(x_TD, routing: Routing, up_EGFD, down_EDF, **arguments) -> list[dict[str, int]]:
    """Settings worth trying, the default first: where a tile can have room for all tokens, with no less."""
    default = default_settings(x_TD, routing, up_EGFD)
    least = default["most_tokens"] if len(x_TD) <= TOKEN_TILES[-1] else 16
    others = [
        _settings(x_TD, routing, up_EGFD, most_tokens=most_tokens, depth=depth)
        for most_tokens in TOKEN_TILES
        for depth in (64, 128)
        if most_tokens >= least
    ]
    return [default, *(each for each in others if each != default and each["stages"] >= LEAST_STAGES)]


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
    if row_box(model_width) is None:
        return f"it copies rows in pieces of at most 256 columns, multiples of 64, and D={model_width} is none"
    tokens_of_an_expert = routing.experts_TA.size / routing.logits_TE.shape[1]
    if tokens_of_an_expert > MOST_TOKENS_OF_AN_EXPERT:
        return (
            f"it streams weights past a few tokens: at most {MOST_TOKENS_OF_AN_EXPERT} for each expert on average, "
            f"and here are {tokens_of_an_expert:.0f}"
        )
    return None


IMPLEMENTATION = dispatch.Implementation(NAME, supports=_supports, run=experts, candidates=candidates)
