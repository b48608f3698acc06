from pallas_kernels.experts.api import ACTIVATIONS, Activation, experts, explain
from pallas_kernels.experts.reference import activate

__all__ = ["ACTIVATIONS", "Activation", "activate", "experts", "explain"]
