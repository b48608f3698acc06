"""Placing a model's parameters over devices. Models name dimensions; tables here say which mesh axis each is split over."""

from sharding.axes import DIMENSIONS, MESH_AXES
from sharding.mesh import make_mesh
from sharding.rules import STRATEGIES, placement

__all__ = ["DIMENSIONS", "MESH_AXES", "STRATEGIES", "make_mesh", "placement"]
