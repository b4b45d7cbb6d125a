"""Train the parts that the zoo ships: `python -m mmcompress.zoo.train NAME`.

Three stages; a run that was stopped goes on with --resume (a GPU encodes anew). Tower and projector learn words for tokens
(see.py, hear.py); what the tower gives for the training scenes is computed once (sense.py); projector and LoRA learn to answer,
with all questions of a scene packed behind one item, several items in a step and, of most items, a random subset of the tokens
(those that show what is asked for and a share of the others, at their own positions), which also helps under reduction.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from mmcompress.eval.loop import pick_dtype
from mmcompress.eval.tasks import create_task
from mmcompress.zoo import _build, hear, parts_dir
from mmcompress.zoo.lora import LoRALinear, add_lora_, lora_state, merge_lora
from mmcompress.zoo.reader import Packed, Reader
from mmcompress.zoo.recipes import RECIPES, Recipe, sense_of
from mmcompress.zoo.see import scale_of, teach
from mmcompress.zoo.sense import Seen, Sense, encode, hidden, store
from mmcompress.zoo.state import State, rate

PREFIX = "model.language_model."


BUDGET = 1024
"""Tokens of a step where --tokens does not say: items are drawn until their tokens and questions reach it."""
READING = (
    "some {tokens:,} tokens a step; one step in ten (in the last quarter two in five) shows its items whole, the others a "
    "random 0.4 to 30 % of their tokens and those that are asked for"
)
"""`_drawn` in words, for the card."""
QUESTION = 24
"""Tokens of a question with its frame, about."""
PLAN = "plan.json"
"""What a run's folder is for, see `_checked`."""
PACE = 30
"""Steps by whose time --minutes is turned into a number of steps, after as many to warm up."""


def choose(seen: Seen, share: float, rng: np.random.Generator) -> Tensor:
    """The tokens of a reading: a random share of all, and all or some of those that show what a question may ask for."""
    keep = torch.from_numpy(rng.random(len(seen.order)) < share)
    if share < 1:
        rate = (1.0, 1.0, 0.5)[int(rng.integers(3))]  # tokens spell a mark together
        keep |= seen.shows & torch.from_numpy(rng.random(len(keep)) < rate)
    return keep.nonzero()[:, 0]


def whole(rng: np.random.Generator, progress: float) -> bool:
    """Whether a step shows its items whole, as they are read later: now and then at first, often at the end."""
    return bool(rng.random() < (0.1 if progress < 0.75 else 0.4))


