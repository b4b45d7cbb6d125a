"""Before a decoder layer: rows leave between two layers; deeper layers get their own positions, masks and lengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mmcompress.compressor import Compressor, layer_index
from mmcompress.models import compat, signals
from mmcompress.models.cache import PromptState, physical, states_of
from mmcompress.models.call import listening
from mmcompress.models.doors import STEP, Door, Frame
from mmcompress.models.items import Item, run_stages
from mmcompress.models.masks import Pattern, layer_mask, take_rows
from mmcompress.models.rotary import Turned
from mmcompress.models.rows import pack, packed_column, restore, rows
from mmcompress.models.signals.layer import Look
from mmcompress.models.signals.taps import Attention, place_of, tappable
from mmcompress.models.wrap import bound, first_parameter

CUTTABLE = ("full_attention", "sliding_attention", "chunked_attention", "minimax_m3_sparse")
"""Types of attention that read nothing but rows and their mask."""
CUTTABLE_MIXED = (*CUTTABLE, *compat.RECURRENT, "hybrid", "hybrid_sliding")
"""Types of layers before which rows may leave."""


@dataclass
class Cut:
    """What the stages before one layer decided in one forward.

    items: as they came in, for a checkpoint's recomputation. previous [B, Q]: which rows of the layer before stay.
    index [B, Q]: the same among the text model's own rows. real [B, Q]: row or padding.
    keys [B, past + Q]: the same over everything that deeper layers hold. turned: tokens that carry several positions from here
    on; embeddings: cos and sin of all rows then, by the tensors that came in.
    """

    items: list[Item]
    previous: Tensor
    index: Tensor
    real: Tensor
    keys: Tensor
    turned: Turned | None = None
    embeddings: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass
class Step:
    """One forward of the text model as its layers see it: P rows come in, `mask` [B, past + P] says which are real.

    frame is None where nothing is to be decided: a decode step or a continued conversation. first: for each cut whose stages
    read attention, where this forward's rows begin among the keys of the layer before.
    """

    door: LayerDoor
    cache: Any
    mask: Tensor
    rows: int
    past: int = 0
    frame: Frame | None = None
    pattern: Pattern = field(default_factory=Pattern)
    attention: dict[int, dict[str, list[Tensor]]] = field(default_factory=dict)  # cut -> signal -> one value an item
    cuts: dict[int, Cut] = field(default_factory=dict)
    masks: dict[tuple, Any] = field(default_factory=dict)
    first: dict[int, int] = field(default_factory=dict)

    def real(self, layer: int) -> Tensor:
        """Which of the rows that enter this layer are real [B, rows]."""
        earlier = [c for c in self.cuts if c <= layer]
        return self.cuts[max(earlier)].real if earlier else self.mask[:, self.past :].bool()

    def deeper_states(self) -> list[PromptState]:
        """What the cache went through below layer 0 before this forward."""
        return [s for s in states_of(self.cache) if s.cut]

    def held(self, layer: int) -> Tensor:
        """Which of the rows that a layer's cache holds are real [B, held]."""
        return physical(self.deeper_states(), self.mask[:, : self.past], layer).bool()

    def run(self, wrapped: Any, i: int, args: tuple, kw: dict[str, Any]) -> Any:
        """Layer i, with what it gets behind the cuts before it."""
        cut = self.door.behind(i)
        if cut is None and self.frame is None:
            return wrapped.original(*args, **kw)
        if len(args) != 1:
            kw = dict(bound(wrapped.module, "forward", args, kw))
            args = (kw.pop(first_parameter(wrapped.module)),)
        hidden = args[0]
        if cut is not None:
            hidden, kw = self.enter(i, cut, hidden, kw)
        self.measure(i, self.real(i).shape[1])
        return wrapped.original(hidden, **kw)

    def measure(self, i: int, num_rows: int) -> None:
        """Before layer i stores its rows: behind what the cache held, of which a sliding window shows the end only."""
        if self.frame is None or not self.door.looks_at(i + 1) or i + 1 in self.cuts:
            return
        cache = self.cache
        self.first[i + 1] = 0 if cache is None else int(cache.get_query_offset(i)) - int(cache.get_mask_sizes(num_rows, i)[1])

    def enter(self, i: int, cut: int, hidden: Tensor, kw: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """What layer i behind a cut gets: its hidden states and arguments, all cut alike."""
        B, P = len(self.mask), self.rows
        if self.frame is not None:
            if i == cut:
                x, back = flat(hidden, B, self.real(cut - 1).shape[1])
                hidden = back(self.reduce(cut, x))
            done = self.cuts[cut]
            embeddings = kw.get("position_embeddings")
            kw = {
                k: v if k in ("attention_mask", *compat.CACHE_NAMES) else take_rows(v, done.index, P, done.real, k)
                for k, v in kw.items()
            }
            if done.turned is not None and embeddings is not None:
                known = id(embeddings[0])
                if known not in done.embeddings:
                    done.embeddings[known] = done.turned.put(kw["position_embeddings"])
                kw["position_embeddings"] = done.embeddings[known]
            keys, P = done.keys, done.real.shape[1]
        else:
            keys = physical(self.deeper_states(), self.mask, i)
        kw["attention_mask"] = self.layer_mask(i, cut, keys, flat(hidden, B, P)[0])
        return hidden, kw

    def reduce(self, cut: int, hidden: Tensor) -> Tensor:
        """The rows that enter layer `cut`. Decided once per forward; a recomputation only makes the values anew."""
        frame, stages, done = self.frame, self.door.stages[cut], self.cuts.get(cut)
        assert frame is not None
        if done is not None:
            x, _ = run_stages(stages, [replace(i) for i in done.items], hidden, cut)
            return rows(x, done.previous.to(x.device))
        for item in frame.items:
            item.to(hidden.device)
        for name, values in self.attention.pop(cut, {}).items():
            for item, value in zip(frame.items, values, strict=True):
                item.signals = {**item.signals, name: value.to(hidden.device)}
        before = [replace(i) for i in frame.items]
        x, keep = run_stages(stages, frame.items, hidden, cut)
        valid = keep & self.real(cut - 1).to(keep.device)
        index, real = pack(valid, frame.left)
        source = packed_column(valid, real, frame.left)
        for item in frame.items:
            item.move(source)
        for b, count in frame.samples.items():
            count.rows_from[cut] = int(real[b].sum())
            if self.past:
                count.past[cut] = int(self.held(cut)[b].sum())
        earlier = [c for c in self.cuts if c < cut]
        composed = self.cuts[max(earlier)].index.to(index.device).gather(1, index) if earlier else index
        turned = None
        rotary = set(signals.of_source("rotary"))
        if frame.turn is not None and any(rotary & self.door.wanted(c) for c in (*earlier, cut)):  # since layer 0's embeddings
            turned = frame.turn(items=frame.items, like=hidden)
        keys = torch.cat([self.held(cut).to(real.device), real], 1)
        self.cuts[cut] = Cut(before, index, composed, real, keys, turned)
        if cut == max(self.door.stages):
            for item in frame.items:
                item.forget()
        return rows(x, index)

    def layer_mask(self, i: int, cut: int, keys: Tensor, hidden: Tensor) -> Any:
        """The mask of layer i over the rows that it holds, by the model's own builder, once per cut, type and device."""
        config = self.door.config
        kind = compat.layer_type(config, i)
        if (known := (cut, kind, hidden.device)) not in self.masks:
            pattern = self.pattern.among(self.cuts[cut].index) if self.frame is not None and self.pattern else Pattern()
            self.masks[known] = layer_mask(config, kind, i, keys, hidden, self.cache, pattern)
        return self.masks[known]

    def hear(self, layers: Any) -> Callable:
        """What listens to the attention of the layers before those cuts whose stages read some of it."""
        before = {id(m): cut for cut in self.door.stages if self.door.looks_at(cut) for m in layers[cut - 1].modules()}

        @torch.no_grad()
        def hear(module: nn.Module, seen: Attention) -> None:
            cut = before.get(id(module))
            if cut is None or cut in self.attention or cut in self.cuts:  # a checkpoint's recomputation
                return
            frame, T = self.frame, seen.q.shape[2]
            assert frame is not None
            for item in frame.items:
                item.to(seen.q.device)
            first = self.first[cut]
            real, held = self.real(cut - 1).to(seen.q.device), self.held(cut - 1).to(seen.q.device)
            last = torch.full((len(real),), T - 1, device=real.device) if frame.left else real.sum(1) - 1
            look = Look(
                seen, first, real, held[:, held.shape[1] - first :], last - frame.call.extra, frame.items, frame.call.extra
            )
            known = signals.known()
            self.attention[cut] = {
                name: known[name].make(look)  # type: ignore[misc]
                for name in self.door.wanted(cut)
                if known[name].source == "layer"
            }

        return hear

    def leave(self, out: Any, states: list[PromptState]) -> Any:
        """Bring the last layer's output back to P rows, and append what the deeper layers hold to the cache's states."""
        missing = sorted(set(self.door.stages) - set(self.cuts))
        if missing:
            raise RuntimeError(
                f"layer {missing[0]} of this {self.door.seam.family.name} model ran without its stage under "
                f"{compat.installed()}: its "
                f"text model does not hand the argument {STEP!r} to its layers; use a placement before the language model"
            )
        real, length = self.mask[:, self.past :], self.mask.shape[1]
        column = torch.arange(real.shape[1], device=real.device).expand(real.shape)
        for cut in sorted(self.cuts):
            done = self.cuts[cut]
            states.append(PromptState(cut, length, done.keys, tail=states[0].tail))
            length = done.keys.shape[1]
            previous, kept_real = done.previous.to(real.device), done.real.to(real.device)
            kept = torch.zeros(real.shape, dtype=torch.long, device=real.device)
            kept = kept.scatter_add(1, previous, kept_real.long()).bool()
            left = self.frame is None or self.frame.left
            column = packed_column(kept, kept_real, left).gather(1, column)
            real = kept_real
        return restore(out, column)


class LayerDoor(Door):
    name = "layer"
    order = 1
    sources = ("layer",)

    @property
    def config(self) -> Any:
        return self.seam.family.stack.config

    def at(self, stage: Compressor) -> int:
        family, depth = self.seam.family, len(self.seam.family.layers)
        layer = layer_index(stage.layer, depth)
        if layer and layer < family.first_cut:
            raise ValueError(
                f"layer must be at least {family.first_cut} in this {family.name} model (DeepStack adds features "
                f"before it), got {stage.layer!r}"
            )
        types = tuple(getattr(self.config, "layer_types", None) or ())
        if layer and (odd := sorted(set(types[layer:]) - set(CUTTABLE_MIXED))):
            raise ValueError(
                f"layer must be None in {family.name} models, whose layers of type {', '.join(odd)} read more than rows and "
                "their "
                f"mask; got {stage.layer!r}"
            )
        own = depth - (getattr(self.config, "num_kv_shared_layers", None) or 0)
        sources = (
            [max(i for i in range(own) if types[i] == t) for t in set(types[own:]) if t in types[:own]] if own < depth else []
        )
        if sources and layer > min(sources):
            raise ValueError(
                f"layer must be at most {min(sources)} in this {family.name} model, whose later layers reuse the keys of "
                f"layer {min(sources)}; got {stage.layer!r}"
            )
        return layer

    def wrap(self) -> None:
        if not self.stages:
            return
        layers = self.seam.family.layers
        for i, layer in enumerate(layers):
            self.seam.wrap(layer, "forward", "on_layer", i)
        for cut in self.stages:
            if self.looks_at(cut):
                found = tappable(layers[cut - 1])
                if not found:
                    raise ValueError(
                        f"{self.seam.family.name} models must take their attention from transformers' attention functions "
                        "to read "
                        f"{sorted(self.wanted(cut))}, got {type(layers[cut - 1]).__name__}"
                    )
                for module in found:
                    if place_of(module) == "forward" and "forward" in module.__dict__:
                        raise ValueError(
                            f"the forward of {type(module).__name__} must be its class's own to read "
                            f"{sorted(self.wanted(cut))}, "
                            f"another library put {module.__dict__['forward']!r} there: install the compressor first"
                        )
                    self.seam.tap(module)

    def looks_at(self, cut: int) -> bool:
        """Whether the stages before this layer read the attention of the layer before."""
        return bool(self.wanted(cut) & set(signals.of_source(*self.sources)))

    def behind(self, i: int) -> int | None:
        """The last cut that a layer stands behind."""
        return max((c for c in self.stages if c <= i), default=None)

    def enter(self, frame: Frame) -> None:
        if not self.stages:
            return
        frame.step = Step(
            self, frame.cache, frame.keys, frame.index.shape[1], frame.past, frame, frame.pattern.among(frame.index)
        )
        frame.kw[STEP] = frame.step
        if any(map(self.looks_at, self.stages)):
            frame.contexts.enter_context(listening(frame.step.hear(self.seam.family.layers)))

    def leave(self, frame: Frame, out: Any) -> Any:
        return out if frame.step is None else frame.step.leave(out, frame.states)

    def later(self, kw: dict[str, Any], cache: Any, mask: Tensor) -> None:
        """A call in which nothing is decided, on a cache whose deeper layers hold fewer rows."""
        if self.stages:
            S = kw["inputs_embeds"].shape[1]
            kw[STEP] = Step(self, cache, mask, S, mask.shape[1] - S)


def flat(hidden: Tensor, B: int, n: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Hidden states as [B, n rows, width] and the way back, where a model keeps several streams: [B, n, streams, D] or
    [streams, B, n, D]."""
    if hidden.dim() == 3:
        return hidden, lambda x: x
    if tuple(hidden.shape[:2]) == (B, n):
        return hidden.flatten(2), lambda x: x.unflatten(2, hidden.shape[2:])
    streams = len(hidden)
    return hidden.movedim(0, 2).flatten(2), lambda x: x.unflatten(2, (streams, -1)).movedim(2, 0)
