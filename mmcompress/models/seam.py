"""The seam: where a compressor takes the rows of items out of a running model and puts fewer back.

Observe at the core (ids, masks, grids, encoder outputs), act at the call of the text model, restore its output to the
caller's length.
Stages at a decoder layer act in wrappers on the layers. All wrappers are instance methods, undone bit for bit.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmcompress.compressor import Compressor
from mmcompress.ledger import Decoder, ItemCount, Ledger, SampleCount
from mmcompress.models import family as find_family
from mmcompress.models.cache import PromptState, physical, remember, states_of
from mmcompress.models.decoder import ATTENTION, Plan, Step
from mmcompress.models.generic import Call, Family, ItemSpec
from mmcompress.models.items import Item, run_stages, runs
from mmcompress.models.rotary import Rotary, axes
from mmcompress.models.rows import pack, packed_column, restore, rows
from mmcompress.models.signals import BACKENDS, last_block, watch
from mmcompress.models.wrap import Wrapper, base_model


class Seam:
    """A compressor installed in one model. Use `compress_`, `restore_` or `with compressor(model)`."""

    anywhere: tuple[str, ...] = ("text",)  # signals that every place offers

    def __init__(self, model: Any, compressor: Compressor):
        self.model: Any = base_model(model)
        self.family: Family = find_family(model)
        self.compressor = compressor
        text_config = self.family.text.config
        self.ledger = Ledger(Decoder.of(text_config, next(self.family.text.parameters()).element_size()))
        self.items: list[Item] = []
        self.calls: list[Call] = []
        self.generating = False
        self.mask2d: Tensor | None = None
        self.prompt = 0
        self.wrappers: list[Wrapper] = []
        self.forward_wrappers: list[Wrapper] = []
        self.prefill: list[Compressor] = []
        self.plan = Plan()
        self.rotary: Rotary | None = None  # where a stage carries positions
        self.place(compressor)

    # what stands where

    def place(self, compressor: Compressor) -> None:
        """Sort the stages to their doors; raise where a door or a signal is missing."""
        depth = len(self.family.layers)
        wanted: set[str] = set()
        for stage in compressor.stages:
            name = type(stage).name or type(stage).__name__
            if stage.placement not in ("prefill", "layer"):
                raise ValueError(f"placement of {name} must be 'prefill' or 'layer' in this version, got {stage.placement!r}")
            layer = self.layer(stage.layer, depth)
            if 0 < layer < self.family.first_cut:
                raise ValueError(
                    f"layer must be at least {self.family.first_cut} in this {self.family.name} model (DeepStack adds features "
                    f"before it), got {stage.layer!r}"
                )
            if not set(stage.kinds) & set(self.family.modalities):
                takes = ", ".join(self.family.modalities)
                raise ValueError(f"{name} compresses {', '.join(stage.kinds)} items, {self.family.name} models take {takes}")
            if stage.is_identity:
                continue
            reads = [self.resolve(name, one, layer) for one in stage.reads]
            if "positions" in reads:
                self.rotary = self.rotary or Rotary.of(self.family.text.rotary_emb)
                stage.check_sections(self.rotary.sections)
            (self.plan.stages.setdefault(layer, []) if layer else self.prefill).append(stage)
            known = self.plan.reads.setdefault(layer, [])
            known.extend(r for r in reads if r not in ("", "crops", *known))
            wanted.update(known)
        self.encoder_reads = [r for r in ("cls_logits", "keys", "tower") if r in wanted]
        encoder = self.family.tower(self.family.core, self.family.modalities[0])
        for part, taps in ((encoder, {"cls_logits", "keys"}), (self.family.text, set(ATTENTION))):
            backend = getattr(part.config, "_attn_implementation", None) if part is not None else None
            if wanted & taps and backend not in BACKENDS:
                raise ValueError(
                    f"attn_implementation must be one of {', '.join(BACKENDS)} to read {sorted(wanted & taps)}, got {backend!r}"
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
        rotary = ("positions",) if hasattr(self.family.text, "rotary_emb") else ()
        offered = (*self.family.signals(), *self.anywhere, *rotary, *(ATTENTION if layer else ()))
        for one in wanted.split("|"):
            if one in offered or not one:  # "a|": without a, nothing
                return one
        place = f"layer {layer}" if layer else "prefill"
        raise ValueError(
            f"{name} reads the signal {wanted.replace('|', ' or ')!r}, which {self.family.name} models lack at {place}; "
            f"offered: {', '.join(offered)}"
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
            if self.rotary is not None:
                wrap(family.text.rotary_emb, "forward", self.on_rotary)
            if self.plan.stages:
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
        for wrapper in self.wrappers:  # all or nothing
            wrapper.check()
        while self.wrappers:
            self.wrappers[-1].undo()
            self.wrappers.pop()
        self.forward_wrappers = []

    def resume(self) -> None:
        for w in self.forward_wrappers:
            w.resume()

    def pause(self) -> None:
        """Leave decode steps to the stock graph; layer stages need their masks in every step."""
        if not self.plan.stages:
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

    def on_text(self, text: Any, forward: Callable) -> Callable:
        def run(**kw):
            if not self.calls:
                return forward(**kw)
            call, cache, x = self.calls[-1], kw.get("past_key_values"), kw["inputs_embeds"]
            items, samples = self.find_items(call, x)
            if items:
                self.items = items
                self.ledger.samples.extend(samples[b] for b in sorted(samples))
            if not items or not (self.prefill or self.plan.stages):
                return self.plain(call, kw, forward)
            B, S = x.shape[:2]
            past, seen = (0, 0) if cache is None else (int(cache.get_query_offset()), int(cache.get_seq_length()))
            position = kw.get("position_ids")
            if position is None:
                position = torch.arange(seen, seen + S, device=x.device)[None]
            position = position.expand(*position.shape[:-2], B, S)
            turn = None
            if self.rotary is not None:
                self.rotary.offer(items, position)
                turn = functools.partial(self.rotary.turn, text.rotary_emb, longest=axes(position).amax((1, 2)))
            x, keep = run_stages(self.prefill, items, x, self.plan.reads.get(0, []))
            valid = keep if call.mask is None else keep & call.mask[:, -S:].bool()
            left = call.mask is None or bool(call.mask[:, -1].all())
            index, real = pack(valid, left)
            source = packed_column(valid, real, left)
            for item in items:
                item.move(source)
            for b, count in samples.items():
                count.rows_from[0] = int(real[b].sum())
            keys = torch.cat([self.physical_mask(call, cache, B, S)[:, :-S].bool(), real], 1)
            kw = gather_extra(kw, index, valid, real)
            kw["inputs_embeds"] = rows(x, index)
            kw["position_ids"] = position.gather(-1, index.expand(*position.shape[:-1], index.shape[1]))
            kw["attention_mask"] = text_mask(text, kw, keys)
            if turn is not None and "positions" in self.plan.reads.get(0, []):
                call.turned = turn(items=items, like=x)
            states = [PromptState(0, seen + S, keys)]
            if self.plan.stages:
                extra = max(0, seen + S - self.prompt) if self.generating else 0
                step = Step(self.plan, cache, keys, past, left, items, samples, extra, turn)
                with step.tap(text.layers):
                    out = forward(**kw, mmcompress_step=step)
                out = step.leave(out, states)
            else:
                out = forward(**kw)
            if (cache := out.get("past_key_values")) is not None:
                remember(cache, states)
            return restore(out, source)

        return run

    def physical_mask(self, call: Call, cache: Any, B: int, S: int) -> Tensor:
        """The 2-D mask [B, past + S] over the rows that layer 0 holds. While generating, `on_prepare` has converted it
        already."""
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
        if self.plan.stages:
            kw["mmcompress_step"] = Step(self.plan, cache, mask)
        return forward(**kw)

    def on_rotary(self, rotary: nn.Module, forward: Callable) -> Callable:
        """In the text model's own call, turn the tokens that carry several positions."""

        def run(x, position_ids):
            turned = self.calls[-1].turned if self.calls else None
            if turned is None:
                return forward(x, position_ids)
            self.calls[-1].turned = None
            last = turned.longest[-len(position_ids) :, None, None] if position_ids.dim() == 3 else turned.longest[:1, None]
            cos, sin = forward(x, torch.cat([position_ids, last.expand(*position_ids.shape[:-1], 1)], -1))
            return turned.put((cos[:, :-1], sin[:, :-1]))

        return run

    def on_layer(self, i: int, forward: Callable) -> Callable:
        def run(hidden, *args, **kw):
            step = kw.pop("mmcompress_step", None)
            if step is not None and self.plan.at(i) is not None:
                hidden = step.enter(i, hidden, kw, self.family.text.config)
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
            raise ValueError(f"input_ids must hold one id per row of the text model {(B, S)}, got {tuple(call.ids.shape)}")
        host = call.ids.cpu()
        real = torch.full((B,), S) if call.mask is None else call.mask[:, -S:].sum(1).cpu()
        items: list[Item] = []
        samples: dict[int, SampleCount] = {}
        for kind in kinds:
            flat: dict[str, Tensor] | None = None
            for spec, at in self.places(call, kind, host):
                b = int(at[0]) // S
                if int(at[-1]) // S != b:
                    raise ValueError(
                        f"every {kind} item must lie within its sample, one of {spec.num_rows} rows leaves sample {b}"
                    )
                if flat is None:
                    flat = {r: self.family.signal(call, kind, r) for r in self.encoder_reads}
                items.append(self.item(spec, b, at % S, x, flat))
                count = samples.setdefault(b, SampleCount(int(real[b])))
                items[-1].count = ItemCount(kind, len(spec.rows), spec.num_rows - len(spec.rows), {0: len(spec.rows)})
                count.items.append(items[-1].count)
        if items and any("text" in r for r in self.plan.reads.values()):
            text = self.text_rows(call, x, host)
            for item in items:
                item.signals["text"] = text[item.sample]
        return items, samples

    def places(self, call: Call, kind: str, host: Tensor) -> list[tuple[ItemSpec, Tensor]]:
        """Every item of a kind with the flat places of its rows in ids [B, S]."""
        place = torch.eq(host, self.family.placeholder(kind)).flatten().nonzero()[:, 0]
        if not len(place):
            return []
        specs = self.family.specs(call, kind, len(place)) or runs(kind, place, host.shape[1])
        if sum(s.num_rows for s in specs) != len(place):
            raise ValueError(
                f"the {kind} features stand for {sum(s.num_rows for s in specs)} rows, input_ids hold {len(place)} placeholders"
            )
        return list(zip(specs, place.split([s.num_rows for s in specs]), strict=True))

    def item(self, spec: ItemSpec, b: int, columns: Tensor, x: Tensor, flat: dict[str, Tensor]) -> Item:
        if flat and spec.source is None:
            raise ValueError(f"{self.family.name} models cannot tell which encoder outputs belong to this {spec.kind}")
        signals = {name: value[spec.source.to(value.device)] for name, value in flat.items()}  # type: ignore[union-attr]
        n = torch.arange(len(spec.rows), device=x.device)
        separator = torch.ones(spec.num_rows, dtype=torch.bool)
        separator[spec.rows] = False
        return Item(
            sample=b,
            kind=spec.kind,
            layout=spec.layout,
            position=spec.position.to(x.device),
            group=spec.group.to(x.device),
            columns=columns[spec.rows].to(x.device),
            anchor=n,
            assignment=n,
            size=torch.ones(len(n), device=x.device),
            separators=columns[separator].to(x.device),
            signals=signals,
        )

    def text_rows(self, call: Call, x: Tensor, host: Tensor) -> list[Tensor]:
        """Embeddings of each sample's own text [T, D]."""
        text = torch.ones_like(host, dtype=torch.bool)
        for kind in self.family.modalities:
            text &= host != self.family.placeholder(kind)
        if call.mask is not None:
            text &= call.mask[:, -x.shape[1] :].bool().cpu()
        return [x[b, row.nonzero()[:, 0].to(x.device)] for b, row in enumerate(text)]

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
        """Beams of one sample get all its items: transformers repeats features item by item, which mixes up the items
        of a prompt with several."""

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
                    for name in self.family.per_item[kind]:
                        if isinstance(value := out.get(name), Tensor):
                            if len(value) != len(order):
                                raise ValueError(
                                    f"{name} must hold one entry per item for several answers to a prompt: "
                                    f"{len(order) // expand_size} items in input_ids, got {len(value) // expand_size}"
                                )
                            out[name] = value[order]
            return ids, out

        return run

    def on_generate(self, model: nn.Module, generate: Callable) -> Callable:
        def run(*args, **kw):
            config = kw.get("generation_config")
            if kw.get("prefill_chunk_size") or getattr(config, "prefill_chunk_size", None):
                raise ValueError(
                    "prefill_chunk_size must be None while a compressor is installed: later chunks would lose the pixels"
                )
            if kw.get("assistant_model") is not None:
                raise ValueError(
                    "assistant_model must be None while a compressor is installed (prompt_lookup_num_tokens works)"
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
    """A fresh mask for the reduced rows: 2-D where one came in (never None: gaps in the positions would look like
    packed sequences), else the model's own builder."""
    mask = kw.get("attention_mask")
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        return keys.long()
    from transformers.masking_utils import create_masks_for_generate

    config: Any = text.config
    cache = kw.get("past_key_values")
    return create_masks_for_generate(
        config=config, inputs_embeds=kw["inputs_embeds"], attention_mask=keys.long(), past_key_values=cache, position_ids=None
    )


def gather_extra(kw: dict, index: Tensor, valid: Tensor, real: Tensor) -> dict:
    """Every other sequence-aligned argument loses the same columns, and DeepStack's features the same visual rows."""
    done = ("inputs_embeds", "attention_mask", "position_ids", "past_key_values", "visual_pos_masks")

    def aligned(v: Any) -> bool:
        return isinstance(v, Tensor) and v.dim() > 1 and v.shape[:2] == valid.shape

    if (visual := kw.get("visual_pos_masks")) is not None:
        kept = valid[visual]
        deep = [level[kept] for level in kw.get("deepstack_visual_embeds") or ()]
        kw = {**kw, "visual_pos_masks": rows(visual, index) & real, "deepstack_visual_embeds": deep}
    return {k: rows(v, index) if k not in done and aligned(v) else v for k, v in kw.items()}
