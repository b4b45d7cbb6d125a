"""What a method is: `Compressor` and its short forms `Scorer`, `Selector`, `Merger`; chains; `num_kept`.

A compressor is an `nn.Module` and a dataclass at once: annotated fields are its configuration, which is fixed once it is made;
parameters are made in `setup()`. What it is and where it stands are told apart: `create("pooling", stride=4).at(layer=2)`.
Subclasses need no decorator beyond `@register`.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import MISSING, dataclass, fields, replace
from decimal import Decimal
from fractions import Fraction
from numbers import Integral, Real
from typing import Any, ClassVar, dataclass_transform

import torch
from torch import Tensor, nn

from mmcompress import ops
from mmcompress.tokens import Reduction, Tokens, gather, identity, keep, merge

PLACES: dict[str, tuple[str, ...]] = {"tower": (), "prefill": (), "layer": ("layer",), "cache": ()}
"""Every placement, in the order in which a model passes them, and the fields that say where in it."""
WHERE = tuple(name for names in PLACES.values() for name in names)
SHARE_TIE = 1e-7
"""A share of the depth that misses a layer by less is that layer's: the rounding of a float32, and so of any wider float."""


def plain(value: Any) -> Any:
    """A field's value as JSON keeps it: other number types become Python's own, dicts and lists are copied.

    numpy scalars and zero-dimensional arrays and tensors become the shortest decimal that they stand for (np.float32(0.1) is
    0.1). A Fraction or Decimal becomes the nearest float, and from then on this float is what counts.
    """
    if isinstance(value, dict):
        return {plain(k): plain(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    if not isinstance(value, nn.Module) and getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = _shortest(value)
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, (Real, Decimal)) else value


class FixedDict(dict):
    """A dict as a field's value: it cannot be changed either."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"the value of a field is fixed once its compressor is made, got a change of {dict(self)!r}")

    __setitem__ = __delitem__ = __ior__ = update = pop = popitem = clear = setdefault = _refuse

    def __reduce__(self) -> Any:
        return FixedDict, (dict(self),)


def _shortest(value: Any) -> Any:
    """The Python value of a numpy scalar or a zero-dimensional tensor, of a float the shortest that rounds to it."""
    exact = value.item()
    if not isinstance(exact, float):
        return exact
    cast = value.new_tensor if isinstance(value, Tensor) else value.dtype.type
    decimals = (float(f"{exact:.{digits}g}") for digits in range(1, 18))
    return next((short for short in decimals if cast(short) == value), exact)  # NaN equals nothing


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


def check_layer(layer: Any) -> None:
    """Raise TypeError or ValueError for what is no place among decoder layers."""
    if layer is None:
        return
    if isinstance(layer, bool) or not isinstance(layer, (int, float)):
        raise TypeError(f"layer must be None, an int >= 0 or a float in (0, 1), got {layer!r}")
    if not (layer >= 0 if isinstance(layer, int) else 0 < layer < 1):
        raise ValueError(f"layer must be None, an int >= 0 or a float in (0, 1), got {layer!r}")


def layer_index(layer: int | float | None, depth: int) -> int:
    """The decoder layer, of `depth`, that the field `layer` means: itself, or for a share the floor of it, exact, at least 1.

    None is 0. 15 / 22 of 22 layers is 15, whatever the float makes of it. Raises ValueError where the model has no such layer.
    """
    layer = plain(layer)
    check_layer(layer)
    if layer is None:
        return 0
    at = layer if isinstance(layer, int) else max(1, min(depth - 1, math.floor((layer + SHARE_TIE) * depth)))
    if at >= depth:
        raise ValueError(f"layer must be below the model's {depth} decoder layers, got {layer!r}")
    return at


def name_of(compressor: Compressor) -> str:
    """How sentences name it."""
    return type(compressor).name or type(compressor).__name__


@dataclass_transform(kw_only_default=True)
@dataclass(eq=False, repr=False, kw_only=True)
class Compressor(nn.Module):
    """Turns N tokens into K. Subclasses write `compress(tokens) -> Reduction` (or use a short form below).

    keep_ratio: the share of tokens kept, in (0, 1]; 1 is the identity, bit for bit.
    layer: None (before the language model) or the decoder layer it stands before: an int (0-based) or a float in (0,
    1), a share of the depth.
    placement: "prefill" or "layer"; follows from `layer`.

    Fields cannot be assigned later: `at(layer=2)` gives the same compressor at another place, `but(keep_ratio=0.5)` one with
    other fields.
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
    swaps_places: ClassVar[bool] = False
    """True for a method whose outputs may stand at each other's anchors, else assignment[anchor[j]] = j."""

    keep_ratio: float = 0.25
    layer: int | float | None = None
    placement: str | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclass(eq=False, repr=False, kw_only=True)(cls)
        cls.__hash__ = nn.Module.__hash__  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        nn.Module.__init__(self)
        for f in fields(self):
            value = plain(getattr(self, f.name))
            setattr(self, f.name, FixedDict(value) if isinstance(value, dict) else value)
        self._ratio = check_ratio(self.keep_ratio).as_integer_ratio()
        self._check_place()
        self.check()
        self.check_keep_ratio()
        self.setup()
        self._fixed = frozenset(f.name for f in fields(self))

    def _check_place(self) -> None:
        """Find the placement where it is not given; refuse fields that contradict it."""
        check_layer(self.layer)
        if self.placement is None:
            self.placement = "prefill" if self.layer is None else "layer"
        if self.placement not in PLACES:
            raise ValueError(f"placement must be one of {', '.join(PLACES)}; got {self.placement!r}")
        if self.placement == "layer" and self.layer is None:
            raise ValueError("placement 'layer' needs the field layer: an int >= 0 or a float in (0, 1); got None")
        for name in WHERE:
            if name not in PLACES[self.placement] and getattr(self, name) is not None:
                raise ValueError(f"{name} must be None at placement {self.placement!r}, got {getattr(self, name)!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        self._refuse_change(name, f"{name}={value!r}")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        self._refuse_change(name, f"{name}=…")
        super().__delattr__(name)

    def _refuse_change(self, name: str, change: str) -> None:
        if name in self.__dict__.get("_fixed", ()):
            new = f"at({change})" if name in (*WHERE, "placement") else f"but({change})"
            raise AttributeError(f"{name} of {name_of(self)} is fixed once it is made: {new} gives a new one with that change")

    # what a method writes

    def check(self) -> None:
        """Raise ValueError/TypeError for a field out of range."""

    def setup(self) -> None:
        """Make parameters and sub-modules."""

    def compress(self, tokens: Tokens) -> Reduction:
        raise NotImplementedError(f"{type(self).__name__} must define compress(tokens)")

    def check_keep_ratio(self) -> None:
        """Refuse a keep_ratio that the method would not listen to."""
        if not (self.has_ratio or self.keep_ratio == type(self).keep_ratio or (self.keep_ratio == 1 and self.is_identity)):
            raise ValueError(f"keep_ratio has no effect on {name_of(self)} and must be left out, got {self.keep_ratio!r}")

    # what a caller uses

    @property
    def is_identity(self) -> bool:
        return self.keep_ratio == 1

    @property
    def stages(self) -> tuple[Compressor, ...]:
        return (self,)

    def but(self, **changes: Any) -> Compressor:
        """A new compressor that differs in these fields, with a copy of this one's parameters.

        Raises ValueError/TypeError as `create` does, and where the parameters do not fit the new fields.
        """
        allowed = [f.name for f in fields(self)]
        for name in changes:
            if name not in allowed:
                raise ValueError(f"{name_of(self)} has no field {name!r}; fields: {', '.join(allowed)}")
        if "placement" not in changes and set(WHERE) & set(changes):
            changes["placement"] = None
        new = type(self)(**{name: getattr(self, name) for name in allowed} | changes)
        new._take_parameters(self, changes)
        return new

    def at(self, *, placement: str | None = None, **where: Any) -> Compressor:
        """The same compressor at another place: `at(layer=2)`, `at(layer=0.5)`, `at(placement="prefill")`.

        A new one; parameters are copied. Raises ValueError/TypeError for a place that there is not.
        """
        for name in where:
            if name not in WHERE:
                raise ValueError(f"at takes placement and {', '.join(WHERE)}, got {name!r}")
        if placement is None and not where:
            raise TypeError(f"at needs a place, placement or {' or '.join(WHERE)}, got none")
        return self.but(**{**dict.fromkeys(WHERE), **where, "placement": placement})

    def _take_parameters(self, other: Compressor, changes: dict[str, Any]) -> None:
        state = {k: v.detach().clone() for k, v in other.state_dict().items()}
        if state and self.state_dict():
            try:
                self.load_state_dict(state, assign=True)  # on their device, in their dtype
            except RuntimeError as error:
                changed = ", ".join(f"{k}={v!r}" for k, v in changes.items())
                raise ValueError(f"the parameters of {name_of(self)} do not fit {changed}: create it anew") from error
            for mine, theirs in zip(self.parameters(), other.parameters(), strict=True):
                mine.requires_grad_(theirs.requires_grad)
        self.train(other.training)

    def check_order(self, depth: int) -> None:
        """Raise ValueError where a stage has no layer among `depth`, or stands before an earlier stage of the chain."""
        places = [(_door(s), layer_index(s.layer, depth)) for s in self.stages]
        for (first, later), (a, b) in zip(itertools.pairwise(self.stages), itertools.pairwise(places), strict=True):
            if b < a:
                raise ValueError(_descent(first, later, f" of {depth} layers"))

    def check_sections(self, sections: tuple[int, ...]) -> None:
        """For a method that carries positions, at installing: raise ValueError where the model's rotary frequencies, as many
        per axis as `sections` says, cannot be shared out among its slots."""

    def num_kept(self, num_tokens: int) -> int:
        """K for an item of N tokens."""
        return _count(num_tokens, *self._ratio)

    def forward(self, tokens: Tokens) -> Reduction:
        if self.is_identity or tokens.num_tokens == 0 or tokens.layout.kind not in self.kinds:
            return identity(tokens)
        if torch.compiler.is_compiling():  # whoever called the compiled region may have opened a block
            return self.compress(tokens)
        with ops.checks_wait():
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
        return {"method": name_of(self), **{f.name: plain(getattr(self, f.name)) for f in fields(self)}}

    def extra_repr(self) -> str:
        return ", ".join(
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if (f.default is MISSING or getattr(self, f.name) != f.default)
            and not (f.name == "placement" and self.placement in ("prefill", "layer"))  # `layer` says it
        )


def _door(stage: Compressor) -> int:
    """Number of the stage's placement in the order of the model; before layer 0 is before the language model."""
    return list(PLACES).index("prefill" if stage.layer == 0 else stage.placement or "prefill")


def _descends(first: Compressor, later: Compressor) -> bool:
    """Whether `later` stands before `first` in every model: a layer's number and a share cannot be compared yet."""
    if _door(first) != _door(later):
        return _door(later) < _door(first)
    return type(first.layer) is type(later.layer) is not type(None) and later.layer < first.layer  # type: ignore[operator]


def _descent(first: Compressor, later: Compressor, of: str = "") -> str:
    where = [str(s.placement) if s.layer is None else f"layer {s.layer:g}" for s in (first, later)]
    return (
        f"the parts of a chain must stand in the order of the model, prefill before layers and layers ascending; got "
        f"{name_of(later)} at {where[1]} behind {name_of(first)} at {where[0]}{of}"
    )


class Scorer(Compressor):
    """Keep the tokens of highest score: write `score(tokens) -> [B, N]`. Ties go to the lowest index."""

    def score(self, tokens: Tokens) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define score(tokens)")

    def compress(self, tokens: Tokens) -> Reduction:
        K, score = self.num_kept(tokens.num_tokens), self.score(tokens)
        if score.shape != tokens.x.shape[:2]:
            raise ValueError(
                f"{name_of(self)} must score [B, N] = {list(tokens.x.shape[:2])} tokens, got shape {list(score.shape)}"
            )
        compiling = torch.compiler.is_compiling()  # the operator itself looks then
        if not compiling and (num := int(score.isnan().sum())):
            raise ValueError(f"scores of {name_of(self)} must not be NaN, got {num} of {score.numel()}")
        return keep(tokens, ops.top_keep(score.float(), K, check_finite=compiling).index)


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
        parts = tuple(self.parts) if isinstance(self.parts, (list, tuple)) else (self.parts,)
        if not parts:
            raise ValueError("a chain needs at least one part, got ()")
        for part in parts:
            if not isinstance(part, Compressor):
                raise TypeError(f"parts of a chain must be compressors, got {part!r}")
        if self.placement != "prefill" or self.layer is not None:
            raise ValueError(f"a chain has no place of its own, its parts have; got {self.layer or self.placement!r}")
        self.parts = tuple(stage for part in parts for stage in part.stages)
        for first, later in itertools.combinations(self.parts, 2):
            if _descends(first, later):
                raise ValueError(_descent(first, later))

    def setup(self) -> None:
        self.parts_ = nn.ModuleList(self.parts)

    @property
    def is_identity(self) -> bool:
        return all(p.is_identity for p in self.parts)

    @property
    def stages(self) -> tuple[Compressor, ...]:
        return self.parts

    def _take_parameters(self, other: Compressor, changes: dict[str, Any]) -> None:
        """The parts have them."""

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
            slot = total.assignment  # all -1 where nothing was left
            if step.assignment.shape[1]:
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
        if not isinstance(config["chain"], (list, tuple)):
            raise TypeError(f"chain must be a list of configurations, got {config['chain']!r}")
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
