"""Every implementation of every op against the op's definition, on the cases that each op's `cases.py` lists.

An implementation that an op's `_implementations()` lists is covered, and no line here has to change. What runs on a
CPU runs here; kernels for the GPU are interpreted on toy shapes, and run on real ones by `make test-gpu`.
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


@functools.lru_cache(maxsize=1)  # one: a real layer's weights take up to 22 GB
def _arguments(cases: ModuleType, case: Any) -> tuple[tuple, dict[str, Any]]:
    return cases.arguments(case)


def check_experts(result_TD: jax.Array, case: experts_cases.Case) -> None:
    """Close to the definition in float32, and not much further from it than the definition in the case's own dtype."""
    exact_TD, own_error = _exact_experts(case)
    assert result_TD.dtype == case.dtype
    error = _relative_error(result_TD, exact_TD)
    if case.dtype == "float32":
        assert error <= FLOAT32_ERROR
    else:
        assert error <= BFLOAT16_ERROR
        assert error <= 1.2 * own_error, f"the definition in bfloat16 has {own_error}"


@functools.lru_cache(maxsize=1)
def _exact_experts(case: experts_cases.Case) -> tuple[jax.Array, float]:
    """The definition's result in float32, and the relative error of its result in the case's dtype."""
    (x_TD, *others), named = _arguments(experts_cases, case)
    static = {name: named[name] for name in ("activation", "first_expert")}
    biases = {name: named[name] for name in ("up_bias_EGF", "down_bias_ED")}
    reference = jax.jit(functools.partial(experts_reference.experts, **static))
    with jax.default_matmul_precision("highest"):
        exact_TD = reference(x_TD.astype(jnp.float32), *others, **biases)
    return exact_TD, _relative_error(reference(x_TD, *others, **biases), exact_TD)


def _relative_error(result: jax.Array, exact: jax.Array) -> float:
    exact_norm = float(jnp.linalg.norm(exact))
    difference = float(jnp.linalg.norm(result.astype(jnp.float32) - exact))
    return difference / exact_norm if exact_norm else difference


def check_route(result: route_api.Routing, case: route_cases.Case) -> None:
    """The very experts of the definition, ties included: the cases' logits are the same in any order of summation."""
    operands, named = _arguments(route_cases, case)
    exact = route_reference.route(*operands, **named)
    np.testing.assert_array_equal(result.logits_TE, exact.logits_TE)
    np.testing.assert_array_equal(result.experts_TA, exact.experts_TA)
    # The GPU's exponential is off by up to two ulp.
    np.testing.assert_allclose(result.weights_TA, exact.weights_TA, rtol=1e-6, atol=1e-12)


@dataclasses.dataclass(frozen=True)
class Op:
    implementations: tuple[Implementation, ...]
    cases: ModuleType
    check: Callable[[Any, Any], None]  # result, case


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
ON_GPU = list(_supported("REAL", H200, but_not=CPU))


def _run(implementation: Implementation, operands: tuple, named: dict[str, Any]) -> Any:
    arrays, run = _split(implementation, named)
    return jax.jit(run)(operands, arrays)


def _split(
    implementation: Implementation, named: dict[str, Any]
) -> tuple[dict[str, Any], Callable[[tuple, dict], Any]]:
    """The arrays among the named arguments, and a function of operands and such arrays that knows the static ones."""
    is_array = {name: isinstance(value, jax.Array | jax.ShapeDtypeStruct) for name, value in named.items()}
    static = {name: value for name, value in named.items() if not is_array[name]}

    def run(operands: tuple, arrays: dict[str, Any]) -> Any:
        return implementation.run(*operands, **arrays, **static)

    return {name: value for name, value in named.items() if is_array[name]}, run


@pytest.mark.parametrize(("op", "implementation", "case"), ON_CPU)
def test_on_cpu(op: Op, implementation: Implementation, case: Any) -> None:
    operands, named = _arguments(op.cases, case)
    op.check(_run(implementation, operands, named), case)


@pytest.mark.parametrize(("op", "implementation", "case"), INTERPRETED)
def test_interpreted(op: Op, implementation: Implementation, case: Any) -> None:
    operands, named = _arguments(op.cases, case)
    with interpret.interpreting():
        result = jax.block_until_ready(_run(implementation, operands, named))
    op.check(result, case)


def _first_of_each(parameters: list[Any]) -> list[Any]:
    """The first case of several tokens for each implementation."""
    several = [parameter for parameter in parameters if parameter.values[2].tokens > 1]
    return list({parameter.values[1].name: parameter for parameter in reversed(several)}.values())


@pytest.mark.parametrize(("op", "implementation", "case"), _first_of_each(INTERPRETED))
def test_no_races(op: Op, implementation: Implementation, case: Any) -> None:
    operands, named = _arguments(op.cases, case)
    with interpret.interpreting(detect_races=True) as detector:
        jax.block_until_ready(_run(implementation, operands, named))
    assert not detector.races_found


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "implementation", "case"), ON_GPU + INTERPRETED)
def test_on_gpu(op: Op, implementation: Implementation, case: Any) -> None:
    operands, named = _arguments(op.cases, case)
    _poison_free_memory()
    op.check(_run(implementation, operands, named), case)


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "implementation", "case"), _first_of_each(ON_GPU))
def test_repeats_bit_by_bit(op: Op, implementation: Implementation, case: Any) -> None:
    operands, named = _arguments(op.cases, case)
    arrays, run = _split(implementation, named)
    run = jax.jit(run)
    first = run(operands, arrays)
    differences = jax.jit(lambda one, two: jax.tree.map(lambda a, b: (_bits(a) != _bits(b)).sum(), one, two))
    for _ in range(200):
        assert not any(jax.tree.leaves(differences(first, run(operands, arrays))))


def _bits(array: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))


def _poison_free_memory() -> None:
    """Leaves NaN in the memory that results will be allocated in: what a kernel forgets to write cannot look right."""
    for size_bytes in (1 << 16, 1 << 20, 1 << 24, 1 << 28):
        jax.block_until_ready([jnp.full((size_bytes // 4,), jnp.nan) for _ in range(8)])
