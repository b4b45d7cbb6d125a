"""What really happened: tokens, sequence lengths, FLOPs and KV bytes of every prefill. Nothing else in the library
counts tokens.

`mmcompress.ledger(model)` is the ledger of the compressor that is installed in a model (this module can be called). FLOPs are
those of the language model's layers, see `mmcompress.flops`; KV bytes are those of the cache as it is after the prefill.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from types import ModuleType
from typing import Any

from torch import Tensor

from mmcompress.flops import Decoder, LayerCost

__all__ = ["Decoder", "ItemCount", "LayerCost", "Ledger", "SampleCount", "held_bytes", "of_model"]

WINDOW = 256
COUNTS = (
    "tokens_in",
    "tokens_kept",
    "separators",
    "sequence_in",
    "sequence_kept",
    "flops_in",
    "flops",
    "kv_bytes_in",
    "kv_bytes",
)
"""The totals of a ledger, as `Ledger.totals` names them."""


def _per_layer(start: int, changed_from: dict[int, int], layers: int) -> list[int]:
    """The count in each layer, given where it changes."""
    out, now = [], start
    for i in range(layers):
        now = changed_from.get(i, now)
        out.append(now)
    return out


@dataclass
class ItemCount:
    """One image, video or clip: tokens in, separators (counted apart), and tokens kept from a layer on ({0: …} is the
    prefill). untouched: the method that passed it by, because it does not compress items of this kind."""

    kind: str
    tokens_in: int
    separators: int = 0
    kept_from: dict[int, int] = field(default_factory=dict)
    untouched: str | None = None

    def kept(self, layers: int) -> list[int]:
        """Tokens that each layer sees."""
        return _per_layer(self.tokens_in, self.kept_from, layers)


@dataclass
class SampleCount:
    """One row of the batch in one prefill: real rows in (mask != 0, padding left out), and rows from a layer on.

    A prefill that continues a cache: past_in, rows that the cache would hold had nothing been dropped (None: what layer 0
    holds), and past, rows that it holds from a layer on ({}: past_in). element_size: bytes of a cached number.
    kv_bytes, kv_bytes_in: this row's share of the cache as it was measured, and of one that holds everything; None where none
    was measured, then they follow from the rows.
    """

    sequence_in: int
    rows_from: dict[int, int] = field(default_factory=dict)
    items: list[ItemCount] = field(default_factory=list)
    past: dict[int, int] = field(default_factory=dict)
    past_in: int | None = None
    element_size: int | None = None
    kv_bytes: int | None = None
    kv_bytes_in: int | None = None

    def rows(self, layers: int) -> list[int]:
        """Rows that each layer sees."""
        return _per_layer(self.sequence_in, self.rows_from, layers)

    @property
    def seen(self) -> int:
        """Rows before this prefill, had nothing been dropped."""
        return self.past.get(0, 0) if self.past_in is None else self.past_in

    def held(self, layers: int) -> list[int]:
        """Rows that each layer's cache held before this prefill."""
        return _per_layer(self.seen, self.past, layers)

    def longer(self, rows: int) -> SampleCount:
        """The count of a prefill with so many text rows more; the cache of that one was not measured."""
        more = {layer: n + rows for layer, n in self.rows_from.items()}
        copied = self._copy()
        return replace(copied, sequence_in=self.sequence_in + rows, rows_from=more, kv_bytes=None, kv_bytes_in=None)

    def _copy(self) -> SampleCount:
        items = [replace(i, kept_from=dict(i.kept_from)) for i in self.items]
        return replace(self, rows_from=dict(self.rows_from), past=dict(self.past), items=items)


