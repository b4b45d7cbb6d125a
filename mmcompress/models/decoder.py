"""Stages before a decoder layer: rows leave between two layers; deeper layers get their own positions, masks and lengths."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mmcompress.compressor import Compressor
from mmcompress.ledger import SampleCount
from mmcompress.models.cache import PromptState, physical, states_of
from mmcompress.models.items import Item, run_stages
from mmcompress.models.rotary import Turned
from mmcompress.models.rows import pack, packed_column, restore, rows
from mmcompress.models.signals import row_attention, watch
from mmcompress.ops.relevance import relevance

ATTENTION = ("query_attention", "relevance")


@dataclass
class Plan:
    """What stands before which layer, and the signals those stages read."""

    stages: dict[int, list[Compressor]] = field(default_factory=dict)
    reads: dict[int, list[str]] = field(default_factory=dict)

    def at(self, layer: int) -> int | None:
        """The last cut that a layer stands behind."""
        return max((c for c in self.stages if c <= layer), default=None)


@dataclass
class Cut:
    """What the stages before one layer decided in one forward.

    items: as they came in, for a checkpoint's recomputation. previous [B, Q]: which rows of the layer before stay.
    index [B, Q]: the same among the text model's own rows. real [B, Q]: row or padding.
    keys [B, past + Q]: the same over everything that deeper layers hold. turned: tokens that carry several positions from here
    on; embeddings: cos and sin of all rows then.
    """

    items: list[Item]
    previous: Tensor
    index: Tensor
    real: Tensor
    keys: Tensor
    turned: Turned | None = None
    embeddings: tuple[Tensor, Tensor] | None = None


@dataclass
class Step:
    """One forward of the text model as its layers see it: P rows come in, `mask` [B, past + P] says which are real.

    extra: candidate tokens after the prompt (assisted decoding, or every step without a cache). items is empty where
    nothing is to be decided: a decode step or a continued conversation. turn(items=, like=): `Rotary.turn` where a stage
    carries positions.
    """

    plan: Plan
    cache: Any
    mask: Tensor
    past: int = 0
    left: bool = True
    items: list[Item] = field(default_factory=list)
    samples: dict[int, SampleCount] = field(default_factory=dict)
    extra: int = 0
    turn: Callable[..., Turned] | None = None
    attention: dict[int, dict[str, dict[int, Tensor]]] = field(default_factory=dict)  # cut -> signal -> item -> values
    cuts: dict[int, Cut] = field(default_factory=dict)
    masks: dict[tuple[int, str], Any] = field(default_factory=dict)

    def real(self, layer: int) -> Tensor:
        """Which of the rows that enter this layer are real [B, rows]."""
        earlier = [c for c in self.cuts if c <= layer]
        return self.cuts[max(earlier)].real if earlier else self.mask[:, self.past :].bool()

    def deeper_states(self) -> list[PromptState]:
        """What the cache went through below layer 0 before this forward."""
        return [s for s in states_of(self.cache) if s.cut]

    def enter(self, i: int, hidden: Tensor, kw: dict[str, Any], config: Any) -> Tensor:
        """Prepare the arguments of layer i behind a cut, in place; returns its hidden states."""
        cut = self.plan.at(i)
        assert cut is not None
        if self.items:
            if i == cut:
                hidden = self.reduce(cut, hidden)
            done, B = self.cuts[cut], len(hidden)
            if kw.get("position_embeddings") is not None:
                kw["position_embeddings"] = done.embeddings or tuple(
                    rows(t.expand(B, *t.shape[1:]), done.index) for t in kw["position_embeddings"]
                )
                if done.turned is not None and done.embeddings is None:
                    kw["position_embeddings"] = done.embeddings = done.turned.put(kw["position_embeddings"])
            if kw.get("position_ids") is not None:
                kw["position_ids"] = rows(kw["position_ids"].expand(B, -1), done.index)
            keys = done.keys
        else:
            keys = physical(self.deeper_states(), self.mask, i)
        kw["attention_mask"] = self.layer_mask(i, cut, keys, hidden, config)
        return hidden

    def reduce(self, cut: int, hidden: Tensor) -> Tensor:
        """The rows that enter layer `cut`. Decided once per forward; a recomputation only makes the values anew."""
        stages, reads = self.plan.stages[cut], self.plan.reads.get(cut, [])
        done = self.cuts.get(cut)
        if done is not None:
            x, _ = run_stages(stages, [replace(i) for i in done.items], hidden, reads, cut)
            return rows(x, done.previous)
        for name, values in self.attention.get(cut, {}).items():
            for i, item in enumerate(self.items):
                item.signals = {**item.signals, name: values[i]}
        before = [replace(i) for i in self.items]
        x, keep = run_stages(stages, self.items, hidden, reads, cut)
        valid = keep & self.real(cut - 1)
        index, real = pack(valid, self.left)
        source = packed_column(valid, real, self.left)
        for item in self.items:
            item.move(source)
        for b, count in self.samples.items():
            count.rows_from[cut] = int(real[b].sum())
        earlier = [c for c in self.cuts if c < cut]
        composed = self.cuts[max(earlier)].index.gather(1, index) if earlier else index
        held = physical(self.deeper_states(), self.mask[:, : self.past], cut).bool()
        carried = any("positions" in self.plan.reads.get(c, []) for c in (*earlier, cut))  # since layer 0's embeddings
        turned = self.turn(items=self.items, like=hidden) if self.turn is not None and carried else None
        self.cuts[cut] = Cut(before, index, composed, real, torch.cat([held, real], 1), turned)
        return rows(x, index)

    def layer_mask(self, i: int, cut: int, keys: Tensor, hidden: Tensor, config: Any) -> Any:
        """The mask of layer i over the rows that it holds, by the model's own builder, once per cut and layer type."""
        from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING as builders

        kinds = getattr(config, "layer_types", None)
        kind = kinds[i] if kinds else "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
        if (cut, kind) not in self.masks:
            build: Any = builders[kind]
            mask = keys.long()
            self.masks[cut, kind] = build(
                config=config, inputs_embeds=hidden, attention_mask=mask, past_key_values=self.cache, layer_idx=i
            )
        return self.masks[cut, kind]

    def tap(self, layers: nn.ModuleList) -> contextlib.AbstractContextManager:
        """Read attention in the layer before each cut whose stages want some of it (ATTENTION)."""
        cuts = [c for c, reads in self.plan.reads.items() if set(ATTENTION) & set(reads)]
        if not cuts:
            return contextlib.nullcontext()
        before = {id(part): c for c in cuts for part in layers[c - 1].modules()}

        @torch.no_grad()
        def see(module, q, k, mask, scaling):
            cut, T = before[id(module)], q.shape[2]
            if cut in self.attention:  # a checkpoint's recomputation
                return
            past = 0 if self.cache is None else int(self.cache.get_query_offset(cut - 1)) - T  # this layer has stored k already
            real, reads = self.real(cut - 1), self.plan.reads[cut]
            seen = self.attention[cut] = {}
            if "query_attention" in reads:
                last = torch.full((len(q),), T - 1, device=q.device) if self.left else real.sum(1) - 1
                weights = row_attention(q, k, mask, scaling, last - self.extra).mean(1)[:, past : past + T]
                seen["query_attention"] = {i: weights[item.sample, item.columns] for i, item in enumerate(self.items)}
            if "relevance" in reads:
                visual, text, first = self.column_sets(real, past)
                scale = q.shape[-1] ** -0.5 if scaling is None else scaling
                held = physical(self.deeper_states(), self.mask[:, : self.past], cut - 1).bool()
                every = torch.cat([held, real], 1)
                share = relevance(q, k[:, :, : past + T], visual, text, first, scale, every)
                seen["relevance"] = {i: share[item.sample].expand(len(item.columns), 2) for i, item in enumerate(self.items)}

        return watch([layers[c - 1] for c in cuts], see)

    def column_sets(self, real: Tensor, past: int) -> tuple[Tensor, Tensor, Tensor]:
        """Over past and present columns [B, past + T]: visual ones (separators too), the prompt's text, and what stands
        before the picture."""
        visual = torch.zeros(len(real), past + real.shape[1], dtype=torch.bool, device=real.device)
        for item in self.items:
            visual[item.sample, past + torch.cat([item.columns, item.separators])] = True
        column = torch.arange(visual.shape[1], device=real.device).expand(visual.shape)
        begin = torch.where(visual, column, visual.shape[1]).amin(1, keepdim=True)
        prompt = torch.nn.functional.pad(real, (past, 0), value=True)
        if self.extra:
            prompt = prompt & (column < real.shape[1] + past - self.extra)
        return visual, prompt & ~visual & (column > begin), prompt & (column < begin)

    def leave(self, out: Any, states: list[PromptState]) -> Any:
        """Bring the last layer's output back to P rows, and append what the deeper layers hold to the cache's states."""
        real, length = self.mask[:, self.past :], self.mask.shape[1]
        column = torch.arange(real.shape[1], device=real.device).expand(real.shape)
        for cut in sorted(self.cuts):
            done = self.cuts[cut]
            states.append(PromptState(cut, length, done.keys))
            length = done.keys.shape[1]
            kept = torch.zeros(real.shape, dtype=torch.long, device=real.device)
            kept = kept.scatter_add(1, done.previous, done.real.long()).bool()
            column = packed_column(kept, done.real, self.left).gather(1, column)
            real = done.real
        return restore(out, column)
