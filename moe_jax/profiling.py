"""How long generation takes, what it could not be faster than, and where a decode step goes.

`GenerateProgram` is one compiled bucket of `generate`, held so that it can be timed without Python around it.
`decode_floor_ms` and `prefill_floor_ms` are arithmetic over what must be read and multiplied. `kernel_times`, `per_step` and
`operator_of` turn a profiler's traces into a table.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import pathlib
import re
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax import models
from moe_jax.kv_cache import KVCache
from moe_jax.model import Model, abstract_parameters
from moe_jax.program import NO_TOKEN, Record, State, compiled_for
from moe_jax.prompts import Batch, checked
from pallas_kernels import timing

CACHE_POSITIONS = 1024  # of a cache whose bytes are divided by them
FIRST_STEP = 32  # steps before it are not counted in the time per token


@dataclasses.dataclass(frozen=True)
class GenerateProgram:
    """Prefill and decoding of one batch, compiled. How many tokens they make is an input, up to `batch.new_bucket`.

    `traced` decodes too, and records the experts of every step; it and `advance` are there if they were asked for.
    `compile_s` is tracing, lowering and compiling prefill and advance; `temporary_bytes` is the device memory that the
    greedier of the two takes beside parameters, cache and state.
    """

    batch: Batch
    prefill: jax.stages.Compiled
    advance: jax.stages.Compiled | None
    traced: jax.stages.Compiled | None
    empty_cache: Callable[..., KVCache]
    trace_buffers: tuple[Any, Any] | None  # shapes
    compile_s: float

    @property
    def temporary_bytes(self) -> int:
        memories = [each.memory_analysis() for each in (self.prefill, self.advance) if each is not None]
        return max(memory.temp_size_in_bytes if memory else 0 for memory in memories)

    def new_cache(self, leaves: Sequence[jax.Array]) -> KVCache:
        return self.empty_cache(tuple(leaves), batch=len(self.batch.prompts), capacity=self.batch.capacity)

    def run(self, leaves: Sequence[jax.Array], cache: KVCache, tokens: int) -> tuple[float, State]:
        """Seconds of prefill and `tokens` new tokens of each request, and the state after them. Uses up the cache."""
        begin_s = time.perf_counter()
        state = self._prefilled(leaves, cache)
        if tokens > 1:
            assert self.advance is not None
            state = self._advanced(self.advance, leaves, state, tokens)
        jax.block_until_ready(state)
        return time.perf_counter() - begin_s, state

    def traced_experts(self, leaves: Sequence[jax.Array], cache: KVCache, tokens: int) -> np.ndarray:
        """`[B, L, U, A]`: the experts of every new token but the first, whose are -1."""
        assert self.traced is not None and self.trace_buffers is not None
        experts, weights = self.trace_buffers
        state = dataclasses.replace(
            self._prefilled(leaves, cache),
            experts_BLUA=jnp.full(experts.shape, NO_TOKEN, experts.dtype),
            weights_BLUA=jnp.zeros(weights.shape, weights.dtype),
        )
        return np.asarray(self._advanced(self.traced, leaves, state, tokens).experts_BLUA)[:, :, :tokens]

    def _prefilled(self, leaves, cache) -> State:
        return self.prefill(tuple(leaves), cache, self.batch.tokens_BT, self.batch.lengths_B, self.batch.inputs)[0]

    def _advanced(self, program: jax.stages.Compiled, leaves, state: State, tokens: int) -> State:
        return program(
            tuple(leaves), state, self.batch.inputs, np.int32(tokens), np.zeros(len(self.batch.prompts), bool)
        )


def compile_generate(
    model: Model,
    *,
    batch: int,
    prompt: int,
    new_tokens: int,
    traces: bool = False,
    prefill_options: Mapping[str, Any] | None = None,
    advance_options: Mapping[str, Any] | None = None,
) -> GenerateProgram:
    """Compiles what greedy requests with random prompts need. The model may be abstract: only shapes are read.

    Args:
      new_tokens: with 1, only prefill is compiled.
      traces: also compile what records experts.
      prefill_options, advance_options: of XLA, by name.
    """
    begin_s = time.perf_counter()
    prompts = np.random.default_rng(0).integers(0, model.vocab_size, (batch, prompt))
    inputs = checked(model, [row.tolist() for row in prompts], new_tokens, None, (), ())
    leaves, programs = compiled_for(model, inputs.filters, Record())
    cache = jax.eval_shape(functools.partial(programs.empty_cache, leaves, batch=batch, capacity=inputs.capacity))
    reads = (leaves, cache, inputs.tokens_BT, inputs.lengths_B, inputs.inputs)
    decodes = (inputs.inputs, np.int32(1), np.zeros(batch, bool))

    def lower(program: Any, *arguments: Any, **static: Any) -> jax.stages.Lowered:
        return program.lower(*arguments, **static)

    def state_of(prefill: Callable[..., Any]) -> State:
        return jax.eval_shape(functools.partial(prefill, new_bucket=inputs.new_bucket), *reads)[0]

    with concurrent.futures.ThreadPoolExecutor(3) as pool:  # compiling leaves Python free to lower the next
        lowered = lower(programs.prefill, *reads, new_bucket=inputs.new_bucket)
        prefill = pool.submit(lowered.compile, compiler_options=dict(prefill_options or {}))
        advance = traced = buffers = None
        if new_tokens > 1:
            lowered = lower(programs.advance, leaves, state_of(programs.prefill), *decodes)
            advance = pool.submit(lowered.compile, compiler_options=dict(advance_options or {}))
        if traces:
            _, tracing = compiled_for(model, inputs.filters, Record(routed_experts=True))
            state = state_of(tracing.prefill)
            buffers = (state.experts_BLUA, state.weights_BLUA)
            lowered = lower(tracing.advance, leaves, state, *decodes)
            traced = pool.submit(lowered.compile, compiler_options=dict(advance_options or {}))
        prefill.result(), advance and advance.result()
        compile_s = time.perf_counter() - begin_s
        return GenerateProgram(
            batch=inputs,
            prefill=prefill.result(),
            advance=advance.result() if advance else None,
            traced=traced.result() if traced else None,
            empty_cache=programs.empty_cache,
            trace_buffers=buffers,
            compile_s=compile_s,
        )


def parameters_of(model: Model) -> tuple[jax.Array, ...]:
    """What a `GenerateProgram` takes as `leaves`."""
    greedy = checked(model, [[0]], 1, None, (), ()).filters
    return compiled_for(model, greedy, Record())[0]


@dataclasses.dataclass(frozen=True)
class Times:
    """Of one batch, in milliseconds: until its first token, and for each further token of every request."""

    first_token_ms: float
    per_token_ms: float
    repeats: int


def measure(
    program: GenerateProgram,
    leaves: Sequence[jax.Array],
    *,
    last: int | None = None,
    repeats: int = 3,
    seconds: float = 3.0,
) -> Times:
    """Times of a program: medians over rounds of 1, 32 and `last` new tokens (all, by default).

    The time per token is that from token 32 to the last, so that prefill and the call's own cost cancel. Rounds end at
    `repeats`, or sooner after `seconds`.

    Raises:
      ValueError: there are fewer than two tokens to take a difference of.
    """
    last = program.batch.max_new_tokens if last is None else last
    first = first_counted(last)
    if first < 1:
        raise ValueError(f"expected at least 2 new tokens to take a difference of, got {last}")
    _, state = program.run(leaves, program.new_cache(leaves), first)
    first_s: list[float] = []
    per_token_s: list[float] = []
    begin_s = time.monotonic()
    while len(first_s) < repeats and (not first_s or time.monotonic() - begin_s < seconds):
        seconds_of = {}
        for tokens in (1, first, last):
            seconds_of[tokens], state = program.run(leaves, state.cache, tokens)
        first_s.append(seconds_of[1])
        per_token_s.append((seconds_of[last] - seconds_of[first]) / (last - first))
    return Times(1e3 * statistics.median(first_s), 1e3 * statistics.median(per_token_s), len(first_s))


def first_counted(last: int) -> int:
    """After how many of `last` tokens the time per token begins to count."""
    return min(FIRST_STEP, last // 2)


def measure_first_token(program: GenerateProgram, leaves: Sequence[jax.Array], *, repeats: int = 3) -> float:
    """Milliseconds of prefill and one token: the median of `repeats` after one to warm up."""
    _, state = program.run(leaves, program.new_cache(leaves), 1)
    seconds = []
    for _ in range(repeats):
        elapsed_s, state = program.run(leaves, state.cache, 1)
        seconds.append(elapsed_s)
    return 1e3 * statistics.median(seconds)


def active_experts(experts_BLUA: np.ndarray) -> np.ndarray:
    """`[L, U]`: how many experts of each layer at least one request chose at each step; -1 is nobody's choice."""
    L, U = experts_BLUA.shape[1:3]
    chosen_LUX = np.moveaxis(experts_BLUA, 0, 2).reshape(L, U, -1)
    sorted_LUX = np.sort(chosen_LUX, axis=2)
    is_new_LUX = np.diff(sorted_LUX, axis=2, prepend=-1) != 0
    return (is_new_LUX & (sorted_LUX >= 0)).sum(axis=2)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes of a model by what a step does with them."""

    experts: int  # all experts of all layers
    num_experts: int
    active_experts: int  # that a token visits
    sparse_layers: int
    embedding: int  # read a row at a time; 0 where it is tied to the head, which is read whole
    rest: int  # attention, routers, norms, shared experts, head
    cache_per_position: int

    @property
    def parameters(self) -> int:
        return self.experts + self.embedding + self.rest


def sizes_of(hf_config: Mapping[str, Any], *, dtype: str = "bfloat16") -> Sizes:
    """The sizes of a decoder, from its config alone."""
    family = models.family_of(dict(hf_config))
    config = family.Config.from_hf(dict(hf_config))
    graph, abstract = abstract_parameters(family, config, dtype=dtype)
    size_bytes = {path: leaf.size * leaf.dtype.itemsize for path, (leaf, _) in abstract.items()}
    stacked = {path: leaf for path, (leaf, dimensions) in abstract.items() if "experts" in dimensions}
    experts = sum(size_bytes[path] for path in stacked)
    embedding = 0 if config.tie_word_embeddings else size_bytes["embedding.weight_VD"]
    cache = jax.eval_shape(functools.partial(nnx.merge(*graph).empty_cache, 1, CACHE_POSITIONS)).layers
    return Sizes(
        experts=experts,
        num_experts=next((leaf.shape[0] for leaf in stacked.values()), 0),
        active_experts=config.num_experts_per_tok,
        sparse_layers=len({path.rpartition(".")[0] for path in stacked}),
        embedding=embedding,
        rest=sum(size_bytes.values()) - experts - embedding,
        cache_per_position=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)) // CACHE_POSITIONS,
    )


def decode_floor_ms(sizes: Sizes, *, batch: int, active_experts: float, positions: float) -> float:
    """What a decode step cannot be faster than: its bytes at the speed of the device's memory (`timing.CEILINGS`).

    `active_experts` is the mean of a layer.
    """
    read = sizes.rest + batch * positions * sizes.cache_per_position
    if sizes.num_experts:
        read += sizes.experts * active_experts / sizes.num_experts
    return 1e3 * read / timing.ceilings().read_bytes_per_s


def prefill_floor_ms(hf_config: Mapping[str, Any], sizes: Sizes, *, batch: int, length: int) -> float:
    """What reading prompts cannot be faster than: the FLOPs, or the bytes of all weights, at `timing.CEILINGS`.

    bfloat16: two bytes and two FLOPs for each weight and token. The head multiplies each prompt's last token only,
    attention half of its square.
    """
    config = models.family_of(dict(hf_config)).Config.from_hf(dict(hf_config))
    head = config.vocab_size * config.hidden_size * 2
    used = sizes.rest - head + sizes.experts * config.num_experts_per_tok / max(1, sizes.num_experts)
    head_width = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    attention = 2 * length * config.num_hidden_layers * config.num_attention_heads * head_width  # causal
    flops = batch * (length * (used + attention) + head)
    best = timing.ceilings()
    return 1e3 * max(flops / best.bf16_flops_per_s, (sizes.rest + sizes.experts) / best.read_bytes_per_s)


OTHER = "other"
HEAD = r"(Head|Embedding)\.logits|CausalLM\._logits"  # a kernel below one of these belongs to the head, whatever it is
# Which operator a kernel belongs to, by the function names of its stack: the first pattern that one of them matches,
# from the innermost function outwards.
OPERATORS: tuple[tuple[str, str], ...] = (
    (r"RMSNorm|norm", "norms"),
    (r"choose|_with_token|sampling", "sampling"),
    (r"Embedding|Rope|rotate", "embedding and rope"),
    (r"Attention\._project|Attention\._output|_heads|matvec|projected", "projections"),
    (r"LayerCache|appended|filled|attend|attention", "attention"),
    (r"route|router", "routing"),
    (r"gate_up|_up\b|up_", "experts: gate and up"),
    (r"down|combine", "experts: down and combine"),
    (r"experts|_experts|MLP|SharedExpert", "experts"),
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """What the compiler wrote about one kernel: its name in the source program and the functions that it came from."""

    op_name: str
    functions: tuple[str, ...]  # outermost first


def instructions(hlo: str) -> dict[str, Instruction]:
    """The origin of every instruction of a compiled module's text, by name; a fusion without one has its last part's."""
    frames = _stacks(hlo)
    found: dict[str, Instruction] = {}
    bodies: dict[str, list[Instruction]] = {}
    calls: dict[str, str] = {}
    computation = ""
    for line in hlo.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            computation = header[1]
        elif named := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = ", line):
            op_name = re.search(r'op_name="([^"]*)"', line)
            frame = re.search(r"stack_frame_id=(\d+)", line)
            origin = Instruction(op_name[1] if op_name else "", frames.get(int(frame[1]), ()) if frame else ())
            found[named[1]] = origin
            if origin.functions:
                bodies.setdefault(computation, []).append(origin)
            if body := re.search(r"calls=%?([\w.-]+)", line):
                calls[named[1]] = body[1]
    for name, called in calls.items():
        known = [origin for origin in bodies.get(called, ()) if operator_of(origin) != OTHER]
        if known and operator_of(found[name]) == OTHER:
            found[name] = known[-1]
    return found


def _stacks(hlo: str) -> dict[int, tuple[str, ...]]:
    """Function names, outermost first, by stack frame id."""

    def table(title: str, pattern: str) -> dict[int, tuple[str, ...]]:
        section = re.search(rf"^{title}\n((?:\d+ .*\n)*)", hlo, re.MULTILINE)
        rows = re.findall(rf"^(\d+) {pattern}", section[1], re.MULTILINE) if section else []
        return {int(row[0]): row[1:] for row in rows}

    names = table("FunctionNames", r'"(.*)"')
    locations = table("FileLocations", r"\{.*?function_name_id=(\d+)()")
    rows = table("StackFrames", r"\{file_location_id=(\d+)(?: parent_frame_id=(\d+))?")
    stacks: dict[int, tuple[str, ...]] = {}
    for frame, (location, parent) in sorted(rows.items()):
        function = names.get(int(locations.get(int(location), ("0",))[0]), ("",))[0]
        # Parents are counted from one, and one stands for none: a frame's parent p is frame p - 1.
        outer = stacks.get(int(parent or 1) - 1, ())
        stacks[frame] = (*outer, function)
    return stacks


def operator_of(origin: Instruction) -> str:
    """The operator that an instruction belongs to, `OTHER` where no function of its stack is known."""
    if any(re.search(HEAD, name) for name in origin.functions):
        return "head"
    for name in (*re.findall(r"\w+", origin.op_name)[::-1][:3], *reversed(origin.functions)):
        for pattern, operator in OPERATORS:
            if re.search(pattern, name):
                return operator
    return OTHER


@dataclasses.dataclass(frozen=True)
class KernelTime:
    """One kernel's share of a trace: what the compiler calls its instruction (or the kernel's name), and its times."""

    instruction: str
    kernel: str
    calls: float
    total_us: float


def trace_file(directory: str | pathlib.Path) -> pathlib.Path:
    """The profile that `jax.profiler.trace(directory)` wrote.

    Raises:
      FileNotFoundError: it wrote none.
    """
    found = sorted(pathlib.Path(directory).glob("plugins/profile/*/*.xplane.pb"))
    if not found:
        raise FileNotFoundError(f"expected an .xplane.pb below {directory}, as jax.profiler.trace writes it, got none")
    return found[-1]


CONTAINERS = ("while", "call", "conditional")  # instructions that consist of others, which are told apart


def kernel_times(path: str | pathlib.Path) -> list[KernelTime]:
    """Kernels of a profile, by instruction. On a GPU what ran on its streams; on a CPU what the threads of XLA ran."""
    planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    on_gpu = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    totals: dict[tuple[str, str], list[float]] = {}
    for plane in on_gpu or planes:
        for line in plane.lines:
            if on_gpu and not line.name.startswith("Stream"):
                continue  # derived lines repeat the streams' events
            for event in line.events:
                instruction = _stats(event).get("hlo_op")
                if str(instruction).startswith(CONTAINERS):
                    continue
                if on_gpu or instruction is not None:
                    times_us = totals.setdefault((str(instruction or event.name), event.name), [])
                    times_us.append(event.duration_ns / 1e3)
    return [KernelTime(*names, calls=len(each_us), total_us=sum(each_us)) for names, each_us in totals.items()]


def _stats(event: Any) -> dict[str, Any]:
    with warnings.catch_warnings():
        # "builtin type event_stats has no __module__ attribute": where warnings are errors, the process would crash.
        warnings.simplefilter("ignore", DeprecationWarning)
        return {key: value for key, value in event.stats if key}


def per_step(before: Sequence[KernelTime], after: Sequence[KernelTime], *, steps: int) -> list[KernelTime]:
    """What `after` has more than `before` by instruction, divided by the steps that it has more; calls are per step."""
    earlier = {(each.instruction, each.kernel): each for each in before}
    found = []
    for each in after:
        less = earlier.get((each.instruction, each.kernel))
        calls = each.calls - (less.calls if less else 0)
        if calls > 0:  # of a kernel that runs as often in both, the difference is noise
            total_us = each.total_us - (less.total_us if less else 0.0)
            found.append(KernelTime(each.instruction, each.kernel, calls / steps, total_us / steps))
    return found
