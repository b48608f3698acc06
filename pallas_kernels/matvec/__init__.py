from pallas_kernels.matvec.api import explain, has_kernel, matvec

__all__ = ["explain", "has_kernel", "matvec"]
