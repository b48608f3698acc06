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
from pallas_kernels.decode_attention import api as attention_api
from pallas_kernels.decode_attention import cases as attention_cases
from pallas_kernels.decode_attention import reference as attention_reference
from pallas_kernels.dispatch import Device, Implementation
from pallas_kernels.experts import api as experts_api
from pallas_kernels.experts import cases as experts_cases
from pallas_kernels.experts import reference as experts_reference
from pallas_kernels.matvec import api as matvec_api
from pallas_kernels.matvec import cases as matvec_cases
from pallas_kernels.matvec import reference as matvec_reference
from pallas_kernels.route import api as route_api
from pallas_kernels.route import cases as route_cases
from pallas_kernels.route import reference as route_reference

CPU = Device("cpu", "cpu")
H200 = Device("gpu", "NVIDIA H200", 132)
# A bfloat16 result is within half an ulp, 2^-9, of the true value; roundings in between add to it.
BFLOAT16_ERROR = 4e-3
# Sums of up to a few hundred float32 products, in any order.
FLOAT32_ERROR = 2e-6
LARGE_WEIGHTS = 1 << 28
HUGE_BYTES = 8e9
# As written: XLA leaves out roundings between its operations otherwise, and the definition in bfloat16 would have few.
AS_WRITTEN = {"xla_allow_excess_precision": False}
# Cases of which arguments and exact results are kept: on a GPU one, as a real layer's weights take up to 22 GB.
MOST_KEPT = 1 if jax.default_backend() == "gpu" else 256


@functools.cache
def _shapes(cases: ModuleType, case: Any) -> tuple[tuple, dict[str, Any]]:
    return aot.shapes_of(functools.partial(cases.arguments, case))


def _forget_others(case: Any) -> None:
    """Gives up what is kept of another case, if there is room for one only: before anything is made for this one."""
    if MOST_KEPT == 1 and _last_case[0] != case:
        _arguments.cache_clear()
        _exact.cache_clear()
        _last_case[0] = case


_last_case: list[Any] = [None]


@functools.lru_cache(maxsize=MOST_KEPT)
def _arguments(cases: ModuleType, case: Any) -> tuple[tuple, dict[str, Any]]:
    """A case's arguments, made in one program: to compile its operations one by one took a second of each test."""
    _, static = aot.split_arrays(_shapes(cases, case)[1])

    @jax.jit
    def arrays() -> tuple[tuple, dict[str, Any]]:
        operands, named = cases.arguments(case)
        return operands, aot.split_arrays(named)[0]

    operands, named = arrays()
    return operands, static | named


def check_numbers(definition: Callable, cases: ModuleType, result: Any, case: Any) -> None:
    """Close to the definition in float32, and not much further from it than the definition in the case's own dtype."""
    exact, own_errors = _exact(definition, cases, case)
    dtype = _arguments(cases, case)[1].get("out_dtype") or case.dtype
    for array, exact_array, own_error in zip(*map(jax.tree.leaves, (result, exact, own_errors)), strict=True):
        assert array.dtype == dtype
        error = _relative_error(array, exact_array)
        if case.dtype == "float32":
            assert error <= FLOAT32_ERROR
        else:
            assert error <= BFLOAT16_ERROR
            assert error <= 1.2 * own_error, f"the definition in bfloat16 has {own_error}"


@functools.lru_cache(maxsize=MOST_KEPT)
def _exact(definition: Callable, cases: ModuleType, case: Any) -> tuple[Any, Any]:
    """The definition's results in float32, and the relative errors of its results in the case's dtype."""
    operands, named = _arguments(cases, case)
    arrays, static = aot.split_arrays(named)

    def in_float32(operands: tuple, arrays: dict[str, Any]) -> Any:
        return definition(*_floats_to_float32(operands), **_floats_to_float32(arrays), **static)

    with jax.default_matmul_precision("highest"):
        exact = jax.jit(in_float32)(operands, arrays)
    own = jax.jit(functools.partial(definition, **static), compiler_options=AS_WRITTEN)(*operands, **arrays)
    return exact, jax.tree.map(_relative_error, own, exact)


def _floats_to_float32(tree: Any) -> Any:
    """All but the weights of whole layers: the definition takes up one expert at a time, and a copy of all would be 45 GB."""

    def converted(leaf: jax.Array) -> jax.Array:
        is_small = leaf.size < LARGE_WEIGHTS
        return leaf.astype(jnp.float32) if is_small and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(converted, tree)


