"""Placing a model's parameters over devices. Models name dimensions; tables here say which mesh axis each is split over."""

from sharding.axes import DIMENSIONS, MESH_AXES
from sharding.layout import Exchange, Layout, Placement, plan_layout
from sharding.mesh import make_mesh
from sharding.strategies import ATTENTION, STRATEGIES, Strategy

__all__ = [
    "ATTENTION",
    "DIMENSIONS",
    "MESH_AXES",
    "STRATEGIES",
    "Exchange",
    "Layout",
    "Placement",
    "Strategy",
    "make_mesh",
    "plan_layout",
]
