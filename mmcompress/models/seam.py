"""The seam: where a compressor takes the rows of items out of a running model and puts fewer back.

Observe at the core (ids, masks, grids, encoder outputs), act at the call of the text model, restore its output to the caller's length.
Stages at a decoder layer act in wrappers on the layers. All wrappers are instance methods, undone bit for bit.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mmcompress.compressor import Compressor
from mmcompress.ledger import Decoder, ItemCount, Ledger, SampleCount
from mmcompress.models import family as find_family
from mmcompress.models.cache import PromptState, physical, remember, states_of
from mmcompress.models.generic import Call, Family, ItemSpec
from mmcompress.models.rows import pack, packed_column, restore, rows
from mmcompress.models.signals import BACKENDS, last_block, row_attention, watch
from mmcompress.models.wrap import Wrapper
from mmcompress.tokens import Layout, Reduction, Tokens

OFFERED_ANYWHERE = ("text",)


@dataclass
class Item:
    """One item on its way through the stages; also the trace that `run.items` shows.

    sample: batch row. position, group [N]: of all tokens that came in. assignment [N]: the output each went into (-1 = dropped).
    anchor [K]: the input tokens whose places the outputs have. columns [K]: where they stand now in the sequence.
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
    signals: dict[str, Tensor] = field(default_factory=dict, repr=False)
    count: ItemCount = field(default_factory=lambda: ItemCount("", 0))
    x: Tensor | None = field(default=None, repr=False)

    @property
    def kept(self) -> Tensor:
        """[N] bool: tokens that stayed or went into one that did."""
        return self.assignment >= 0

    def reduce(self, new: Reduction, j: int) -> None:
        """Take row j of a stage's result."""
        mask = slice(None) if new.mask is None else new.mask[j]
        anchor = new.anchor[j][mask]
        self.x, self.size = new.x[j][mask], new.size[j][mask]
        self.columns, self.anchor = self.columns[anchor], self.anchor[anchor]
        self.assignment = torch.where(self.assignment >= 0, new.assignment[j][self.assignment.clamp(min=0)], -1)
        self.signals = {k: v if k == "text" else v[anchor] for k, v in self.signals.items()}


@dataclass
class Cut:
    """What the stages before one layer decided in one forward.

    items: as they came in, for a checkpoint's recomputation. previous [B, Q]: rows of the layer before that stay. index [B, Q]: the same among the
    text model's own rows. real [B, Q]: row or padding. keys [B, past + Q]: the same over all that deeper layers hold.
    """

    items: list[Item]
    previous: Tensor
    index: Tensor
    real: Tensor
    keys: Tensor


@dataclass
class Step:
    """One forward of the text model as its layers see it: P rows come in, `mask` [B, past + P] says which are real; `cuts` fills up as layers run."""

    cache: Any
    mask: Tensor
    past: int = 0
    left: bool = True
    items: list[Item] = field(default_factory=list)
    samples: dict[int, SampleCount] = field(default_factory=dict)
    extra: int = 0  # candidate tokens after the prompt (assisted decoding, or all steps without a cache)
    attention: dict[int, Tensor] = field(default_factory=dict)
    cuts: dict[int, Cut] = field(default_factory=dict)
    masks: dict[tuple[int, str], Any] = field(default_factory=dict)

    def real(self, layer: int) -> Tensor:
        """Which of the rows that enter this layer's attention are real [B, rows]."""
        earlier = [c for c in self.cuts if c <= layer]
        return self.cuts[max(earlier)].real if earlier else self.mask[:, self.past :].bool()


