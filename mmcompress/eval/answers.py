"""Answering the questions of one item with a compressor installed, and reading the item once where that changes nothing.

Keys and values of a prompt's beginning do not depend on what follows. Where no stage of the compressor reads the text, the
prompt up to the end of the item is read once, and all questions about it continue on copies of that cache as one left-padded
batch of stock `generate`. Otherwise each question is asked by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmcompress.ask import ask, check_kinds
from mmcompress.compressor import Compressor
from mmcompress.ledger import Decoder, SampleCount
from mmcompress.models import family, signals


@dataclass
class Reply:
    """The greedy reply to one question, what its prefill counts (one entry; of a long recording one per window), and the trace
    of its item."""

    text: str
    counts: list[SampleCount]
    item: Any


def reads_text(compressor: Compressor) -> bool:
    """Whether what a compressor keeps may depend on the question."""
    reads = {one for stage in compressor.stages if not stage.is_identity for read in stage.reads for one in read.split("|")}
    known = signals.known()
    return any(known[one].needs_text for one in reads if one in known)


def answer(
    model: Any,
    processor: Any,
    prompts: Sequence[dict[str, Tensor]],
    compressor: Compressor,
    max_new_tokens: int = 8,
    batch_size: int = 16,
) -> list[Reply]:
    """Greedy replies to questions about one and the same item; each prompt holds the inputs of `generate` for one question.

    Raises ValueError where the compressor does not work on this model or item.
    """
    length = shared_length(model, prompts)
    if length and len(prompts) > 1 and not reads_text(compressor):
        return _share(model, processor, prompts, length, compressor, max_new_tokens, batch_size)
    replies = []
    for inputs in prompts:
        one = ask(model, processor, inputs, compressor, max_new_tokens)
        replies.append(Reply(one.text, list(one.ledger.samples), one.items[0] if one.items else None))
    return replies


def shared_length(model: Any, prompts: Sequence[dict[str, Tensor]]) -> int:
    """How many columns all prompts share, up to the end of their item; 0 where they cannot share: cross-attention, padding,
    or prompts that differ before the item's end or stop there."""
    adapter = family(model)
    if getattr(adapter.config, "is_encoder_decoder", False):
        return 0
    first = prompts[0]["input_ids"]
    marks = torch.tensor([adapter.placeholder(kind) for kind in adapter.modalities], device=first.device)
    end = int(torch.isin(first[0], marks).nonzero()[-1]) + 1
    for inputs in prompts:
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        if ids.shape[0] != 1 or ids.shape[1] <= end or not torch.equal(ids[:, :end], first[:, :end]):
            return 0
        if (mask is not None and not bool(mask.all())) or bool(torch.isin(ids[0, end:], marks).any()):
            return 0
    return end


def _share(
    model: Any,
    processor: Any,
    prompts: Sequence[dict[str, Tensor]],
    length: int,
    compressor: Compressor,
    max_new_tokens: int,
    batch_size: int,
) -> list[Reply]:
    ids = prompts[0]["input_ids"]
    beginning = {k: v[:, :length] if v.shape[:2] == ids.shape else v for k, v in prompts[0].items()}
    check_kinds(compressor, family(model).brought(beginning))
    replies: list[Reply] = []
    with torch.inference_mode(), compressor(model) as run:
        cache = model(**beginning, use_cache=True, logits_to_keep=1).past_key_values
        if not run.ledger.samples:
            raise ValueError("the model saw no image, video or audio tokens: there is nothing to compress")
        (read,), (item, *_) = list(run.ledger.samples), run.items
        for start in range(0, len(prompts), batch_size):
            ends = [p["input_ids"][0, length:] for p in prompts[start : start + batch_size]]
            held = cache if start + batch_size >= len(prompts) else copy.deepcopy(cache)
            held.batch_repeat_interleave(len(ends))
            text = _generate(model, processor, ids[:, :length], ends, held, max_new_tokens)
            replies += [Reply(t, [longer(read, len(e), run.ledger.decoder)], item) for t, e in zip(text, ends, strict=True)]
    return replies


def longer(read: SampleCount, rows: int, decoder: Decoder) -> SampleCount:
    """The count of a prefill with so many text rows more. Its cache would hold as many more where this one grew by rows."""
    grown, L, size = read.longer(rows), decoder.layers, read.element_size
    if read.kv_bytes != decoder.kv_bytes(read.rows(L), size):
        return grown
    held, would = decoder.kv_bytes(grown.rows(L), size), decoder.kv_bytes([grown.sequence_in] * L, size)
    return replace(grown, kv_bytes=held, kv_bytes_in=would)


def _generate(
    model: Any, processor: Any, beginning: Tensor, ends: Sequence[Tensor], cache: Any, max_new_tokens: int
) -> list[str]:
    """Replies to prompts that go on differently after a cached beginning [1, P]; padded between it and their own ends."""
    widest = max(map(len, ends))
    ids = beginning.new_full((len(ends), widest), processor.tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, end in enumerate(ends):
        ids[row, widest - len(end) :] = end
        mask[row, widest - len(end) :] = 1
    start = beginning.expand(len(ends), -1)
    out = model.generate(
        input_ids=torch.cat([start, ids], 1),
        attention_mask=torch.cat([torch.ones_like(start), mask], 1),
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    new = out[:, start.shape[1] + widest :]
    return [processor.tokenizer.decode(row, skip_special_tokens=True).strip() for row in new]