def share_of(rng: np.random.Generator, progress: float) -> float:
    """The share of tokens that a reading shows: at first little else than what is asked for."""
    low, high = (0.004, 0.06) if progress < 0.5 else (0.02, 0.3)
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mmcompress.zoo.train", description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(RECIPES), help="the model")
    parser.add_argument("--out", type=Path, default=None, help="folder of the run (runs/NAME)")
    parser.add_argument("--steps", type=_count, default=None, help="steps of the last stage (the recipe's)")
    parser.add_argument(
        "--minutes", type=float, default=None, help="in place of --steps: as many as fit, by the first ones' time"
    )
    parser.add_argument(
        "--tokens", type=_count, default=BUDGET, help=f"tokens of a step of the last stage ({BUDGET}; a GPU takes 16,000)"
    )
    parser.add_argument("--see-steps", type=_count, default=None, help="steps of the first stage (the recipe's)")
    parser.add_argument("--scale", type=float, default=1.0, help="scenes, as a factor on the recipe's")
    parser.add_argument("--until", choices=("see", "encode", "answer"), default="answer", help="the last stage that is done")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the last saved state of --out")
    parser.add_argument("--blind", action="store_true", help="hide the item: the baseline that a model must beat")
    parser.add_argument("--start", type=Path, default=None, help="folder of trained parts to go on from, of a run or shipped")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (a GPU where there is one)"
    )
    parser.add_argument("--threads", type=int, default=None, help="threads (all cores)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the frozen weights")
    parser.add_argument("--cache-dir", type=Path, default=None, help="where the converted wheels are")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads or os.cpu_count() or 1)
    args.out = args.out or Path("runs") / (args.name + ("-blind" if args.blind else ""))
    recipe = RECIPES[args.name]
    try:
        plan = _checked(args, recipe)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` stops a run as Ctrl-C does: its state is saved
    train(args, recipe, plan)


def _count(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text}")
    return value


def _checked(args: argparse.Namespace, recipe: Recipe) -> dict[str, Any]:
    """What the folder of a run is for: a run that goes on must be the same. Raises ValueError or FileNotFoundError for what
    would fail later, before an earlier run is overwritten."""
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device must be cpu where there is no GPU, got {args.device!r}")
    if args.until == "encode" and args.device != "cpu":
        raise ValueError(f"--until encode needs --device cpu, which alone keeps what it encoded; got {args.device!r}")
    if args.start and (args.blind or recipe.hear):
        raise ValueError(f"--start is for models that see, and not for --blind; got {args.name} {args.start}")
    for source in recipe.sources:
        create_task(source.task).length("train")  # raises where data is missing
    start = None if args.blind else args.start or (parts_of(recipe.start) if recipe.start else None)
    if start and not all((start / f"{part}.safetensors").is_file() for part in ("tower", "projector", "lora")):
        raise ValueError(f"--start must be a folder with tower, projector and lora.safetensors, got {str(start)!r}")
    plan = {
        "name": args.name,
        "blind": args.blind,
        "seed": args.seed,
        "scale": args.scale,
        "see_steps": None if args.blind or start else args.see_steps or recipe.see,
        "start": None if start is None else str(start.resolve()),
    }
    file = args.out / PLAN
    if args.resume and file.is_file():
        for key, was in json.loads(file.read_text()).items():
            if plan[key] != was:
                raise ValueError(f"--resume must go on with {key} {was!r} as {args.out} began, got {plan[key]!r}")
    return plan


def _clear(out: Path, start: str | None) -> None:
    """Make room for a new run; the parts that it starts from may lie there."""
    names = ["run.json", "log.jsonl", "measured-*.json", *(f"{stage}.*" for stage in ("see", "hear", "answer"))]
    if start != str(out.resolve()):
        names += [f"{part}.safetensors" for part in ("tower", "projector", "lora")]
    for file in (f for name in names for f in out.glob(name)):
        file.unlink()
    shutil.rmtree(out / "seen", ignore_errors=True)


def train(args: argparse.Namespace, recipe: Recipe, plan: dict[str, Any]) -> None:
    began = time.time()
    torch.manual_seed(args.seed)
    start = None if plan["start"] is None else Path(plan["start"])
    if not args.resume:
        _clear(args.out, plan["start"])
    (args.out / PLAN).write_text(json.dumps(plan, indent=1) + "\n")
    device = torch.device(args.device)
    on_gpu = device.type != "cpu"
    dtype = torch.bfloat16 if on_gpu and args.dtype == "auto" else pick_dtype(args.dtype)
    if on_gpu:
        torch.set_float32_matmul_precision("high")
    model, processor = _build(args.name, args.cache_dir)
    model.requires_grad_(False).to(device)
    out = args.out
    sources = {s.name: max(round(s.scenes * args.scale), 2) for s in recipe.sources}
    report: dict[str, Any] = {"sources": sources, "reading": READING.format(tokens=args.tokens)}
    main_sense: Any = sense_of(args.name, model, processor)
    if start:
        of = args.name if args.start else str(recipe.start)
        how = "those that ship" if start == parts_dir(of).resolve() else "of another run"
        report["start"] = f"the trained parts of `{of}` are taken over ({how})"
    if not args.blind and (recipe.see or start):
        report["see"] = _tower(args, recipe, main_sense, dtype, start)
    if args.until == "see":
        return
    model.to(dtype)
    for p in main_sense.trained.values():
        p.data = p.data.float()
    views: dict[bool, Sense] = {False: main_sense}
    if any(s.thumbnail for s in recipe.sources):
        views[True] = sense_of(args.name, model, processor, eye=main_sense.eye, thumbnail=True)
    senses = [views[s.thumbnail] for s in recipe.sources]
    scenes: list[list[Seen]] = []
    for source, sense in zip(recipe.sources, senses, strict=True):
        task, n = create_task(source.task), sources[source.name]
        if args.blind:
            scenes.append([hidden(s) for s in task.scenes("train", n, args.seed)])
        elif on_gpu:  # faster than a file
            scenes.append(encode(sense, task, "train", n, args.seed))
        else:
            scenes.append(store(sense, task, "train", n, args.seed, out / "seen" / source.name))
    if args.until == "encode":
        return
    steps = args.steps or recipe.answer
    layers = add_lora_(model.model.language_model, torch.Generator().manual_seed(args.seed))
    if start:
        _take_over(start, main_sense, layers, args.seed)
    elif recipe.lora and not args.blind:
        _reads(layers, parts_of(recipe.lora))
    elif recipe.hear and not args.blind:
        report["hear"] = _heard(args, recipe, main_sense, scenes)
    _answer(args, recipe, senses, scenes, layers, steps, report)
    report |= {"resumed": args.resume, "minutes": round((time.time() - began) / 60, 1)}
    _export(args, main_sense, layers, report)


def parts_of(name: str) -> Path:
    """Where a model finds the trained parts of the one that it starts from: of a run of one's own, or those that ship."""
    run = Path("runs") / name
    return run if (run / "run.json").is_file() else parts_dir(name)


def _tower(args: argparse.Namespace, recipe: Recipe, sense: Any, dtype: torch.dtype, start: Path | None) -> dict[str, float]:
    """First stage, in place; writes tower.safetensors."""
    eye = sense.eye
    parts = args.out / "tower.safetensors"
    if start:
        lora = load_file(start / parts.name)
        state = {eye.tower_prefix + n: v.clone() for n, v in eye.tower.state_dict().items()}
        merge_lora(state, lora)
        eye.tower.load_state_dict({n.removeprefix(eye.tower_prefix): v for n, v in state.items()})
        save_file(lora, parts)
        _fill(sense, load_file(start / "projector.safetensors"))  # features of Qwen's tower end in a layer of it
        return {}
    eye.encoder.to(dtype)
    eye.projector.float()
    words = sense.model.get_input_embeddings().weight.detach()
    steps = args.see_steps or recipe.see
    layers, line = teach(eye, words, sense.processor.tokenizer, args.out, steps, args.seed)
    save_file({k: v.half().contiguous() for k, v in lora_state(layers, eye.tower_prefix).items()}, parts)
    return {"steps": steps, **line}


def _heard(args: argparse.Namespace, recipe: Recipe, sense: Sense, scenes: list[list[Seen]]) -> dict[str, float]:
    """First stage of a model that hears, in place; done once."""
    line, projector = args.out / "hear.json", args.out / "hear.safetensors"
    if not projector.is_file():
        line.write_text(json.dumps(hear.teach(sense, scenes, recipe.hear, args.seed)))
        save_file({n: p.detach().contiguous() for n, p in sense.trained.items()}, projector)
    _fill(sense, load_file(projector))
    return json.loads(line.read_text())


def _fill(sense: Sense, tensors: dict[str, Tensor]) -> None:
    """The visual parameters that are trained, in place."""
    for name, p in sense.trained.items():
        p.data.copy_(tensors[name])


def _take_over(parts: Path, sense: Any, layers: dict[str, LoRALinear], seed: int) -> None:
    """Projector, newline and LoRA of trained parts, in place; the features' scale is taken out of the projector again."""
    sense.eye.mean, sense.eye.std = scale_of(sense.eye, seed)
    tensors = {n: v.to(sense.device).float() for n, v in load_file(parts / "projector.safetensors").items()}
    weight, bias = (f"{sense.eye.projector_prefix}{sense.eye.ends[0]}.{n}" for n in ("weight", "bias"))
    tensors[bias] = tensors[bias] + tensors[weight] @ sense.eye.mean
    tensors[weight] = tensors[weight] * sense.eye.std
    _fill(sense, tensors)
    _reads(layers, parts)


def _reads(layers: dict[str, LoRALinear], parts: Path) -> None:
    """The LoRA of trained parts, in place."""
    for name, value in load_file(parts / "lora.safetensors").items():
        layer, _, which = name.removeprefix(PREFIX).rpartition(".weight.lora_")
        getattr(layers[layer], which).data.copy_(value)


def _answer(args, recipe: Recipe, senses: list[Sense], scenes: list[list[Seen]], layers, steps: int, report: dict) -> None:
    """Last stage: projector and LoRA, in place."""
    visual = list(senses[0].trained.values())
    lora = [p for m in layers.values() for p in (m.a, m.b)]
    trained = [*visual, *lora]
    for p in trained:
        p.requires_grad_(True)
    groups = [{"params": visual, "peak": recipe.rates[0]}, {"params": lora, "peak": recipe.rates[1]}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)
    optimizer.zero_grad()  # what is left of the first stage
    state = State(args.out / "answer", trained, optimizer)
    done = state.load()
    report["answer"] = {"steps": done, "cpu_minutes": state.cpu_minutes}
    if args.minutes is not None:
        steps = max(steps, done + 2 * PACE + 1)  # until the pace is known
    reader = Reader(senses[0])
    log = (args.out / "log.jsonl").open("a")
    stats: dict[str, list] = {}

    def made(step: int, steps: int) -> tuple[Packed, list[str]]:
        rng = np.random.default_rng([args.seed, step])
        items, topics = _drawn(recipe, scenes, step / steps, rng, args.blind, args.tokens)
        return reader.packed(items), topics

    bar, step = tqdm(initial=done, total=steps, desc="answer", mininterval=10), done
    with ThreadPoolExecutor(1) as pool:
        coming, began = pool.submit(made, step, steps), time.time()
        try:
            while step < steps:
                if step == done + PACE:
                    began = time.time()
                elif step == done + 2 * PACE and args.minutes is not None:
                    steps = max(done + int(PACE + args.minutes * 60 * PACE / (time.time() - began)), step + 1)
                    bar.total = steps
                packed, topics = coming.result()
                coming = pool.submit(made, step + 1, steps)
                for g in optimizer.param_groups:
                    g["lr"] = g["peak"] * rate(step, steps)
                losses, right = reader.read(packed)
                losses.mean().backward()
                for topic, ok in zip(topics, right, strict=True):
                    stats.setdefault(topic, []).append(ok)
                stats.setdefault("loss", []).append(losses.mean().item())
                nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                bar.update()
                if step % 50 == 0 or step == steps:
                    line = {k: round(float(np.mean(v)), 3) for k, v in sorted(stats.items())}
                    bar.set_postfix_str(f"loss={line['loss']}")
                    log.write(json.dumps({"stage": "answer", "step": step, **line}) + "\n")
                    log.flush()
                    report["answer"], stats = {"steps": steps, "cpu_minutes": state.cpu_minutes, **line}, {}
                state.keep(step)
        finally:
            state.save(step)
            bar.close()


def _drawn(recipe: Recipe, scenes: list[list[Seen]], progress: float, rng: np.random.Generator, blind: bool, tokens: int):
    """The items of a step of some `tokens` tokens, with their questions and what they show, and the topic of every question."""
    items: list[tuple[Seen, list[Any], Tensor | None]] = []
    topics: list[str] = []
    size, all_of_it = 0, whole(rng, progress)
    weights = np.array([s.weight if progress >= 0.5 or s.early is None else s.early for s in recipe.sources])
    weights /= weights.sum()
    while size < tokens:
        k = int(rng.choice(len(weights), p=weights))
        seen = scenes[k][int(rng.integers(len(scenes[k])))]
        keep = None if blind else choose(seen, 1.0 if all_of_it else share_of(rng, progress), rng)
        asked = [seen.questions[i] for i in rng.permutation(len(seen.questions))[:6]]
        cost = 5 + QUESTION * len(asked) + (0 if keep is None else len(keep))
        if items and size + cost > tokens * 1.1:
            break
        items.append((seen, asked, keep))
        topics += [f"{recipe.sources[k].task} {question.topic}" for question in asked]
        size += cost
    return items, topics


def _export(args: argparse.Namespace, sense: Sense, layers: Any, report: dict) -> None:
    """The parts as they ship: float16, the features' scale folded into the projector."""
    out: Path = args.out
    save_file({k: v.half().contiguous() for k, v in sense.folded().items()}, out / "projector.safetensors")
    save_file({k: v.half().contiguous() for k, v in lora_state(layers, PREFIX).items()}, out / "lora.safetensors")
    import transformers

    record = {
        "name": args.name,
        "blind": args.blind,
        "seed": args.seed,
        "scale": args.scale,
        **report,
        "threads": torch.get_num_threads(),
        "device": str(sense.device) if sense.device.type == "cpu" else torch.cuda.get_device_name(sense.device),
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
    }
    (out / "run.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"parts written to {out}")


if __name__ == "__main__":
    main()
