from pallas_kernels.route.api import Routing, RoutingRule, explain, route

__all__ = ["Routing", "RoutingRule", "explain", "route"]
