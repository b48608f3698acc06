from pallas_kernels.matvec.api import explain, matvec

__all__ = ["explain", "matvec"]
