"""Several questions behind one reading of an item: how zoo models are trained, and how their full-token accuracy is measured.

Each question sees the item and itself, at the positions that it would have alone; so packed logits are those of the stock
forward. Sequences are padded to a few lengths, since the CPU's bfloat16 kernels are prepared once per shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmcompress.zoo.sense import Seen, Sense

BLOCK = 128
"""Sequences are padded to a multiple of this."""


class Reader:
    """The text side of a zoo model, fed by a `Sense`."""

    def __init__(self, sense: Sense) -> None:
        self.sense, self.model = sense, sense.model
        self.text = sense.core.language_model
        self.before, self.between, self.after = frame(sense.processor, sense.kind)

    def ids(self, text: str) -> list[int]:
        return self.sense.processor.tokenizer(text, add_special_tokens=False).input_ids

    def __call__(self, seen: Seen, questions: list[Any], keep: Tensor | None) -> tuple[Tensor, list[bool]]:
        """Mean loss over the questions, and per question whether greedy decoding would give exactly its answer.

        keep: the tokens that the model may see, ascending; None hides the item.
        """
        opening = self.ids(self.before)
        n = len(opening)
        position = torch.arange(n)
        if seen.position.dim() == 2:
            position = position.expand(3, n)
        shown = seen.position[..., :0] if keep is None else seen.position[..., keep]
        ids, places, block, where, target = list(opening), [position, shown + n], [0] * (n + shown.shape[-1]), [], []
        start = n + seen.length
        for k, question in enumerate(questions):
            asked = self.ids(f"{self.between}{question.prompt}{self.after}")
            said = self.ids(f"{question.answer}<|im_end|>")
            first = len(block) + len(asked) - 1
            ids += asked + said[:-1]
            m = len(asked) + len(said) - 1
            line = torch.arange(start, start + m)
            places.append(line if seen.position.dim() == 1 else line.expand(3, m))
            block += [k + 1] * m
            where.append(torch.arange(first, first + len(said)))
            target.append(torch.tensor(said))
        embed = self.model.get_input_embeddings()
        dtype = embed.weight.dtype
        text = embed(torch.tensor(ids))
        parts = [text[:n], text[n:]] if keep is None else [text[:n], self.sense.embed(seen, keep).to(dtype), text[n:]]
        x, place, group = torch.cat(parts), torch.cat(places, -1), torch.tensor(block)
        rest = -len(x) % BLOCK
        x = nn.functional.pad(x, (0, 0, 0, rest))
        place = nn.functional.pad(place, (0, rest))
        group = nn.functional.pad(group, (0, rest), value=-1)
        mask = ((group[None] == 0) | (group[None] == group[:, None])).tril()
        hidden = self.text(
            inputs_embeds=x[None],
            attention_mask=torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)[None, None],
            position_ids=place[None] if place.dim() == 1 else place[:, None],
            use_cache=False,
        ).last_hidden_state[0]
        logits = self.model.lm_head(hidden[torch.cat(where)]).float().split([len(t) for t in target])
        loss = torch.stack([nn.functional.cross_entropy(x, t) for x, t in zip(logits, target, strict=True)]).mean()
        return loss, [bool((x.argmax(-1) == t).all()) for x, t in zip(logits, target, strict=True)]


def frame(processor: Any, kind: str) -> tuple[str, str, str]:
    """The chat prompt of one question about one item, cut: before the item, between item and question, after the question."""
    content = [{"type": kind}, {"type": "text", "text": "\0"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
    before, rest = text.split(getattr(processor, f"{kind}_token"))
    between, after = rest.split("\0")
    return before, between, after
