"""The seam: where a compressor takes the rows of items out of a running model and puts fewer back.

Observe at the core (ids, masks, grids, encoder outputs), act at the call of the text model, restore its output to the
caller's length. What stands where is sorted by the doors. The seam holds configuration only: all state of a call is in
`call.py`. All wrappers are instance methods, undone bit for bit.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import Counter
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from mmcompress.compressor import Compressor
from mmcompress.ledger import Decoder, Ledger, SampleCount
from mmcompress.models import compat, signals
from mmcompress.models.cache import Licence, PromptState, is_reduced, physical, remember, states_of
from mmcompress.models.call import (
    NOTE,
    Call,
    Encoded,
    arrived,
    await_features,
    awaits_features,
    current,
    listening,
    running,
    take_prepared,
)
from mmcompress.models.doors import STEP, Frame, doors
from mmcompress.models.finding import check_found, find_items
from mmcompress.models.generating import Generating
from mmcompress.models.generic import Family, feature_lengths, feature_rows
from mmcompress.models.items import Item, Placed
from mmcompress.models.masks import Pattern, gather_extra, text_mask
from mmcompress.models.rotary import Rotary, axes
from mmcompress.models.rows import pack, packed_column, restore, rows
from mmcompress.models.signals.taps import Attention, last_block, place_of, run_tapped, tappable
from mmcompress.models.wrap import Wrapped, base_model, bound, parameters_of

WAIT = 300.0
"""Seconds that taking a compressor out waits for calls that other threads are in."""


MARK = "apply_from_config"
"""The name of an empty weight that a saved model holds: transformers reports it where nobody takes it."""


MERGED = (
    "inputs_embeds must not hold features that get_…_features made while a compressor is installed: features that the caller "
    "merged cannot be told from text; pass input_ids with pixels or sound"
)


HOLDERS: WeakKeyDictionary[Compressor, ref[Seam]] = WeakKeyDictionary()
"""compressor -> the seam that installed it last."""


def without_memory(value: Any) -> Any:
    """A tensor's shape, not its numbers."""
    return value.to("meta") if isinstance(value, Tensor) else value


def is_merged(kw: dict[str, Any]) -> bool:
    """Whether a text model is called with embeddings of more than one row."""
    x = kw.get("inputs_embeds")
    return isinstance(x, Tensor) and x.shape[1] > 1


class Running:
    """How many calls each thread is in. Copied and pickled as empty."""

    def __init__(self) -> None:
        self.calls: Counter[int] = Counter()
        self.changed = threading.Condition()

    def __reduce__(self) -> tuple:
        return Running, ()

    @contextlib.contextmanager
    def one(self):
        me = threading.get_ident()
        with self.changed:
            self.calls[me] += 1
        try:
            yield
        finally:
            with self.changed:
                self.calls[me] -= 1
                if not self.calls[me]:
                    del self.calls[me]
                    self.changed.notify_all()

    @contextlib.contextmanager
    def ended(self, seconds: float):
        """Once no other thread is in a call, and while none enters one. Raises RuntimeError inside a call of this thread, or
        after so long."""
        if threading.get_ident() in self.calls:
            raise RuntimeError("a compressor cannot be taken out of a model by a call of that model itself: let it end first")
        with self.changed:
            if not self.changed.wait_for(lambda: not self.calls, seconds):
                raise RuntimeError(
                    f"a compressor cannot be taken out while another thread is in generate or forward (waited "
                    f"{seconds:.0f} s): join that thread first, the compressor is still installed"
                )
            yield


