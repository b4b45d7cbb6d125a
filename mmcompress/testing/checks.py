"""The checks of the contract, one method each: None, or what is wrong. Without a stage they ask the stock model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mmcompress.compressor import Compressor
from mmcompress.testing.harness import STEPS, Harness, NotRun, Refused, first_line
from mmcompress.testing.oracle import Direction, Fails, Rows


class Checks(Harness):
    """`check_…(stage)` for every name in CHECKS."""

    def check_install(self, stage: Compressor | None) -> str | None:
        try:
            with self.compressed(stage):
                pass
        except (ValueError, TypeError) as error:
            raise Refused(first_line(error)) from error
        return None

    def check_identity(self, stage: Compressor | None) -> str | None:
        return self.unchanged(self.batch(), stage and Direction(keep_ratio=1))

    def check_text_only(self, stage: Compressor | None) -> str | None:
        if self.text_only is None:
            raise NotRun("needs text_only")
        return self.unchanged(self.text_only, stage)

    def unchanged(self, inputs: Mapping[str, Tensor], stage: Compressor | None) -> str | None:
        """Bit for bit the stock model."""
        logits, (tokens, steps) = self.model(**inputs).logits, self.answer(inputs)
        with self.compressed(stage):
            got, (new_tokens, new_steps) = self.model(**inputs).logits, self.answer(inputs)
        if not torch.equal(new_tokens, tokens):
            return "other tokens"
        return self.differ(got, logits, "logits", 0) or self.differ(new_steps, steps, "generated", 0)

    def check_machinery(self, stage: Compressor | None) -> str | None:
        inputs = self.batch()
        logits = self.model(**inputs).logits
        with self.compressed(stage and Direction(keep_ratio=0.9999)):
            got = self.model(**inputs).logits
        real = inputs["attention_mask"].bool()
        return self.differ(got[real], logits[real], "logits")

    def check_batch(self, stage: Compressor | None) -> str | None:
        self.several()
        sides: list[dict[str, Any]] = [{}]
        if "padding_side" in inspect.signature(self.inputs).parameters:
            sides.append({"padding_side": "right"})
        with self.compressed(stage):
            alone = [self.model(**self.batch([r])).logits[0] for r in range(self.samples)]
            for side in sides:
                inputs = self.batch(**side)
                logits = self.model(**inputs).logits
                for r, wanted in enumerate(alone):
                    real = inputs["attention_mask"][r].bool()
                    if wrong := self.differ(logits[r][real], wanted, f"logits of row {r}{' padded right' if side else ''}"):
                        return wrong
            tokens, steps = self.answer(self.batch())
            for r, wanted in enumerate(alone):
                new, own = self.answer(self.batch([r]))
                if not torch.equal(tokens[r], new[0]):
                    return f"row {r} generates other tokens"
                if wrong := self.differ(steps[r], own[0], f"generated row {r}") or self.differ(
                    own[0, 0], wanted[-1], f"first step of row {r} and its forward"
                ):
                    return wrong
        return None

    # prune = mask

    def check_mask(self, stage: Compressor | None) -> str | None:
        if stage is None:
            return self.no_mask()
        for r in self.rows_with_items():
            inputs, gone, cut = self.dropped(r, stage)
            with self.compressed(stage):
                got = self.model(**inputs).logits[0]
            real = inputs["attention_mask"][0].bool()
            real[gone] = False
            if wrong := self.differ(got[real], self.reference(inputs, gone, cut)[real], f"logits of sample {r}"):
                return wrong
        return None

    def no_mask(self) -> str | None:
        if self.windowed(self.batch([0])["input_ids"].shape[1]):
            return "a window shorter than the prompt: no mask equals it"
        return None

    def check_generate(self, stage: Compressor | None) -> str | None:
        return self.as_reference(stage, lambda inputs: self.answer(inputs))

    def check_turns(self, stage: Compressor | None) -> str | None:
        return self.as_reference(stage, self.second_turn)

    def as_reference(self, stage: Compressor | None, ask: Callable) -> str | None:
        """Tokens and logits = the stock model's with the columns hidden; where rows are removed, one run over all tokens."""
        for r in self.rows_with_items():
            if stage is None:
                inputs, _ = self.sample(r)
                tokens, steps = ask(inputs)
                gone, cut = list[int](), 0
            else:
                inputs, gone, cut = self.dropped(r, stage)
                with self.compressed(stage):
                    tokens, steps = ask(inputs)
            if stage is not None and self.hiding_is_removing(0):
                with self.without(inputs, gone, cut).hide():
                    new, wanted = ask(inputs)
                if not torch.equal(new, tokens):
                    return f"sample {r} gives other tokens"
                wanted = wanted[0]
            else:
                S, n = inputs["input_ids"].shape[1], steps.shape[1]
                whole = self.longer(inputs, new=tokens[0, :-1])
                with self.without(inputs, gone, cut).remove():
                    wanted = self.model(**whole).logits[0, S - 1 :][-n:]
            if wrong := self.differ(steps[0], wanted, f"sample {r}"):
                return wrong if stage is not None else self.no_mask() or wrong
        return self.no_mask() if stage is None else None

    def second_turn(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """An answer, three more words, and the logits of the second answer on the cache of the first."""
        first = self.generate(inputs)
        ids = inputs["input_ids"]
        more = torch.cat([first.sequences, ids[:, -3:]], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(more[:, ids.shape[1] :])], 1)
        name = "past_key_values" if getattr(first, "past_key_values", None) is not None else "cache"
        second = self.generate({"input_ids": more, "attention_mask": mask, name: getattr(first, name)})
        return second.sequences[:, ids.shape[1] :], torch.stack(list(second.logits), 1)

    def check_uncached(self, stage: Compressor | None) -> str | None:
        return self.same_answers(stage, use_cache=False)

    def check_static(self, stage: Compressor | None) -> str | None:
        return self.same_answers(stage, cache_implementation="static")

    def same_answers(self, stage: Compressor | None, **config: Any) -> str | None:
        inputs = self.batch()
        with self.compressed(stage):
            tokens, steps = self.answer(inputs)
            new, again = self.answer(inputs, **config)
        if not torch.equal(new, tokens):
            return "other tokens"
        return self.differ(again, steps, "logits")

    # several answers

    def check_beams(self, stage: Compressor | None) -> str | None:
        self.several()
        rows = self.rows
        config = {"num_beams": 2, "output_scores": True, "output_logits": False}
        with self.compressed(stage):
            batch = self.generate(self.batch(rows), **config)
            for i, r in enumerate(rows):
                own = self.batch([r])
                single = self.generate(own, **config)
                new = batch.sequences[i, -STEPS:]
                if not torch.equal(single.sequences[0, -STEPS:], new):
                    return f"row {r}: other tokens than alone"
                score = self.forced(own, new.tolist()).log_softmax(-1).gather(1, new[:, None]).mean()
                if abs(float(score - batch.sequences_scores[i])) > 10 * self.tolerance:
                    return f"row {r}: score {float(batch.sequences_scores[i]):.4f}, its tokens have {float(score):.4f}"
        return None

    def check_answers(self, stage: Compressor | None) -> str | None:
        self.several()
        rows = self.rows
        with self.compressed(stage), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            tokens, steps = self.answer(self.batch(rows), num_return_sequences=2, do_sample=True)
            for i, new in enumerate(tokens):
                wanted = self.forced(self.batch([rows[i // 2]]), new.tolist())
                if wrong := self.differ(steps[i], wanted, f"answer {i % 2} of row {i // 2}"):
                    return wrong
        return None

    # restoring

    def check_restore(self, stage: Compressor | None) -> str | None:
        inputs = self.batch()
        logits, tokens = self.model(**inputs).logits, self.answer(inputs)[0]
        before, config = (stage and self.known.get("traces")) or self.traces(), str(self.model.config)
        for fails in (False, True):
            try:
                with self.compressed((stage and Fails(keep_ratio=self.keep_ratio)) if fails else stage):
                    self.model(**inputs)
                    self.answer(inputs)
            except ZeroDivisionError:
                pass
            after = self.traces()
            if left := sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k)):
                return f"left behind{' after an exception' if fails else ''}: {', '.join(left[:3])}"
        if str(self.model.config) != config:
            return "the configuration has changed"
        if not torch.equal(self.answer(inputs)[0], tokens):
            return "other tokens afterwards"
        return self.differ(self.model(**inputs).logits, logits, "logits afterwards", 0)

    # counting

    def check_ledger(self, stage: Compressor | None) -> str | None:
        if stage is None:
            return None
        wanted = torch.tensor(self.ids)
        for r in self.rows_with_items():
            inputs, _, _ = self.dropped(r, stage)
            rows = Rows(self.layers)
            with rows.watch(), self.compressed(stage) as run:
                self.model(**inputs)
            count = int(torch.isin(inputs["input_ids"].cpu(), wanted).sum())
            told = run.ledger.tokens_in + run.ledger.separators
            if told != count:
                return f"sample {r}: {told} tokens and separators, {count} placeholders"
            (sample,) = run.ledger.samples
            got = [len(rows.of[i]) for i in range(len(self.layers))]
            if sample.rows(len(self.layers)) != got:
                return f"sample {r}: rows of the layers {sample.rows(len(self.layers))}, they got {got}"
        inputs = self.batch()
        with self.compressed(stage) as run:
            self.answer(inputs)
        told, count = run.ledger.tokens_in + run.ledger.separators, int(torch.isin(inputs["input_ids"].cpu(), wanted).sum())
        return None if told == count else f"generate: {told} tokens and separators, {count} placeholders"

    def check_items(self, stage: Compressor | None) -> str | None:
        if self.items is None:
            raise NotRun("needs items")
        if stage is None:
            return None
        with self.compressed(stage) as run:
            self.model(**self.batch())
        wanted = [list(own) for own in self.items if own]
        got = [[i.tokens_in + i.separators for i in s.items] for s in run.ledger.samples if s.items]
        if got != wanted:
            return f"items of {got} rows, they have {wanted}"
        places = [item.sample for item in run.items]
        right = [r for r, own in enumerate(self.items) for _ in own]
        return None if sorted(places) == right else f"items of samples {places}, they are of {right}"
