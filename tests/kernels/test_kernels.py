"""Every implementation of every op against the op's definition, on the cases that each op's `cases.py` lists.

An implementation that an op's `_implementations()` lists is covered, and no line here has to change. What runs on a
CPU runs here; kernels for the GPU are interpreted on toy shapes, run on real ones by `make test-gpu`, and compiled for
them by `make aot`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import aot, interpret
from pallas_kernels.dispatch import Device, Implementation
from pallas_kernels.experts import api as experts_api
from pallas_kernels.experts import cases as experts_cases
from pallas_kernels.experts import reference as experts_reference
from pallas_kernels.route import api as route_api
from pallas_kernels.route import cases as route_cases
from pallas_kernels.route import reference as route_reference

CPU = Device("cpu", "cpu")
H200 = Device("gpu", "NVIDIA H200", 132)
# A bfloat16 result is within half an ulp, 2^-9, of the true value; roundings in between add to it.
BFLOAT16_ERROR = 4e-3
# Sums of up to a few hundred float32 products, in any order.
FLOAT32_ERROR = 2e-6


def check_experts(result_TD: jax.Array, operands: tuple, named: dict[str, Any]) -> None:
    """Close to the definition in float32, and not much further from it than the definition in the case's own dtype."""
    x_TD, *others = operands
    with jax.default_matmul_precision("highest"):
        exact_TD = _reference(x_TD.astype(jnp.float32), *others, **named)
    assert result_TD.dtype == x_TD.dtype
    error = _relative_error(result_TD, exact_TD)
    if x_TD.dtype == jnp.float32:
        assert error <= FLOAT32_ERROR
    else:
        own_error = _relative_error(_reference(*operands, **named), exact_TD)
        assert error <= BFLOAT16_ERROR
        assert error <= 1.2 * own_error, f"the definition in bfloat16 has {own_error}"


def _reference(*operands: Any, activation: str, first_expert: int, **biases: Any) -> jax.Array:
    static = functools.partial(experts_reference.experts, activation=activation, first_expert=first_expert)
    return jax.jit(static)(*operands, **biases)


def _relative_error(result: jax.Array, exact: jax.Array) -> float:
    exact_norm = float(jnp.linalg.norm(exact))
    difference = float(jnp.linalg.norm(result.astype(jnp.float32) - exact))
    return difference / exact_norm if exact_norm else difference


def check_route(result: route_api.Routing, operands: tuple, named: dict[str, Any]) -> None:
    """The very experts of the definition, ties included: the cases' logits are the same in any order of summation."""
    exact = route_reference.route(*operands, **named)
    np.testing.assert_array_equal(result.logits_TE, exact.logits_TE)
    np.testing.assert_array_equal(result.experts_TA, exact.experts_TA)
    # The GPU's exponential is off by up to two ulp.
    np.testing.assert_allclose(result.weights_TA, exact.weights_TA, rtol=1e-6, atol=1e-12)


@dataclasses.dataclass(frozen=True)
class Op:
    implementations: tuple[Implementation, ...]
    cases: ModuleType
    check: Callable[[Any, tuple, dict[str, Any]], None]


OPS = {
    "experts": Op(experts_api._implementations(), experts_cases, check_experts),
    "route": Op(route_api._implementations(), route_cases, check_route),
}


def _supported(cases_name: str, device: Device, *, but_not: Device | None = None) -> Iterator[Any]:
    """(op, implementation, case) of everything that runs on `device`, by name, and not on `but_not`."""
    for op_name, op in OPS.items():
        for case in getattr(op.cases, cases_name):
            operands, named = aot.shapes_of(functools.partial(op.cases.arguments, case))
            for implementation in op.implementations:
                is_elsewhere = but_not is not None and implementation.supports(but_not, *operands, **named) is None
                if not is_elsewhere and implementation.supports(device, *operands, **named) is None:
                    yield pytest.param(op, implementation, case, id=f"{op_name}-{implementation.name}-{case.name}")


ON_CPU = list(_supported("AWKWARD", CPU))
INTERPRETED = list(_supported("AWKWARD", H200, but_not=CPU))
COMPILED = list(_supported("REAL", H200, but_not=CPU))


@pytest.mark.parametrize(("op", "implementation", "case"), ON_CPU)
def test_on_cpu(op: Op, implementation: Implementation, case: Any) -> None:
    operands, named = op.cases.arguments(case)
    op.check(implementation.run(*operands, **named), operands, named)


@pytest.mark.parametrize(("op", "implementation", "case"), INTERPRETED)
def test_interpreted(op: Op, implementation: Implementation, case: Any) -> None:
    operands, named = op.cases.arguments(case)
    with interpret.interpreting():
        result = jax.block_until_ready(implementation.run(*operands, **named))
    op.check(result, operands, named)


def _first_of_each(parameters: list[Any]) -> list[Any]:
    """The first case of several tokens for each implementation."""
    several = [parameter for parameter in parameters if parameter.values[2].tokens > 1]
    return list({parameter.values[1].name: parameter for parameter in reversed(several)}.values())


@pytest.mark.parametrize(("op", "implementation", "case"), _first_of_each(INTERPRETED))
def test_no_races(op: Op, implementation: Implementation, case: Any) -> None:
    operands, named = op.cases.arguments(case)
    with interpret.interpreting(detect_races=True) as detector:
        jax.block_until_ready(implementation.run(*operands, **named))
    assert not detector.races_found


@pytest.mark.aot
@pytest.mark.parametrize(("op", "implementation", "case"), COMPILED)
def test_compiles(op: Op, implementation: Implementation, case: Any) -> None:
    operands, named = aot.shapes_of(functools.partial(op.cases.arguments, case))
    program = aot.compile_for_h200(functools.partial(_run, implementation, named), operands, _arrays(named))
    assert program.kernels
    for kernel in program.kernels:
        assert kernel.spill_bytes == 0, kernel
        assert kernel.shared_memory_bytes <= aot.SHARED_MEMORY_BYTES, kernel
    assert not program.large_copies


def _run(implementation: Implementation, named: dict[str, Any], operands: tuple, arrays: dict[str, Any]) -> Any:
    return implementation.run(*operands, **(named | arrays))


def _arrays(named: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in named.items() if isinstance(value, jax.Array | jax.ShapeDtypeStruct)}
