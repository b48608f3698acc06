"""Choosing implementations: by order, by name, with reasons, for another device."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels import dispatch, route
from pallas_kernels.dispatch import Device, Implementation
from pallas_kernels.route import RoutingRule

ON_HOPPER = Implementation(
    "fast", supports=lambda device, x: None if device.is_hopper else "it runs on Hopper GPUs alone", run=lambda x: x + 2
)
ANYWHERE = Implementation("plain", supports=lambda device, x: None, run=lambda x: x + 1)
BOTH = (ON_HOPPER, ANYWHERE)


def test_takes_the_first_that_can() -> None:
    assert dispatch.choose("op", BOTH, 1) is ANYWHERE
    with dispatch.compiling_for(Device("gpu", "NVIDIA H200", 132)):
        assert dispatch.choose("op", BOTH, 1) is ON_HOPPER
    assert dispatch.choose("op", BOTH, 1) is ANYWHERE


def test_takes_the_one_named() -> None:
    with dispatch.compiling_for(Device("gpu", "NVIDIA H200", 132)):
        assert dispatch.choose("op", BOTH, 1, implementation="plain") is ANYWHERE


def test_explains() -> None:
    assert dispatch.explain(BOTH, 1) == [("fast", "it runs on Hopper GPUs alone"), ("plain", None)]


@pytest.mark.parametrize(
    ("implementations", "name", "message"),
    [
        (
            BOTH,
            "fast",
            "op: implementation 'fast' cannot run this call: it runs on Hopper GPUs alone. Pass implementation=None",
        ),
        (BOTH, "quick", "op: expected implementation to be None or one of 'fast', 'plain', got 'quick'"),
        ((ON_HOPPER,), None, "op: nothing runs these arguments.\n  fast: it runs on Hopper GPUs alone"),
    ],
)
def test_refusals_say_why(implementations, name: str | None, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        dispatch.choose("op", implementations, 1, implementation=name)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("kind", "expected"), [("NVIDIA H200", True), ("NVIDIA GH200 480GB", True), ("NVIDIA B200", False)]
)
def test_is_hopper(kind: str, expected: bool) -> None:
    assert Device("gpu", kind).is_hopper is expected


def test_ops_name_the_argument_of_the_wrong_shape() -> None:
    x_TD, gate_ED = jnp.ones((3, 16)), jnp.ones((4, 16))
    routing = route(x_TD, gate_ED, rule=RoutingRule(2))
    with pytest.raises(
        ValueError, match=r"expected down_EDF of shape \(4, 16, 8\) beside up_EGFD \(4, 2, 8, 16\), got"
    ):
        pallas_kernels.experts(x_TD, routing, jnp.ones((4, 2, 8, 16)), jnp.ones((4, 8, 16)))
    with pytest.raises(ValueError, match="expected top_k between 1 and the 4 selectable experts, got 5"):
        route(x_TD, gate_ED, rule=RoutingRule(5))
