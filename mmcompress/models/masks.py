"""Masks of reduced rows: made anew by the model's own builders, never gathered; blocks that see later rows, and samples packed
into one row, are read off what the model made and given back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmcompress.models import compat


@dataclass(frozen=True)
class Pattern:
    """In what the attention among the newest rows differs from plainly causal.

    later: for each layer type ("": the only one) the pairs of rows [B, S, S] whose first sees the later second.
    samples [B, S]: the sample of a packed batch that each row belongs to, or None.
    """

    later: dict[str, Tensor] = field(default_factory=dict)
    samples: Tensor | None = None

    @classmethod
    def of(cls, kw: dict[str, Any], config: Any, past: int) -> Pattern:
        """Read off the arguments of a text model's call. Raises ValueError for a mask that is not understood."""
        mask, S = kw.get("attention_mask"), kw["inputs_embeds"].shape[1]
        if mask is None:
            return cls({}, samples_of(kw, config))
        later = {}
        for kind, one in (mask if isinstance(mask, dict) else {"": mask}).items():
            if isinstance(one, Tensor) and one.ndim == 4:
                if one.shape[1] != 1:
                    raise ValueError(f"attention_mask must be the same for all heads, got {list(one.shape)}")
                seen = one if one.dtype == torch.bool else one > torch.finfo(one.dtype).min / 2
                pairs = seen[:, 0, :, past : past + S].triu(1)
            elif hasattr(one, "mask_mod"):  # a BlockMask of Flex attention
                row = torch.arange(S, device=kw["inputs_embeds"].device)
                sample = torch.arange(one.shape[0], device=row.device)[:, None, None]
                pairs = one.mask_mod(sample, torch.zeros_like(sample), row[None, :, None], row[None, None] + past).triu(1)
            elif isinstance(one, Tensor) or one is None:
                continue  # 2-D, or plainly causal
            else:
                raise ValueError(f"attention_mask must be tensors or block masks, got {type(one).__name__} for {kind or 'all'}")
            if bool(pairs.any()):
                later[kind] = pairs
        return cls(later)

    def __bool__(self) -> bool:
        return bool(self.later) or self.samples is not None

    def among(self, index: Tensor) -> Pattern:
        """The same for rows `index` [B, Q] only."""
        b = torch.arange(len(index), device=index.device)[:, None, None]
        later = {
            k: v.expand(len(index), *v.shape[1:])[
                b.to(v.device), index[:, :, None].to(v.device), index[:, None, :].to(v.device)
            ]
            for k, v in self.later.items()
        }
        samples = None if self.samples is None else self.samples.expand(len(index), -1).gather(1, index.to(self.samples.device))
        return Pattern(later, samples)

    def overlay(self, kind: str, past: int, device: Any) -> dict[str, Any]:
        """What makes a builder of this layer type follow the pattern; {} where there is nothing to say."""
        out: dict[str, Any] = {}
        later = self.later.get(kind, self.later.get(""))
        if later is not None:
            n = past + later.shape[1]
            full = nn.functional.pad(later.to(device), (past, 1, past, 1))  # beyond (a static cache's end) nothing changes
            out["or_mask_function"] = lambda b, h, q, k: full[b, q.clamp(max=n), k.clamp(max=n)]
        if self.samples is not None:
            own = self.samples.to(device)
            out["and_mask_function"] = lambda b, h, q, k: own[b, q] == own[b, k]
        return out


def samples_of(kw: dict[str, Any], config: Any) -> Tensor | None:
    """Where stock transformers would keep packed samples apart: no mask, no cache, restarting text positions."""
    cached = kw.get("use_cache")
    if compat.cache_of(kw) is not None or (getattr(config, "use_cache", True) if cached is None else cached):
        return None
    position = kw.get("position_ids")
    if position is None or (position.dim() == 3 and len(position) != 4):
        return None
    position = position[0] if position.dim() == 3 else position
    return compat.packed_samples(position.expand(len(kw["inputs_embeds"]), -1))


