from pallas_kernels.experts.api import ACTIVATIONS, Activation, experts, explain

__all__ = ["ACTIVATIONS", "Activation", "experts", "explain"]
