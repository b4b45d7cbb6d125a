"""How the contract's checks run a model: in batches and alone, compressed and stock, with rows hidden or taken out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmcompress.compressor import Compressor
from mmcompress.testing.oracle import Rows, Without, decoder_layers, match

STEPS = 5
"""New tokens of every answer."""


class Refused(Exception):
    """The library said no, in a sentence."""


class NotRun(Exception):
    """A check that these inputs cannot carry."""


@dataclass
class Harness:
    """One model and its inputs: how the checks run it, with a compressor or without."""

    model: Any
    inputs: Callable[..., Mapping[str, Tensor]]
    samples: int
    text_only: Mapping[str, Tensor] | None
    items: Sequence[Sequence[int]] | None
    placeholders: Sequence[int] | None
    layer: int
    keep_ratio: float
    tolerance: float
    install: dict[str, Any]
    known: dict[Any, Any] = field(default_factory=dict)

    def differ(self, got: Tensor, wanted: Tensor, what: str, tolerance: float | None = None) -> str | None:
        """None, or by how much two logits differ, relative to the largest; bit for bit where the tolerance is 0."""
        tolerance = self.tolerance if tolerance is None else tolerance
        if got.shape != wanted.shape:
            return f"{what}: shapes {tuple(got.shape)} and {tuple(wanted.shape)}"
        never = wanted < -1e30  # what the model itself rules out
        if not torch.equal(got < -1e30, never):
            return f"{what}: other tokens are ruled out"
        got, wanted = got.double().masked_fill(never, 0), wanted.double().masked_fill(never, 0)
        error = float((got - wanted).abs().max() / (wanted.abs().max().clamp(min=1e-9) if tolerance else 1))
        return None if error <= tolerance else f"{what}: off by {error:.2g}" + (" of the largest logit" if tolerance else "")

    # running the model

    @contextlib.contextmanager
    def compressed(self, stage: Compressor | None) -> Iterator[Any]:
        """The model with the stage installed; the stock model for None."""
        if stage is None:
            yield None
            return
        from mmcompress.patch import installed

        with installed(self.model, stage, **self.install) as run:
            yield run

    def batch(self, rows: Sequence[int] | None = None, **config: Any) -> dict[str, Tensor]:
        return dict(self.inputs(list(range(self.samples)) if rows is None else list(rows), **config))

    def narrow(self) -> list[int]:
        """The samples with one item, where the items are known."""
        return [r for r, own in enumerate(self.items or ()) if len(own) == 1]

    @contextlib.contextmanager
    def narrowed(self) -> Iterator[None]:
        """`rows` are only those samples for a while."""
        self.known["rows"] = self.narrow()
        try:
            yield
        finally:
            del self.known["rows"]

    @property
    def rows(self) -> list[int]:
        """The samples that checks of several answers take."""
        return self.known.get("rows") or list(range(self.samples))

    def several(self) -> None:
        if self.samples < 2:
            raise NotRun("needs several samples: give a function of rows as inputs")

    def generate(self, inputs: Mapping[str, Tensor], steps: int = STEPS, **config: Any) -> Any:
        given = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, **config}
        return self.model.generate(**inputs, max_new_tokens=steps, min_new_tokens=steps, **given)

    def answer(self, inputs: Mapping[str, Tensor], steps: int = STEPS, **config: Any) -> tuple[Tensor, Tensor]:
        """New tokens [B, steps] and their logits [B, steps, V]."""
        out = self.generate(inputs, steps, **config)
        return out.sequences[:, -steps:], torch.stack(list(out.logits), 1)

    def forced(self, inputs: Mapping[str, Tensor], tokens: list[int]) -> Tensor:
        """Logits [steps, V] of one sample that answers with these tokens."""
        start = inputs["input_ids"].shape[1]
        allowed = lambda _, ids: [tokens[min(len(ids) - start, len(tokens) - 1)]]  # noqa: E731
        return self.answer(inputs, len(tokens), prefix_allowed_tokens_fn=allowed)[1][0]

    @property
    def layers(self) -> list[Any]:
        if "layers" not in self.known:
            prompt = self.text_only
            if prompt is None:
                ids = self.batch([0])["input_ids"]
                keep = ~torch.isin(ids[0], torch.tensor(self.ids, device=ids.device))
                prompt = {"input_ids": ids[:, keep], "attention_mask": torch.ones_like(ids[:, keep])}
            try:
                self.known["layers"] = decoder_layers(self.model, lambda: self.model(**prompt))
            except (TypeError, ValueError):
                self.known["layers"] = self.layers_by_length()
        return self.known["layers"]

    def layers_by_length(self) -> list[Any]:
        """The layers of a model that takes no prompt without items: the list that runs last."""
        stacks = [m for m in self.model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) > 1]
        names = {id(m): n for n, m in self.model.named_modules()}
        text = [m for m in stacks if any(w in names[id(m)] for w in ("language_model", "text_model"))]
        return list((text or stacks)[0])

    @property
    def ids(self) -> list[int]:
        """The placeholder ids."""
        if self.placeholders is None:
            config = self.model.config
            found = set()
            for part in (config, *(getattr(config, n, None) for n in ("vision_config", "audio_config", "thinker_config"))):
                for kind in ("image", "video", "audio"):
                    for name in (f"{kind}_token_id", f"{kind}_token_index", f"{kind}_patch_id"):
                        if isinstance(value := getattr(part, name, None), int):
                            found.add(value)
            self.placeholders = sorted(found)
        return list(self.placeholders)

    # rows that are dropped

    def sample(self, r: int) -> tuple[dict[str, Tensor], int]:
        """Sample r with padding on its left (so that a mask is always made), of a length that no other dimension has."""
        inputs = self.batch([r])
        taken = {n for v in inputs.values() for n in v.shape if v is not inputs["input_ids"]}
        taken |= {n for p in self.model.parameters() for n in p.shape}
        S = inputs["input_ids"].shape[1]
        pad = next(p for p in range(2, 200) if S + p not in taken)
        return self.longer(inputs, left=pad), pad

    def longer(self, inputs: Mapping[str, Tensor], left: int = 0, new: Tensor | None = None) -> dict[str, Tensor]:
        """Inputs [1, S] with padding before or more ids behind: marks of the columns follow with zeros."""
        shape, right = inputs["input_ids"].shape, 0 if new is None else len(new)
        out = dict(inputs)
        for name, value in inputs.items():
            beside = any(w in name for w in ("feature", "pixel", "image_", "padding", "audio_attention"))
            if value.shape[:2] == shape and not value.is_floating_point() and not beside:
                ends = [0] * (2 * (value.dim() - 2))
                out[name] = torch.nn.functional.pad(value, (*ends, left, right))
        if new is not None:
            out["input_ids"][0, shape[1] :] = new
            out["attention_mask"][0, shape[1] :] = 1
        return out

    def dropped(self, r: int, stage: Compressor) -> tuple[dict[str, Tensor], list[int], int]:
        """(sample r, the columns that the stage drops in it, the layer from which they are gone)."""
        cut = self.layer if stage.layer else 0
        if (r, cut) not in self.known:
            inputs, pad = self.sample(r)
            stock, mine = Rows(self.layers), Rows(self.layers)
            with stock.watch():
                self.model(**inputs)
            with mine.watch(), self.compressed(stage):
                self.model(**inputs)
            columns = match(mine.of[cut], stock.of[cut])
            if columns is None:
                raise AssertionError(f"the rows that enter layer {cut} are no rows of the stock model")
            gone = [c for c in range(pad, inputs["input_ids"].shape[1]) if c not in set(columns)]
            items = torch.isin(inputs["input_ids"][0], torch.tensor(self.ids, device=inputs["input_ids"].device))
            if not gone or not bool(items[gone].all()):
                raise AssertionError(f"{len(gone)} rows were dropped of sample {r}" + (", not all of items" if gone else ""))
            self.known[r, cut] = inputs, gone, cut
        return self.known[r, cut]

    def without(self, inputs: Mapping[str, Tensor], gone: list[int], cut: int) -> Without:
        return Without(self.layers, inputs["input_ids"].shape[1], gone, cut)

    def hiding_is_removing(self, r: int) -> bool:
        """Whether the stock model does the same without rows as with them hidden: not where layers mix rows by distance."""
        if "hide" not in self.known:
            inputs, _ = self.sample(r)
            ids = inputs["input_ids"][0]
            gone = torch.isin(ids, torch.tensor(self.ids, device=ids.device)).nonzero()[::3, 0].tolist()
            out = []
            for way in ("hide", "remove"):
                with getattr(self.without(inputs, gone, 0), way)():
                    out.append(self.model(**inputs).logits[0, -1])
            self.known["hide"] = self.differ(out[0], out[1], "") is None
        return self.known["hide"]

    def windowed(self, length: int) -> bool:
        """Whether a window is shorter than the prompt: it counts the rows that are left, as no mask of the stock model does."""
        config = self.model.config.get_text_config()
        kinds = getattr(config, "layer_types", None)
        window = getattr(config, "sliding_window", None)
        return bool(window and window < length and (kinds is None or "sliding_attention" in kinds))

    def rows_with_items(self) -> list[int]:
        found = []
        for r in range(self.samples):
            ids = self.batch([r])["input_ids"]
            if bool(torch.isin(ids, torch.tensor(self.ids, device=ids.device)).any()):
                found.append(r)
        return found[:2]

    def reference(self, inputs: Mapping[str, Tensor], gone: list[int], cut: int) -> Tensor:
        """Logits [S, V] of the stock model without these rows."""
        without = self.without(inputs, gone, cut)
        with without.hide() if self.hiding_is_removing(0) else without.remove():
            return self.model(**inputs).logits[0]

    def remember(self) -> None:
        """Note the traces of the model before anything was installed; a call of the stock model may leave some of its own."""
        with contextlib.suppress(Exception):  # a stock model that cannot answer says so in the checks
            self.model(**self.batch())
            self.answer(self.batch())
            self.answer(self.batch(), cache_implementation="static")
        self.known["traces"] = self.traces()

    def traces(self) -> dict[str, Any]:
        """Whatever an installed compressor could leave on a module."""
        out: dict[str, Any] = {}
        for name, module in self.model.named_modules():
            out[f"{name} class"] = type(module)
            for key, value in vars(module).items():
                out[f"{name}.{key}"] = (
                    tuple(value) if isinstance(value, dict) else id(value) if callable(value) else type(value)
                )
        return out


def first_line(error: BaseException) -> str:
    """An error's message in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
