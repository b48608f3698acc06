"""Plans replicas and positions of experts from measured routing, and shows how much the busiest device gains.

    python scripts/plan_placement.py --devices 2 4 8

Routing comes from the bundled Shakespeare model generating text (one plan for each layer), and from skewed synthetic
choices: 128 experts, 8 per token, popularity falling as 1 / rank. Plans are made from the first half of the tokens and
judged on the second, which they have not seen. `without` is every expert in the slot of its number, `moved` the same slots
planned, `replicated` one slot more on each device. Writes JSON lines and a picture to --output.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import tyro

import moe_jax
from sharding.placement import device_loads, expert_loads, identity, imbalance, plan

PROMPTS = ("ROMEO:", "To be", "First Citizen:", "KING RICHARD III:", "The ", "JULIET:\nO", "Now is", "What, ho!")
SYNTHETIC_DEVICES = (8, 16, 32, 64)
SYNTHETIC_TOKENS = 65536


@dataclasses.dataclass(frozen=True)
class Options:
    """What to plan for."""

    devices: tuple[int, ...] = (2, 4, 8)
    tokens: int = 256
    output: Path = Path("docs/benchmarks/cpu/placement.jsonl")


def bundled_choices(tokens: int) -> tuple[np.ndarray, int]:
    """`[L, T, A]`: the experts that computed each new token of every prompt, and how many there are."""
    model = moe_jax.load("shakespeare", dtype="float32")
    sampling = [moe_jax.Sampling(temperature=0.9, seed=seed) for seed in range(len(PROMPTS))]
    out = moe_jax.generate(
        model, list(PROMPTS), max_new_tokens=tokens, sampling=sampling, stop_token_ids=(), routed_experts=True
    )
    assert out.routing is not None
    experts_BLUA = out.routing.experts_BLUA
    layers, active = experts_BLUA.shape[1], experts_BLUA.shape[3]
    # Token after token, prompts side by side: the second half is later text of every prompt.
    return experts_BLUA.transpose(1, 2, 0, 3).reshape(layers, -1, active), model.config.num_local_experts


def synthetic_choices(num_experts: int = 128, active: int = 8, seed: int = 0) -> np.ndarray:
    """`[1, T, A]`: distinct experts for each token, drawn with probabilities that fall as 1 / rank."""
    draw = np.random.default_rng(seed)
    logits_E = -np.log(draw.permutation(np.arange(1, num_experts + 1)))
    noisy_TE = logits_E + draw.gumbel(size=(SYNTHETIC_TOKENS, num_experts))
    return np.argpartition(-noisy_TE, active, axis=1)[None, :, :active]


def record(name: str, experts_LTA: np.ndarray, num_experts: int, devices: int) -> dict[str, Any]:
    """Load of the busiest device against the mean, worst and mean over layers."""
    half = experts_LTA.shape[1] // 2
    slots = -(-num_experts // devices)
    found: dict[str, list[float]] = {"without": [], "moved": [], "replicated": []}
    for experts_TA in experts_LTA:
        seen_E, later_E = (expert_loads(part, num_experts) for part in (experts_TA[:half], experts_TA[half:]))
        plans = {
            "without": identity(num_experts),
            "moved": plan(seen_E, devices=devices, slots=slots),
            "replicated": plan(seen_E, devices=devices, slots=slots + 1),
        }
        for kind, tables in plans.items():
            found[kind].append(imbalance(device_loads(later_E, tables, devices=devices)))
    return {
        "routing": name,
        "devices": devices,
        "experts": num_experts,
        "slots_per_device": slots,
        "tokens_planned_from": half,
        **{f"{kind}_mean": round(float(np.mean(values)), 4) for kind, values in found.items()},
        **{f"{kind}_worst_layer": round(float(np.max(values)), 4) for kind, values in found.items()},
    }


def picture(records: list[dict[str, Any]], path: Path) -> None:
    """The busiest device against the mean, before and after, for each routing."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(record["routing"] for record in records))
    figure, panels = pyplot.subplots(1, len(names), figsize=(4.6 * len(names), 3.2), squeeze=False)
    kinds = {
        "without": ("#c9b79c", "by number"),
        "moved": ("#8d9db6", "moved"),
        "replicated": ("#1b6ca8", "one replica more"),
    }
    for panel, name in zip(panels[0], names, strict=True):
        rows = [record for record in records if record["routing"] == name]
        for offset, (kind, (colour, label)) in enumerate(kinds.items()):
            places = np.arange(len(rows)) + 0.27 * (offset - 1)
            heights = [row[f"{kind}_mean"] for row in rows]
            bars = panel.bar(places, heights, 0.25, color=colour, label=label)
            panel.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
        panel.axhline(1, color="#555555", linewidth=0.8)
        panel.set_xticks(range(len(rows)), [str(row["devices"]) for row in rows])
        panel.set_xlabel("devices", fontsize=9)
        panel.set_title(name, loc="left", fontsize=10)
        panel.set_ylim(0, max(row["without_mean"] for row in rows) * 1.15)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("busiest device / mean", fontsize=9)
    panels[0, -1].legend(frameon=False, fontsize=8, loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main(options: Options) -> None:
    bundled, num_experts = bundled_choices(options.tokens)
    synthetic = synthetic_choices()
    records = [
        record("bundled Shakespeare model, 8 experts", bundled, num_experts, devices)
        for devices in options.devices
        if num_experts % devices == 0
    ]
    records += [record("synthetic, 128 experts, 1 / rank", synthetic, 128, devices) for devices in SYNTHETIC_DEVICES]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text("".join(json.dumps(line) + "\n" for line in records))
    picture(records, options.output.with_suffix(".png"))
    for line in records:
        print(
            f"{line['routing']:40} {line['devices']:3} devices: by number {line['without_mean']:.2f}, "
            f"moved {line['moved_mean']:.2f}, one replica more on each {line['replicated_mean']:.2f}"
        )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
