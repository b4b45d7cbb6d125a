"""What a method is: `Compressor` and its short forms `Scorer`, `Selector`, `Merger`; chains; `num_kept`.

A compressor is an `nn.Module` and a dataclass at once: annotated fields are its configuration, parameters are made in
`setup()`.
Subclasses need no decorator beyond `@register`.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, fields, replace
from fractions import Fraction
from numbers import Integral, Real
from typing import Any, ClassVar, dataclass_transform

import torch
from torch import Tensor, nn

from mmcompress.tokens import Reduction, Tokens, gather, identity, keep, merge

PLACEMENTS = ("prefill", "layer", "tower", "cache")


def check_ratio(keep_ratio: Any, name: str = "keep_ratio") -> Fraction:
    """The exact decimal value of a ratio in (0, 1]. Raises TypeError or ValueError with the value got."""
    if isinstance(keep_ratio, (bool, str)) or not isinstance(keep_ratio, (Real, Fraction)):
        raise TypeError(f"{name} must be a number in (0, 1], got {keep_ratio!r}")
    if not math.isfinite(keep_ratio) or not 0 < float(keep_ratio) <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {keep_ratio!r}")
    return Fraction(str(keep_ratio))


def num_kept(num_tokens: int, keep_ratio: float) -> int:
    """How many of `num_tokens` a ratio keeps: decimal-exact, halves round up, at least 1 (0 of 0)."""
    return _count(num_tokens, *check_ratio(keep_ratio).as_integer_ratio())


def _count(n: int, p: int, q: int) -> int:
    return min(n, max(1, (2 * n * p + q) // (2 * q)))


@dataclass_transform(kw_only_default=True)
@dataclass(eq=False, repr=False, kw_only=True)
class Compressor(nn.Module):
    """Turns N tokens into K. Subclasses write `compress(tokens) -> Reduction` (or use a short form below).

    keep_ratio: the share of tokens kept, in (0, 1]; 1 is the identity, bit for bit.
    layer: None (before the language model) or the decoder layer it stands before: an int (0-based) or a float in (0,
    1), a share of the depth.
    placement: "prefill" or "layer"; follows from `layer`.

    Called with `Tokens` it returns a `Reduction`; called with a model it returns a context manager that installs it.
    """

    name: ClassVar[str] = ""
    reads: ClassVar[tuple[str, ...]] = ()
    """Signals that `compress` uses; "a|b" takes the first that the model offers, "a|" does without where a is not offered."""
    has_ratio: ClassVar[bool] = True
    """False for a method with a rule of its own in place of keep_ratio."""
    identity_config: ClassVar[dict[str, Any]] = {"keep_ratio": 1}
    """The fields at which the method changes nothing, bit for bit."""
    kinds: ClassVar[tuple[str, ...]] = ("image", "video", "audio")
    """Items that the method compresses; those of other kinds pass untouched."""

    keep_ratio: float = 0.25
    layer: int | float | None = None
    placement: str = "prefill"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclass(eq=False, repr=False, kw_only=True)(cls)
        cls.__hash__ = nn.Module.__hash__  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        nn.Module.__init__(self)
        self._ratio = check_ratio(self.keep_ratio).as_integer_ratio()
        if self.layer is not None:
            if isinstance(self.layer, bool) or not isinstance(self.layer, Real):
                raise TypeError(f"layer must be None, an int >= 0 or a float in (0, 1), got {self.layer!r}")
            if not (self.layer >= 0 if isinstance(self.layer, Integral) else 0 < self.layer < 1):
                raise ValueError(f"layer must be None, an int >= 0 or a float in (0, 1), got {self.layer!r}")
            self.placement = "layer"
        if self.placement not in PLACEMENTS:
            raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}; got {self.placement!r}")
        if self.placement == "layer" and self.layer is None:
            raise ValueError("placement 'layer' needs the field layer: an int >= 0 or a float in (0, 1); got None")
        self.check()
        self.setup()

    # what a method writes

    def check(self) -> None:
        """Raise ValueError/TypeError for a field out of range."""

    def setup(self) -> None:
        """Make parameters and sub-modules."""

    def compress(self, tokens: Tokens) -> Reduction:
        raise NotImplementedError(f"{type(self).__name__} must define compress(tokens)")

    # what a caller uses

    @property
    def is_identity(self) -> bool:
        return self.keep_ratio == 1

    @property
    def stages(self) -> tuple[Compressor, ...]:
        return (self,)

    def check_sections(self, sections: tuple[int, ...]) -> None:
        """For a method that carries positions, at installing: raise ValueError where the model's rotary frequencies, as many
        per axis as `sections` says, cannot be shared out among its slots."""

    def num_kept(self, num_tokens: int) -> int:
        """K for an item of N tokens."""
        return _count(num_tokens, *self._ratio)

    def forward(self, tokens: Tokens) -> Reduction:
        if self.is_identity or tokens.num_tokens == 0 or tokens.layout.kind not in self.kinds:
            return identity(tokens)
        return self.compress(tokens)

    def __call__(self, target: Any) -> Any:
        if isinstance(target, Tokens):
            return super().__call__(target)
        from mmcompress.patch import installed

        return installed(target, self)

    def __or__(self, other: Compressor) -> Chain:
        if not isinstance(other, Compressor):
            raise TypeError(f"a chain needs a Compressor on both sides of |, got {other!r}")
        return Chain(parts=(*self.stages, *other.stages))

    def config(self) -> dict[str, Any]:
        """The method's name and its fields as plain JSON values."""
        return {"method": type(self).name or type(self).__name__, **{f.name: getattr(self, f.name) for f in fields(self)}}

    def extra_repr(self) -> str:
        return ", ".join(
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if f.default is MISSING or getattr(self, f.name) != f.default
        )