class Ledger:
    """Counts of all prefills since installing or `clear`; every property is a total over them, exact however many they were.

    `samples` (and `items` in them) are the last `window` counts, one per batch row and prefill that had items; older ones live
    on in the totals. Text-only calls and decode steps are not counted. flops and kv_bytes are None where the language model
    has a layer that is not understood (`decoder.unknown`). Threads may add and read at the same time; a ledger can be copied
    and pickled.
    """

    def __init__(self, decoder: Decoder, window: int = WINDOW):
        if not isinstance(window, int) or window < 1:
            raise ValueError(f"window must be an int of at least 1, got {window!r}")
        self.decoder, self.window = decoder, window
        self._lock = threading.RLock()
        self.clear()

    def clear(self) -> None:
        """Forget all counts."""
        with self._lock:
            self._last: deque[SampleCount] = deque(maxlen=self.window)
            self._sums: dict[str, int | None] = dict.fromkeys(COUNTS, 0)  # tokens_kept, sequence_kept: summed over layers
            self._num_samples = self._num_items = 0
            self._untouched: Counter[str] = Counter()

    def add(
        self, samples: Iterable[SampleCount], element_size: int | None = None, cache: Any = None, columns: int | None = None
    ) -> None:
        """Count the rows of one prefill, after it ran; what happens to `samples` later changes nothing.

        element_size: bytes of a number of the rows that went in (`x.element_size()`). cache: what holds the keys and values
        now (a transformers cache, `()` where the call kept none); its bytes are shared out evenly over its batch. None: the
        bytes follow from the rows. columns: tokens that the cache would hold in each batch row, padding included, had nothing
        been dropped; `cache.get_seq_length()` by default.
        """
        shares = None if cache is None else held_bytes(cache, columns)
        counted = []
        for sample in samples:
            one = sample._copy()
            if one.element_size is None:
                one.element_size = element_size
            if shares is not None:
                one.kv_bytes, one.kv_bytes_in = shares
            counted.append((one, self._count(one)))
        with self._lock:
            for one, numbers in counted:
                self._last.append(one)
                self._num_samples += 1
                self._num_items += len(one.items)
                self._untouched.update(i.untouched for i in one.items if i.untouched is not None)
                for name, number in numbers.items():
                    total = self._sums[name]
                    self._sums[name] = None if total is None or number is None else total + number

    def _count(self, one: SampleCount) -> dict[str, int | None]:
        """What one sample adds to each total."""
        L, size = self.decoder.layers, one.element_size
        rows, past = one.rows(L), one.held(L)
        rows_in, past_in = [one.sequence_in] * L, [one.seen] * L
        kv, kv_in = one.kv_bytes, one.kv_bytes_in
        return {
            "tokens_in": sum(i.tokens_in for i in one.items),
            "tokens_kept": sum(sum(i.kept(L)) for i in one.items),
            "separators": sum(i.separators for i in one.items),
            "sequence_in": one.sequence_in,
            "sequence_kept": sum(rows),
            "flops_in": self._flops(rows_in, past_in),
            "flops": self._flops(rows, past),
            "kv_bytes_in": self.decoder.kv_bytes(_added(rows_in, past_in), size) if kv_in is None else kv_in,
            "kv_bytes": self.decoder.kv_bytes(_added(rows, past), size) if kv is None else kv,
        }

    def _flops(self, rows: list[int], past: list[int]) -> int | None:
        return self.decoder.flops(rows, past) if any(past) else self.decoder.flops(rows)

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            state = {k: v for k, v in self.__dict__.items() if k != "_lock"}
            return state | {"_last": self._last.copy(), "_sums": dict(self._sums), "_untouched": Counter(self._untouched)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()

    @property
    def samples(self) -> tuple[SampleCount, ...]:
        """The last `window` samples, oldest first; `add` puts more in."""
        with self._lock:
            return tuple(self._last)

    @property
    def items(self) -> list[ItemCount]:
        """The items of `samples`."""
        return [i for s in self.samples for i in s.items]

    @property
    def tokens_in(self) -> int:
        return self.totals()["tokens_in"]

    @property
    def tokens_kept(self) -> float:
        """Tokens that a layer sees, mean over the layers (a whole number unless tokens leave inside the decoder)."""
        return self.totals()["tokens_kept"]

    @property
    def separators(self) -> int:
        return self.totals()["separators"]

    @property
    def kept_ratio(self) -> float:
        """Tokens kept / tokens in, separators left out; nan before the first item."""
        t = self.totals()
        return t["tokens_kept"] / t["tokens_in"] if t["tokens_in"] else float("nan")

    @property
    def sequence_in(self) -> int:
        return self.totals()["sequence_in"]

    @property
    def sequence_kept(self) -> float:
        """Rows that a layer sees, mean over the layers."""
        return self.totals()["sequence_kept"]

    @property
    def flops_in(self) -> int | None:
        return self.totals()["flops_in"]

    @property
    def flops(self) -> int | None:
        return self.totals()["flops"]

    @property
    def kv_bytes_in(self) -> int | None:
        return self.totals()["kv_bytes_in"]

    @property
    def kv_bytes(self) -> int | None:
        return self.totals()["kv_bytes"]

    def totals(self) -> dict[str, Any]:
        """All totals as plain JSON values (tokens, rows, FLOPs, bytes), of one moment; None for what is not counted."""
        with self._lock:
            sums, prefills = dict(self._sums), self._num_samples
        for name in ("tokens_kept", "sequence_kept"):
            mean = Fraction(sums[name] or 0, max(self.decoder.layers, 1))
            sums[name] = int(mean) if mean.denominator == 1 else float(mean)  # type: ignore[assignment]
        kept, given = sums["tokens_kept"], sums["tokens_in"]
        ratio = None if not prefills else kept / given if kept is not None and given else float("nan")
        return {"prefills": prefills, **sums, "kept_ratio": ratio}

    def to_json(self) -> dict[str, Any]:
        """Totals, and every sample of the window."""
        return {"decoder": asdict(self.decoder), "totals": self.totals(), "samples": [asdict(s) for s in self.samples]}

    def __str__(self) -> str:
        t = self.totals()
        if not t["prefills"]:
            return "no image, video or audio tokens seen yet"
        less = 100 * (1 - t["flops"] / t["flops_in"]) if t["flops"] is not None and t["flops_in"] else 0
        parts = [
            f"{t['tokens_in']} → {t['tokens_kept']:.0f} tokens ({100 * t['kept_ratio']:.1f} %) + {t['separators']} separators",
            f"sequence {t['sequence_in']} → {t['sequence_kept']:.0f}",
            "KV not counted" if t["kv_bytes"] is None else f"KV {_bytes(t['kv_bytes_in'])} → {_bytes(t['kv_bytes'])}",
            f"prefill FLOPs not counted ({self.decoder.unknown})"
            if t["flops"] is None
            else f"prefill {t['flops_in'] / 1e9:.1f} → {t['flops'] / 1e9:.1f} GFLOP (−{less:.0f} %)",
        ]
        if t["flops"] is not None and self.decoder.scans:
            parts[-1] += f" without the scans of {self.decoder.scans} layers"
        if t["prefills"] > 1:
            parts.append(f"{t['prefills']} samples")
        with self._lock:
            items, untouched = self._num_items, dict(self._untouched)
        for method, passed in untouched.items():
            parts.append(f"{items - passed} of {items} items were of a kind that {method} compresses")
        return ", ".join(parts)

    __repr__ = __str__


def _added(rows: list[int], past: list[int]) -> list[int]:
    return [n + p for n, p in zip(rows, past, strict=True)]


def _bytes(n: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.1f} {unit}" if unit != "B" else f"{n:.0f} B"
        n /= 1024
    return f"{n:.2f} GiB"


# the cache


def held_bytes(cache: Any, columns: int | None = None) -> tuple[int, int]:
    """Bytes that one batch row holds of a transformers cache, and would hold after `columns` rows (its length by default).

    A layer that grows holds its rows, behind a sliding window at most window - 1; one that is allocated in advance, and the
    states of linear attention, take the same however many rows there are. Quantised layers are measured in their packed form.
    """
    held = would = Fraction(0)
    for layer in getattr(cache, "layers", cache):
        growing, fixed = 0, 0
        for name, value in vars(layer).items():
            size = sum(_nbytes(t) for t in _tensors(value))
            if name.endswith("_states") or hasattr(layer, "max_cache_len"):
                fixed += size
            else:
                growing += size
        batch = _batch(layer)
        held += Fraction(growing + fixed, batch)
        would += Fraction(fixed, batch)
        if growing:
            most = layer.sliding_window - 1 if isinstance(getattr(layer, "sliding_window", None), int) else None
            now = int(layer.get_seq_length())
            then = int(cache.get_seq_length()) if columns is None else columns
            if most is not None:
                now, then = min(now, most), min(then, most)
            would += Fraction(growing * then, batch * now)
    return round(held), round(would)


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in what a cache layer keeps, but counters; of packed ones the tensors inside."""
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__"):
            for name in value.__tensor_flatten__()[0]:
                yield from _tensors(getattr(value, name))
        elif value.dim():
            yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _batch(layer: Any) -> int:
    """Batch rows of a cache layer."""
    states: Sequence[Any] = [getattr(layer, "keys", None), *vars(layer).values()]
    return next((len(t) for s in states for t in _tensors(s) if t.dim() > 1), 1)


# the public handle


def of_model(model: Any) -> Ledger:
    """The ledger of the compressor that is installed in `model`. Raises ValueError where none is."""
    from mmcompress.patch import _seam

    seam = _seam(model)
    if seam is None:
        raise ValueError(f"model must have a compressor installed to have a ledger, got a {type(model).__name__} without one")
    return seam.ledger


class _Callable(ModuleType):
    """`mmcompress.ledger` is this module and, called, `of_model`."""

    def __call__(self, model: Any) -> Ledger:
        return of_model(model)


sys.modules[__name__].__class__ = _Callable
