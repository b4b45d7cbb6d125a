"""Items on their way through the stages: from rows of the sequence to `Tokens`, and from a `Reduction` back to rows."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mmcompress.compressor import Compressor
from mmcompress.ledger import ItemCount
from mmcompress.models import signals
from mmcompress.models.generic import ItemSpec
from mmcompress.tokens import Layout, Reduction, Tokens, fault


@dataclass
class Item:
    """One item on its way through the stages; also the trace that `run.items` shows.

    sample: batch row. position, group [N]: of all tokens that came in. assignment [N]: the output each went into (-1 =
    dropped).
    anchor [K]: the input tokens whose places the outputs have. columns [K], separators: where these stand now in the sequence.
    """

    sample: int
    kind: str
    layout: Layout
    position: Tensor
    group: Tensor
    columns: Tensor
    anchor: Tensor
    assignment: Tensor
    size: Tensor
    separators: Tensor
    signals: dict[str, Tensor] = field(default_factory=dict, repr=False)
    count: ItemCount = field(default_factory=lambda: ItemCount("", 0))
    x: Tensor | None = field(default=None, repr=False)

    @property
    def kept(self) -> Tensor:
        """[N] bool: tokens that stayed or went into one that did."""
        return self.assignment >= 0

    def move(self, source: Tensor) -> None:
        """Follow the rows to the columns that they were packed to (source [B, columns before])."""
        source = source.to(self.columns.device)
        self.columns, self.separators = source[self.sample, self.columns], source[self.sample, self.separators]

    def to(self, device: torch.device) -> None:
        """Follow the rows to another device."""
        for name in ("position", "group", "columns", "anchor", "assignment", "size", "separators"):
            setattr(self, name, getattr(self, name).to(device))
        self.signals = {k: v.to(device) for k, v in self.signals.items()}

    def reduce(self, new: Reduction, j: int) -> None:
        """Take row j of a stage's result."""
        mask = slice(None) if new.mask is None else new.mask[j]
        anchor = new.anchor[j][mask]
        self.x, self.size = new.x[j][mask], new.size[j][mask]
        self.columns, self.anchor = self.columns[anchor], self.anchor[anchor]
        self.assignment = torch.where(self.assignment >= 0, new.assignment[j][self.assignment.clamp(min=0)], -1)
        self.signals = {k: v[anchor] if per_token(k) else v for k, v in self.signals.items()}
        self.signals |= {k: v[j][mask] for k, v in new.carried().items()}

    def forget(self) -> None:
        """Drop the signals once the last stage of a call has read them; what tokens carry stays."""
        self.signals = {k: v for k, v in self.signals.items() if k in CARRIED}


CARRIED = ("positions", "num_positions", "order")
"""What tokens carry with them from one stage to the next (`Reduction.carried`)."""


def per_token(name: str) -> bool:
    """Whether a signal of this name follows the tokens."""
    return name not in signals.known() or signals.known()[name].per_token


@dataclass(frozen=True)
class Placed:
    """A stage where it stands, with the signals that it reads: for each the names that serve, best first, and whether it does
    without."""

    stage: Compressor
    reads: tuple[tuple[tuple[str, ...], bool], ...] = ()

    @property
    def name(self) -> str:
        return type(self.stage).name or type(self.stage).__name__

    def served(self, item: Item) -> tuple[str, ...]:
        """The signals that this item has for the stage. Raises ValueError where one that it needs is missing."""
        out = []
        for names, optional in self.reads:
            found = next((n for n in names if n in item.signals or n in LAYOUT), None)
            if found is None and not optional:
                raise ValueError(
                    f"{self.name} reads the signal {' or '.join(names)!r}, but the model cannot tell which encoder outputs "
                    "belong to "
                    f"this {item.kind}"
                )
            if found is not None and found not in LAYOUT:
                out.append(found)
        return tuple(out)


LAYOUT = signals.of_source("layout")