class Scorer(Compressor):
    """Keep the tokens of highest score: write `score(tokens) -> [B, N]`. Ties go to the lowest index."""

    def score(self, tokens: Tokens) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define score(tokens)")

    def compress(self, tokens: Tokens) -> Reduction:
        K = self.num_kept(tokens.num_tokens)
        order = self.score(tokens).float().argsort(dim=1, descending=True, stable=True)
        return keep(tokens, order[:, :K])


class Selector(Compressor):
    """Keep the tokens it names: write `select(tokens, K) -> [B, K]` column indices without duplicates, in any order."""

    def select(self, tokens: Tokens, K: int) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define select(tokens, K)")

    def compress(self, tokens: Tokens) -> Reduction:
        return keep(tokens, self.select(tokens, self.num_kept(tokens.num_tokens)))


class Merger(Compressor):
    """Average groups of tokens: write `assign(tokens, K) -> (assignment [B, N], anchor [B, K] ascending)`."""

    def assign(self, tokens: Tokens, K: int) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} must define assign(tokens, K)")

    def distance(self, tokens: Tokens, other: Tensor) -> Tensor:
        """How far every token lies from the token in column other [B, N]: [B, N] float32, any monotone measure (squared
        Euclidean)."""
        x = tokens.x.detach().float()
        return (x - gather(x, other)).square().sum(-1)

    def compress(self, tokens: Tokens) -> Reduction:
        return merge(tokens, *self.assign(tokens, self.num_kept(tokens.num_tokens)))


class Chain(Compressor):
    """Several placed compressors in order, written `a | b`."""

    has_ratio = False
    keep_ratio: float = 1
    parts: tuple[Compressor, ...] = ()

    def check(self) -> None:
        if not self.parts:
            raise ValueError("a chain needs at least one part, got ()")

    def setup(self) -> None:
        self.parts_ = nn.ModuleList(self.parts)

    @property
    def is_identity(self) -> bool:
        return all(p.is_identity for p in self.parts)

    @property
    def stages(self) -> tuple[Compressor, ...]:
        return self.parts

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(dict.fromkeys(r for p in self.parts for r in p.reads))

    def config(self) -> dict[str, Any]:
        return {"chain": [p.config() for p in self.parts]}

    def extra_repr(self) -> str:
        return ""

    def compress(self, tokens: Tokens) -> Reduction:
        """The parts one after the other on one batch of items, wherever they are placed."""
        total, carries = identity(tokens), False
        for part in self.parts:
            if total.mask is not None:
                raise ValueError(
                    "a chain on bare Tokens needs equal counts within the batch: pass items one by one or install it"
                )
            step = part(tokens)
            tokens = tokens.take(step)
            carries |= step.positions is not None
            slot = step.assignment.gather(1, total.assignment.clamp(min=0))
            total = replace(
                step,
                anchor=total.anchor.gather(1, step.anchor),
                assignment=torch.where(total.assignment >= 0, slot, -1),
            )
        if carries:  # a later part that only prunes hands on what its tokens carry
            total = replace(total, **{name: tokens.signals[name] for name in ("positions", "num_positions")})
        return total


def from_config(config: dict[str, Any]) -> Compressor:
    """The compressor that `Compressor.config()` described. Raises ValueError/TypeError as `create` does."""
    from mmcompress.registry import create

    if not isinstance(config, dict):
        raise TypeError(f"config must be a dict with 'method' or 'chain', got {config!r}")
    if "chain" in config:
        return Chain(parts=tuple(stage for c in config["chain"] for stage in from_config(c).stages))  # a preset is a chain too
    if "method" not in config:
        raise ValueError(f"config must hold 'method' or 'chain', got keys {sorted(config)}")
    rest = dict(config)
    return create(rest.pop("method"), **rest)


class TowerCompressor(Compressor):
    """Base of methods inside the vision or audio encoder (`placement="tower"`).

    Such a method sees the hidden states [B, N, D] between two encoder blocks once per block and answers with a Reduction;
    `compress_` refuses the placement until the tower seam exists.
    """

    placement: str = "tower"


class CacheCompressor(Compressor):
    """Base of methods on keys and values after prefill (`placement="cache"`).

    The payload differs per head: write `compress_cache(keys [B, H, N, d], values [B, H, N, d], scores [B, H, N]) ->
    index [B, H, K]`;
    `compress_` refuses the placement until the cache seam exists.
    """

    placement: str = "cache"

    def compress_cache(self, keys: Tensor, values: Tensor, scores: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define compress_cache(keys, values, scores)")
