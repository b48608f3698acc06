"""Whole MoE layers of real checkpoints, routing and experts as dispatch chooses them for an H200, compiled without one."""

from __future__ import annotations

import functools

import pytest

from pallas_kernels import aot, experts, route
from pallas_kernels.experts import cases as experts_cases
from pallas_kernels.route import cases as route_cases

# One for routing, one for the experts, one that clears the counters of their barriers; the 60 experts of qwen1.5, no
# multiple of 8, are padded before and cut after, in two more.
MOST_LAUNCHES_IN_DECODE = 5
# Logits and choice, sums of counts and the plan, rows spread, two multiplications, the sum per token; beside them XLA's
# paddings and conversions.
MOST_LAUNCHES_IN_PREFILL = 14


@pytest.mark.aot
@pytest.mark.parametrize("tokens", experts_cases.TOKENS)
@pytest.mark.parametrize("name", list(experts_cases.LAYERS))
def test_layer_compiles(name: str, tokens: int) -> None:
    layer, router = experts_cases.LAYERS[name], route_cases.ROUTERS[name]
    case = experts_cases.Case(name, tokens, layer)
    (x_TD, _, *matrices), biases = aot.shapes_of(functools.partial(experts_cases.arguments, case))
    static = {key: biases.pop(key) for key in ("activation", "first_expert")}
    routed_case = route_cases.Case(name, tokens, router)
    (_, gate_ED), route_biases = aot.shapes_of(functools.partial(route_cases.arguments, routed_case))
    rule = route_biases.pop("rule")

    def run(x_TD, gate_ED, matrices, route_biases, biases):
        routing = route(x_TD, gate_ED, rule=rule, **route_biases)
        return experts(x_TD, routing, *matrices, **static, **biases)

    program = aot.compile_for_h200(run, x_TD, gate_ED, matrices, route_biases, biases)
    for kernel in program.kernels:
        assert kernel.spill_bytes == 0, kernel
        assert kernel.shared_memory_bytes <= aot.SHARED_MEMORY_BYTES, kernel
    assert not program.large_copies
    is_decode = "experts_decode" in program.launches
    assert len(program.launches) <= (MOST_LAUNCHES_IN_DECODE if is_decode else MOST_LAUNCHES_IN_PREFILL), (
        program.launches
    )