def _relative_error(result: jax.Array, exact: jax.Array) -> float:
    exact_norm = float(np.linalg.norm(exact))
    difference = float(np.linalg.norm(np.asarray(result, np.float32) - exact))
    return difference / exact_norm if exact_norm else difference


def check_route(result: route_api.Routing, case: route_cases.Case) -> None:
    """The very experts of the definition, ties included: the cases' logits are the same in any order of summation."""
    operands, named = _arguments(route_cases, case)
    arrays, static = aot.split_arrays(named)
    definition = functools.partial(route_reference.route, **static)
    exact = jax.jit(definition, compiler_options=AS_WRITTEN)(*operands, **arrays)
    np.testing.assert_array_equal(result.logits_TE, exact.logits_TE)
    np.testing.assert_array_equal(result.experts_TA, exact.experts_TA)
    if case.router.has_norm:
        np.testing.assert_array_equal(result.normed_TD, exact.normed_TD)
    # The GPU's exponential is off by up to two ulp.
    np.testing.assert_allclose(result.weights_TA, exact.weights_TA, rtol=1e-6, atol=1e-12)


@dataclasses.dataclass(frozen=True)
class Op:
    implementations: tuple[Implementation, ...]
    cases: ModuleType
    check: Callable[[Any, Any], None]  # result, case


OPS = {
    "decode_attention": Op(
        attention_api._implementations(),
        attention_cases,
        functools.partial(check_numbers, attention_reference.decode_attention, attention_cases),
    ),
    "experts": Op(
        experts_api._implementations(),
        experts_cases,
        functools.partial(check_numbers, experts_reference.experts, experts_cases),
    ),
    "matvec": Op(
        matvec_api._implementations(),
        matvec_cases,
        functools.partial(check_numbers, matvec_reference.matvec, matvec_cases),
    ),
    "route": Op(route_api._implementations(), route_cases, check_route),
}


def _supported(cases_name: str, device: Device, *, but_not: Device | None = None) -> Iterator[Any]:
    """(op, implementation, case) of everything that runs on `device`, by name, and not on `but_not`."""
    for op_name, op in OPS.items():
        for case in getattr(op.cases, cases_name):
            operands, named = _shapes(op.cases, case)
            for implementation in op.implementations:
                is_elsewhere = but_not is not None and implementation.supports(but_not, *operands, **named) is None
                if not is_elsewhere and implementation.supports(device, *operands, **named) is None:
                    name = f"{op_name}-{implementation.name}-{case.name}"
                    yield pytest.param(op, implementation, case, id=name, marks=_worker_of(cases_name, op_name, case))


def _worker_of(cases_name: str, op_name: str, case: Any) -> tuple[pytest.MarkDecorator, ...]:
    """Real layers go to one worker each, as it keeps the memory that the largest case took; huge ones come alone."""
    if (cases_name, op_name) != ("REAL", "experts"):
        return ()
    group = pytest.mark.xdist_group(case.layer.key)
    return (group, pytest.mark.huge) if case.layer.num_experts * case.layer.expert_bytes > HUGE_BYTES else (group,)


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
    arrays, static = aot.split_arrays(named)
    return arrays, lambda operands, arrays: implementation.run(*operands, **arrays, **static)


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


@pytest.mark.aot
@pytest.mark.parametrize(
    ("op", "implementation", "case"), [parameter for parameter in ON_GPU if parameter.values[0] is OPS["matvec"]]
)
def test_projection_compiles(op: Op, implementation: Implementation, case: Any) -> None:
    operands, named = _shapes(op.cases, case)
    arrays, run = _split(implementation, named)
    program = aot.compile_for_h200(run, operands, arrays)
    assert len(program.launches) == 1
    (kernel,) = program.kernels
    assert kernel.spill_bytes == 0
    assert kernel.shared_memory_bytes <= aot.SHARED_MEMORY_BYTES


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "implementation", "case"), ON_GPU + INTERPRETED)
def test_on_gpu(op: Op, implementation: Implementation, case: Any) -> None:
    _forget_others(case)
    operands, named = _arguments(op.cases, case)
    _poison_free_memory()
    op.check(_run(implementation, operands, named), case)


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "implementation", "case"), _first_of_each(ON_GPU))
def test_repeats_bit_by_bit(op: Op, implementation: Implementation, case: Any) -> None:
    _forget_others(case)
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
