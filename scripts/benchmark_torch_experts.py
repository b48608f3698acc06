"""Times a MoE layer of torch's grouped_mm on the GPU; scripts/benchmark_kernels.py calls it in a process of its own.

    echo '[{"num_experts": 8, "active": 2, "width": 512, "model_width": 256, "gates": 2}, "toy", 64]' \\
        | python scripts/benchmark_torch_experts.py

Reads one JSON list (layer, shape name, tokens) from each line of its input, and prints a JSON object for each. The
layer is what Hugging Face transformers runs: softmax, top-k, sort by expert, gather, two grouped products, weighted
sum; captured in a CUDA graph, over weights that rotate beyond the L2 cache.
"""

from __future__ import annotations

import json
import sys

import torch

ROTATED_BYTES = 1e9


def moe_layer(x_TD, gate_ED, up_EXD, down_EDF, active: int, gates: int):
    """X is the gate's width and the linear part's, one after the other, or F alone for experts without a gate."""
    weights_TA, experts_TA = torch.topk(torch.softmax(x_TD @ gate_ED.T, dim=-1, dtype=torch.float32), active)
    order_M = torch.argsort(experts_TA.flatten(), stable=True)
    sizes_E = torch.zeros(len(gate_ED), dtype=torch.int32, device="cuda")
    sizes_E.scatter_add_(0, experts_TA.flatten(), torch.ones_like(experts_TA.flatten(), dtype=torch.int32))
    ends_E = torch.cumsum(sizes_E, 0, dtype=torch.int32)
    rows_MD = x_TD[order_M // active]
    up_MX = torch._grouped_mm(rows_MD, up_EXD.transpose(1, 2), offs=ends_E)
    if gates == 2:
        gate_MF, linear_MF = up_MX.chunk(2, dim=-1)
        hidden_MF = torch.nn.functional.silu(gate_MF) * linear_MF
    else:
        hidden_MF = torch.relu(up_MX)
    out_MD = torch._grouped_mm(hidden_MF, down_EDF.transpose(1, 2), offs=ends_E)
    weighted_MD = out_MD * weights_TA.flatten()[order_M, None].to(out_MD.dtype)
    return torch.zeros_like(x_TD).index_add_(0, order_M // active, weighted_MD)


def graph_time_us(run, count: int) -> float:
    """Microseconds of each of `count` calls captured one after another in a CUDA graph: the median of five replays."""
    for index in range(count):
        run(index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(count):
            run(index)
    times_us = []
    for _ in range(6):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times_us.append(1e3 * start.elapsed_time(end) / count)
    return sorted(times_us[1:])[2]


def measure(layer: dict, tokens: int, weights: list[tuple]) -> float:
    xs_TD = [torch.randn(tokens, layer["model_width"], dtype=torch.bfloat16, device="cuda") for _ in range(8)]

    def run(index: int):
        return moe_layer(xs_TD[index % 8], *weights[index % len(weights)], layer["active"], layer["gates"])

    with torch.no_grad():
        return graph_time_us(run, count=8 if tokens <= 512 else 2)


def make_weights(layer: dict) -> list[tuple]:
    experts, width, model_width = layer["num_experts"], layer["width"], layer["model_width"]
    size_bytes = 2 * experts * width * model_width * (layer["gates"] + 1)

    def normal(*shape: int):
        return torch.empty(*shape, dtype=torch.bfloat16, device="cuda").normal_(0, shape[-1] ** -0.5)

    return [
        (
            normal(experts, model_width),
            normal(experts, layer["gates"] * width, model_width),
            normal(experts, model_width, width),
        )
        for _ in range(max(1, round(ROTATED_BYTES / size_bytes)))
    ]


def main() -> None:
    made, weights = None, []
    for line in sys.stdin:
        layer, name, tokens = json.loads(line)
        if name != made:
            weights.clear()
            torch.cuda.empty_cache()
            made, weights = name, make_weights(layer)
        try:
            print(
                json.dumps({"shape": name, "tokens": tokens, "time_us": round(measure(layer, tokens, weights), 1)}),
                flush=True,
            )
        except RuntimeError as error:
            print(f"{name}, {tokens} tokens: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