def run_stages(stages: list[Placed], items: list[Item], x: Tensor, layer: int = 0) -> tuple[Tensor, Tensor]:
    """x with the outputs written in (a new tensor), and which columns stay [B, S]."""
    keep = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    if not stages:
        return x, keep
    for item in items:
        item.x = x[item.sample, item.columns]
        keep[item.sample, item.columns] = False
    for placed in stages:
        buckets: dict[Any, list[Item]] = {}
        for item in items:
            if len(item.columns):
                buckets.setdefault((item.layout, len(item.columns), placed.served(item)), []).append(item)
        for (layout, _, reads), bucket in buckets.items():
            if layout.kind not in placed.stage.kinds:
                for item in bucket:
                    item.count.untouched = placed.name
            result = check(placed.stage, placed.stage(stack(bucket, reads)), bucket)
            for j, item in enumerate(bucket):
                item.reduce(result, j)
    b = torch.cat([torch.full_like(i.columns, i.sample) for i in items])
    columns = torch.cat([i.columns for i in items])
    keep[b, columns] = True
    x = x.index_put((b, columns), torch.cat([i.x for i in items]).to(x.dtype))  # type: ignore[misc]
    for item in items:
        if not len(item.columns):  # nothing is left that they could separate
            keep[item.sample, item.separators] = False
            item.separators = item.separators[:0]
        item.x = None
        item.count.kept_from[layer] = len(item.columns)
    return x, keep


def stack(bucket: list[Item], reads: tuple[str, ...]) -> Tokens:
    """The items of one layout as a batch."""
    first = bucket[0]
    read: dict[str, Tensor] = {}
    for name in reads:
        values = [i.signals[name] for i in bucket]
        if per_token(name):
            read[name] = torch.stack(values)
        else:
            read[name] = nn.utils.rnn.pad_sequence(values, batch_first=True)
            read[f"{name}_mask"] = nn.utils.rnn.pad_sequence(
                [torch.ones(len(v), dtype=torch.bool, device=v.device) for v in values], batch_first=True
            )
        if name == "positions" and "num_positions" in first.signals:
            read["num_positions"] = torch.stack([i.signals["num_positions"] for i in bucket])
    pick = lambda get: torch.stack([get(i)[i.anchor] for i in bucket])  # noqa: E731
    return Tokens(
        x=torch.stack([i.x for i in bucket]),  # type: ignore[misc]
        position=pick(lambda i: i.position),
        group=pick(lambda i: i.group),
        size=torch.stack([i.size for i in bucket]),
        layout=first.layout,
        signals=read,
    )


def check(stage: Compressor, result: Reduction, bucket: list[Item]) -> Reduction:
    """Refuse a malformed reduction instead of running on with it."""
    name, n = type(stage).name or type(stage).__name__, len(bucket[0].columns)
    if not isinstance(result, Reduction):
        raise TypeError(f"{name} must return a Reduction, got {type(result).__name__}")
    B, K = result.anchor.shape
    if len(bucket) != B or tuple(result.x.shape[:2]) != (B, K) or tuple(result.assignment.shape) != (B, n) or n < K:
        raise ValueError(
            f"{name} returned x {tuple(result.x.shape)}, anchor {(B, K)}, assignment {tuple(result.assignment.shape)} "
            f"for {len(bucket)} items of {n} tokens"
        )
    if result.mask is not None and tuple(result.mask.shape) != (B, K):
        raise ValueError(f"{name} must return a mask [B, K] = {[B, K]}, got {list(result.mask.shape)}")
    if said := fault(result, [item.x for item in bucket], stage.swaps_places):  # type: ignore[misc]
        raise ValueError(f"{name} returned a malformed reduction: {said}")
    if result.positions is not None:
        if "positions" not in bucket[0].signals:
            raise ValueError(f"{name} must read the signal 'positions' to return positions, it reads {list(stage.reads)}")
        if result.num_positions is None or result.positions.dim() != 4 or result.positions.shape[::3] != (B, 3):
            raise ValueError(
                f"{name} must return positions [B, K, P, 3] with num_positions [B, K], got {list(result.positions.shape)} "
                f"with {'none' if result.num_positions is None else list(result.num_positions.shape)}"
            )
    return result


def runs(kind: str, place: Tensor, S: int) -> list[ItemSpec]:
    """Each run of neighbouring placeholder columns is one item of unknown structure."""
    breaks = (place[1:] != place[:-1] + 1) | (place[1:] % S == 0)
    edges = [0, *(breaks.nonzero()[:, 0] + 1).tolist(), len(place)]
    return [replace(ItemSpec.lattice(kind, (b - a, 1, 1)), source=None) for a, b in itertools.pairwise(edges)]
