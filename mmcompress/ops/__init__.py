"""Similarity and clustering operators: `torch.ops.mmcompress.*` and the public functions on them.

Each operator has a PyTorch reference and, where built, a compiled CPU or CUDA kernel; `status()` tells which one runs. Raw
float32, bfloat16 or float16 features go in, dot products are accumulated in float32, reciprocal norms are applied last; ties go
to the lowest index.
"""

from mmcompress.ops import core
from mmcompress.ops.cluster import KMeans, kmeans
from mmcompress.ops.core import checks_wait, require, set_cpu_level, status
from mmcompress.ops.density import DensityPeaks, density_peaks
from mmcompress.ops.greedy import k_center, max_sum
from mmcompress.ops.merging import merge, sum_into
from mmcompress.ops.neighbor import neighbors
from mmcompress.ops.rows import Kept, top_keep
from mmcompress.ops.similarity import Match, bipartite_match, nearest

core.load()

__all__ = [
    "DensityPeaks",
    "KMeans",
    "Kept",
    "Match",
    "bipartite_match",
    "checks_wait",
    "density_peaks",
    "k_center",
    "kmeans",
    "max_sum",
    "merge",
    "nearest",
    "neighbors",
    "require",
    "set_cpu_level",
    "status",
    "sum_into",
    "top_keep",
]
