"""What really happened: tokens, sequence lengths, FLOPs and KV bytes of every prefill. Nothing else in the library
counts tokens.

FLOPs are the closed form of the field, two per multiply-add, attention without the causal half: a decoder layer of
width d, MLP width m,
Hq query and Hk key heads of width e costs `4 n d e (Hq + Hk) + 6 n d m + 4 n² e Hq`, which is `2n(4d² + 3dm) + 4dn²`
without grouped heads
(GlobalCom², arXiv 2501.05179, tables 8-9). Embeddings, encoder and output head are not counted. KV bytes are `2 n e Hk`
elements a layer.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any


@dataclass(frozen=True)
class Decoder:
    """The language model's dimensions: layers L, width d, MLP width m, query heads, key heads, head width, bytes per
    cached number."""

    layers: int
    width: int
    mlp: int
    heads: int
    kv_heads: int
    head_width: int
    bytes: int = 2

    @classmethod
    def of(cls, config: Any, bytes: int = 2) -> Decoder:
        """From a transformers text config."""
        heads = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            mlp=getattr(config, "intermediate_size", 4 * config.hidden_size),
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_width=getattr(config, "head_dim", None) or config.hidden_size // heads,
            bytes=bytes,
        )

    def flops(self, rows: list[int]) -> int:
        """FLOPs of one prefill that sees rows[i] rows in layer i."""
        d, e = self.width, self.head_width
        per_row = 4 * d * e * (self.heads + self.kv_heads) + 6 * d * self.mlp
        return sum(n * per_row + 4 * n * n * e * self.heads for n in rows)

    def kv_bytes(self, rows: list[int]) -> int:
        """Bytes of keys and values that a cache with rows[i] rows in layer i holds."""
        return 2 * self.kv_heads * self.head_width * self.bytes * sum(rows)


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
    prefill)."""

    kind: str
    tokens_in: int
    separators: int = 0
    kept_from: dict[int, int] = field(default_factory=dict)

    def kept(self, layers: int) -> list[int]:
        """Tokens that each layer sees."""
        return _per_layer(self.tokens_in, self.kept_from, layers)


@dataclass
class SampleCount:
    """One row of the batch: real rows in, and rows from a layer on."""

    sequence_in: int
    rows_from: dict[int, int] = field(default_factory=dict)
    items: list[ItemCount] = field(default_factory=list)

    def rows(self, layers: int) -> list[int]:
        """Rows that each layer sees."""
        return _per_layer(self.sequence_in, self.rows_from, layers)


class Ledger:
    """Counts of all prefills since installing; every property is a total over them.

    `samples` holds one entry per batch row and prefill that had items; text-only calls and decode steps are not counted.
    """

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self.samples: list[SampleCount] = []

    def clear(self) -> None:
        """Forget all counts."""
        self.samples.clear()

    @property
    def items(self) -> list[ItemCount]:
        return [i for s in self.samples for i in s.items]

    @property
    def tokens_in(self) -> int:
        return sum(i.tokens_in for i in self.items)

    @property
    def tokens_kept(self) -> float:
        """Tokens that a layer sees, mean over the layers (a whole number unless tokens leave inside the decoder)."""
        total = Fraction(sum(sum(i.kept(self.decoder.layers)) for i in self.items), self.decoder.layers)
        return int(total) if total.denominator == 1 else float(total)

    @property
    def separators(self) -> int:
        return sum(i.separators for i in self.items)

    @property
    def kept_ratio(self) -> float:
        """Tokens kept / tokens in, separators left out; nan before the first item."""
        return self.tokens_kept / self.tokens_in if self.tokens_in else float("nan")

    @property
    def sequence_in(self) -> int:
        return sum(s.sequence_in for s in self.samples)

    @property
    def sequence_kept(self) -> float:
        """Rows that a layer sees, mean over the layers."""
        total = Fraction(sum(sum(s.rows(self.decoder.layers)) for s in self.samples), self.decoder.layers)
        return int(total) if total.denominator == 1 else float(total)

    @property
    def flops_in(self) -> int:
        return sum(self.decoder.flops([s.sequence_in] * self.decoder.layers) for s in self.samples)

    @property
    def flops(self) -> int:
        return sum(self.decoder.flops(s.rows(self.decoder.layers)) for s in self.samples)

    @property
    def kv_bytes_in(self) -> int:
        return sum(self.decoder.kv_bytes([s.sequence_in] * self.decoder.layers) for s in self.samples)

    @property
    def kv_bytes(self) -> int:
        return sum(self.decoder.kv_bytes(s.rows(self.decoder.layers)) for s in self.samples)

    def totals(self) -> dict[str, Any]:
        """All totals as plain JSON values (tokens, rows, FLOPs, bytes)."""
        names = (
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
        return {
            "prefills": len(self.samples),
            **{n: getattr(self, n) for n in names},
            "kept_ratio": self.kept_ratio if self.samples else None,
        }

    def to_json(self) -> dict[str, Any]:
        """Totals and every sample."""
        return {"decoder": asdict(self.decoder), "totals": self.totals(), "samples": [asdict(s) for s in self.samples]}

    def __str__(self) -> str:
        if not self.samples:
            return "no image, video or audio tokens seen yet"
        t = self.totals()
        return (
            f"{t['tokens_in']} → {t['tokens_kept']:.0f} tokens ({100 * self.kept_ratio:.1f} %) + {t['separators']} separators, "
            f"sequence {t['sequence_in']} → {t['sequence_kept']:.0f}, "
            f"KV {_bytes(t['kv_bytes_in'])} → {_bytes(t['kv_bytes'])}, "
            f"prefill {t['flops_in'] / 1e9:.1f} → {t['flops'] / 1e9:.1f} GFLOP "
            f"(−{100 * (1 - t['flops'] / t['flops_in']):.0f} %)" + (f", {t['prefills']} samples" if t["prefills"] > 1 else "")
        )

    __repr__ = __str__


def _bytes(n: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.1f} {unit}" if unit != "B" else f"{n:.0f} B"
        n /= 1024
    return f"{n:.2f} GiB"