class Seam:
    """A compressor installed in one model. Use `compress_`, `restore_` or `with compressor(model)`."""

    def __init__(self, model: nn.Module, compressor: Compressor):
        self.model: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.family: Family = find_family(model)
        self.compressor = compressor
        text_config = self.family.text.config
        self.ledger = Ledger(Decoder.of(text_config, next(self.family.text.parameters()).element_size()))
        self.items: list[Item] = []
        self.calls: list[Call] = []
        self.generating, self.mask2d = False, None
        self.prompt = 0
        self.wrappers: list[Wrapper] = []
        self.forward_wrappers: list[Wrapper] = []
        self.plan(compressor)

    # what stands where

    def plan(self, compressor: Compressor) -> None:
        depth = len(self.family.layers)
        self.prefill: list[Compressor] = []
        self.cuts: dict[int, list[Compressor]] = {}
        self.reads: dict[int, list[str]] = {}
        for stage in compressor.stages:
            name = type(stage).name or type(stage).__name__
            if stage.placement not in ("prefill", "layer"):
                raise ValueError(f"placement of {name} must be 'prefill' or 'layer' in this version, got {stage.placement!r}")
            layer = self.layer(stage.layer, depth)
            if stage.is_identity:
                continue
            reads = [self.resolve(name, wanted, layer) for wanted in stage.reads]
            (self.cuts.setdefault(layer, []) if layer else self.prefill).append(stage)
            self.reads.setdefault(layer, []).extend(r for r in reads if r != "crops" and r not in self.reads.get(layer, []))
        wanted = {r for rs in self.reads.values() for r in rs}
        self.encoder_reads = [r for r in ("cls_logits", "keys", "tower") if r in wanted]
        tapped = [m for m, r in (("encoder", {"cls_logits", "keys"}), ("text", {"query_attention"})) if wanted & r]
        for which in tapped:
            part = self.family.text if which == "text" else self.family.tower(self.family.core, self.family.modalities[0])
            backend = part.config._attn_implementation  # type: ignore[union-attr]
            if backend not in BACKENDS:
                raise ValueError(
                    f"attn_implementation of the {which} must be one of {', '.join(BACKENDS)} to read {sorted(wanted)}, got {backend!r}"
                )

    @staticmethod
    def layer(layer: int | float | None, depth: int) -> int:
        if layer is None:
            return 0
        at = layer if isinstance(layer, int) else max(1, int(layer * depth))
        if not 0 <= at < depth:
            raise ValueError(f"layer must be below the model's {depth} decoder layers, got {layer!r}")
        return at

    def resolve(self, name: str, wanted: str, layer: int) -> str:
        offered = (*self.family.signals(), *OFFERED_ANYWHERE, *(("query_attention",) if layer else ()))
        for one in wanted.split("|"):
            if one in offered:
                return one
        place = f"layer {layer}" if layer else "prefill"
        raise ValueError(
            f"{name} reads the signal {wanted.replace('|', ' or ')!r}, which {self.family.name} models do not offer at {place}; offered: {', '.join(offered)}"
        )

    # installing

    def install(self) -> None:
        wrap = lambda module, name, make: self.wrappers.append(Wrapper(module, name, make, self))  # noqa: E731
        family, core = self.family, self.family.core
        try:
            wrap(core, "forward", self.on_core)
            for kind in family.modalities:
                if hasattr(core, f"get_{kind}_features"):
                    wrap(core, f"get_{kind}_features", lambda module, original, kind=kind: self.on_features(kind, original))
            if "tower" in self.encoder_reads and (projector := family.projector(core, family.modalities[0])) is not None:
                wrap(projector, "forward", self.on_projector)
            wrap(family.text, "forward", self.on_text)
            if self.cuts:
                for i, layer in enumerate(family.layers):
                    wrap(layer, "forward", lambda module, original, i=i: self.on_layer(i, original))
            self.forward_wrappers = list(self.wrappers)
            wrap(self.model, "prepare_inputs_for_generation", self.on_prepare)
            wrap(self.model, "generate", self.on_generate)
            if family.per_item:
                wrap(self.model, "_expand_inputs_for_generation", self.on_expand)
        except BaseException:
            self.uninstall()
            raise

    def uninstall(self) -> None:
        while self.wrappers:
            self.wrappers[-1].undo()
            self.wrappers.pop()
        self.forward_wrappers = []

    def resume(self) -> None:
        for w in self.forward_wrappers:
            w.resume()

    def pause(self) -> None:
        """Leave decode steps to the stock graph; layer stages need their masks in every step."""
        if not self.cuts:
            for w in self.forward_wrappers:
                w.pause()

    # the wrappers

    def on_core(self, core: nn.Module, forward: Callable) -> Callable:
        def run(*args, **kwargs):
            if args:
                kwargs = {**inspect.signature(type(core).forward).bind(core, *args, **kwargs).arguments, **kwargs}
                kwargs.update(kwargs.pop("kwargs", {}))
                kwargs.pop("self")
            ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
            if not isinstance(mask, Tensor) or mask.ndim != 2:
                if mask is not None and not self.generating:
                    raise ValueError(
                        "attention_mask must be 2-D [batch, columns] while a compressor is installed, got a prepared mask"
                    )
                mask = self.mask2d if self.generating else None
            call = Call(kwargs, ids, mask)
            self.calls.append(call)
            try:
                with self.encoder_tap(core, call):
                    return forward(**kwargs)
            finally:
                self.calls.pop()

        return run

    def encoder_tap(self, core: nn.Module, call: Call) -> contextlib.AbstractContextManager:
        kinds = self.family.kinds(call)
        if not kinds or not {"cls_logits", "keys"} & set(self.encoder_reads):
            return contextlib.nullcontext()
        towers = [t for k in kinds if (t := self.family.tower(core, k)) is not None]

        def see(module, q, k, mask, scaling):
            call.attention.setdefault(call.kind or kinds[0], []).append((q, k))

        return watch([last_block(t) for t in towers], see)

    def on_features(self, kind: str, original: Callable) -> Callable:
        def run(*args, **kwargs):
            call = self.calls[-1] if self.calls else None
            if call is None or call.kind is not None:  # called by the user, or from another get_*_features
                return original(*args, **kwargs)
            call.kind = kind
            try:
                call.features[kind] = out = original(*args, **kwargs)
            finally:
                call.kind = None
            return out

        return run

    def on_projector(self, projector: nn.Module, forward: Callable) -> Callable:
        def run(x, *args, **kwargs):
            if self.calls:
                call = self.calls[-1]
                call.tower.setdefault(call.kind or self.family.kinds(call)[0], []).append(x)
            return forward(x, *args, **kwargs)

        return run

    def on_text(self, text: nn.Module, forward: Callable) -> Callable:
        def run(**kw):
            if not self.calls:
                return forward(**kw)
            call, cache, x = self.calls[-1], kw.get("past_key_values"), kw["inputs_embeds"]
            items, samples = self.find_items(call, x)
            if items:
                self.items = items
                self.ledger.samples.extend(samples.values())
            if not items or not (self.prefill or self.cuts):
                return self.plain(call, kw, forward)
            B, S = x.shape[:2]
            x, keep = self.run_stages(self.prefill, items, x)
            valid = keep if call.mask is None else keep & call.mask[:, -S:].bool()
            left = call.mask is None or bool(call.mask[:, -1].all())
            index, real = pack(valid, left)
            source = packed_column(valid, real, left)
            for item in items:
                item.columns = source[item.sample, item.columns]
            for b, count in samples.items():
                count.rows_from[0] = int(real[b].sum())
            past, seen = (0, 0) if cache is None else (int(cache.get_query_offset()), int(cache.get_seq_length()))
            keys = torch.cat([self.physical_mask(call, cache, B, S)[:, :-S].bool(), real], 1)
            position = kw.get("position_ids")
            if position is None:
                position = torch.arange(seen, seen + S, device=x.device)[None]
            position = position.expand(*position.shape[:-2], B, S)
            kw = gather_extra(kw, index, B, S)
            kw["inputs_embeds"] = rows(x, index)
            kw["position_ids"] = position.gather(-1, index.expand(*position.shape[:-1], index.shape[1]))
            kw["attention_mask"] = text_mask(text, kw, keys)
            states = [PromptState(0, seen + S, keys)]
            if self.cuts:
                extra = max(0, seen + S - self.prompt) if self.generating else 0
                step = Step(cache, keys, past, left, items, samples, extra)
                with self.query_tap(text, step):
                    out = forward(**kw, mmcompress_step=step)
                out = unpack_cuts(out, step, states)
            else:
                out = forward(**kw)
            if (cache := out.get("past_key_values")) is not None:
                remember(cache, states)
            return restore(out, source)

        return run

    def physical_mask(self, call: Call, cache: Any, B: int, S: int) -> Tensor:
        """The 2-D mask [B, past + S] over the rows that layer 0 holds. While generating, `on_prepare` has converted it already."""
        states = states_of(cache)
        if call.mask is not None and (self.generating or not states):
            return call.mask
        mask = call.mask
        if mask is None:
            seen = 0 if cache is None else int(cache.get_seq_length())
            mask = torch.ones(B, seen + S, dtype=torch.long, device=self.model.device)
        return physical(states, mask, 0)

    def plain(self, call: Call, kw: dict, forward: Callable) -> Any:
        """Text only, a decode step, or nothing to drop: the stock call, with the mask that fits what the cache holds."""
        cache = kw.get("past_key_values")
        if not any(s.length for s in states_of(cache)):
            return forward(**kw)
        B, S = kw["inputs_embeds"].shape[:2]
        mask = self.physical_mask(call, cache, B, S)
        if not self.generating or call.mask is None:
            kw["attention_mask"] = mask
        if self.cuts:
            kw["mmcompress_step"] = Step(cache, mask)
        return forward(**kw)

    def on_layer(self, i: int, forward: Callable) -> Callable:
        def run(hidden, *args, **kw):
            step = kw.pop("mmcompress_step", None)
            cut = max((c for c in self.cuts if c <= i), default=None)
            if step is None or cut is None:
                return forward(hidden, *args, **kw)
            if step.items:
                if i == cut:
                    hidden = self.cut_rows(step, cut, hidden)
                done, B = step.cuts[cut], len(hidden)
                if kw.get("position_embeddings") is not None:
                    kw["position_embeddings"] = tuple(
                        rows(t.expand(B, *t.shape[1:]), done.index) for t in kw["position_embeddings"]
                    )
                if kw.get("position_ids") is not None:
                    kw["position_ids"] = rows(kw["position_ids"].expand(B, -1), done.index)
                keys = done.keys
            else:
                keys = physical([s for s in states_of(step.cache) if s.cut], step.mask, i)
            kw["attention_mask"] = self.layer_mask(step, i, cut, keys, hidden)
            return forward(hidden, *args, **kw)

        return run

    # items and stages

    def find_items(self, call: Call, x: Tensor) -> tuple[list[Item], dict[int, SampleCount]]:
        """The items of this call, and one count per batch row that holds some."""
        B, S = x.shape[:2]
        kinds = self.family.kinds(call)
        if not kinds:
            return [], {}
        if call.ids is None:
            raise ValueError(
                "input_ids must be given together with pixels or sound while a compressor is installed, got inputs_embeds only"
            )
        if tuple(call.ids.shape) != (B, S):
            raise ValueError(
                f"input_ids must hold one id per row of the text model {(B, S)} (the processor's expanded form), got {tuple(call.ids.shape)}"
            )
        host = call.ids.cpu()
        real = torch.full((B,), S) if call.mask is None else call.mask[:, -S:].sum(1).cpu()
        items: list[Item] = []
        samples: dict[int, SampleCount] = {}
        for kind in kinds:
            flat: dict[str, Tensor] | None = None
            for spec, at in self.places(call, kind, host):
                b, at = int(at[0]) // S, at[spec.rows]
                if int(at[-1]) // S != b:
                    raise ValueError(
                        f"the {kind} items must lie within their samples; an item of {spec.num_rows} rows begins in sample {b} and ends in the next"
                    )
                if flat is None:
                    flat = {r: self.family.signal(call, kind, r) for r in self.encoder_reads}
                items.append(self.item(spec, b, (at % S).to(x.device), x, flat))
                count = samples.setdefault(b, SampleCount(int(real[b])))
                items[-1].count = ItemCount(kind, len(spec.rows), spec.num_rows - len(spec.rows), {0: len(spec.rows)})
                count.items.append(items[-1].count)
        if items and any("text" in r for r in self.reads.values()):
            text = self.text_rows(call, x, host)
            for item in items:
                item.signals["text"] = text[item.sample]
        return items, samples

    def places(self, call: Call, kind: str, host: Tensor) -> list[tuple[ItemSpec, Tensor]]:
        """Every item of a kind with the flat places of its rows in ids [B, S]."""
        place = (host == self.family.placeholder(kind)).flatten().nonzero()[:, 0]
        if not len(place):
            return []
        specs = self.family.specs(call, kind, len(place)) or runs(kind, place, host.shape[1])
        if sum(s.num_rows for s in specs) != len(place):
            raise ValueError(
                f"the {kind} features stand for {sum(s.num_rows for s in specs)} rows, input_ids hold {len(place)} placeholders"
            )
        return list(zip(specs, place.split([s.num_rows for s in specs]), strict=True))

    def item(self, spec: ItemSpec, b: int, columns: Tensor, x: Tensor, flat: dict[str, Tensor]) -> Item:
        N = len(columns)
        if flat and spec.source is None:
            raise ValueError(f"{self.family.name} models cannot tell which encoder outputs belong to this {spec.kind}")
        signals = {name: value[spec.source.to(value.device)] for name, value in flat.items()}  # type: ignore[union-attr]
        n = torch.arange(N, device=x.device)
        size = torch.ones(N, device=x.device)
        return Item(
            b, spec.kind, spec.layout, spec.position.to(x.device), spec.group.to(x.device), columns, n, n, size, signals
        )

    def text_rows(self, call: Call, x: Tensor, host: Tensor) -> list[Tensor]:
        """Embeddings of each sample's own text [T, D]."""
        text = torch.ones_like(host, dtype=torch.bool)
        for kind in self.family.modalities:
            text &= host != self.family.placeholder(kind)
        if call.mask is not None:
            text &= call.mask[:, -x.shape[1] :].bool().cpu()
        return [x[b, row.nonzero()[:, 0].to(x.device)] for b, row in enumerate(text)]

    def run_stages(self, stages: list[Compressor], items: list[Item], x: Tensor, layer: int = 0) -> tuple[Tensor, Tensor]:
        """x with the outputs written in (a new tensor), and which columns stay [B, S]."""
        keep = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if not stages:
            return x, keep
        for item in items:
            item.x = x[item.sample, item.columns]
            keep[item.sample, item.columns] = False
        for stage in stages:
            buckets: dict[Any, list[Item]] = {}
            for item in items:
                if len(item.columns):
                    buckets.setdefault((item.layout, len(item.columns)), []).append(item)
            for bucket in buckets.values():
                result = check(stage, stage(stack(bucket, self.reads.get(layer, []))), bucket)
                for j, item in enumerate(bucket):
                    item.reduce(result, j)
        b = torch.cat([torch.full_like(i.columns, i.sample) for i in items])
        columns = torch.cat([i.columns for i in items])
        keep[b, columns] = True
        x = x.index_put((b, columns), torch.cat([i.x for i in items]).to(x.dtype))  # type: ignore[misc]
        for item in items:
            item.x = None
            item.count.kept_from[layer] = len(item.columns)
        return x, keep

    # decoder layers

    def query_tap(self, text: nn.Module, step: Step) -> contextlib.AbstractContextManager:
        cuts = [c for c in self.cuts if "query_attention" in self.reads.get(c, [])]
        if not cuts:
            return contextlib.nullcontext()
        at = {id(part): c for c in cuts for part in text.layers[c - 1].modules()}  # type: ignore[union-attr, index]

        def see(module, q, k, mask, scaling):
            cut = at[id(module)]
            if cut not in step.attention:  # a checkpoint's recomputation comes here again
                real = step.real(cut - 1)
                row = real.shape[1] - 1 - step.extra if step.left else real.sum(1) - 1 - step.extra
                row = torch.as_tensor(row, device=q.device).expand(len(q))
                past = (
                    k.shape[2] - q.shape[2]
                    if mask is None or mask.ndim != 4 or mask.shape[-1] == real.shape[1] + step.past
                    else step.past
                )
                with torch.no_grad():
                    step.attention[cut] = row_attention(q, k, mask, scaling, row).mean(1)[:, past : past + q.shape[2]]

        return watch([text.layers[c - 1] for c in cuts], see)  # type: ignore[union-attr, index]

    def cut_rows(self, step: Step, cut: int, hidden: Tensor) -> Tensor:
        """The rows that enter layer `cut`. Decided once per forward; a checkpoint's recomputation finds the decision and only makes the values anew."""
        done = step.cuts.get(cut)
        if done is not None:
            x, _ = self.run_stages(self.cuts[cut], [replace(i) for i in done.items], hidden, cut)
            return rows(x, done.previous)
        earlier = [c for c in step.cuts if c < cut]
        real = step.real(cut - 1)
        if "query_attention" in self.reads.get(cut, []):
            for item in step.items:
                item.signals = {**item.signals, "query_attention": step.attention[cut][item.sample, item.columns]}
        before = [replace(i) for i in step.items]
        x, keep = self.run_stages(self.cuts[cut], step.items, hidden, cut)
        index, now = pack(keep & real, step.left)
        source = packed_column(keep & real, now, step.left)
        for item in step.items:
            item.columns = source[item.sample, item.columns]
        for b, count in step.samples.items():
            count.rows_from[cut] = int(now[b].sum())
        held = physical([s for s in states_of(step.cache) if s.cut], step.mask[:, : step.past], cut).bool()
        composed = step.cuts[max(earlier)].index.gather(1, index) if earlier else index
        step.cuts[cut] = Cut(before, index, composed, now, torch.cat([held, now], 1))
        return rows(x, index)

    def layer_mask(self, step: Step, i: int, cut: int, keys: Tensor, hidden: Tensor) -> Any:
        """The mask of layer i over the rows that it holds, by the model's own builder, once per cut and layer type."""
        from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING as builders

        config: Any = self.family.text.config
        kinds = getattr(config, "layer_types", None)
        kind = kinds[i] if kinds else "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
        if (cut, kind) not in step.masks:
            build: Any = builders[kind]
            step.masks[cut, kind] = build(
                config=config, inputs_embeds=hidden, attention_mask=keys.long(), past_key_values=step.cache, layer_idx=i
            )
        return step.masks[cut, kind]

    # generate

    def on_prepare(self, model: nn.Module, prepare: Callable) -> Callable:
        def run(input_ids, *args, **kw):
            cache, mask = kw.get("past_key_values"), kw.get("attention_mask")
            if mask is not None and mask.ndim == 2:
                if states_of(cache):
                    kw["attention_mask"] = mask = physical(states_of(cache), mask, 0)
                self.mask2d = mask
            if kw.get("is_first_iteration") or cache is None:  # cache is None: use_cache=False, every step is a prefill
                self.resume()
            else:
                self.pause()
            return prepare(input_ids, *args, **kw)

        return run

    def on_expand(self, model: nn.Module, expand: Callable) -> Callable:
        """Beams of one sample get all its items: transformers repeats features item by item, which mixes up the items of a prompt with several."""

        def run(expand_size=1, is_encoder_decoder=False, input_ids=None, **kw):
            ids, out = expand(expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kw)
            call = Call(kw, input_ids, kw.get("attention_mask"))
            if expand_size > 1 and input_ids is not None:
                for kind in self.family.kinds(call):
                    owner = [int(at[0]) // input_ids.shape[1] for _, at in self.places(call, kind, input_ids.cpu())]
                    order = sorted(
                        range(len(owner) * expand_size),
                        key=lambda i: (owner[i // expand_size], i % expand_size, i // expand_size),
                    )
                    for name in self.family.per_item:
                        if isinstance(value := out.get(name), Tensor) and len(value) == len(order):
                            out[name] = value[order]
            return ids, out

        return run

    def on_generate(self, model: nn.Module, generate: Callable) -> Callable:
        def run(*args, **kw):
            config = kw.get("generation_config")
            if kw.get("prefill_chunk_size") or getattr(config, "prefill_chunk_size", None):
                raise ValueError(
                    "prefill_chunk_size must be None while a compressor is installed (transformers drops the pixels of later chunks)"
                )
            if kw.get("assistant_model") is not None:
                raise ValueError(
                    "assistant_model must be None while a compressor is installed: its prefill is not checked; prompt_lookup_num_tokens works"
                )
            ids = next((i for i in (kw.get("input_ids"), kw.get("inputs"), *args[:1]) if isinstance(i, Tensor)), None)
            self.prompt = 0 if ids is None else ids.shape[1]
            self.generating = True  # masks are physical already, the text wrapper must not convert them again
            try:
                return generate(*args, **kw)
            finally:
                self.generating, self.mask2d = False, None
                self.resume()

        return run


def text_mask(text: nn.Module, kw: dict, keys: Tensor) -> Any:
    """A fresh mask for the reduced rows: 2-D where one came in (never None: gaps in the positions would look like packed sequences), else the model's own builder."""
    mask = kw.get("attention_mask")
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        return keys.long()
    from transformers.masking_utils import create_masks_for_generate

    config: Any = text.config
    cache = kw.get("past_key_values")
    return create_masks_for_generate(
        config=config, inputs_embeds=kw["inputs_embeds"], attention_mask=keys.long(), past_key_values=cache, position_ids=None
    )


def gather_extra(kw: dict, index: Tensor, B: int, S: int) -> dict:
    """Every other sequence-aligned argument loses the same columns."""
    done = ("inputs_embeds", "attention_mask", "position_ids", "past_key_values")

    def aligned(v: Any) -> bool:
        return isinstance(v, Tensor) and v.dim() > 1 and tuple(v.shape[:2]) == (B, S)

    return {k: rows(v, index) if k not in done and aligned(v) else v for k, v in kw.items()}


def unpack_cuts(out: Any, step: Step, states: list[PromptState]) -> Any:
    """Bring the output of the last layer back to P rows, and append what the deeper layers hold to the cache's states."""
    real, length = step.mask[:, step.past :], step.mask.shape[1]
    column = torch.arange(real.shape[1], device=real.device).expand(real.shape)
    for cut in sorted(step.cuts):
        done = step.cuts[cut]
        states.append(PromptState(cut, length, done.keys))
        length = done.keys.shape[1]
        kept = (
            torch.zeros(real.shape, dtype=torch.long, device=real.device).scatter_add(1, done.previous, done.real.long()).bool()
        )
        column = packed_column(kept, done.real, step.left).gather(1, column)
        real = done.real
    return restore(out, column)


def runs(kind: str, place: Tensor, S: int) -> list[ItemSpec]:
    """Each run of neighbouring placeholder columns is one item of unknown structure."""
    breaks = (place[1:] != place[:-1] + 1) | (place[1:] % S == 0)
    edges = [0, *(breaks.nonzero()[:, 0] + 1).tolist(), len(place)]
    out = [ItemSpec.lattice(kind, (b - a, 1, 1)) for a, b in zip(edges, edges[1:], strict=False)]
    for spec in out:
        spec.source = None
    return out


def stack(bucket: list[Item], reads: list[str]) -> Tokens:
    """The items of one layout as a batch."""
    first = bucket[0]
    signals: dict[str, Tensor] = {}
    for name in reads:
        values = [i.signals[name] for i in bucket]
        if name == "text":
            signals["text"] = nn.utils.rnn.pad_sequence(values, batch_first=True)
            signals["text_mask"] = nn.utils.rnn.pad_sequence(
                [torch.ones(len(v), dtype=torch.bool, device=v.device) for v in values], batch_first=True
            )
        else:
            signals[name] = torch.stack(values)
    pick = lambda get: torch.stack([get(i)[i.anchor] for i in bucket])  # noqa: E731
    return Tokens(
        x=torch.stack([i.x for i in bucket]),  # type: ignore[misc]
        position=pick(lambda i: i.position),
        group=pick(lambda i: i.group),
        size=torch.stack([i.size for i in bucket]),
        layout=first.layout,
        signals=signals,
    )


def check(stage: Compressor, result: Reduction, bucket: list[Item]) -> Reduction:
    """Refuse a malformed reduction instead of running on with it."""
    name, n = type(stage).name or type(stage).__name__, len(bucket[0].columns)
    if not isinstance(result, Reduction):
        raise TypeError(f"{name} must return a Reduction, got {type(result).__name__}")
    B, K = result.anchor.shape
    if len(bucket) != B or tuple(result.x.shape[:2]) != (B, K) or tuple(result.assignment.shape) != (B, n) or n < K:
        raise ValueError(
            f"{name} returned x {tuple(result.x.shape)}, anchor {(B, K)}, assignment {tuple(result.assignment.shape)} for {len(bucket)} items of {n} tokens"
        )
    return result
