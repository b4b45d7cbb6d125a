"""The command `mmcompress check MODEL`: the contract of `mmcompress.testing.check_family` on one model, as a table.

MODEL is a family's name (a tiny random model of it), `zoo:NAME`, a folder or a hub id. A real model is asked about pictures,
clips or recordings of noise that its own processor prepares.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

SIZES = ((160, 112), (112, 160))
"""(width, height) of the pictures of noise."""
SECONDS = (1.0, 2.0)
NUM_FRAMES = 4
WORDS = ("What is this?", "Which colours do you see here, and where?")


def arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", help="a family's name (a tiny random model), zoo:NAME, a folder or a hub id")
    p.add_argument("--kind", metavar="KIND", help="image, video or audio (default: the first that the model takes)")
    p.add_argument("--layer", type=int, default=2, metavar="L", help="decoder layer of the layer checks (default: 2)")
    p.add_argument("--checks", metavar="NAME,…", help="only these checks (default: all)")


def command(args: argparse.Namespace) -> int:
    """Print the table (or JSON); 1 where the model does not keep the contract."""
    from mmcompress.ask import quiet
    from mmcompress.cli import progress
    from mmcompress.testing import CHECKS

    quiet()
    checks = list(CHECKS) if args.checks is None else [c.strip() for c in args.checks.split(",")]
    report = check(args.model, kind=args.kind, layer=args.layer, checks=checks, progress=progress)
    progress("")
    if args.json:
        import json

        print(json.dumps(report.to_json(), indent=2, ensure_ascii=False))
    else:
        print(text(report))
    return 0 if report.ok else 1


def check(model: str, kind: str | None = None, **options: Any) -> Any:
    """The `Report` of a family's tiny model, or of a real model. Raises ValueError for what is neither."""
    from mmcompress.registry import did_you_mean
    from mmcompress.testing import FAMILIES, check_family, check_tiny

    if model in FAMILIES:
        if kind not in (None, *FAMILIES[model].kinds):
            raise ValueError(f"kind must be {' or '.join(FAMILIES[model].kinds)} for the tiny {model}, got {kind!r}")
        return check_tiny(model, **options)
    from mmcompress.ask import load_model

    try:
        loaded, processor = load_model(model)
    except ValueError as error:
        raise ValueError(f"{error}{did_you_mean(model, FAMILIES)}") from error
    samples = Samples(loaded, processor, kind)
    return check_family(loaded, samples, samples=len(WORDS), text_only=samples.text_only(), **options)


def text(report: Any) -> str:
    """The table, and a sentence that sums it up."""
    counts = {word: sum(v.startswith(word) for _, v in report) for word in ("pass", "fail", "refused", "stock", "not run")}
    told = ", ".join(f"{n} {word}" for word, n in counts.items() if n)
    last = "The model keeps the contract." if report.ok else "The model does not keep the contract."
    return f"{report.model}\n\n{report}\n\n{told}. {last}"


class Samples:
    """Two prompts about items of noise, in batches that the model's own processor pads on the left."""

    def __init__(self, model: Any, processor: Any, kind: str | None = None):
        import numpy as np

        from mmcompress.ask import sampling_rate
        from mmcompress.models import family

        takes = family(model).modalities
        parts = {"image": "image_processor", "video": "video_processor", "audio": "feature_extractor"}
        takes = [k for k in takes if getattr(processor, parts[k], None) is not None]
        if not takes or kind not in (None, *takes):
            raise ValueError(
                f"kind must be one that {type(processor).__name__} prepares ({', '.join(takes) or 'none'}), got {kind!r}"
            )
        self.model, self.processor, self.kind = model, processor, kind or takes[0]
        noise = np.random.default_rng(0)
        if self.kind == "audio":
            self.rate = sampling_rate(processor)
            self.items: list[Any] = [noise.standard_normal(int(s * self.rate)).astype("float32") * 0.1 for s in SECONDS]
        elif self.kind == "video":
            self.items = [noise.integers(0, 256, (NUM_FRAMES, 224, 224, 3), "uint8") for _ in SIZES]
        else:
            from PIL import Image

            coarse = (noise.integers(0, 256, (8, 8, 3), "uint8") for _ in SIZES)
            self.items = [Image.fromarray(c).resize(size) for c, size in zip(coarse, SIZES, strict=True)]

    def __call__(self, rows: Sequence[int]) -> Mapping[str, Any]:
        argument = {"image": "images", "video": "videos", "audio": "audio"}[self.kind]
        more: dict[str, Any] = {argument: [self.items[r] for r in rows]}
        if self.kind == "audio":
            more["sampling_rate"] = self.rate
        if self.kind == "video":
            numbers = list(range(NUM_FRAMES))
            told = {"total_num_frames": NUM_FRAMES, "fps": 1.0, "frames_indices": numbers, "duration": float(NUM_FRAMES)}
            more |= {"do_sample_frames": False, "video_metadata": [told for _ in rows]}
        return self._prepared([self._prompt(WORDS[r], [self.kind]) for r in rows], **more)

    def text_only(self) -> Mapping[str, Any]:
        """Two prompts without items."""
        return self._prepared([self._prompt(words, []) for words in WORDS])

    def _prompt(self, words: str, kinds: Sequence[str]) -> str:
        content = [{"type": kind} for kind in kinds] + [{"type": "text", "text": words}]
        if getattr(self.processor, "chat_template", None):
            messages = [{"role": "user", "content": content}]
            return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return "".join(getattr(self.processor, f"{kind}_token") + "\n" for kind in kinds) + words

    def _prepared(self, prompts: list[str], **items: Any) -> Mapping[str, Any]:
        from mmcompress.ask import _fit as fit

        tokenizer = self.processor.tokenizer
        before, tokenizer.padding_side = tokenizer.padding_side, "left"
        try:
            inputs = self.processor(text=prompts, return_tensors="pt", padding=len(prompts) > 1, **items)
        finally:
            tokenizer.padding_side = before
        return fit(self.model, inputs)
