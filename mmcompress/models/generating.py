"""How `generate` meets the seam: masks in the length of the cache, several answers to a prompt, and what is refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmcompress.models import compat
from mmcompress.models.cache import is_reduced, physical, states_of
from mmcompress.models.call import NOTE, Call, Encoded, Generation, Prepared, prepare
from mmcompress.models.finding import expanded_order, places, repeated
from mmcompress.models.generic import KINDS
from mmcompress.models.wrap import Wrapped, bound


class Generating:
    """The part of the seam that stands around `generate`."""

    model: Any
    family: Any
    licence: Any
    running: Any
    standing: dict[str, Any]
    acts: bool

    def wrap_generation(self) -> None:
        self.wrap(self.model, "prepare_inputs_for_generation", "on_prepare")  # type: ignore[attr-defined]
        self.wrap(self.model, "generate", "on_generate")  # type: ignore[attr-defined]
        self.wrap(self.model, "_expand_inputs_for_generation", "on_expand")  # type: ignore[attr-defined]
        if hasattr(self.model, "generate_batch"):
            self.wrap(self.model, "generate_batch", "on_generate_batch")  # type: ignore[attr-defined]

    def on_generate_batch(self, wrapped: Wrapped, args: tuple, kwargs: dict[str, Any]) -> Any:
        raise ValueError(
            "generate_batch (continuous batching, transformers serve) must not be used while a compressor is installed: its "
            "paged "
            "cache holds text only; use generate"
        )

    def on_generate(self, wrapped: Wrapped, args: tuple, kwargs: dict[str, Any]) -> Any:
        given = bound(wrapped.module, "generate", args, kwargs)
        for config in (given.get("generation_config"), self.model.generation_config):
            if given.get("prefill_chunk_size") or getattr(config, "prefill_chunk_size", None):
                raise ValueError(
                    "prefill_chunk_size must be None while a compressor is installed: later chunks would lose the pixels"
                )
        if given.get("assistant_model") is not None:
            raise ValueError("assistant_model must be None while a compressor is installed (prompt_lookup_num_tokens works)")
        self.check_standing()  # type: ignore[attr-defined]
        with self.running.one():
            try:
                return wrapped.original(*args, **kwargs)
            finally:
                prepare(None)

    def on_expand(self, wrapped: Wrapped, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Answers to one prompt get all its items: transformers repeats features item by item, which mixes up the items
        of a prompt with several. A model with an expansion of its own knows better."""
        own = type(self.model)._expand_inputs_for_generation is not compat.stock_expansion()
        kw = bound(wrapped.module, wrapped.name, args, kwargs)
        input_ids, copies = kw.get("input_ids"), kw.get("expand_size", 1)
        given = {k: v for k, v in kw.items() if k not in ("input_ids", "expand_size", "is_encoder_decoder")}
        before = {kind: compat.feature_lists(one) for kind, one in compat.encoded_ahead(given).items()} if copies > 1 else {}
        ids, out = wrapped.original(*args, **kwargs)
        if input_ids is None:
            return ids, out
        if copies > 1 and not self.family.per_sample:
            if not own:
                out |= repeated(self.family, given, input_ids, copies)
            for kind, encoded in compat.encoded_ahead(given).items():
                note = getattr(encoded, NOTE, None) or Encoded(
                    {}, True, [len(f) for f in before[kind].get("pooler_output", ())]
                )
                call = Call(self, given, input_ids, given.get("attention_mask"), encoded={kind: note})
                owner = [int(at[0]) // input_ids.shape[1] for _, at in places(self.family, call, kind, input_ids.cpu())]
                order, after = expanded_order(owner, len(input_ids), copies), compat.encoded_ahead(out)[kind]
                compat.put_features(after, before[kind], order)
                setattr(after, NOTE, note)
                setattr(after, f"{NOTE}_order", order)
        return ids, {**out, "mmcompress": Generation(ids.shape[1])}

    def on_prepare(self, wrapped: Wrapped, args: tuple, kwargs: dict[str, Any]) -> Any:
        kw = dict(bound(wrapped.module, wrapped.name, args, kwargs))
        generation = kw.pop("mmcompress", None)
        ids, cache, mask, embeds = kw.pop("input_ids"), compat.cache_of(kw), kw.get("attention_mask"), kw.get("inputs_embeds")
        first = bool(kw.get("is_first_iteration"))
        if embeds is not None and first and self.acts and isinstance(ids, Tensor) and self.holds_placeholders(ids):
            raise ValueError(
                "inputs_embeds must be None where input_ids hold placeholders and a compressor is installed: features that the "
                "caller merged cannot be told from text; pass pixels or sound"
            )
        if is_reduced(cache):
            self.take_up(cache)  # type: ignore[attr-defined]
            new = kw.get("next_sequence_length")
            new = ids.shape[1] if new is None else new
            states = states_of(cache)
            if mask is None and not states[0].whole:
                mask = torch.ones(len(ids), int(cache.get_seq_length()) + new, dtype=torch.long, device=ids.device)
            if isinstance(mask, Tensor) and mask.ndim == 2:
                kw["attention_mask"] = mask = physical(states, mask, 0)
        prepared = wrapped.original(ids, **kw)
        rows = prepared.get("input_ids")
        rows = prepared.get("inputs_embeds") if rows is None else rows
        if rows is None or (rows.shape[1] == 1 and cache is not None and not first and not self.needs_mask(cache)):
            prepare(None)  # a decode step: the stock graph
            return prepared
        if isinstance(mask, Tensor) and mask.ndim != 2:
            mask = None
        if mask is None and is_reduced(cache):
            mask = torch.ones(len(rows), int(cache.get_query_offset()) + rows.shape[1], dtype=torch.long, device=rows.device)
        extra = 0 if generation is None else max(0, ids.shape[1] - generation.prompt)
        prepare(Prepared(self.licence, rows, mask, extra))
        return prepared

    def needs_mask(self, cache: Any) -> bool:
        """Whether a decode step on this cache goes through the seam: its layers hold different rows."""
        return len(states_of(cache)) > 1

    def holds_placeholders(self, ids: Tensor) -> bool:
        return any(bool((ids == self.family.placeholder(kind)).any()) for kind in KINDS if self.family.placeholder(kind) >= 0)
