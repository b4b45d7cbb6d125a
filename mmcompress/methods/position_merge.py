"""Merge tokens, and let each merged token carry the positions of several of its members, one per slice of rotary frequencies.

Source: Huang et al., "PPE: Positional Preservation Embedding for Multimodal Large Language Models" (arXiv 2510.22936, ICLR
2026); formulas checked against the released re-implementation. Differences: members are ordered by distance from the centre
(released: two columns sorted independently, so that weights have no effect), outputs stand in raster order, every item is
merged by itself, the number of positions may be any that a section of frequencies holds, and a cascade collects the positions
of all members in turn (released: those of the last member). Features are plain means of the stage's tokens, as released.
"""

import math
from dataclasses import replace
from numbers import Integral

import torch
from torch import Tensor

from mmcompress import ops
from mmcompress.compressor import Compressor, Merger
from mmcompress.registry import create, get_method, list_methods, register
from mmcompress.tokens import Reduction, Tokens, gather

POSITIONS = 8  # the paper's K


@register
class PositionMerge(Compressor):
    """Merge with another method; a merged token keeps the positions of several members, shared out over its rotary frequencies.

    merger: the method that clusters and averages, by name or as a configuration, {"method": "tome", "metric": "keys"}; its
    keep_ratio is that of this method. A cluster's centre is its anchor. dpc_knn looks at 3 neighbours where tokens carry
    several positions already, unless the configuration says otherwise.
    positions: "carry" (this method), or one of two baselines at the same merging, one position per token: "anchor" (the
    centre's) or "renumber" (outputs follow one another from where the item starts; on a grid they fill the smallest square,
    row by row). Text keeps its positions in all three.
    num_positions: positions per token; "auto": the largest that divides 8 and every rotary section of the model.
    member_order: whose positions come first, "center" (the centre's, then by distance from it, ties by index) or "index_desc"
    (the highest index's).
    fill: what the slots left over repeat, "cyclic" (p1 p2 p1 p2), "first" (p1 p2 p1 p1) or "spread" (p1 p1 p2 p2).
    cascade: what tokens that carry several positions already hand on, "interleave" (the first of each member, then the second
    of each, …) or "inherit" (all of the member with the highest index).
    mode: "corrected" or "official" (dpc_knn only: the release's counts, clips merged per step of their grid, outputs by
    descending score, and a num_positions that divides every rotary section).
    """

    keep_ratio: float = 0.45
    merger: str | dict = "dpc_knn"
    positions: str = "carry"
    num_positions: int | str = "auto"
    member_order: str = "center"
    fill: str = "cyclic"
    cascade: str = "interleave"
    mode: str = "corrected"

    def check(self) -> None:
        P = self.num_positions
        if P != "auto" and (isinstance(P, (bool, str)) or not isinstance(P, Integral) or P < 1):
            raise ValueError(f"num_positions must be 'auto' or an integer >= 1, got {P!r}")
        for name, allowed in (
            ("positions", ("carry", "anchor", "renumber")),
            ("member_order", ("center", "index_desc")),
            ("fill", ("cyclic", "first", "spread")),
            ("cascade", ("interleave", "inherit")),
            ("mode", ("corrected", "official")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {getattr(self, name)!r}")
        if self.mode == "official" and self._merger()[0] != "dpc_knn":
            raise ValueError(f"merger must be dpc_knn in mode 'official', got {self.merger!r}")

    def _merger(self) -> tuple[str, dict]:
        """Name and fields of the merger."""
        fields = dict(self.merger) if isinstance(self.merger, dict) else {"method": self.merger}
        name = fields.pop("method", None)
        mergers = [m for m in list_methods() if isinstance(c := get_method(m), type) and issubclass(c, Merger)]
        if name not in mergers:
            raise ValueError(f"merger must be one of {', '.join(mergers)}, or a configuration of one; got {self.merger!r}")
        if own := {"keep_ratio", "layer", "placement"} & set(fields):
            raise ValueError(f"merger must leave {', '.join(sorted(own))} to position_merge itself, got {self.merger!r}")
        return name, fields

    def setup(self) -> None:
        name, fields = self._merger()
        if self.mode == "official":
            fields["mode"] = "official"
        self.base = create(name, keep_ratio=self.keep_ratio, **fields)
        later = {"num_neighbors": 3} if name == "dpc_knn" else {}
        self.later = create(name, keep_ratio=self.keep_ratio, **{**later, **fields})

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("positions", *self.base.reads)

    @property
    def is_identity(self) -> bool:
        return self.base.is_identity

    @property
    def swaps_places(self) -> bool:  # type: ignore[override]
        return self.mode == "official"

    def num_kept(self, num_tokens: int) -> int:
        return self.base.num_kept(num_tokens)

    def check_sections(self, sections: tuple[int, ...]) -> None:
        if self.num_positions == "auto":
            return
        P = int(self.num_positions)
        if min(sections) < P:
            raise ValueError(f"num_positions must be at most the smallest rotary section of {list(sections)}, got {P}")
        if self.mode == "official" and any(s % P for s in sections):
            raise ValueError(f"num_positions must divide every rotary section of {list(sections)} in mode 'official', got {P}")

    def compress(self, tokens: Tokens) -> Reduction:
        steps = tokens.layout.grid[0] if self.mode == "official" and tokens.layout.kind == "video" else 1
        if steps == 1:
            return self._merge(tokens)
        B, N = tokens.group.shape
        each = torch.arange(steps, device=tokens.group.device).repeat_interleave(-(-N // steps))[:N]
        if N % steps or bool((tokens.position[..., 0] != each).any()):
            raise ValueError(
                f"a clip needs equally many tokens at each of its {steps} steps in mode 'official', got {N} tokens"
            )
        out = self._merge(_split(tokens, steps))
        M, K = N // steps, out.num_kept
        step = torch.arange(B * steps, device=out.anchor.device)[:, None] % steps
        out = replace(out, anchor=out.anchor + step * M, assignment=out.assignment + step * K)
        return Reduction(
            **{name: None if v is None else v.reshape(B, -1, *v.shape[2:]) for name, v in vars(out).items()}  # type: ignore[arg-type]
        )

    def _merge(self, tokens: Tokens) -> Reduction:
        carried = tokens.signals.get("num_positions")
        base = self.base if carried is None else self.later
        out = base(replace(tokens, size=torch.ones_like(tokens.size)))  # plain means
        positions = tokens.signals.get("positions")
        positions = tokens.position[:, :, None] if positions is None else positions
        if positions.is_floating_point() or positions.shape[:2] != tokens.group.shape or positions.shape[3:] != (3,):
            raise ValueError(
                f"positions must be integers of shape [B, N, P, 3] with [B, N] = {list(tokens.group.shape)}, "
                f"got {positions.dtype} {list(positions.shape)}"
            )
        if self.positions != "carry":
            own = gather(positions[:, :, 0], out.anchor)
            own = renumbered(positions[:, :, 0], own) if self.positions == "renumber" else own
            return self._placed(tokens, base, out, own[:, :, None], torch.ones_like(out.anchor))
        P = self.num_positions
        if P == "auto":
            P = POSITIONS if "positions" not in tokens.signals else positions.shape[2]
        if carried is None:
            positions, valid = positions[:, :, :1], torch.ones_like(tokens.group)
        else:
            valid = carried
        assignment, K = out.assignment, out.num_kept
        joined, column = assignment >= 0, torch.arange(tokens.num_tokens, device=assignment.device)
        slot = assignment.clamp(min=0)
        if carried is not None and self.cascade == "inherit":
            last = torch.full_like(out.anchor, -1).scatter_reduce(1, slot, torch.where(joined, column, -1), "amax")
            assignment = torch.where(last.gather(1, slot) == column, assignment, -1)
        if self.member_order == "center":
            center = out.anchor.gather(1, slot)
            rank = member_rank(base.distance(tokens, center).masked_fill(center == column, -torch.inf))  # type: ignore[operator]
        else:
            rank = column.flip(0).expand_as(assignment)
        carried_on, num = carry(positions, valid, assignment, rank, K, int(P), self.fill)
        return self._placed(tokens, base, out, carried_on, num)

    def _placed(self, tokens: Tokens, base: Compressor, out: Reduction, positions: Tensor, num: Tensor) -> Reduction:
        """The reduction with these positions, and sizes that count the tokens' own."""
        joined, slot = out.assignment >= 0, out.assignment.clamp(min=0)
        size = ops.sum_into(torch.where(joined, tokens.size, 0), slot, out.num_kept).to(out.size.dtype)
        out = replace(out, size=size, positions=positions, num_positions=num)
        if self.mode == "official" and tokens.num_tokens > out.num_kept:
            return by_score(out, base.peaks(tokens, out.num_kept).center)  # type: ignore[operator]
        return out


def _split(tokens: Tokens, steps: int) -> Tokens:
    """Every step of a clip as an item."""
    cut = lambda v: v.reshape(-1, v.shape[1] // steps, *v.shape[2:])  # noqa: E731
    signals = {k: v.repeat_interleave(steps, 0) if k.startswith("text") else cut(v) for k, v in tokens.signals.items()}
    return replace(
        tokens,
        **{name: cut(getattr(tokens, name)) for name in ("x", "position", "group", "size")},
        layout=replace(tokens.layout, grid=(1, *tokens.layout.grid[1:])),
        signals=signals,
    )


def by_score(out: Reduction, center: Tensor) -> Reduction:
    """The outputs in the order of their centres [B, K], at the same places of the sequence."""
    order = torch.searchsorted(out.anchor, center)  # the output that comes j-th
    values = {name: gather(getattr(out, name), order) for name in ("x", "size", "positions", "num_positions")}
    return replace(out, **values, assignment=order.argsort(dim=1).gather(1, out.assignment))


def renumbered(before: Tensor, own: Tensor) -> Tensor:
    """Positions [B, K, 3] of outputs that stand side by side: one after another where all three axes of the positions [B, N, 3]
    before are one, else on the smallest square, at the time `own` [B, K, 3]."""
    k = torch.arange(own.shape[1], device=own.device).expand(own.shape[:2])
    start, side = before.amin(1, keepdim=True), max(math.ceil(math.sqrt(own.shape[1])), 1)
    line = start + k[..., None]
    square = torch.stack([own[..., 0], start[..., 1] + k // side, start[..., 2] + k % side], -1)
    flat = (before[..., 1] == before[..., 2]).all(1)
    return torch.where(flat[:, None, None], line, square)


def member_rank(distance: Tensor) -> Tensor:
    """[B, N] -> the rank of every token by ascending distance, ties by index."""
    return distance.argsort(dim=1, stable=True).argsort(dim=1)


def carry(
    positions: Tensor, valid: Tensor, assignment: Tensor, rank: Tensor, num_out: int, P: int, fill: str
) -> tuple[Tensor, Tensor]:
    """The positions [B, K, P, 3] that the outputs carry, and how many of them are no repeats [B, K].

    positions [B, N, R, 3] of the tokens, the first valid [B, N] of them their own; assignment [B, N] (-1: none); rank [B, N]
    orders the members. An output takes the first position of each member, then the second of each, … up to P, and repeats
    them as `fill` says.
    """
    B, N, R = positions.shape[:3]
    r = torch.arange(R, device=positions.device)
    own = (r < valid[..., None]) & (assignment >= 0)[..., None]  # [B, N, R]
    key = (assignment[..., None] * R + r) * N + rank[..., None]
    order = key.masked_fill(~own, num_out * R * N).flatten(1).argsort(dim=1)
    count = torch.zeros(B, num_out, dtype=torch.long, device=order.device)
    count = count.scatter_add(1, assignment.clamp(min=0), own.sum(-1))
    if count.device.type == "cpu" and not torch.compiler.is_compiling() and count.numel() and int(count.min()) < 1:
        raise ValueError(f"assignment must give each of the {num_out} clusters a member, got counts {count.tolist()}")
    start = count.cumsum(1) - count
    n = count.clamp(max=P)
    j = torch.arange(P, device=order.device)
    if fill == "cyclic":
        j = j % n.clamp(min=1)[..., None]
    elif fill == "first":
        j = torch.where(j < n[..., None], j, 0)
    else:
        j = j * n[..., None] // P
    source = order.gather(1, (start[..., None] + j).clamp(max=N * R - 1).flatten(1))  # [B, K * P]
    return gather(positions.flatten(1, 2), source).unflatten(1, (num_out, P)), n
