"""Train the parts that the zoo ships: `python -m mmcompress.zoo.train image`.

On several cores `torchrun --nproc-per-node 2 -m mmcompress.zoo.train image` shares each step's two pictures.

Three stages, each resumable: the frozen tower's outputs are computed once; the projector learns words for tokens (align.py);
projector and LoRA learn to answer, with several questions packed behind one picture and, in most steps, a random subset of its
tokens (those that show the marks and a share of the others, at their own positions), which also helps under reduction.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from mmcompress.eval.tasks import COLOURS, DIGITS, SHAPES, Detail, EasyVQA
from mmcompress.zoo import _build, list_models
from mmcompress.zoo.align import collect, fit
from mmcompress.zoo.features import Scene, encode
from mmcompress.zoo.lora import add_lora_, lora_state

PREFIX = "model.language_model."


class Reader:
    """The model's text side fed with tower features: packs questions behind one picture and reads the answers' logits."""

    def __init__(self, model, tokenizer) -> None:
        self.model, self.core, self.tokenizer = model, model.model, tokenizer
        self.mean, self.std = torch.zeros(()), torch.ones(())  # of the tower features, folded into the projector at the end
        self.opening = self._ids("<|im_start|>user\n")

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        return (x.float() - self.mean) / self.std

    def image_tokens(self, scene: Scene, keep: torch.Tensor) -> torch.Tensor:
        """Embeddings of the packed positions `keep` [k] -> [k, width]."""
        rows = scene.order[keep]
        newline = rows < 0
        x = torch.from_numpy(np.array(scene.features[rows.clamp(min=0).numpy()]))
        x = self.core.multi_modal_projector(self.normalise(x))
        return torch.where(newline[:, None], self.core.image_newline, x)

    def __call__(self, scene: Scene, questions: list[tuple[str, str]], keep: torch.Tensor | None):
        """Mean loss over the questions, and per question whether greedy decoding would give exactly the answer.

        `keep`: the packed positions that the model may see, None hides the picture. Each question sees the picture and itself.
        """
        embed = self.core.get_input_embeddings()
        n = len(self.opening)
        start = n + len(scene.order)
        shown = torch.arange(0) if keep is None else keep
        ids, position, block, where, target = [], [*range(n), *(shown + n).tolist()], [0] * (n + len(shown)), [], []
        for k, (question, answer) in enumerate(questions):
            asked = self._ids(f"\n{question}<|im_end|>\n<|im_start|>assistant\n")
            said = self._ids(f"{answer}<|im_end|>")
            first = len(position) + len(asked) - 1
            ids += asked + said[:-1]
            position += range(start, start + len(asked) + len(said) - 1)
            block += [k + 1] * (len(asked) + len(said) - 1)
            where.append(torch.arange(first, first + len(said)))
            target.append(torch.tensor(said))
        text = embed(torch.tensor(self.opening + ids))
        parts = [text[:n], text[n:]] if keep is None else [text[:n], self.image_tokens(scene, keep), text[n:]]
        group = torch.tensor(block)
        mask = (group[None] == 0) | (group[None] == group[:, None])
        mask = mask.tril()
        hidden = self.core.language_model(
            inputs_embeds=torch.cat(parts)[None],
            attention_mask=torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[None, None],
            position_ids=torch.tensor(position)[None],
            use_cache=False,
        ).last_hidden_state[0]
        logits = self.model.lm_head(hidden[torch.cat(where)]).split([len(t) for t in target])
        loss = torch.stack([nn.functional.cross_entropy(x, t) for x, t in zip(logits, target, strict=True)]).mean()
        return loss, [bool((x.argmax(-1) == t).all()) for x, t in zip(logits, target, strict=True)]


def choose(scene: Scene, share: float, task: str, rng: np.random.Generator) -> torch.Tensor:
    """Packed positions of a step: a random share of all, and for small marks (mostly all of) the tokens that show them."""
    keep = torch.from_numpy(rng.random(len(scene.order)) < share)
    if task == "detail" and share < 1:
        on_mark = (scene.mark[scene.order.clamp(min=0)] >= 0) & (scene.order >= 0)
        rate = 1.0 if rng.random() < 0.7 else 0.5
        keep |= on_mark & torch.from_numpy(rng.random(len(keep)) < rate)
    return keep.nonzero()[:, 0]


def pick(scene: Scene, n: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Up to n of the scene's questions; questions that ask what come before those of yes and no half of the time."""
    pairs = [q for m in scene.marks for q in m.questions]
    order = rng.permutation(len(pairs)).tolist()
    if rng.random() < 0.5:
        order = sorted(order, key=lambda i: pairs[i][1] in ("yes", "no"))
    return [pairs[i] for i in order[:n]]


