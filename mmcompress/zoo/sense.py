"""What a zoo model's encoder gives for the item of a scene, and how the model packs it: computed once, then trained on.

One class a kind of item. `Seen` is the common form: rows of encoder output, which of them each token averages, where the token
stands, and whether it shows anything that a question asks for. Scenes are made and looked at by any process, encoded in batches
by the one that holds the model.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mmcompress.eval.tasks.base import Mark, Question, Scene, Task
from mmcompress.zoo.boxes import layout, token_boxes, token_marks
from mmcompress.zoo.eye import GRID, SIDE, TOKENS, Eye, QwenEye, normalised

NEWLINE = -1
BATCH = 16  # scenes that are encoded at once where all are kept in memory
VIEWS = 128  # views that it takes at once


@dataclass
class Seen:
    """An item as the model sees it.

    features [M, W] float16: rows of encoder output. order [S, r]: the rows that a token averages, NEWLINE in its first column
    for a newline. position [S] or [3, S]: of the tokens, from 0. length: positions that the item takes.
    shows [S]: the token shows a mark, or sounds in the evidence of a question. marks: of the scene.
    """

    features: Tensor
    order: Tensor
    position: Tensor
    length: int
    shows: Tensor
    questions: list[Question]
    marks: list[Mark] = field(default_factory=list)


NOTHING = torch.zeros(0, 0, dtype=torch.float16)


class Sense:
    """Base: `see(scene)` gives a `Seen`, `embed` makes embeddings of the language model of tokens.

    A subclass defines `look(scene)`: what the encoder takes, on the CPU, and a `Seen` without features; and `encode(inputs)`:
    the features of each. `look` needs no weights.
    """

    kind = "image"
    prefix: str
    """Of the projector's tensors."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.core, self.processor = model, model.model, processor

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def look(self, scene: Scene) -> tuple[Any, Seen]:
        raise NotImplementedError(f"{type(self).__name__} must define look(scene)")

    def encode(self, inputs: Sequence[Any]) -> list[Tensor]:
        """Features [M, W], float16, on the model's device."""
        raise NotImplementedError(f"{type(self).__name__} must define encode(inputs)")

    @torch.inference_mode()
    def see(self, scene: Scene) -> Seen:
        given, seen = self.look(scene)
        return replace(seen, features=self.encode([given])[0])

    @property
    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The visual parameters that are trained with the language model, by their full names."""
        found = {f"{self.prefix}{n}": p for n, p in self.projector.named_parameters()}
        newline = getattr(self.core, "image_newline", None)
        return found if newline is None else {**found, "model.image_newline": newline}

    @property
    def projector(self) -> torch.nn.Module:
        return self.core.multi_modal_projector

    def project(self, x: Tensor) -> Tensor:
        """Rows of features -> embeddings of the language model, float32."""
        return self.projector(x.to(next(self.projector.parameters()).dtype)).float()

    def folded(self) -> dict[str, Tensor]:
        """The trained visual tensors, the features' scale folded into them."""
        return {n: p.detach() for n, p in self.trained.items()}

    def embed(self, *shown: tuple[Seen, Tensor]) -> Tensor:
        """Embeddings [k, D], float32, of items' tokens: of each item those in `keep` [k], one item behind the other."""
        order = torch.cat([seen.order[keep] for seen, keep in shown])
        rows = torch.cat(
            [seen.features[seen.order[keep].clamp(min=0).flatten().to(seen.features.device)] for seen, keep in shown]
        )
        x = self.project(rows).unflatten(0, order.shape).mean(1)
        newline = order[:, 0] == NEWLINE
        return torch.where(newline[:, None].to(x.device), self.core.image_newline, x) if bool(newline.any()) else x


class Sight(Sense):
    """What is seen by an eye."""

    eye_of: type[Eye] = Eye

    def __init__(self, model: Any, processor: Any, eye: Eye | None = None) -> None:
        super().__init__(model, processor)
        self.eye = eye or self.eye_of(model)
        self.prefix = self.eye.projector_prefix

    @property
    def projector(self) -> torch.nn.Module:
        return self.eye.projector

    def project(self, x: Tensor) -> Tensor:
        return self.eye.project(x)

    def encode(self, inputs: Sequence[Any]) -> list[Tensor]:
        """inputs: views [v, 3, 224, 224]. The CPU takes them one by one, its kernels are prepared for one shape."""
        views = torch.cat(list(inputs)).split(1 if self.device.type == "cpu" else VIEWS)
        x = torch.cat([self.eye.features(v).half() for v in views])
        return [f.flatten(0, 1) for f in x.split([len(v) for v in inputs])]

    def folded(self) -> dict[str, Tensor]:
        return {**super().folded(), **self.eye.folded()}


