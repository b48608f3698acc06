"""Mixture-of-Experts operations: a plain-JAX definition each, and kernels for the devices that have one."""

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.experts import ACTIVATIONS, Activation, activate, experts
from pallas_kernels.matvec import matvec
from pallas_kernels.route import Routing, RoutingRule, route

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "Routing",
    "RoutingRule",
    "activate",
    "decode_attention",
    "experts",
    "matvec",
    "route",
]
