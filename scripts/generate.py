"""Continues prompts with a model on one device, several, or several hosts.

Example, on one machine:
  python scripts/generate.py --model shakespeare --prompts "ROMEO:" "To be" --mesh ep=4,tp=2 --strategy ep_agrs/ep_psum

The same over several hosts: start it on each with the same arguments but the process id. On one machine, over loopback:
  export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=2
  for id in 0 1; do
    python scripts/generate.py --model shakespeare --prompts "ROMEO:" --mesh ep=4 --coordinator 127.0.0.1:8476 \
        --num-processes 2 --process-id $id &
  done; wait

Under SLURM, Open MPI or Kubernetes `--multi-host` alone is enough. Every host reads the checkpoint from the same path, and of
it only what its devices hold. Process 0 prints. If a process dies the others end within `--timeout-s`, saying so.
"""

from __future__ import annotations

import dataclasses
import json
import time

import jax
import numpy as np
import tyro

import moe_jax
from moe_jax import multihost
from moe_jax.layers.moe import DROPPED


@dataclasses.dataclass
class Options:
    model: str = "shakespeare"
    """A checkpoint directory, a hub id, or "shakespeare"."""
    prompts: tuple[str, ...] = ("ROMEO:",)
    """Texts; for a model without tokenizer, token ids like "5 17 3"."""
    max_new_tokens: int = 64
    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0
    dtype: str | None = None
    """float32, bfloat16 or float16; by default bfloat16, on a CPU float32."""
    mesh: str | None = None
    """Devices to split the model over, such as "ep=4,tp=2"; over several hosts, all of theirs."""
    strategy: str | None = None
    """tp, ep_psum, eptp_psum, ep_agrs, ep_a2a, ep_ragged, eptp_dp, or two for prefill and decode: ep_agrs/ep_psum."""
    attention: str | None = None
    """How to split everything but the experts: tp or dp."""
    capacity_factor: float | None = None
    """Of ep_a2a and eptp_dp: drop what exceeds this times an even share. Nothing is dropped by default."""
    json: bool = False
    """Print tokens and what was dropped as one line of JSON."""
    multi_host: bool = False
    """Find the other hosts by SLURM's, Open MPI's or Kubernetes' variables."""
    coordinator: str | None = None
    """Address and port of process 0, such as 10.0.0.1:8476."""
    num_processes: int | None = None
    process_id: int | None = None
    timeout_s: int = 60
    """How long to wait for the other processes at the start, and for one that died."""

    def run(self) -> None:
        hosts = dict(coordinator=self.coordinator, num_processes=self.num_processes, process_id=self.process_id)
        if self.multi_host or any(value is not None for value in hosts.values()):
            multihost.join(**hosts, timeout_s=self.timeout_s)
            multihost.require_same(dataclasses.asdict(dataclasses.replace(self, process_id=None)))
            if self.mesh is None:
                count = jax.device_count()
                raise ValueError(f"expected a mesh over the {count} devices of all hosts, such as --mesh ep={count}")
        model = moe_jax.load(
            self.model,
            dtype=self.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"),
            mesh=self.mesh,
            strategy=self.strategy,
            attention=self.attention,
            capacity_factor=self.capacity_factor,
        )
        encode = model.tokenizer.encode if model.tokenizer else lambda ids: [int(each) for each in ids.split()]
        prompts = [encode(each) for each in self.prompts]
        started_s = time.perf_counter()
        out = moe_jax.generate(
            model,
            prompts,
            max_new_tokens=self.max_new_tokens,
            sampling=moe_jax.Sampling(temperature=self.temperature, seed=self.seed),
            routed_experts=True,
        )
        if jax.process_index() == 0:
            self._show(prompts, out, time.perf_counter() - started_s)

    def _show(self, prompts, out: moe_jax.Generated, elapsed_s: float) -> None:
        dropped, choices = _dropped(prompts, out)
        if self.json:
            print(json.dumps(dict(tokens=out.tokens.tolist(), dropped=dropped, choices=choices)), flush=True)
            return
        texts = out.texts or [f" -> {tokens.tolist()}" for tokens in out.tokens]
        for prompt, text in zip(self.prompts, texts, strict=True):
            print(f"{prompt}{text}")
        print(
            f"[{int(out.lengths.sum())} tokens in {elapsed_s:.1f} s with compilation on {jax.device_count()} devices of "
            f"{jax.process_count()} processes; {dropped} of {choices} choices of experts dropped]"
        )


def _dropped(prompts: list[list[int]], out: moe_jax.Generated) -> tuple[int, int]:
    """How many choices of experts exceeded a capacity, and how many there were; not counting padding."""
    assert out.routing is not None
    new = np.arange(out.tokens.shape[1]) < out.lengths[:, None]
    experts = [out.routing.experts_BLUA.swapaxes(1, 2)[new]]
    for request, prompt in enumerate(prompts):
        experts.append(out.routing.prompt_experts_BLTA[request, :, : len(prompt)])
    return sum(int((each == DROPPED).sum()) for each in experts), sum(each.size for each in experts)


if __name__ == "__main__":
    multihost.run(tyro.cli(Options, description=__doc__).run)