class Picture(Sight):
    """LLaVA-NeXT: thumbnail, crops, newlines; of a scene marked as `thumbnail` only the first view, as LLaVA sees it."""

    def __init__(self, model: Any, processor: Any, eye: Eye | None = None, thumbnail: bool = False) -> None:
        super().__init__(model, processor, eye)
        self.thumbnail = thumbnail

    def look(self, scene: Scene) -> tuple[Tensor, Seen]:
        picture = scene.item
        if self.thumbnail:
            order, grid = torch.arange(TOKENS), None
            views = normalised([picture.convert("RGB").resize((SIDE, SIDE), 3)])  # 3: bicubic, as the processors do
        else:
            order, grid = layout(self.model.config, picture.size)
            views = self.processor.image_processor(images=picture, return_tensors="pt").pixel_values[0]
        marks = token_marks(token_boxes(picture.size, grid), scene.marks)
        shows = (marks[order.clamp(min=0)] >= 0) & (order >= 0)
        return views, Seen(NOTHING, order[:, None], torch.arange(len(order)), len(order), shows, scene.questions, scene.marks)


class Clip(Sight):
    """LLaVA-OneVision: 64 tokens a frame, each the mean of 2x2, and one newline behind the last frame."""

    kind = "video"

    def look(self, scene: Scene) -> tuple[Tensor, Seen]:
        frames = scene.item
        views = normalised([f.convert("RGB").resize((SIDE, SIDE), 3) for f in frames])
        cell = (
            torch.arange(len(frames) * TOKENS)
            .view(len(frames), GRID // 2, 2, GRID // 2, 2)
            .permute(0, 1, 3, 2, 4)
            .reshape(-1, 4)
        )
        order = torch.cat([cell, torch.full((1, 4), NEWLINE)])
        boxes = token_boxes(frames[0].size, None).view(GRID // 2, 2, GRID // 2, 2, 4).permute(0, 2, 1, 3, 4).reshape(-1, 4, 4)
        boxes = torch.cat([boxes[..., :2].amin(1), boxes[..., 2:].amax(1)], -1)
        shows = [token_marks(boxes, [m for m in scene.marks if m.frame == t]) >= 0 for t in range(len(frames))]
        flag = torch.cat([*shows, torch.zeros(1, dtype=torch.bool)])
        return views, Seen(NOTHING, order, torch.arange(len(order)), len(order), flag, scene.questions, scene.marks)


class Grid(Sight):
    """Qwen2.5-VL without a merge of patches: the picture's own grid, at (t, h, w) positions."""

    eye_of = QwenEye

    def look(self, scene: Scene) -> tuple[tuple[Tensor, Tensor], Seen]:
        batch = self.processor.image_processor(images=[scene.item], return_tensors="pt")
        _, h, w = batch.image_grid_thw[0].tolist()
        top, left = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        position = torch.stack([torch.zeros_like(top), top, left]).flatten(1)
        cell = torch.tensor([scene.item.width / w, scene.item.height / h]).double().repeat(2)
        boxes = torch.stack([left, top, left + 1, top + 1], -1).flatten(0, 1) * cell
        shows = token_marks(boxes, scene.marks) >= 0
        seen = Seen(NOTHING, torch.arange(h * w)[:, None], position, max(h, w), shows, scene.questions, scene.marks)
        return (batch.pixel_values, batch.image_grid_thw), seen

    def encode(self, inputs: Sequence[Any]) -> list[Tensor]:
        """inputs: the processor's pixel_values and image_grid_thw."""
        pixels, grids = (torch.cat(x) for x in zip(*inputs, strict=True))
        return list(self.eye.rows(pixels, grids).half().split(grids.prod(1).tolist()))  # type: ignore[attr-defined]


class Sound(Sense):
    """Qwen2-Audio: 25 tokens a second."""

    kind, prefix = "audio", "model.multi_modal_projector."

    def look(self, scene: Scene) -> tuple[tuple[Tensor, int, int], Seen]:
        extract = self.processor.feature_extractor
        batch = extract(
            [scene.item],
            sampling_rate=extract.sampling_rate,
            return_attention_mask=True,
            padding="max_length",
            return_tensors="pt",
        )
        frames = batch.attention_mask.sum(-1)
        steps, num = (int(n) for n in self.core.audio_tower._get_feat_extract_output_lengths(frames))
        order = torch.arange(num)
        shows = torch.zeros(num, dtype=torch.bool)
        for mark in scene.marks:
            shows[heard(mark)] = True
        seen = Seen(NOTHING, order[:, None], order, num, shows, scene.questions, scene.marks)
        return (batch.input_features, steps, num), seen

    def encode(self, inputs: Sequence[Any]) -> list[Tensor]:
        """inputs: log-mel features [1, bins, frames], how many of the tower's steps sound, and how many tokens they give."""
        tower, out = self.core.audio_tower, []
        like = next(tower.parameters())
        for mel, steps, num in inputs:
            width = mel.shape[-1] // 2
            silent = torch.arange(width, device=like.device)[None] >= steps
            mask = torch.zeros(1, 1, width, width, dtype=like.dtype, device=like.device)
            mask = mask.masked_fill(silent[:, None, None], float("-inf"))
            out.append(tower(mel.to(like), attention_mask=mask).last_hidden_state[0, :num].half())
        return out


def heard(mark: Mark) -> slice:
    """The tokens of 40 ms in which a mark sounds."""
    assert mark.seconds is not None
    return slice(int(mark.seconds[0] * 25), int(mark.seconds[1] * 25) + 1)


def hidden(scene: Scene) -> Seen:
    """A scene whose item nobody looks at."""
    nothing = torch.zeros(0, dtype=torch.long)
    return Seen(NOTHING, nothing[:, None], nothing, 0, nothing.bool(), scene.questions)


class _Looked(Dataset):
    """Scenes as a sense looks at them, without the items."""

    def __init__(self, sense: Sense, task: Task, split: str, numbers: range, seed: int) -> None:
        self.sense, self.task, self.split, self.numbers, self.seed = sense, task, split, numbers, seed

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> tuple[Any, Seen]:
        return self.sense.look(self.task.scene(self.split, self.seed, self.numbers[i]))


@torch.inference_mode()
def encode(sense: Sense, task: Task, split: str, n: int, seed: int) -> list[Seen]:
    """The first n scenes of a split as the model sees them, features on its device: made by all cores, encoded in batches."""
    length = task.length(split)
    numbers = range(n if length is None else min(n, length))
    cores = max((os.cpu_count() or 1) - 2, 1)
    loader = DataLoader(_Looked(sense, task, split, numbers, seed), BATCH, num_workers=cores, collate_fn=list)
    out: list[Seen] = []
    with tqdm(total=len(numbers), desc=f"encode {task.name}", mininterval=10) as bar:
        for batch in loader:
            for (_, seen), features in zip(batch, sense.encode([given for given, _ in batch]), strict=True):
                own = {k: getattr(seen, k).clone() for k in ("order", "position", "shows")}  # not the workers' shared memory
                out.append(replace(seen, **own, features=features))
            bar.update(len(batch))
    return out


def store(sense: Sense, task: Task, split: str, n: int, seed: int, folder: Path) -> list[Seen]:
    """The first n scenes of a split as the model sees them; each is kept as a file of `folder` and computed only once."""
    folder.mkdir(parents=True, exist_ok=True)
    out: list[Seen] = []
    for i, scene in enumerate(tqdm(task.scenes(split, n, seed), total=n, desc=f"encode {folder.name}", mininterval=10)):
        file = folder / f"{i}.safetensors"
        if not file.is_file():
            seen = sense.see(scene)
            tensors = {"features": seen.features, "order": seen.order, "position": seen.position, "shows": seen.shows}
            save_file({k: v.clone() for k, v in tensors.items()}, file.with_suffix(".part"), {"length": str(seen.length)})
            file.with_suffix(".part").rename(file)
        with safe_open(file, "pt") as f:
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
            out.append(Seen(**tensors, length=int(f.metadata()["length"]), questions=scene.questions, marks=scene.marks))
    return out