class Seam(Generating):
    """A compressor installed in one model. Use `compress_`, `restore_` or `with compressor(model)`."""

    anywhere: tuple[str, ...] = ("text",)
    """Sources of signals that every place offers, beside the encoder's."""
    doors: tuple[str, ...] = ("prefill", "layer")

    def __init__(self, model: Any, compressor: Compressor, family: Family):
        self.outer: Any = model
        self.model: Any = base_model(model)
        self.family = family
        self.compressor = compressor
        self.ledger = Ledger(self.decoder())
        self.items: list[Item] = []
        self.wrappers: list[Wrapped] = []
        self.licence, self.running = Licence(), Running()
        self.owns = False  # whether the compressor is a part of the model by this seam
        self.config_before: tuple[bool, Any] | None = None  # whether the configuration held an entry before, and which
        self.rotary: Rotary | None = None  # where a stage carries positions
        known = doors()
        self.standing = {name: known[name](self) for name in self.doors if name in known}
        self.place(compressor)
        self.wanted = set().union(*(d.everything_wanted() for d in self.standing.values()))
        self.encoder_reads = sorted(self.wanted & set(signals.of_source("encoder")))
        self.text_reads = bool(self.wanted & set(signals.of_source("text")))
        self.acts = any(d.stages for d in self.standing.values())
        self.core_names = parameters_of(type(self.family.core), "forward")
        self.item_names = (*(n for n in self.core_names if self.family.holds_items(n)), "mm_encoder_outputs")
        """Arguments of the core that hold pixels, sound or features."""

    def decoder(self) -> Decoder:
        """What the ledger counts with."""
        return Decoder.of(self.family.stack, next(self.family.stack.parameters()).element_size())

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("items", "licence")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, items=[], licence=Licence())

    # what stands where

    def place(self, compressor: Compressor) -> None:
        """Sort the stages to their doors; raise where a door or a signal is missing."""
        compressor.check_order(len(self.family.layers))
        for stage in compressor.stages:
            name = type(stage).name or type(stage).__name__
            door = self.standing.get(stage.placement)
            if door is None:
                raise ValueError(
                    f"placement of {name} must be one of {', '.join(self.standing)} in {self.family.name} models, got "
                    f"{stage.placement!r}"
                )
            at = door.at(stage)
            if not at:
                door = next(iter(self.standing.values()))  # before the first layer is before the language model
            if not set(stage.kinds) & set(self.family.modalities):
                takes = ", ".join(self.family.modalities)
                raise ValueError(f"{name} compresses {', '.join(stage.kinds)} items, {self.family.name} models take {takes}")
            if stage.is_identity:
                continue
            placed = Placed(stage, tuple(self.resolve(name, one, door, at) for one in stage.reads))
            if any(set(names) & set(signals.of_source("rotary")) for names, _ in placed.reads):
                self.rotary = self.rotary or Rotary.of(self.family.stack.rotary_emb)
                stage.check_sections(self.rotary.sections)
            door.put(at, placed)

    def resolve(self, name: str, wanted: str, door: Any, at: int) -> tuple[tuple[str, ...], bool]:
        """The names among "a|b" that this place offers, and whether the method does without ("a|")."""
        rotary = ("rotary",) if hasattr(self.family.stack, "rotary_emb") else ()
        offered = (*self.family.signals(), *signals.of_source(*self.anywhere, *rotary, *(door.sources if at else ())))
        names = wanted.split("|")
        served = tuple(one for one in names if one in offered)
        if not served and "" not in names:
            place = f"layer {at}" if at else "prefill"
            raise ValueError(
                f"{name} reads the signal {wanted.replace('|', ' or ')!r}, which {self.family.name} models lack at {place}; "
                f"offered: {', '.join(offered)}"
            )
        return served, "" in names

    # installing

    def wrap(self, module: nn.Module, name: str, handler: str, *key: Any) -> None:
        self.wrappers.append(Wrapped(module, name, self, handler, *key))

    def tap(self, module: nn.Module) -> None:
        """Let this attention module be listened to."""
        self.wrap(module, place_of(module), "on_attention")

    def install(self) -> None:
        try:
            self.put_wrappers()
            self.own()
        except BaseException:
            self.remove()
            raise

    def put_wrappers(self) -> None:
        family, core = self.family, self.family.core
        self.refuse_replicas(core)
        self.wrap(core, "forward", "on_core")
        for kind in family.modalities:
            if hasattr(core, f"get_{kind}_features"):
                self.wrap(core, f"get_{kind}_features", "on_features", kind)
        self.wrap_encoders(core)
        self.wrap(family.text, "forward", "on_text")
        if self.rotary is not None:
            self.wrap(family.stack.rotary_emb, "forward", "on_rotary")
        for door in self.standing.values():
            door.wrap()
        self.wrap_generation()

    def wrap_encoders(self, core: nn.Module) -> None:
        """Tap the encoders of which a stage reads attention, and the projectors of which one reads inputs."""
        read = [signals.known()[name] for name in self.encoder_reads]
        towers = {id(t): t for k in self.family.modalities if (t := self.family.tower(core, k)) is not None}
        if any(one.attention for one in read):
            for tower in towers.values():
                found = tappable(last_block(tower))
                if not found:
                    raise ValueError(
                        f"the encoder must take its attention from transformers' attention functions to read "
                        f"{self.encoder_reads}, "
                        f"got {type(tower).__name__}"
                    )
                for module in found:
                    self.tap(module)
        if any(one.projector for one in read):
            projectors = {id(p): p for k in self.family.modalities if (p := self.family.projector(core, k)) is not None}
            for projector in projectors.values():
                self.wrap(projector, "forward", "on_projector")

    def refuse_replicas(self, core: nn.Module) -> None:
        for module in {id(self.model): self.model, id(core): core}.values():
            self.wrap(module, "_replicate_for_data_parallel", "on_replicate")

    def own(self) -> None:
        """Make the compressor a part of the model: its parameters, mode, device and dtype are the model's from here on."""
        holder = HOLDERS[self.compressor]() if self.compressor in HOLDERS else None
        if holder is not None and holder.owns and next(self.compressor.parameters(), None) is not None:
            raise ValueError(
                f"{type(self.compressor).__name__} must be in one model at a time, whose its parameters are: it is installed "
                f"in a {type(holder.model).__name__} already; install a copy (compressor.but())"
            )
        HOLDERS[self.compressor] = ref(self)
        self.compressor.train(self.model.training)
        parameter = next(self.family.stack.parameters(), None)
        if parameter is not None and parameter.device.type != "meta":
            self.compressor.to(parameter.device)
        self.model.add_module("mmcompress", self.compressor)
        self.owns = True

    def uninstall(self) -> None:
        for wrapper in self.wrappers:  # all or nothing
            wrapper.check()
        with self.running.ended(WAIT):
            self.remove()

    def keep_config(self) -> None:
        """Name the compressor in the model's configuration, which transformers saves, until it is taken out."""
        own = self.model.config.__dict__
        self.config_before = ("mmcompress" in own, own.get("mmcompress"))
        self.model.config.mmcompress = self.compressor.config()
        for model in {id(m): m for m in (self.model, self.outer)}.values():
            if hasattr(model, "save_pretrained"):
                self.wrap(model, "save_pretrained", "on_save")

    def on_save(self, wrapped: Wrapped, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The compressor is saved beside the model or adapter. A mark among the weights makes transformers name
        `mmcompress.apply_from_config` when the folder is loaded without it."""
        from mmcompress.io import save_beside

        given = bound(wrapped.module, "save_pretrained", args, kwargs)
        if given.get("state_dict") is not None:
            given = {**given, "state_dict": {**given["state_dict"], f"mmcompress.{MARK}": torch.zeros(1)}}
        self.compressor.register_buffer(MARK, torch.zeros(1))
        try:
            out = wrapped.original(**given)
        finally:
            del self.compressor._buffers[MARK]
        if given.get("is_main_process", True):
            save_beside(self.compressor, given["save_directory"])
        return out

    def remove(self) -> None:
        if self.config_before is not None:
            was_there, value = self.config_before
            if was_there:
                self.model.config.mmcompress = value
            else:
                self.model.config.__dict__.pop("mmcompress", None)
            self.config_before = None
        while self.wrappers:
            self.wrappers[-1].undo()
            self.wrappers.pop()
        if self.owns and self.model._modules.get("mmcompress") is self.compressor:
            del self.model._modules["mmcompress"]
        self.owns = False
        self.licence.valid = False

    # the wrappers

    def on_replicate(self, wrapped: Wrapped, args: tuple, kwargs: dict[str, Any]) -> Any:
        raise ValueError(
            "model must not be in nn.DataParallel while a compressor is installed, its replicas share one state: use "
            "DistributedDataParallel (torchrun, accelerate launch), or set CUDA_VISIBLE_DEVICES to one device"
        )

    def on_core(self, wrapped: Wrapped, args: tuple, kwargs: dict[str, Any]) -> Any:
        kw = {**dict(zip(self.core_names, args, strict=False)), **kwargs}
        return wrapped.original(**kw) if self.is_decode(kw) else self.observe(wrapped, kw)

    def is_decode(self, kw: dict[str, Any]) -> bool:
        """Whether this is one new row on a cache that needs nothing from the seam: the stock graph runs, compiled or not."""
        ids = kw.get("input_ids")
        cache = compat.cache_of(kw)
        if ids is None or cache is None or ids.shape[1] != 1 or kw.get("mmcompress") is not None:
            return False
        for name in self.item_names:
            if kw.get(name) is not None:
                return False
        states = getattr(cache, "reduced", None)
        if states is None or len(states) == 0:
            return True
        if len(states) > 1 or not cache.licence.valid:
            return False
        mask = kw.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return mask.shape[1] == int(cache.get_query_offset()) + 1
        return mask is not None or states[0].whole

    @torch.compiler.disable
    def observe(self, wrapped: Wrapped, kw: dict[str, Any]) -> Any:
        """Call the core, knowing what goes in. Under torch.compile it runs as it stands, with all that it calls."""
        kw.pop("mmcompress", None)  # of a `generate` whose preparation is another library's
        ids, cache = kw.get("input_ids"), compat.cache_of(kw)
        prepared = take_prepared(self.licence, ids if ids is not None else kw.get("inputs_embeds"))
        if ids is not None:
            arrived()
        elif self.acts and awaits_features(self.licence):
            raise ValueError(MERGED)
        mask = kw.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            if prepared is None:
                raise ValueError(
                    "attention_mask must be 2-D [batch, columns] while a compressor is installed, got a prepared mask"
                )
            mask = prepared.mask
        elif prepared is None:
            like = ids if ids is not None else kw.get("inputs_embeds")
            kw["attention_mask"] = mask = self.whole_mask(mask, cache, like)
            if is_reduced(cache):
                mask = self.physical_mask(mask, cache, like)
                if self.family.axes == 1:  # m-RoPE's positions follow the mask of all columns
                    kw["attention_mask"] = mask
        if is_reduced(cache):
            self.take_up(cache)
        call = Call(self, kw, ids, mask, prepared is not None, prepared.extra if prepared is not None else 0)
        for kind, out in compat.encoded_ahead(kw).items():
            note: Encoded | None = getattr(out, NOTE, None)
            if note is None and not self.acts:
                continue  # of structure unknown, and nothing is changed
            if note is None or note.by is not self.licence:
                raise ValueError(
                    f"mm_encoder_outputs must hold what this model's own get_{kind}_features gave while the compressor was "
                    f"installed, got a {type(out).__name__} made elsewhere: pass the pixels instead"
                )
            call.encoded[kind] = note
            if (order := getattr(out, f"{NOTE}_order", None)) is not None:
                call.order[kind] = order
        with self.running.one(), running(call), contextlib.ExitStack() as heard:
            for kind in self.family.modalities:
                if not hasattr(wrapped.module, f"get_{kind}_features"):  # the core calls that encoder itself
                    heard.enter_context(self.hearing(call, kind))
            out = wrapped.original(**kw)
        if not call.answered and self.acts and (call.encoded or self.family.kinds(call)):
            raise RuntimeError(
                f"{type(self.model).__name__} under {compat.installed()} took items, but its text model "
                f"{type(self.family.text).__name__} did not run in this call: nothing was compressed (looked for a call of "
                f"{type(self.family.text).__name__}.forward)"
            )
        return out

    def take_up(self, cache: Any) -> None:
        """Let a reduced cache be read while this compressor is installed. Raises ValueError where layers of it hold fewer rows
        before which nothing stands now."""
        deeper = sorted(s.cut for s in states_of(cache) if s.cut and s.length)
        here = {at for door in self.standing.values() for at in door.stages}
        if set(deeper) - here:
            raise ValueError(
                f"past_key_values must be used with a compressor at layer {deeper[0]}, before which this cache was reduced, "
                "got "
                f"{self.compressor!r}"
            )
        cache.licence = self.licence

    @staticmethod
    def whole_mask(mask: Tensor | None, cache: Any, like: Tensor | None) -> Tensor | None:
        """A 2-D mask with one column for each token of cache and call; stock models read the first ones of a longer mask."""
        if mask is None or like is None:
            return mask
        past, seen = (0, 0) if cache is None else (int(cache.get_query_offset()), int(cache.get_seq_length()))
        B, S = like.shape[:2]
        if len(mask) != B or (mask.shape[1] < seen + S and mask.shape[1] != past + S):
            raise ValueError(
                f"attention_mask must have one column for each of the {seen + S} tokens that the cache and this call hold, "
                f"[{B}, {seen + S}], got {list(mask.shape)}"
            )
        return mask[:, : seen + S]

    def physical_mask(self, mask: Tensor | None, cache: Any, like: Tensor) -> Tensor:
        """The 2-D mask [B, past + S] over the rows that layer 0 holds, from one over all columns, over these rows, or None."""
        B, S = like.shape[:2]
        past, seen = int(cache.get_query_offset()), int(cache.get_seq_length())
        if mask is None:
            mask = torch.ones(B, seen + S, dtype=torch.long, device=like.device)
        elif mask.shape[1] == past + S and past != seen:
            return mask
        return physical(states_of(cache), mask, 0)

    def on_attention(self, wrapped: Wrapped, args: tuple, kwargs: dict[str, Any]) -> Any:
        return run_tapped(wrapped, args, kwargs)

    def on_features(self, wrapped: Wrapped, kind: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        call = current(self)
        if torch.compiler.is_compiling() or (call is not None and call.kind is not None):  # from another get_*_features
            return wrapped.original(*args, **kwargs)
        given = bound(wrapped.module, wrapped.name, args, kwargs)
        seen = Encoded(given, ahead=call is None, by=self.licence)
        if call is None:  # `generate` encodes before it prepares the first forward, or a user asks
            call = Call(self, given, None, None)
        call.encoded[kind], call.kind = seen, kind
        try:
            with running(call), self.hearing(call, kind):
                out = wrapped.original(*args, **kwargs)
        finally:
            call.kind = None
        seen.lengths = feature_lengths(out)  # as they are now: several answers to a prompt repeat the output in place
        if not seen.tower and self.family.projector(self.family.core, kind) is None:
            seen.tower = feature_rows(out)
        if seen.ahead:
            self.check_standing()
            await_features(self.licence)
            seen.arguments = {k: without_memory(v) if self.family.holds_items(k) else v for k, v in given.items()}
            with contextlib.suppress(AttributeError):  # a tuple or tensor of an older form: lengths are read from it again
                setattr(out, NOTE, seen)
        return out

    def hearing(self, call: Call, kind: str) -> contextlib.AbstractContextManager:
        """Note the attention of the encoder that runs."""
        if not any(signals.known()[name].attention for name in self.encoder_reads):
            return contextlib.nullcontext()
        tower = self.family.tower(self.family.core, kind)
        inside = {id(m) for m in last_block(tower).modules()} if tower is not None else set()

        def hear(module: nn.Module, seen: Attention) -> None:
            if id(module) in inside and current(self) is call:
                call.of(kind).attention.append(Attention(seen.q.detach(), seen.k.detach(), scaling=seen.scaling))

        return listening(hear)

    def check_standing(self) -> None:
        """Raise RuntimeError where another library took the core's wrapper off, or another module stands in its place."""
        core = self.family.core
        wrapper = next(w for w in self.wrappers if w.module is core and w.name == "forward")
        if not wrapper.stands() or all(module is not core for module in self.model.modules()):
            raise RuntimeError(
                f"the forward of {type(core).__name__} must be the one that compress_ put there, but it was taken off or "
                "the module "
                "replaced since: nothing would be compressed; call restore_ and compress_ again"
            )

    def refuse_copy(self, core: nn.Module) -> None:
        """A copy of the core was called: raise where it took the core's place in the model."""
        if self.licence.valid and any(module is core for module in self.model.modules()):
            self.check_standing()

    def on_projector(self, wrapped: Wrapped, args: tuple, kwargs: dict[str, Any]) -> Any:
        call = current(self)
        if call is not None:
            kinds = [call.kind] if call.kind else self.family.kinds(call)
            if kinds:
                call.of(kinds[0]).tower.append((args[0] if args else next(iter(kwargs.values()))).detach())
        return wrapped.original(*args, **kwargs)

    def on_text(self, wrapped: Wrapped, args: tuple, kwargs: dict[str, Any]) -> Any:
        call = current(self)
        alone = call is None and self.acts and awaits_features(self.licence)
        if alone and is_merged(bound(wrapped.module, "forward", args, kwargs)):
            raise ValueError(MERGED)
        if call is None or call.answered:
            return wrapped.original(*args, **kwargs)
        call.answered = True
        kw = dict(bound(wrapped.module, "forward", args, kwargs))
        cache, x = compat.cache_of(kw), kw.get("inputs_embeds")
        if x is None:
            if self.acts and self.family.kinds(call):
                raise RuntimeError(
                    f"{type(self.model).__name__} under {compat.installed()} did not hand inputs_embeds to its text model: "
                    "nothing "
                    "could be compressed"
                )
            return wrapped.original(**kw)
        items, samples = find_items(self.family, call, x, self.encoder_reads, self.text_reads)
        if self.acts and (cache is None or x.shape[1] > 1):
            check_found(self.family, call, items, self.model)
        if items and self.acts:
            frame = self.frame(call, kw, x, items, samples, cache)
            out = self.reduced(wrapped, frame)
        else:
            out = self.plain(wrapped, call, kw, cache, x)
        if items:
            self.items = items
            kept = compat.cache_of(out) if hasattr(out, "get") else None
            self.ledger.add((samples[b] for b in sorted(samples)), x.element_size(), cache=() if kept is None else kept)
        return out

    def frame(
        self, call: Call, kw: dict[str, Any], x: Tensor, items: list[Item], samples: dict[int, SampleCount], cache: Any
    ) -> Frame:
        B, S = x.shape[:2]
        past, seen = (0, 0) if cache is None else (int(cache.get_query_offset()), int(cache.get_seq_length()))
        position = kw.get("position_ids")
        if position is None:
            position = torch.arange(seen, seen + S, device=x.device)[None]
        position = position.expand(*position.shape[:-2], B, S)
        turn = None
        if self.rotary is not None:
            self.rotary.offer(items, position)
            turn = functools.partial(self.rotary.turn, self.family.stack.rotary_emb, longest=axes(position).amax((1, 2)))
        pattern = Pattern.of(kw, self.family.stack.config, past)
        if pattern.samples is not None and (odd := self.prompt_reads()):
            raise ValueError(
                f"position_ids must not restart (packed samples) while a stage reads {', '.join(odd)}, which belong to one "
                "prompt: "
                "pad the samples instead"
            )
        left = call.mask is None or bool(call.mask[:, -1].all())
        held = x.new_ones(B, past, dtype=torch.bool) if call.mask is None else (call.mask[:, :-S] != 0).to(x.device)
        if held.shape[1] != past:
            held = torch.nn.functional.pad(held, (past - held.shape[1], 0), value=True)  # a prefix that the mask leaves out
        keep = torch.ones(B, S, dtype=torch.bool, device=x.device)
        return Frame(call, kw, x, items, samples, cache, past, seen, position, pattern, left, keep, held, turn)

    @staticmethod
    def tokens_before(frame: Frame) -> Tensor:
        """Real tokens of each sample that the cache stands for [B]."""
        first = next((s for s in states_of(frame.cache) if s.cut == 0 and s.tokens is not None), None)
        if first is None:
            return frame.held.sum(1)
        return first.tokens.to(frame.held.device) + frame.held[:, first.mask.shape[1] :].sum(1)

    def prompt_reads(self) -> list[str]:
        """Signals read by some stage that are about the prompt's text."""
        return sorted(n for n in self.wanted if signals.known()[n].needs_text)

    def reduced(self, wrapped: Wrapped, frame: Frame) -> Any:
        """The text model's call with fewer rows, its output with as many as before."""
        call, kw, S = frame.call, frame.kw, frame.x.shape[1]
        before = self.tokens_before(frame)
        for b, count in frame.samples.items():
            if frame.past:
                count.past[0], count.past_in = int(frame.held[b].sum()), int(before[b])
        tail = S - 1 - max(int(torch.cat([i.columns, i.separators]).max()) for i in frame.items if len(i.columns))
        for door in self.standing.values():
            door.before(frame)
        valid = frame.keep if call.mask is None else frame.keep & (call.mask[:, -S:] != 0).to(frame.keep.device)
        frame.index, frame.real = pack(valid, frame.left)
        frame.source = packed_column(valid, frame.real, frame.left)
        for item in frame.items:
            item.move(frame.source)
        for b, count in frame.samples.items():
            count.rows_from[0] = int(frame.real[b].sum())
        frame.keys = torch.cat([frame.held, frame.real], 1)
        given = ("inputs_embeds", "attention_mask", "position_ids", *compat.CACHE_NAMES)
        frame.kw = kw = gather_extra(kw, frame.index, valid, frame.real, given)
        if "logits_to_keep" in kw:  # some text models cut their own rows by it; the caller still does
            kw["logits_to_keep"] = 0
        kw["inputs_embeds"] = rows(frame.x, frame.index)
        index = frame.index.to(frame.position.device)
        kw["position_ids"] = frame.position.gather(-1, index.expand(*frame.position.shape[:-1], index.shape[1]))
        pattern = frame.pattern.among(frame.index) if frame.pattern else frame.pattern
        kw["attention_mask"] = text_mask(self.family.stack.config, kw, frame.keys, pattern, frame.past)
        rows_in = call.mask[:, -S:] != 0 if call.mask is not None else torch.ones_like(frame.keep)
        tokens = before + rows_in.sum(1).to(before.device)
        frame.states = [PromptState(0, frame.seen + S, frame.keys, tail=tail if frame.left else 0, tokens=tokens)]
        for door in self.standing.values():
            door.enter(frame)
        with frame.contexts:
            out = wrapped.original(**frame.kw)
        for door in reversed(self.standing.values()):
            out = door.leave(frame, out)
        if call.turned is not None:
            raise RuntimeError(
                f"the text model of {type(self.model).__name__} under {compat.installed()} did not call its rotary_emb: "
                "carried "
                "positions were not applied"
            )
        for item in frame.items:
            item.forget()
        if (kept := compat.cache_of(out)) is not None:
            remember(kept, frame.states, self.licence)
        return restore(out, frame.source)

    def plain(self, wrapped: Wrapped, call: Call, kw: dict[str, Any], cache: Any, x: Tensor) -> Any:
        """Text only, a decode step, or nothing to drop: the stock call, with the mask that fits what the cache holds."""
        if not is_reduced(cache):
            return wrapped.original(**kw)
        mask = call.mask
        if mask is None:
            mask = self.physical_mask(None, cache, x)
        given = kw.get("attention_mask")
        if given is None or (isinstance(given, Tensor) and given.ndim == 2):
            kw["attention_mask"] = mask
        elif not call.generating:  # made by the core from a mask over all columns
            past = int(cache.get_query_offset())
            kw["attention_mask"] = text_mask(
                self.family.stack.config, kw, mask != 0, Pattern.of(kw, self.family.stack.config, past), past
            )
        for door in self.standing.values():
            door.later(kw, cache, mask)
        return wrapped.original(**kw)

    def on_rotary(self, wrapped: Wrapped, args: tuple, kwargs: dict[str, Any]) -> Any:
        """In the text model's own call, turn the tokens that carry several positions."""
        call = current(self)
        turned = call.turned if call is not None else None
        if turned is None:
            return wrapped.original(*args, **kwargs)
        call.turned = None  # type: ignore[union-attr]
        kw = dict(bound(wrapped.module, "forward", args, kwargs))
        x, position_ids = kw.pop("x"), kw.pop("position_ids")
        last = turned.longest[-len(position_ids) :, None, None] if position_ids.dim() == 3 else turned.longest[:1, None]
        cos, sin = wrapped.original(x, torch.cat([position_ids, last.expand(*position_ids.shape[:-1], 1)], -1), **kw)
        return turned.put((cos[..., :-1, :], sin[..., :-1, :]))

    def on_layer(self, wrapped: Wrapped, i: int, args: tuple, kwargs: dict[str, Any]) -> Any:
        step = kwargs.pop(STEP, None)
        if step is None:
            return wrapped.original(*args, **kwargs)
        return step.run(wrapped, i, args, kwargs)
