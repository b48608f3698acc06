from pallas_kernels.decode_attention.api import decode_attention, explain

__all__ = ["decode_attention", "explain"]
