"""Train the mapper of `vq_hash` for the zoo's `video` model: `python -m mmcompress.train.vq_hash`.

The model stays as it is: only the mapper and the attention over the codes learn, on the language model's loss (VQToken's own
and only one). What the tower gives for the training clips is computed once. `mmcompress.io.from_pretrained(OUT)` loads the
result.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mmcompress import zoo
from mmcompress.compressor import Compressor
from mmcompress.eval.loop import pick_dtype, weights_of
from mmcompress.eval.tasks import create_task
from mmcompress.io import CONFIG, from_pretrained, save_pretrained
from mmcompress.registry import create
from mmcompress.tokens import Layout, Tokens
from mmcompress.zoo.eye import GRID
from mmcompress.zoo.reader import Reader
from mmcompress.zoo.recipes import sense_of
from mmcompress.zoo.sense import NEWLINE, Seen, Sense, store
from mmcompress.zoo.state import State, rate

SIDE = GRID // 2  # tokens along a frame's edge
QUESTIONS = 6  # of a clip in one step
SAVE_EVERY = 180.0  # seconds


class Rows(Sense):
    """A sense of items whose features are embeddings of the language model already."""

    def __init__(self, sense: Sense) -> None:
        super().__init__(sense.model, sense.processor)
        self.kind = sense.kind

    def embed(self, *shown: tuple[Seen, Tensor]) -> Tensor:
        return torch.cat([seen.features[keep].float() for seen, keep in shown])


@torch.no_grad()
def embedded(sense: Sense, seen: Seen) -> Seen:
    """The item with its tokens' embeddings [S, D], float16, as features."""
    return replace(seen, features=sense.embed((seen, torch.arange(len(seen.order)))).half())


def reduced(method: Compressor, seen: Seen) -> Seen:
    """An embedded clip as the language model reads it behind `method`: outputs at their anchors' places, and the separators."""
    separator = seen.order[:, 0] == NEWLINE
    column = (~separator).nonzero()[:, 0]
    grid = (len(column) // SIDE**2, SIDE, SIDE)
    out = method(Tokens.of(seen.features[column].float(), Layout("video", grid)))
    keep, order = torch.cat([column[out.anchor[0]], separator.nonzero()[:, 0]]).sort()
    rows = torch.cat([out.x[0], seen.features[separator].float()])[order]
    return replace(seen, features=rows, order=seen.order[keep], position=seen.position[..., keep], shows=seen.shows[keep])


def read(reader: Reader, seen: Seen, questions: list[Any]) -> tuple[Tensor, list[bool]]:
    """Mean loss, and which of the questions would be answered right, from all rows of `seen`."""
    return reader(seen, questions, torch.arange(len(seen.features)))


def train(
    method: Compressor,
    reader: Reader,
    clips: list[Seen],
    out: Path,
    steps: int,
    batch: int = 2,
    lr: float = 1e-3,
    seed: int = 0,
    resume: bool = False,
) -> dict[str, float]:
    """Train the method's parameters in place on embedded clips; state, log and result are kept in `out`. Returns the log's last
    line. Raises ValueError where `resume` finds another method there."""
    found = json.loads((out / CONFIG).read_text()) if resume and (out / CONFIG).is_file() else method.config()
    found.pop("format_version", None)
    if found != method.config():
        changed = sorted(k for k in method.config() if found.get(k) != method.config()[k])
        raise ValueError(f"out must hold a run of the same method to resume, got one with another {', '.join(changed)}")
    trained = list(method.parameters())
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)
    state = State(out / "train", trained, optimizer)
    done = state.load() if resume else 0
    save_pretrained(method, out)
    stats: dict[str, list[float]] = {}
    line: dict[str, float] = {}
    saved = time.time()
    with (out / "log.jsonl").open("a") as log:
        for step in (bar := tqdm(range(done, steps), initial=done, total=steps, desc="train", mininterval=10)):
            for group in optimizer.param_groups:
                group["lr"] = lr * rate(step, steps)
            rng = np.random.default_rng([seed, step])  # a resumed run draws what an unbroken one would
            for _ in range(batch):
                seen = clips[int(rng.integers(len(clips)))]
                asked = [seen.questions[i] for i in rng.permutation(len(seen.questions))[:QUESTIONS]]
                shown = reduced(method, seen)
                loss, right = read(reader, shown, asked)
                (loss / batch).backward()
                for question, ok in zip(asked, right, strict=True):
                    stats.setdefault(f"right {question.topic}", []).append(ok)
                stats.setdefault("loss", []).append(loss.item())
                stats.setdefault("tokens", []).append(int((shown.order[:, 0] != NEWLINE).sum()))
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % 25 == 0 or step + 1 == steps:
                line = {k: round(float(np.mean(v)), 4) for k, v in sorted(stats.items())}
                bar.set_postfix_str(f"loss={line['loss']}")
                log.write(json.dumps({"step": step + 1, **line}) + "\n")
                log.flush()
                stats = {}
            if time.time() - saved > SAVE_EVERY or step + 1 == steps:
                state.save(step + 1)
                saved = time.time()
    save_pretrained(method, out)
    return line


