"""Time the CUDA operators against eager PyTorch on the GPU: CUDA events, medians; called by gpu.sh.

Writes results/ops_gpu.json.
"""
# ruff: noqa: B023 (every function is called at once)

import json
import statistics
from pathlib import Path

import torch
from ops import chat_univi, mv_loop, tome_match

from mmcompress import ops


def timed(function, rounds: int = 20) -> float:
    for _ in range(3):
        function()
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
        if sum(times) > 5000:
            break
    return round(statistics.median(times), 4)


def main() -> None:
    ops.require("cuda")
    generator = torch.Generator(device="cuda").manual_seed(0)
    rows = {}
    for n, d, k in ((576, 1024, 58), (2880, 4096, 288), (6272, 3584, 627), (23040, 1024, 1152)):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(n, d, generator=generator, device="cuda").to(dtype)
            assignment = torch.arange(n, device="cuda") // 2
            name = f"{n}x{d} {str(dtype).removeprefix('torch.')}"
            rows[f"k_center {name} k{k}"] = timed(lambda: ops.k_center(x, k)), timed(lambda: mv_loop(x, k), 3)
            rows[f"bipartite_match {name}"] = (
                timed(lambda: ops.bipartite_match(x, n // 4)),
                timed(lambda: tome_match(x, n // 4)),
            )
            rows[f"merge {name}"] = (
                timed(lambda: ops.merge(x, assignment, n // 2)),
                timed(lambda: torch.zeros(n // 2, d, device="cuda", dtype=dtype).index_add_(0, assignment, x)),
            )
            if n <= 6272:
                rows[f"density_peaks {name}"] = (
                    timed(lambda: ops.density_peaks(x, k)),
                    timed(lambda: chat_univi(x.float(), k, 5)),
                )
    data = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "clock": "CUDA events, median",
        "features": "gaussian",
    }
    data["ms"] = {name: {"ours": ours, "eager": eager} for name, (ours, eager) in rows.items()}
    file = Path(__file__).parent / "results" / "ops_gpu.json"
    file.write_text(json.dumps(data, indent=1) + "\n")
    print(f"{data['device']}, torch {torch.__version__}")
    for name, (ours, eager) in rows.items():
        print(f"{name:42} ours {ours:9.4f} ms   eager {eager:9.4f} ms   {eager / ours:6.2f}x")


if __name__ == "__main__":
    main()