def progress_of(step: int, steps: int, elapsed: float, minutes: float | None) -> float:
    return min(max(step / steps, elapsed / 60 / minutes if minutes else 0.0), 1.0)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mmcompress.zoo.train", description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=list_models(), help="the model")
    parser.add_argument("--out", type=Path, default=None, help="folder of the run (runs/NAME)")
    parser.add_argument(
        "--minutes", type=float, default=None, help="end the last stage after this time, with its full schedule"
    )
    parser.add_argument("--steps", type=int, default=2000, help="steps of the last stage, two pictures each")
    parser.add_argument("--align-steps", type=int, default=900, help="steps of the projector's stage")
    parser.add_argument("--pictures", type=int, nargs=3, default=[320, 200, 550], help="pictures: crowded, easy_vqa, detail")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the last saved state of --out")
    parser.add_argument("--blind", action="store_true", help="hide the picture: the baseline that a model must beat")
    parser.add_argument("--lr", type=float, nargs=2, default=[3e-4, 8e-4], help="peak learning rates: projector, LoRA")
    parser.add_argument("--cache-dir", type=Path, default=None, help="where the converted wheels are")
    args = parser.parse_args(argv)
    out: Path = args.out or Path("runs") / (args.name + ("-blind" if args.blind else ""))
    out.mkdir(parents=True, exist_ok=True)
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
        torch.set_num_threads(max((os.cpu_count() or 1) // dist.get_world_size(), 1))
    try:
        train(args, out)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def train(args: argparse.Namespace, out: Path) -> None:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    log = (out / "log.jsonl" if rank == 0 else Path(os.devnull)).open("a")
    torch.manual_seed(args.seed)
    model, processor = _build(args.name, args.cache_dir)
    model.requires_grad_(False)
    reader = Reader(model, processor.tokenizer)
    crowded, easy, detail = args.pictures
    tasks = Detail(), EasyVQA()
    sets = {  # computed by one process first, then read by all
        "crowded": lambda: tasks[0].crowded("train", crowded, args.seed),
        "easy_vqa": lambda: tasks[1].scenes("train", easy, args.seed),
        "detail": lambda: tasks[0].scenes("train", detail, args.seed),
    }
    scenes: dict[str, list[Scene]] = {}
    for turn in range(2):
        if (rank == 0) == (turn == 0):
            for name, make in sets.items():
                scenes[name] = encode(model, processor, make(), out.parent / f"features-{name}-{args.seed}.bin", name)
        if world > 1:
            dist.barrier()

    projector = model.model.multi_modal_projector
    layers = add_lora_(model.model.language_model, torch.Generator().manual_seed(args.seed))
    lora = [p for m in layers.values() for p in (m.a, m.b)]
    visual = [*projector.parameters(), model.model.image_newline]
    for p in (*lora, *visual):
        p.requires_grad_(True)
    trained = [*visual, *lora]
    optimizer = torch.optim.AdamW(
        [{"params": visual, "peak": args.lr[0]}, {"params": lora, "peak": args.lr[1]}],
        lr=0.0,
        betas=(0.9, 0.98),
        weight_decay=0.01,
    )
    done, elapsed = 0, 0.0
    if args.resume and (out / "state.json").is_file():
        done, elapsed = _resume(out, trained, optimizer, reader)
    elif not args.blind:
        if rank == 0:
            torch.set_num_threads(os.cpu_count() or 1)  # the others wait
            pairs = collect([s for v in scenes.values() for s in v], args.seed)
            reader.mean, reader.std = pairs.x.float().mean(0), pairs.x.float().std(0) + 1e-6
            weight = model.get_input_embeddings().weight.detach()
            result = fit(projector, pairs, reader.normalise, weight, processor.tokenizer, args.align_steps, args.seed)
            log.write(json.dumps({"stage": "align", "marks": len(pairs.marks), "steps": args.align_steps, **result}) + "\n")
            torch.set_num_threads(max((os.cpu_count() or 1) // world, 1))
            log.flush()
            _save(out, trained, optimizer, reader, 0, 0.0)
        if world > 1:
            dist.barrier()
            _resume(out, trained, optimizer, reader)

    model.model.language_model.train()
    began, saved = time.time() - elapsed, time.time()
    stats: dict[str, list] = {}
    bar = tqdm(total=args.steps, initial=done, desc="answer", mininterval=5, disable=rank > 0)
    for step in range(done, args.steps):
        now = torch.tensor(progress_of(step, args.steps, time.time() - began, args.minutes))
        if world > 1:
            dist.broadcast(now, 0)
        p = float(now)
        if p >= 1:
            break
        for g in optimizer.param_groups:
            g["lr"] = g["peak"] * min(1.0, (step + 1) / 30) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * p)))
        shared = np.random.default_rng([args.seed, step])  # the same in every process: steps of one length
        full = shared.random() < (0.03 if p < 0.85 else 0.35)
        share = 1.0 if full else float(np.exp(shared.uniform(np.log(0.03), np.log(0.25))))
        both = shared.random() < 0.35
        for i in range(rank, 2, world):
            rng = np.random.default_rng([args.seed, step, i])
            name = "easy_vqa" if both else "detail"
            scene = scenes[name][int(rng.integers(len(scenes[name])))]
            asked = pick(scene, 6, rng)
            loss, right = reader(scene, asked, None if args.blind else choose(scene, share, name, rng))
            (loss / 2).backward()
            for (_, answer), ok in zip(asked, right, strict=True):
                stats.setdefault(kind_of(name, answer), []).append(ok)
            stats.setdefault("loss " + name, []).append(loss.item())
        if world > 1:
            flat = torch.cat([torch.zeros(q.numel()) if q.grad is None else q.grad.flatten() for q in trained])
            dist.all_reduce(flat)
            for q, g in zip(trained, flat.split([q.numel() for q in trained]), strict=True):
                q.grad = g.view_as(q)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.update()
        done = step + 1
        if rank == 0 and (done % 25 == 0):
            line = {k: round(float(np.mean(v)), 3) for k, v in sorted(stats.items())}
            bar.set_postfix_str(" ".join(f"{k}={v}" for k, v in line.items()))
            log.write(
                json.dumps({"step": done, "progress": round(p, 4), "minutes": round((time.time() - began) / 60, 1), **line})
                + "\n"
            )
            log.flush()
            stats = {}
        if rank == 0 and time.time() - saved > 240:
            _save(out, trained, optimizer, reader, done, time.time() - began)
            saved = time.time()
    if rank == 0:
        _save(out, trained, optimizer, reader, done, time.time() - began)
        _export(args, out, model, layers, reader, done, time.time() - began)


def kind_of(task: str, answer: str) -> str:
    if task == "easy_vqa":
        return "easy yes/no" if answer in ("yes", "no") else "easy what"
    return "digit" if answer in DIGITS else "colour" if answer in COLOURS else "shape" if answer in SHAPES else "word"


def _save(out: Path, trained: list[nn.Parameter], optimizer, reader: Reader, step: int, elapsed: float) -> None:
    tensors = {f"p{i}": p.detach().contiguous() for i, p in enumerate(trained)}
    for i, p in enumerate(trained):
        for k, v in optimizer.state.get(p, {}).items():
            tensors[f"{k}.{i}"] = v.contiguous()
    tensors |= {"mean": reader.mean.contiguous(), "std": reader.std.contiguous()}
    save_file(tensors, out / "state.tmp")
    os.replace(out / "state.tmp", out / "state.safetensors")
    (out / "state.json").write_text(json.dumps({"step": step, "elapsed_s": round(elapsed, 1)}))


def _resume(out: Path, trained: list[nn.Parameter], optimizer, reader: Reader) -> tuple[int, float]:
    tensors, state = load_file(out / "state.safetensors"), json.loads((out / "state.json").read_text())
    for i, p in enumerate(trained):
        p.data.copy_(tensors[f"p{i}"])
        moments = {k: tensors[f"{k}.{i}"] for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}.{i}" in tensors}
        if moments:
            optimizer.state[p] = moments
    reader.mean, reader.std = tensors["mean"], tensors["std"]
    return state["step"], state["elapsed_s"]


def _export(args, out: Path, model, layers, reader: Reader, steps: int, elapsed: float) -> None:
    """The parts as they ship: float16, the features' scale folded into the projector's first layer."""
    projector = model.model.multi_modal_projector
    first = projector.linear_1.weight.detach() / reader.std
    name = "model.multi_modal_projector."
    parts = {
        name + "linear_1.weight": first,
        name + "linear_1.bias": projector.linear_1.bias.detach() - first @ reader.mean.expand(first.shape[1]),
        name + "linear_2.weight": projector.linear_2.weight.detach(),
        name + "linear_2.bias": projector.linear_2.bias.detach(),
        "model.image_newline": model.model.image_newline.detach(),
    }
    save_file({k: v.half().contiguous() for k, v in parts.items()}, out / "projector.safetensors")
    save_file({k: v.half().contiguous() for k, v in lora_state(layers, PREFIX).items()}, out / "lora.safetensors")
    import transformers

    record = {
        "name": args.name,
        "blind": args.blind,
        "seed": args.seed,
        "pictures": dict(zip(("crowded", "easy_vqa", "detail"), args.pictures, strict=True)),
        "align_steps": 0 if args.blind else args.align_steps,
        "steps": steps,
        "learning_rates": {"projector": args.lr[0], "lora": args.lr[1]},
        "minutes": round(elapsed / 60, 1),
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
    }
    (out / "run.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"parts written to {out}")


if __name__ == "__main__":
    main()