@torch.no_grad()
def accuracy(reader: Reader, clips: list[Seen], show: Callable[[Seen], Seen]) -> float:
    """Share of all the clips' questions that are answered right from what `show` makes of a clip."""
    return float(np.mean([ok for seen in tqdm(clips, mininterval=10) for ok in read(reader, show(seen), seen.questions)[1]]))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mmcompress.train.vq_hash", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=Path("runs/vq_hash"), help="folder of the run and of its result")
    parser.add_argument("--num-codes", type=int, default=32, help="tokens of a clip")
    parser.add_argument("--adaptive", action="store_true", help="a number of tokens for every clip, in place of --num-codes")
    parser.add_argument(
        "--tasks", nargs="+", default=["video_order", "video_event"], help="tasks that give clips and questions"
    )
    parser.add_argument("--scenes", type=int, default=400, help="training clips of each task")
    parser.add_argument("--test-scenes", type=int, default=40, help="test clips of each task, measured at the end; 0: none")
    parser.add_argument("--steps", type=int, default=1500, help="steps of --batch clips")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of clips, steps, k-means and first weights")
    parser.add_argument("--resume", action="store_true", help="go on from the last saved state of --out")
    parser.add_argument("--threads", type=int, default=None, help="threads (all cores)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the frozen weights")
    parser.add_argument("--cache-dir", type=Path, default=None, help="where the converted wheels are")
    args = parser.parse_args(argv)
    for name in ("scenes", "steps", "batch"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be an integer >= 1, got {getattr(args, name)}")
    torch.set_num_threads(args.threads or os.cpu_count() or 1)
    args.out.mkdir(parents=True, exist_ok=True)
    model, processor = zoo.load("video", cache_dir=args.cache_dir)
    weights = weights_of(model)
    model.requires_grad_(False)
    dtype = pick_dtype(args.dtype)
    for part in (model.model.vision_tower, model.model.language_model, model.lm_head):
        part.to(dtype)
    sense = sense_of("video", model, processor)
    width = model.get_input_embeddings().weight.shape[1]
    codes: dict[str, Any] = {"adaptive": True} if args.adaptive else {"num_codes": args.num_codes}
    method = create("vq_hash", mapper=True, width=width, seed=args.seed, **codes)

    def clips(split: str, n: int) -> list[Seen]:
        """The tasks' clips, embedded; what the tower gives for them is kept in a folder per task."""
        seen: list[Seen] = []
        for task in args.tasks:
            folder = args.out / "seen" / f"{task}-{split}-{args.seed}"
            seen += [embedded(sense, s) for s in store(sense, create_task(task), split, n, args.seed, folder)]
        return seen

    began, reader = time.time(), Reader(Rows(sense))
    last = train(method, reader, clips("train", args.scenes), args.out, args.steps, args.batch, args.lr, args.seed, args.resume)
    save_pretrained(method.half(), args.out)  # as it ships; the accuracy below is of what was saved
    method = from_pretrained(args.out)
    record: dict[str, Any] = {"model": {"zoo": "video", "weights": weights}}
    record |= {"settings": {k: v for k, v in vars(args).items() if k not in ("out", "cache_dir", "resume")}}
    record |= {"train": last, "minutes_of_last_call": round((time.time() - began) / 60, 1)}
    if args.test_scenes:
        test, codebook = clips("test", args.test_scenes), create("vq_hash", seed=args.seed, **codes)
        shows = {"all tokens": lambda s: s, "codebook": lambda s: reduced(codebook, s), "trained": lambda s: reduced(method, s)}
        record["accuracy"] = {name: round(accuracy(reader, test, show), 4) for name, show in shows.items()}
        record["questions"] = sum(len(s.questions) for s in test)
    import transformers

    versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    record |= {"date": date.today().isoformat(), "versions": versions}
    (args.out / "run.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"method written to {args.out}" + (f": {record['accuracy']}" if args.test_scenes else ""))


if __name__ == "__main__":
    main()
