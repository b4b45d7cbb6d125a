"""Several questions behind one reading of an item: how zoo models are trained, and how their full-token accuracy is measured.

Each question sees the item and itself, at the positions that it would have alone; so packed logits are those of the stock
forward. Sequences are padded to a few lengths, since the CPU's bfloat16 kernels are prepared once per shape.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
        losses, right = self.read([(seen, questions, keep)])
        return losses.mean(), right

    def read(self, items: list[tuple[Seen, list[Any], Tensor | None]]) -> tuple[Tensor, list[bool]]:
        """Several items at once, none of which sees another: loss of every question, and whether it is answered right.

        Items stand behind one another in rows that are as long as the longest needs.
        """
        lines = [self._line(*item) for item in items]
        sizes = [len(line.block) for line in lines]
        width = max(max(sizes), 2 * BLOCK)
        width += -width % BLOCK
        row, column = [], []  # where each item starts
        used: list[int] = []  # the length of each row
        for size in sizes:
            fits = [r for r, n in enumerate(used) if n + size <= width]
            if not fits:
                used.append(0)
            r = fits[0] if fits else len(used) - 1
            row.append(r)
            column.append(used[r])
            used[r] += size
        embed = self.model.get_input_embeddings()
        x = embed.weight.new_zeros(len(used), width, embed.weight.shape[1])
        place = torch.zeros(len(used), width, *lines[0].place.shape[:-1], dtype=torch.long)
        owner, group = torch.full((2, len(used), width), -1)
        where, target = [], []
        for i, (line, r, c, size) in enumerate(zip(lines, row, column, sizes, strict=True)):
            x[r, c : c + size] = line.embeds
            place[r, c : c + size] = line.place.movedim(-1, 0)
            owner[r, c : c + size] = i
            group[r, c : c + size] = line.block
            where += [w + r * width + c for w in line.where]
            target += line.target
        same, question = owner[:, None] == owner[:, :, None], group[:, None] == group[:, :, None]
        mask = (same & ((group[:, None] == 0) | question)).tril()
        hidden = self.text(
            inputs_embeds=x,
            attention_mask=torch.zeros(mask.shape, dtype=x.dtype).masked_fill(~mask, torch.finfo(x.dtype).min)[:, None],
            position_ids=place if place.dim() == 2 else place.movedim(-1, 0),
            use_cache=False,
        ).last_hidden_state.flatten(0, 1)
        logits = self.model.lm_head(hidden[torch.cat(where)]).float().split([len(t) for t in target])
        losses = torch.stack([nn.functional.cross_entropy(x, t) for x, t in zip(logits, target, strict=True)])
        return losses, [bool((x.argmax(-1) == t).all()) for x, t in zip(logits, target, strict=True)]

    def _line(self, seen: Seen, questions: list[Any], keep: Tensor | None) -> _Line:
        opening = self.ids(self.before)
        n = len(opening)
        shown = seen.position[..., :0] if keep is None else seen.position[..., keep]
        ids, places, block = (
            list(opening),
            [torch.arange(n).expand(*shown.shape[:-1], n), shown + n],
            [0] * (n + shown.shape[-1]),
        )
        where, target = [], []
        start = n + seen.length
        for k, question in enumerate(questions):
            prompt = self.ids(f"{self.between}{question.prompt}{self.after}")
            said = self.ids(f"{question.answer}<|im_end|>")
            first = len(block) + len(prompt) - 1
            ids += prompt + said[:-1]
            m = len(prompt) + len(said) - 1
            places.append(torch.arange(start, start + m).expand(*shown.shape[:-1], m))
            block += [k + 1] * m
            where.append(torch.arange(first, first + len(said)))
            target.append(torch.tensor(said))
        text = self.model.get_input_embeddings()(torch.tensor(ids))
        embeds = text if keep is None else torch.cat([text[:n], self.sense.embed(seen, keep).to(text.dtype), text[n:]])
        return _Line(embeds, torch.cat(places, -1), torch.tensor(block), where, target)


class _Line(NamedTuple):
    """An item and its questions: embeds [m, D], place [m] or [3, m], block [m] (0: what every question sees, else its number),
    and for each question the rows that say its answer and the answer's ids."""

    embeds: Tensor
    place: Tensor
    block: Tensor
    where: list[Tensor]
    target: list[Tensor]


def frame(processor: Any, kind: str) -> tuple[str, str, str]:
    """The chat prompt of one question about one item, cut: before the item, between item and question, after the question."""
    content = [{"type": kind}, {"type": "text", "text": "\0"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
    before, rest = text.split(getattr(processor, f"{kind}_token"))
    between, after = rest.split("\0")
    return before, between, after
