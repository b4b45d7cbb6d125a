"""What the operators mean, again: float64 NumPy loops that share nothing with the package; and inputs to compare on."""

import numpy as np
import torch

from mmcompress import ops

NEAR = 1e-6  # decisions between candidates closer than this are left to rounding
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
AVAILABLE = [level for level in ("avx512", "avx2", "scalar", "reference") if ops.set_cpu_level(level) == level]
ops.set_cpu_level("avx512")


def image_like(n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows that vary smoothly, around a common mean, with noise."""
    generator = torch.Generator().manual_seed(seed)
    walk = torch.randn(n, 12, generator=generator).cumsum(0) / max(n, 1) ** 0.5
    noise = torch.randn(n, d, generator=generator)
    return (walk @ torch.randn(12, d, generator=generator) + 0.3 * noise + torch.randn(d, generator=generator)).to(dtype)


def unit(x: torch.Tensor) -> np.ndarray:
    x = x.double().numpy()
    norm = np.sqrt((x * x).sum(1, keepdims=True))
    return np.divide(x, norm, out=np.zeros_like(x), where=norm > 1e-12)


def cosine_distance(x: torch.Tensor) -> np.ndarray:
    u = unit(x)
    return np.maximum(1 - u @ u.T, 0)


def square_distance(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    a, b = a.double().numpy(), b.double().numpy()
    return (
        ((a[:, None] - b[None]) ** 2).sum(-1)
        if a.size * len(b) < 1e7
        else np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T, 0)
    )


def replay_farthest(distance: np.ndarray, picks: list[int], near: float = NEAR) -> None:
    """Every pick is the farthest from the earlier ones (up to `near`), no pick comes twice, the radius never grows."""
    assert len(set(picks)) == len(picks)
    least, radius = distance[picks[0]].copy(), np.inf
    for step, pick in enumerate(picks[1:], 1):
        left = np.setdiff1d(np.arange(len(distance)), picks[:step])
        assert least[pick] >= least[left].max() - near, (step, pick)
        assert least[pick] <= radius + near
        radius = least[pick]
        least = np.minimum(least, distance[pick])


def replay_max_sum(x: torch.Tensor, picks: list[int]) -> None:
    u = unit(x)
    assert len(set(picks)) == len(picks)
    total = u @ u[picks[0]]
    for step, pick in enumerate(picks[1:], 1):
        left = np.setdiff1d(np.arange(len(u)), picks[:step])
        assert total[pick] <= total[left].min() + NEAR * step, (step, pick)
        total += u @ u[pick]


def merge(x: np.ndarray, assignment: np.ndarray, num_out: int, size: np.ndarray | None = None):
    out, total = np.zeros((num_out, x.shape[1])), np.zeros(num_out)
    for i, j in enumerate(assignment):
        if j < 0:
            continue
        weight = 1.0 if size is None else size[i]
        total[j] += weight
        out[j] += weight * x[i]
    return np.divide(out, total[:, None], out=np.zeros_like(out), where=total[:, None] != 0), total


def density_peaks(x: torch.Tensor, k: int):
    distance = square_distance(x, x) / x.shape[1]
    np.fill_diagonal(distance, 0)
    density = -np.sort(distance, axis=1)[:, :k].mean(1)
    delta = np.empty(len(x))
    for i in range(len(x)):
        denser = [j for j in range(len(x)) if density[j] > density[i] or (density[j] == density[i] and j < i)]
        delta[i] = np.sqrt(distance[i, denser].min() if denser else distance.max())
    return density, delta
