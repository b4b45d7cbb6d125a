"""VidCom²: keep the video tokens that are least like their frame and least like the whole video.

Source: Liu et al., "Video Compression Commander" (arXiv 2505.14454, EMNLP 2025); released code xuyang-liu16/VidCom2 @ 944a17d.
The release, hence the published numbers, scores by a sum of Gaussians on the half of the channels with the lowest variance
(`scorer="gaussian"`); the paper's text says cosine on all channels (`scorer="cosine"`). The two agree on 20 to 70 % of the
kept tokens only, so a result must name the scorer.

`mode="corrected"` keeps exactly num_kept(N, keep_ratio) tokens (released: rounded per frame, at least 1, clipped, so that even
keep_ratio = 1 loses tokens). `mode="official"` keeps the released sets, at keep_ratio = 1 too. Original positions are kept.
Images and sound pass untouched.
"""

from numbers import Real
from typing import ClassVar

import torch
from torch import Tensor

from mmcompress.compressor import Compressor, check_ratio
from mmcompress.ops.apportion import apportion, top_per_group
from mmcompress.registry import register
from mmcompress.tokens import Reduction, Tokens, keep_where


@register
class Vidcom2(Compressor):
    """Prune a video: frames unlike the rest get more tokens, and tokens unlike frame and video stay.

    scorer: "gaussian" (the release) or "cosine" (the paper's text).
    mode: "corrected" (exact counts) or "official" (released counts and sets).
    temperature: of the softmax over frames. channel_ratio: share of channels that the Gaussian scorer looks at, in (0, 1].
    """

    kinds: ClassVar[tuple[str, ...]] = ("video",)

    scorer: str = "gaussian"
    mode: str = "corrected"
    temperature: float = 0.01
    channel_ratio: float = 0.5

    def check(self) -> None:
        if self.scorer not in ("gaussian", "cosine"):
            raise ValueError(f"scorer must be 'gaussian' or 'cosine', got {self.scorer!r}")
        if self.mode not in ("corrected", "official"):
            raise ValueError(f"mode must be 'corrected' or 'official', got {self.mode!r}")
        if isinstance(self.temperature, bool) or not isinstance(self.temperature, Real) or not 0 < self.temperature < torch.inf:
            raise ValueError(f"temperature must be a finite number > 0, got {self.temperature!r}")
        check_ratio(self.channel_ratio, "channel_ratio")

    @property
    def is_identity(self) -> bool:
        return self.keep_ratio == 1 and self.mode == "corrected"

    def compress(self, tokens: Tokens) -> Reduction:
        frames = split_frames(tokens)  # [B, T, M, D]
        T, M = frames.shape[1:3]
        if self.scorer == "gaussian":
            video, frame = gaussian_scores(frames, self.channel_ratio)
        else:
            video, frame = cosine_scores(frames)
        ratio = frame_ratios(video, self.temperature, float(self.keep_ratio))
        unlike = -(video + frame).flatten(1)
        if self.mode == "official":
            counts = (ratio.clamp(max=1) * M).round().clamp(min=1).long()
            return keep_where(tokens, top_per_group(unlike, tokens.group, counts))
        K = self.num_kept(tokens.num_tokens)
        counts = apportion(ratio * M, torch.full((T,), M, device=ratio.device), K)
        if K >= T:
            counts = fill_empty(counts)
        return keep_where(tokens, top_per_group(unlike, tokens.group, counts), K)


def split_frames(tokens: Tokens) -> Tensor:
    """x as [B, T, M, D] float32. Raises ValueError unless the tokens are whole frames of equal size, one after the other."""
    x, T = tokens.x.detach(), tokens.layout.grid[0]
    B, N, D = x.shape
    if T < 1 or N % T:
        raise ValueError(f"vidcom2 needs frames of equal size, got {N} tokens in {T} frames")
    if not torch.compiler.is_compiling():
        if not torch.equal(tokens.group, (torch.arange(N, device=x.device) // (N // T)).expand(B, N)):
            raise ValueError(f"vidcom2 needs {T} whole frames of {N // T} tokens each in order, got groups of other sizes")
        if not bool(x.isfinite().all()):
            raise ValueError(f"x must be finite, got {int((~x.isfinite()).sum())} values that are NaN or infinite")
    return x.float().view(B, T, N // T, D)


def gaussian_scores(x: Tensor, channel_ratio: float) -> tuple[Tensor, Tensor]:
    """Similarity to the video's and to the frame's mean, [B, T, M] each, of unit tokens on the channels of lowest variance."""
    num_channels = int(x.shape[-1] * channel_ratio) or x.shape[-1]
    variance = x.flatten(1, 2).var(1, correction=0)
    channels = variance.argsort(dim=-1, stable=True)[:, :num_channels].sort().values
    x = x.gather(-1, channels[:, None, None].expand(*x.shape[:-1], num_channels))
    x = x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)

    def kernel(center: Tensor) -> Tensor:
        distance = (x - center).square().sum(-1)
        return sum(torch.exp(-distance / (2 * 2.0**e)) for e in range(-3, 2))  # type: ignore[return-value]

    return kernel(x.mean((1, 2), keepdim=True)), kernel(x.mean(2, keepdim=True))


def cosine_scores(x: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine to the video's and to the frame's mean token, [B, T, M] each."""
    reciprocal = 1 / x.norm(dim=-1).clamp(min=1e-12)

    def cosine(center: Tensor) -> Tensor:
        return (x * center).sum(-1) * reciprocal / center.norm(dim=-1).clamp(min=1e-12)

    return cosine(x.mean((1, 2), keepdim=True)), cosine(x.mean(2, keepdim=True))


def frame_ratios(video: Tensor, temperature: float, keep_ratio: float) -> Tensor:
    """Ratio r_t of each frame [B, T], float64, not clipped; their mean is keep_ratio."""
    unlike = -video.double().mean(-1)
    return keep_ratio * (1 + (unlike / temperature).softmax(-1) - 1 / video.shape[1])


def fill_empty(counts: Tensor) -> Tensor:
    """While a frame has no token, the first such frame takes one from the fullest; ties to the lowest index. counts [B, T]."""
    for _ in range(counts.shape[1]):
        needs = (counts == 0).any(1, keepdim=True).long()
        full, empty = counts.argmax(1, keepdim=True), (counts == 0).int().argmax(1, keepdim=True)
        counts = counts.scatter_add(1, full, -needs).scatter_add(1, empty, needs)
    return counts


def official_emission(kept: list[list[int]], num_per_frame: int, row: int = 0) -> list[int]:
    """The release's output order. kept: per frame the tokens kept, 0…M-1.

    row 0: indices into the tokens, frame after frame. row g: frames are rows of g tokens and a newline each, indices into that
    sequence; the release puts all newlines of a frame behind the frame's kept tokens.
    """
    length = num_per_frame + (num_per_frame // row if row else 0)
    out: list[int] = []
    for t, ids in enumerate(kept):
        out += [t * length + (i // row * (row + 1) + i % row if row else i) for i in ids]
        out += [t * length + r * (row + 1) + row for r in range(num_per_frame // row if row else 0)]
    return out
