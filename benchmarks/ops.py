"""Time every operator against its peers: one process, interleaved, medians of process CPU time with one thread (wall time with
two).

    python benchmarks/ops.py --quick     # under 6 minutes on an idle core: the shapes of the table "must reach"
    python benchmarks/ops.py             # more shapes, Gaussian features too, two threads, a plot

Features are DINOv2 tokens of real photographs (five crops of a picture, frames of a panning window), lifted to the width by a
fixed random map; without the tower, patches of the photographs. Outputs are checked before anything is timed: a wrong index
makes the exit status 1. Peers that are not installed are reported as such: `pip install --no-build-isolation -e ".[bench]"`,
and `pip install fpsample` (built from source) for the full run. Loops of papers are written here from their description.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mmcompress import ops

RESULTS = Path(__file__).parent / "results"
CACHE = Path(".bench")
FEATURES = "real"  # or "gaussian", "patches"

# (row, ours, peer, at least): the ratios to reach with one thread
TARGETS = [
    ("k_center 2880x1024 k288", "ours f32", "mv loop", 5),
    ("k_center 2880x1024 k288", "ours f32", "DivPrune loop", 25),
    ("k_center 2880x1024 k288", "ours f32", "torch-quickfps", 20),
    ("k_center 2880x1024 k288", "ours f32", "best PyTorch block form", 2),
    ("k_center 2880x1024 k288", "ours bf16", "mv loop", 7),
    ("k_center 2880x4096 k288", "ours f32", "PyTorch block form, medium", 1.5),
    ("k_center 23040x1024 k1152", "ours f32", "mv loop", 10),
    ("k_center 23040x1024 k1152", "ours bf16", "mv loop", 16),
    ("bipartite_match 2880x1024", "ours f32", "ToMe", 1.8),
    ("bipartite_match 2880x1024", "ours bf16", "ToMe", 3.6),
    ("bipartite_match 6272x1024", "ours f32", "ToMe", 1.8),
    ("bipartite_match 6272x1024", "ours bf16", "ToMe", 3.6),
    ("merge 2880x1024", "ours f32", "scatter_reduce", 8),
    ("kmeans 6272x896 K256", "ours f32", "faiss-cpu", 1.5),
    ("kmeans 6272x896 K256", "ours bf16", "faiss-cpu", 2),
    ("kmeans 6272x896 K256", "ours f32", "VQToken loop", 3),
    ("kmeans 6272x896 K256", "ours bf16", "VQToken loop", 5),
    ("kmeans seeds 6272x896 K32", "ours f32", "published k-means++ loop", 20),
    ("density_peaks 2880x1024", "ours f32", "Chat-UniVi", 2.7),
    ("density_peaks 2880x1024", "ours bf16", "Chat-UniVi", 4.5),
    ("top_keep 5x576x4096 bf16", "ours", "loop of topk and index", 5),
    ("top_keep 32x196x4096 bf16", "ours", "loop of topk and index", 5),
    ("k_center batch 5x576x1024 k58", "ours f32", "ours per item", 1),
    ("k_center batch 5x576x1024 k58", "ours f32", "mv loop per item", 3),
    ("k_center batch 32x196x1024 k20", "ours f32", "ours per item", 1),
    ("k_center batch 32x196x1024 k20", "ours f32", "mv loop per item", 3),
    ("bipartite_match batch 5x576x1024", "ours f32", "ours per item", 1),
    ("bipartite_match batch 32x196x1024", "ours f32", "ours per item", 1),
]


# Features


def photographs():
    from sklearn.datasets import load_sample_images

    return [torch.from_numpy(image.copy()).permute(2, 0, 1) / 255 for image in load_sample_images().images]


def windows(num: int, side: int) -> torch.Tensor:
    """[num, 3, side, side]: a window that pans over the photographs."""
    pictures = [torch.nn.functional.interpolate(p[None], scale_factor=1.6, mode="bilinear")[0] for p in photographs()]
    out = []
    for i in range(num):
        p = pictures[i * len(pictures) // num]
        step = i / max(num - 1, 1)
        top, left = int(step * (p.shape[1] - side)), int((3 * step % 1) * (p.shape[2] - side))
        out.append(p[:, top : top + side, left : left + side])
    return torch.stack(out)


def tower_tokens(num: int, side: int) -> tuple[torch.Tensor, str]:
    """[num, tokens, width] and where they come from."""
    file = CACHE / f"tokens_{num}x{side}.pt"
    if file.exists():
        return torch.load(file)
    x = windows(num, side)
    try:
        from transformers import Dinov2Model

        from mmcompress.zoo.wheels import part_dir

        tower = Dinov2Model.from_pretrained(part_dir("dinov2-small-focus")).eval()
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        x = (x - mean[:, None, None]) / std[:, None, None]
        with torch.no_grad():
            tokens = torch.cat([tower(pixel_values=part).last_hidden_state[:, 1:] for part in x.split(4)])
        found = tokens, "DINOv2-small tokens of photographs"
    except (ImportError, OSError, ValueError) as error:
        patches = torch.nn.functional.unfold(x, 14, stride=14).transpose(1, 2)
        found = patches - patches.mean((0, 1)), f"photo patches (no tower: {type(error).__name__})"
    CACHE.mkdir(exist_ok=True)
    torch.save(found, file)
    return found


def features(num: int, tokens: int, width: int, kind: str = "real") -> torch.Tensor:
    """[num, tokens, width] float32."""
    global FEATURES
    generator = torch.Generator().manual_seed(0)
    if kind == "gaussian":
        return torch.randn(num, tokens, width, generator=generator)
    x, FEATURES = tower_tokens(num, round(tokens**0.5) * 14)
    return x @ (torch.randn(x.shape[-1], width, generator=generator) / x.shape[-1] ** 0.5)


# Peers, written from their descriptions


def mv_loop(x, k, first=0):
    x = x / x.norm(dim=1, keepdim=True)
    distance, picks = torch.full((len(x),), torch.inf, device=x.device), []
    for _ in range(k):
        picks.append(first)
        distance = torch.minimum(distance, 1 - torch.mv(x, x[first]))
        distance[first] = -1
        first = int(distance.argmax())
    return torch.tensor(picks)


def divprune_loop(x, k):
    """Every step takes the minimum over all chosen rows of the distance matrix again."""
    x = x / x.norm(dim=1, keepdim=True)
    distance = 1 - x @ x.T
    picks = torch.zeros(1, dtype=torch.int64)
    for _ in range(k - 1):
        least = distance.index_select(0, picks).amin(0)
        least[picks] = -1
        picks = torch.cat([picks, least.argmax()[None]])
    return picks


def block_form(x, k, m=64):
    """Exact farthest-first by blocks: candidates, their Gram matrix, one product per block."""
    x = x / x.norm(dim=1, keepdim=True)
    distance = torch.full((len(x),), torch.inf)
    picks, fresh = [0], [0]
    while len(picks) < k:
        distance = torch.minimum(distance, (1 - (x @ x[fresh].T).amax(1)).clamp(min=0))
        distance[picks] = -1
        value, index = torch.sort(distance, descending=True, stable=True)
        outside = float(value[m]) if m < len(x) else -1.0
        index = index[:m].sort().values
        gram, least, fresh = 1 - x[index] @ x[index].T, distance[index], []
        while len(picks) < k:
            best = int(least.argmax())
            if float(least[best]) <= outside and fresh:
                break
            fresh.append(int(index[best]))
            picks.append(fresh[-1])
            least = torch.minimum(least, gram[:, best].clamp(min=0))
            least[best] = -1
        m = min(2 * m, 512) if len(fresh) > 0.6 * m else max(64, m // 2) if len(fresh) < 0.15 * m else m
    return torch.tensor(picks)


def tome_match(x, r):
    x = x / x.norm(dim=-1, keepdim=True)
    value, partner = (x[0::2] @ x[1::2].T).max(-1)
    order = value.argsort(descending=True)
    source = order[:r]
    return source, order[r:], partner[source]


def chat_univi(x, k, num_neighbors):
    distance = torch.cdist(x[None], x[None]) / x.shape[1] ** 0.5
    nearest = distance.topk(num_neighbors, dim=-1, largest=False).values
    density = (-(nearest**2).mean(-1)).exp()
    density = density + torch.rand(density.shape, device=x.device) * 1e-6
    mask = (density[:, None, :] > density[:, :, None]).type(x.dtype)
    most = distance.flatten(1).max(-1).values[:, None, None]
    separation = (distance * mask + most * (1 - mask)).min(-1).values
    center = (separation * density).topk(k, dim=-1).indices
    assignment = distance.gather(1, center[..., None].expand(-1, -1, len(x))).argmin(1)
    return center[0], assignment[0]


def vqtoken_loop(x, centroid, iterations):
    x = x / x.norm(dim=1, keepdim=True)
    for _ in range(iterations):
        label = (1 - x @ (centroid / centroid.norm(dim=1, keepdim=True)).T).argmin(1)
        centroid = torch.stack([x[label == j].mean(0) if (label == j).any() else centroid[j] for j in range(len(centroid))])
    return label, centroid


def mm_kmeans(x, centroid, iterations):
    x = x / x.norm(dim=1, keepdim=True)
    for _ in range(iterations):
        label = (x @ (centroid / centroid.norm(dim=1, keepdim=True)).T).argmax(1)
        total = torch.zeros_like(centroid).index_add_(0, label, x)
        count = torch.zeros(len(centroid)).index_add_(0, label, torch.ones(len(x)))
        centroid = torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], centroid)
    return label, centroid


def published_seeding(x, uniform):
    """k-means++ that computes the distances to all chosen centres again for every seed."""
    picks = [int(uniform[0] * len(x))]
    for u in uniform[1:]:
        weight = torch.cdist(x, x[picks]).amin(1) ** 2
        picks.append(min(int(torch.searchsorted(weight.double().cumsum(0), u * weight.double().sum(), right=True)), len(x) - 1))
    return torch.tensor(picks)


def peer(module: str, make: Callable) -> Callable | None:
    try:
        return make(importlib.import_module(module))
    except ImportError:
        return None


def precise(function: Callable, precision: str = "highest") -> Callable:
    def call():
        torch.set_float32_matmul_precision(precision)
        try:
            return function()
        finally:
            torch.set_float32_matmul_precision("highest")

    return call


# Rows: name → (variants, checks, FLOPs, bytes). A variant that is None is not installed.


def k_center_row(num, tokens, width, k, kind, quick):
    x = features(num, tokens, width, kind).reshape(-1, width)
    n, half = len(x), x.bfloat16()
    unit = x / x.norm(dim=1, keepdim=True)
    variants = {
        "ours f32": lambda: ops.k_center(x, k),
        "ours bf16": lambda: ops.k_center(half, k),
        "mv loop": lambda: mv_loop(x, k),
        "PyTorch block form": lambda: block_form(x, k),
        "PyTorch block form, medium": precise(lambda: block_form(x, k), "medium"),
    }
    if n <= 4096 and width <= 1024:
        variants["DivPrune loop"] = lambda: divprune_loop(x, k)
        variants["torch-quickfps"] = peer("torch_quickfps", lambda m: lambda: m.sample_idx(unit[None], k, start_idx=0)[0])
        if not quick:
            variants["fpsample"] = peer("fpsample", lambda m: lambda: m.fps_sampling(unit.numpy(), k, start_idx=0))
            variants["torch_cluster"] = peer("torch_cluster", lambda m: lambda: m.fps(unit, ratio=k / n, random_start=False))

    def check():
        wide = x.double() / x.double().norm(dim=1, keepdim=True)
        replay(wide, ops.k_center(x, k).tolist())
        wide = half.double() / half.double().norm(dim=1, keepdim=True)
        replay(wide, ops.k_center(half, k).tolist())

    return variants, check, 2 * n * width * k, 4 * n * width


def replay(unit, picks):
    """Every pick must be the farthest one, in float64, up to 1e-6."""
    distance = torch.full((len(unit),), torch.inf, dtype=torch.float64)
    for step, pick in enumerate(picks):
        if step:
            assert distance[pick] >= distance.max() - 1e-6, f"k_center: pick {step} is not the farthest row"
        distance = torch.minimum(distance, 1 - unit @ unit[pick])
        distance[pick] = -1


def match_row(num, tokens, width, kind, quick):
    x = features(num, tokens, width, kind).reshape(-1, width)
    half, r = x.bfloat16(), x.shape[0] // 4
    variants = {
        "ours f32": lambda: ops.bipartite_match(x, r),
        "ours bf16": lambda: ops.bipartite_match(half, r),
        "ToMe": lambda: tome_match(x, r),
        "ToMe, medium": precise(lambda: tome_match(x, r), "medium"),
        "ToMe, bf16": lambda: tome_match(half, r),
    }

    def check():
        for y in (x, half):
            wide = y.double() / y.double().norm(dim=1, keepdim=True)
            score, partner = wide[0::2] @ wide[1::2].T, ops.bipartite_match(y, r).partner // 2
            assert (score.gather(1, partner[:, None])[:, 0] >= score.amax(1) - 1e-6).all(), (
                "bipartite_match: a partner is not the nearest"
            )

    n = len(x)
    return variants, check, n * n * width // 2, 4 * n * width


def merge_row(num, tokens, width, kind, quick):
    x = features(num, tokens, width, kind).reshape(-1, width)
    n, r = len(x), len(x) // 4
    match = ops.bipartite_match(x, r)
    source, keep, target = tome_match(x, r)
    even, odd, half = x[0::2], x[1::2], x.bfloat16()

    def scatter():
        merged = odd.scatter_reduce(0, target[:, None].expand(-1, width), even[source], "mean")
        return torch.cat([even[keep], merged])

    def index_add():
        size = torch.ones(n - r).index_add_(0, match.assignment, torch.ones(n)) - 1
        return torch.zeros(n - r, width).index_add_(0, match.assignment, x) / size[:, None]

    variants = {
        "ours f32": lambda: ops.merge(x, match.assignment, n - r),
        "ours bf16": lambda: ops.merge(half, match.assignment, n - r),
        "scatter_reduce": scatter,
        "index_add": index_add,
        "copy of the input": x.clone,
    }

    def check():
        torch.testing.assert_close(variants["ours f32"]()[0], index_add(), atol=1e-5, rtol=1e-5)

    return variants, check, n * width, 4 * (2 * n - r) * width


def kmeans_row(num, tokens, width, k, kind, quick):
    x = features(num, tokens, width, kind).reshape(-1, width)
    n, half = len(x), x.bfloat16()
    unit = x / x.norm(dim=1, keepdim=True)
    start = unit[torch.randperm(n, generator=torch.Generator().manual_seed(0))[:k]].contiguous()

    def faiss_kmeans(faiss):
        def call():
            faiss.omp_set_num_threads(torch.get_num_threads())
            kmeans = faiss.Kmeans(width, k, niter=10, spherical=True, max_points_per_centroid=n, min_points_per_centroid=1)
            kmeans.train(unit.numpy(), init_centroids=start.numpy())
            return kmeans.index.search(unit.numpy(), 1)

        return call

    def sklearn_kmeans(cluster):
        return lambda: cluster.KMeans(k, init=start.numpy(), n_init=1, max_iter=10, tol=0, algorithm="lloyd").fit(unit.numpy())

    variants = {
        "ours f32": lambda: ops.kmeans(x, k, init=start),
        "ours bf16": lambda: ops.kmeans(half, k, init=start),
        "faiss-cpu": peer("faiss", faiss_kmeans),
        "VQToken loop": lambda: vqtoken_loop(x, start, 10),
        "PyTorch mm + index_add": lambda: mm_kmeans(x, start, 10),
        "PyTorch mm + index_add, medium": precise(lambda: mm_kmeans(x, start, 10), "medium"),
    }
    if not quick:
        variants["scikit-learn"] = peer("sklearn.cluster", sklearn_kmeans)

    def check():
        one = ops.kmeans(x, k, init=start, num_iterations=1).assignment
        score = (x.double() / x.double().norm(dim=1, keepdim=True)) @ (
            start.double() / start.double().norm(dim=1, keepdim=True)
        ).T
        assert (score.gather(1, one[:, None])[:, 0] >= score.amax(1) - 1e-6).all(), "kmeans: an assignment is not the nearest"

    return variants, check, 20 * n * k * width, 4 * n * width * 20


def seeds_row(num, tokens, width, k, kind, quick):
    x = features(num, tokens, width, kind).reshape(-1, width)
    unit = x / x.norm(dim=1, keepdim=True)
    uniform = torch.rand(k, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    variants = {
        "ours f32": lambda: torch.ops.mmcompress.kmeans_pp(unit, uniform, k, True, 0.0),
        "published k-means++ loop": lambda: published_seeding(unit, uniform),
    }

    def check():
        assert len(set(variants["ours f32"]().tolist())) == k, "kmeans_pp: a seed came twice"

    return variants, check, 2 * len(x) * width * k, 4 * len(x) * width * k


def density_row(num, tokens, width, kind, quick):
    x = features(num, tokens, width, kind).reshape(-1, width)
    n, half, k = len(x), x.bfloat16(), len(x) // 10
    variants = {
        "ours f32": lambda: ops.density_peaks(x, k),
        "ours bf16": lambda: ops.density_peaks(half, k),
        "Chat-UniVi": lambda: chat_univi(x, k, 5),
        "Chat-UniVi, medium": precise(lambda: chat_univi(x, k, 5), "medium"),
    }

    def check():
        got, want = set(ops.density_peaks(x, k).center.tolist()), set(chat_univi(x.double(), k, 5)[0].tolist())
        assert len(got & want) > 0.95 * k, f"density_peaks: {len(got & want)} of {k} centres agree"

    return variants, check, n * n * width, 4 * n * n  # half of the symmetric products


def top_row(num, tokens, width, kind, quick):
    x = features(num, tokens, width, kind).bfloat16()
    score, k = x.float().norm(dim=-1), max(tokens // 4, 1)
    position = torch.arange(num * tokens).reshape(num, tokens)

    def loop():
        out = []
        for item in range(num):
            index = score[item].topk(k).indices.sort().values
            out.append((x[item][index], position[item][index]))
        return torch.stack([rows for rows, _ in out]), torch.stack([place for _, place in out])

    def one_sort():
        index = score.topk(k).indices.sort().values
        return x.gather(1, index[..., None].expand(-1, -1, width)), position.gather(1, index)

    kept = x[:, :k].contiguous()
    variants = {
        "ours": lambda: ops.top_keep(score, k, x, position),
        "loop of topk and index": loop,
        "one batched topk and gather": one_sort,
        "copy of the output": kept.clone,
    }

    def check():
        assert torch.equal(variants["ours"]().x, loop()[0]), "top_keep: rows differ"

    return variants, check, 0, 4 * num * k * width


def batch_row(num, tokens, width, k, kind, quick):
    x = features(num, tokens, width, kind)
    variants = {
        "ours f32": lambda: ops.k_center(x, k),
        "ours per item": lambda: [ops.k_center(item, k) for item in x],
        "mv loop per item": lambda: [mv_loop(item, k) for item in x],
    }

    def check():
        assert torch.equal(variants["ours f32"](), torch.stack(variants["ours per item"]())), "k_center: batch and items differ"

    return variants, check, 2 * num * tokens * width * k, 4 * num * tokens * width


def match_batch_row(num, tokens, width, kind, quick):
    x, r = features(num, tokens, width, kind), tokens // 4
    variants = {
        "ours f32": lambda: ops.bipartite_match(x, r),
        "ours per item": lambda: [ops.bipartite_match(item, r) for item in x],
        "ToMe per item": lambda: [tome_match(item, r) for item in x],
    }

    def check():
        one = torch.stack([m.assignment for m in variants["ours per item"]()])
        assert torch.equal(variants["ours f32"]().assignment, one), "bipartite_match: batch and items differ"

    return variants, check, num * tokens * tokens * width // 2, 4 * num * tokens * width


QUICK = {
    "k_center 2880x1024 k288": (k_center_row, 5, 576, 1024, 288),
    "k_center 2880x4096 k288": (k_center_row, 5, 576, 4096, 288),
    "k_center 23040x1024 k1152": (k_center_row, 40, 576, 1024, 1152),
    "bipartite_match 2880x1024": (match_row, 5, 576, 1024),
    "bipartite_match 6272x1024": (match_row, 32, 196, 1024),
    "merge 2880x1024": (merge_row, 5, 576, 1024),
    "kmeans 6272x896 K256": (kmeans_row, 32, 196, 896, 256),
    "kmeans seeds 6272x896 K32": (seeds_row, 32, 196, 896, 32),
    "density_peaks 2880x1024": (density_row, 5, 576, 1024),
    "top_keep 5x576x4096 bf16": (top_row, 5, 576, 4096),
    "top_keep 32x196x4096 bf16": (top_row, 32, 196, 4096),
    "k_center batch 5x576x1024 k58": (batch_row, 5, 576, 1024, 58),
    "k_center batch 32x196x1024 k20": (batch_row, 32, 196, 1024, 20),
    "bipartite_match batch 5x576x1024": (match_batch_row, 5, 576, 1024),
    "bipartite_match batch 32x196x1024": (match_batch_row, 32, 196, 1024),
}
MORE = {
    "k_center 576x1024 k58": (k_center_row, 1, 576, 1024, 58),
    "k_center 6272x3584 k627": (k_center_row, 32, 196, 3584, 627),
    "bipartite_match 2880x4096": (match_row, 5, 576, 4096),
    "merge 2880x4096": (merge_row, 5, 576, 4096),
    "kmeans 6272x896 K32": (kmeans_row, 32, 196, 896, 32),
    "density_peaks 2880x4096": (density_row, 5, 576, 4096),
}


# Measurement


def timed(function: Callable, clock: Callable) -> float:
    start = clock()
    function()
    return (clock() - start) * 1e3


def measure(variants: dict[str, Callable | None], rounds: int, clock: Callable) -> dict[str, float | None]:
    """Median milliseconds of every variant, interleaved; few rounds where a single one takes long."""
    times: dict[str, list[float]] = {name: [] for name, function in variants.items() if function}
    first = {name: timed(variants[name], clock) for name in times}  # also the warm-up
    for name, value in first.items():
        if value > 2000:
            times[name].append(value)
    for _ in range(rounds):
        for name in times:
            if first[name] > 2000 and len(times[name]) >= 2:
                continue
            times[name].append(timed(variants[name], clock))
    return {name: statistics.median(times[name]) if name in times else None for name in variants}


def machine() -> dict:
    def gflops(precision: str, dtype: torch.dtype) -> float:
        a = torch.randn(1024, 1024).to(dtype)
        best = min(timed(precise(lambda: a @ a, precision), time.process_time) for _ in range(5))
        return round(2 * 1024**3 / best / 1e6, 1)

    big = torch.randn(16 << 20)
    copy = big.clone()
    flags = (
        next((line.split() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), [])
        if Path("/proc/cpuinfo").exists()
        else []
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "level": ops.set_cpu_level("avx512"),
        "cpu_flags": [f for f in ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16") if f in flags],
        "gflops_f32": gflops("highest", torch.float32),
        "gflops_f32_medium": gflops("medium", torch.float32),
        "gflops_bf16": gflops("highest", torch.bfloat16),
        "gb_per_s": round(2 * big.nbytes / min(timed(lambda: copy.copy_(big), time.process_time) for _ in range(5)) / 1e6, 1),
    }


def report(results: dict, targets: list) -> list[dict]:
    table = []
    for row, ours, name, least in targets:
        if row not in results:
            continue
        times = results[row]["ms"]
        if name == "best PyTorch block form":
            against = min(times["PyTorch block form"], times["PyTorch block form, medium"])
        else:
            against = times.get(name)
        ratio = against / times[ours] if against else None
        table.append({"row": row, "ours": ours, "peer": name, "at_least": least, "reached": ratio and round(ratio, 2)})
    return table


def plot(results: dict, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(results)
    figure, axes = plt.subplots(figsize=(9, 0.42 * sum(len(results[n]["ms"]) for n in names) / 2 + 1))
    place, ticks, labels = 0, [], []
    for name in names:
        for variant, ms in results[name]["ms"].items():
            if ms is None:
                continue
            axes.barh(place, ms, color="tab:blue" if variant.startswith("ours") else "silver")
            ticks.append(place)
            labels.append(f"{name}: {variant}")
            place -= 1
        place -= 0.6
    axes.set(xscale="log", xlabel="ms of CPU time, one thread (median)", yticks=ticks)
    axes.set_yticklabels(labels, fontsize=5)
    figure.tight_layout()
    figure.savefig(file, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only the shapes of the table, one thread")
    parser.add_argument("--rounds", type=int, help="rounds per row (quick: 5, else 9)")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/ops.json, quick: ops_quick.json)")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    ops.require("cpu")
    rounds = args.rounds or (5 if args.quick else 9)
    kinds = ("real",) if args.quick else ("real", "gaussian")
    rows = {n: r for n, r in {**QUICK, **({} if args.quick else MORE)}.items() if args.only in n}
    data = {
        "machine": machine(),
        "clock": "process CPU time, one thread, median, interleaved",
        "rounds": rounds,
        "rows": {},
        "wrong": [],
    }
    print(json.dumps(data["machine"]))
    for kind in kinds:
        for name, (make, *shape) in rows.items():
            label = name if kind == "real" else f"{name} (gaussian)"
            variants, check, flop, size = make(*shape, kind, args.quick)
            try:
                check()
            except AssertionError as error:
                data["wrong"].append(f"{label}: {error}")
                print(f"WRONG {label}: {error}")
            ms = measure(variants, rounds, time.process_time)
            compute, memory = flop / data["machine"]["gflops_f32"] / 1e6, size / data["machine"]["gb_per_s"] / 1e6
            result = {"ms": ms, "flop": flop, "bytes": size, "floor_ms": round(max(compute, memory), 3), "features": kind}
            if kind == "real":
                result["features"] = FEATURES
            if not args.quick and kind == "real":
                torch.set_num_threads(2)
                result["ms_two_threads_wall"] = measure(variants, 3, time.perf_counter)
                torch.set_num_threads(1)
            data["rows"][label] = result
            shown = "  ".join(f"{n} {'not installed' if t is None else f'{t:.4g}'}" for n, t in ms.items())
            print(
                f"{label} [GFLOP {flop / 1e9:.3g}, MB {size / 1e6:.3g}, floor {result['floor_ms']:.3g} ms]  {shown}", flush=True
            )
    if not args.quick:
        data["note"] = "two threads: wall time, noisy where the machine was not idle"
    data["table"] = report(data["rows"], TARGETS)
    out = args.out or RESULTS / ("ops_quick.json" if args.quick else "ops.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(data, indent=1) + "\n")
    lines = ["| operator, shape | ours | against | at least | reached |", "|---|---|---|---|---|"]
    for t in data["table"]:
        reached = (
            "not installed" if t["reached"] is None else f"{t['reached']}× {'' if t['reached'] >= t['at_least'] else '(short)'}"
        )
        lines.append(f"| {t['row']} | {t['ours']} | {t['peer']} | {t['at_least']}× | {reached.strip()} |")
    print("\n".join(lines))
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    if importlib.util.find_spec("matplotlib"):
        plot(data["rows"], out.with_suffix(".png"))
    return 1 if data["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
