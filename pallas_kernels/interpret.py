"""Runs Mosaic GPU kernels on a CPU: toy shapes, true numbers, and a race detector.

A step of a kernel's loop takes about 3 ms. Not modelled: speed, `wgmma` with A in
registers, atomics and semaphores. A kernel that passes here can still lack a `wgmma_wait` or a `commit_smem`, or
deadlock on a full GPU: only a run on the GPU shows that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call  # the race detector's verdict has no public name
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch


class RaceDetector:
    """Whether the kernels that ran inside `interpreting(detect_races=True)` so far raced for memory."""

    @property
    def races_found(self) -> bool:
        return interpret_pallas_call.get_races().races_found


@contextlib.contextmanager
def interpreting(*, detect_races: bool = False, num_sms: int = 2) -> Iterator[RaceDetector]:
    """Interprets every kernel traced inside, on a pretended Hopper GPU with `num_sms` multiprocessors.

    Memory that a kernel did not write reads as NaN. Call a fresh `jax.jit` inside: what an enclosing jit has traced
    already stays as it is. Results have to be waited for inside, with `jax.block_until_ready`.

    Example:
      with interpret.interpreting(detect_races=True) as detector:
          y_TD = jax.block_until_ready(jax.jit(kernel)(x_TD))
      assert not detector.races_found
    """
    parameters = plgpu.InterpretGPUParams(detect_races=detect_races)
    interpret_pallas_call.reset_gpu_interpret_mode_state()
    pretended = dispatch.Device("gpu", "NVIDIA H200", num_sms, is_interpreted=True)
    with dispatch.compiling_for(pretended), plgpu.force_gpu_interpret_mode(parameters):
        yield RaceDetector()
