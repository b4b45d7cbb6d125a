"""Several questions behind one reading of an item: how zoo models are trained, and how their full-token accuracy is measured.

Each question sees the item and itself, at the positions that it would have alone; so packed logits are those of the stock
forward. Sequences are padded to a few lengths, since the CPU's bfloat16 kernels are prepared once per shape.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmcompress.zoo.sense import Seen, Sense

BLOCK = 128
"""Sequences are padded to a multiple of this."""
Item = tuple[Seen, list[Any], Tensor | None]
"""An item, questions about it, and the tokens that the model may see, ascending; None hides the item."""


class Reader:
    """The text side of a zoo model, fed by a `Sense`."""

    def __init__(self, sense: Sense) -> None:
        self.sense, self.model = sense, sense.model
        self.text = sense.core.language_model
        self.before, self.between, self.after = frame(sense.processor, sense.kind)
        tokenizer = sense.processor.tokenizer
        self.ids = cache(lambda text: tokenizer(text, add_special_tokens=False).input_ids)

    def __call__(self, seen: Seen, questions: list[Any], keep: Tensor | None) -> tuple[Tensor, list[bool]]:
        """Mean loss over the questions, and per question whether greedy decoding would give exactly its answer."""
        losses, right = self.read(self.packed([(seen, questions, keep)]))
        return losses.mean(), right

    def packed(self, items: list[Item]) -> Packed:
        """Items behind one another in rows; on the CPU, without the model's weights."""
        lines = [self._line(*item) for item in items]
        at, shape = arranged([line.place.shape[-1] for line in lines])
        cells = shape[0] * shape[1]
        place = torch.zeros(*lines[0].place.shape[:-1], cells, dtype=torch.long)
        owner, group = torch.full((2, cells), -1)
        for i, (line, start) in enumerate(zip(lines, at, strict=True)):
            span = slice(start, start + line.place.shape[-1])
            place[..., span], owner[span], group[span] = line.place, i, line.block
        answers = [(start, rows, said) for line, start in zip(lines, at, strict=True) for rows, said in line.answers]
        return Packed(
            shape=shape,
            place=place,
            owner=owner,
            group=group,
            ids=torch.cat([line.ids for line in lines]),
            spoken=torch.cat([line.spoken + start for line, start in zip(lines, at, strict=True)]),
            shown=[(seen, keep) for seen, _, keep in items if keep is not None],
            visible=torch.cat([line.visible + start for line, start in zip(lines, at, strict=True)]),
            where=torch.tensor([start + row for start, rows, _ in answers for row in rows]),
            target=torch.tensor([i for _, _, said in answers for i in said]),
            question=torch.tensor([q for q, (_, _, said) in enumerate(answers) for _ in said]),
        )

    def read(self, packed: Packed) -> tuple[Tensor, list[bool]]:
        """Loss of every question, and whether it is answered right; no item sees another."""
        embed, device = self.model.get_input_embeddings(), self.sense.device
        place, owner, group = (x.to(device).unflatten(-1, packed.shape) for x in (packed.place, packed.owner, packed.group))
        x = embed.weight.new_zeros(len(packed.owner), embed.weight.shape[1])
        x = x.index_copy(0, packed.spoken.to(device), embed(packed.ids.to(device)))
        if packed.shown:
            x = x.index_copy(0, packed.visible.to(device), self.sense.embed(*packed.shown).to(x.dtype))
        same, question = owner[:, None] == owner[:, :, None], group[:, None] == group[:, :, None]
        mask = (same & ((group[:, None] == 0) | question)).tril()
        hidden = self.text(
            inputs_embeds=x.unflatten(0, packed.shape),
            attention_mask=torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, torch.finfo(x.dtype).min)[:, None],
            position_ids=place,
            use_cache=False,
        ).last_hidden_state.flatten(0, 1)
        logits = self.model.lm_head(hidden[packed.where.to(device)]).float()
        target, of = packed.target.to(device), packed.question.to(device)
        size = torch.bincount(of)
        losses = (
            logits.new_zeros(len(size)).index_add(0, of, nn.functional.cross_entropy(logits, target, reduction="none")) / size
        )
        wrong = torch.bincount(of, (logits.argmax(-1) != target).float())
        return losses, (wrong == 0).tolist()

    def _line(self, seen: Seen, questions: list[Any], keep: Tensor | None) -> _Line:
        opening = self.ids(self.before)
        n = len(opening)
        shown = seen.position[..., :0] if keep is None else seen.position[..., keep]
        first = n + shown.shape[-1]
        ids, places, block, answers = list(opening), list(range(n)), [0] * first, []
        for k, question in enumerate(questions):
            prompt = self.ids(f"{self.between}{question.prompt}{self.after}")
            said = self.ids(f"{question.answer}<|im_end|>")
            m = len(prompt) + len(said) - 1
            answers.append((range(len(block) + len(prompt) - 1, len(block) + m), said))
            ids += prompt + said[:-1]
            places += range(n + seen.length, n + seen.length + m)
            block += [k + 1] * m
        spoken = torch.tensor(places).expand(*shown.shape[:-1], -1)
        rows = torch.arange(len(block))
        return _Line(
            place=torch.cat([spoken[..., :n], shown + n, spoken[..., n:]], -1),
            block=torch.tensor(block),
            ids=torch.tensor(ids),
            spoken=torch.cat([rows[:n], rows[first:]]),
            visible=rows[n:first],
            answers=answers,
        )


def arranged(sizes: list[int]) -> tuple[list[int], tuple[int, int]]:
    """Where each item starts, cells numbered row by row, and (rows, width): each where it first fits, the width what costs
    least. A cell's linear layers cost what its attention to some 1,000 others does."""
    shortest = max(-(-max(sizes) // BLOCK), 2) * BLOCK
    found = []
    for width in range(shortest, max(shortest, 5 * BLOCK) + 1, BLOCK):
        used: list[int] = []  # the length of each row
        at = []
        for size in sizes:
            r = next((r for r, n in enumerate(used) if n + size <= width), len(used))
            used += [0] * (r == len(used))
            at.append(r * width + used[r])
            used[r] += size
        found.append((len(used) * width * (1 + width / 1024), at, (len(used), width)))
    return min(found)[1:]


class Packed(NamedTuple):
    """What a forward needs. Cells are numbered row by row of `shape` (rows, width).

    place [cells] or [3, cells]: positions. owner, group [cells]: the item (-1: padding) and its question (0: what every
    question sees). ids go to the cells `spoken`, the tokens of `shown` to `visible`. Behind the cells `where` [A] stand the ids
    `target` of answers, each part of a `question`.
    """

    shape: tuple[int, int]
    place: Tensor
    owner: Tensor
    group: Tensor
    ids: Tensor
    spoken: Tensor
    shown: list[tuple[Seen, Tensor]]
    visible: Tensor
    where: Tensor
    target: Tensor
    question: Tensor


class _Line(NamedTuple):
    """One item in cells of its own: see `Packed`; answers: rows that say each question's answer, and its ids."""

    place: Tensor
    block: Tensor
    ids: Tensor
    spoken: Tensor
    visible: Tensor
    answers: list[tuple[range, list[int]]]


def frame(processor: Any, kind: str) -> tuple[str, str, str]:
    """The chat prompt of one question about one item, cut: before the item, between item and question, after the question."""
    content = [{"type": kind}, {"type": "text", "text": "\0"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
    before, rest = text.split(getattr(processor, f"{kind}_token"))
    between, after = rest.split("\0")
    return before, between, after