def text_mask(config: Any, kw: dict[str, Any], keys: Tensor, pattern: Pattern, past: int) -> Any:
    """A fresh mask for reduced rows over keys [B, past + rows]: 2-D where one came in (never None: gaps in the positions would
    look like packed samples), else by the builder of each layer type."""
    mask, x = kw.get("attention_mask"), kw["inputs_embeds"]
    if (mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)) and not pattern:
        return keys.long()
    if pattern.samples is not None and "flash" in (config._attn_implementation or ""):
        raise ValueError(
            f"position_ids must not restart (packed samples) under attn_implementation {config._attn_implementation!r} while a "
            "compressor is installed: use sdpa, or pad the samples"
        )
    common = {"config": config, "inputs_embeds": x, "attention_mask": keys.long(), compat.cache_name(): compat.cache_of(kw)}

    def make(kind: str, entry: Any = None) -> Any:
        if isinstance(entry, Tensor) and entry.ndim == 2 and kind not in compat.RECURRENT:
            return keys.to(entry.dtype)
        build = compat.builder(kind)
        if build is None:
            raise ValueError(f"attention_mask must be of layer types that {compat.installed()} builds, got {kind!r}")
        extra = {} if kind in compat.RECURRENT else pattern.overlay(kind, past, x.device)
        return build(**common, **extra)

    if isinstance(mask, dict):
        return {kind: make(kind, entry) for kind, entry in mask.items()}
    types = dict.fromkeys(getattr(config, "layer_types", None) or [compat.layer_type(config, 0)])
    made = {kind: make(kind) for kind in types}
    if mask is None and getattr(config, "layer_types", None) and len(made) > 1:
        return made
    return next(iter(made.values()))


def layer_mask(config: Any, kind: str, i: int, keys: Tensor, hidden: Tensor, cache: Any, pattern: Pattern) -> Any:
    """The mask of decoder layer i, of this type, over the rows that it holds [B, past + Q]."""
    build = compat.builder(kind)
    if build is None:
        raise ValueError(
            f"layer must be None in front of layers of type {kind!r}, whose masks {compat.installed()} does not build"
        )
    past = keys.shape[1] - hidden.shape[1]
    extra = {} if kind in compat.RECURRENT else pattern.overlay(kind, past, hidden.device)
    common = {
        "config": config,
        "inputs_embeds": hidden,
        "attention_mask": keys.to(hidden.device).long(),
        compat.cache_name(): cache,
    }
    return build(**common, layer_idx=i, **extra)


def gather_extra(kw: dict[str, Any], index: Tensor, valid: Tensor, real: Tensor, done: tuple[str, ...]) -> dict[str, Any]:
    """Every other argument that lies along the rows loses the same columns; where one is a mask of rows, lists of values for
    just these rows lose the same values (DeepStack)."""
    from mmcompress.models.rows import rows

    def aligned(v: Any) -> bool:
        return isinstance(v, Tensor) and v.dim() > 1 and tuple(v.shape[:2]) == tuple(valid.shape)

    out = {k: rows(v, index.to(v.device)) if k not in done and aligned(v) else v for k, v in kw.items()}
    for name, visual in kw.items():
        if name in done or not aligned(visual) or visual.dtype != torch.bool or visual[0, 0].numel() != 1:
            continue
        marks = visual.reshape(valid.shape)
        out[name] = (rows(marks, index) & real).view(*index.shape, *visual.shape[2:])
        kept, count = valid[marks], int(marks.sum())

        def take(v: Any, kept: Tensor = kept, count: int = count) -> Any:
            if isinstance(v, Tensor) and v.dim() == 2 and len(v) == count:
                return v[kept.to(v.device)]
            if isinstance(v, (list, tuple)):
                return type(v)(take(x) for x in v)
            return {k: take(x) for k, x in v.items()} if type(v) is dict else v

        out = {k: take(v) if isinstance(v, (list, tuple, dict)) and k not in done else v for k, v in out.items()}
    return out


def take_rows(v: Any, index: Tensor, P: int, real: Tensor, name: str = "") -> Any:
    """Rows `index` [B, Q] of an argument of a decoder layer that lies along its P rows: [B or 1, P, ...], position ids of any
    leading dimensions, tuples of such. Masks of rows forget what is padding now (real [B, Q])."""
    from mmcompress.models.rows import rows

    if isinstance(v, tuple):
        return tuple(take_rows(x, index, P, real, name) for x in v)
    if not isinstance(v, Tensor) or v.dim() < 2:
        return v
    B, index = len(index), index.to(v.device)
    if name == "position_embeddings" and v.dim() > 2 and v.shape[-2] == P:  # some give one table an axis in front
        return rows(v.expand(*v.shape[:-3], B, *v.shape[-2:]), index, v.dim() - 2)
    if name == "position_ids":
        v = v.expand(*v.shape[:-2], B, P)
        return v.gather(-1, index.expand(*v.shape[:-2], *index.shape))
    pairs = v.shape[-2:] == (P, P) and (v.dim() > 3 or v.dtype == torch.bool)  # of rows, not along them
    if v.shape[1] != P or v.shape[0] not in (1, B) or pairs:
        return v
    out = rows(v.expand(B, *v.shape[1:]), index)
    if name.endswith("mask") and out.dim() == 2:  # padding of the reduced rows may come from dropped real ones
        out = out * real.to(out.device, out.dtype)
    return out
