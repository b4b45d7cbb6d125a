"""What the methods cost beside the prefill that they shorten: the zoo's `image` model on a picture of ten crops, 2,816 tokens.

    python benchmarks/method_cost.py      # about ten minutes on two idle cores; writes benchmarks/results/method_cost.json

The same medians as those of `mmcompress bench --timing`: settings take turns, a method's own cost is the time inside its stages
and in reading the encoder's signals for them, as a share of the uncompressed prefill. The model's own grids end at four crops,
so this one is given a grid of 5 x 2; its answers there mean nothing, its shapes are what is timed.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from mmcompress import create, list_methods, zoo
from mmcompress.cards import has_ratio, markdown
from mmcompress.eval.bench import Setting
from mmcompress.eval.loop import check_task, environment, pick_dtype
from mmcompress.eval.tasks import create_task
from mmcompress.eval.timing import prefill_times

RESULTS = Path(__file__).parent / "results"
GRID = [448, 1120]  # height and width in pixels: 2 x 5 crops of 224
RATIO = 0.25
LIMITS = {"vq_hash": 0.1}  # of the uncompressed prefill; the others 3 %


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="of which the medians are taken (5)")
    parser.add_argument(
        "--dtype", default="float32", help="of the model (float32); auto: bfloat16 where the CPU multiplies it fast"
    )
    args = parser.parse_args()
    model, processor = zoo.load("image")
    model.to(pick_dtype(args.dtype))
    model.config.image_grid_pinpoints = processor.image_processor.image_grid_pinpoints = [GRID]
    task = create_task("detail")
    check_task(model, task)
    sample = next(iter(task.samples("test", 1, 0)))
    sample = replace(sample, item=sample.item.resize((GRID[1], GRID[0])))
    settings = [Setting("none", None, create("none"))]
    for name in (m for m in list_methods() if m != "none"):
        ratio = RATIO if has_ratio(name) else None
        settings.append(Setting(name, ratio, create(name, **({} if ratio is None else {"keep_ratio": ratio}))))
    times = prefill_times(model, processor, task, [sample], settings, "zoo:image", rounds=args.rounds)
    for row in times:
        row["limit"] = LIMITS.get(row["label"], 0.03)
    report = {"environment": environment(model), "tokens": 11 * 256, "times": times}
    (RESULTS / "method_cost.json").write_text(json.dumps(report, indent=1) + "\n")
    head = ["method", "sequence", "prefill ms", "of uncompressed", "own cost", "limit"]
    lines = [
        [
            t["label"],
            f"{t['sequence']:.0f}",
            f"{t['ms']:.0f}",
            f"{t['share']:.2f}",
            f"{100 * t['own']:.2f} %",
            f"{100 * t['limit']:.0f} %",
        ]
        for t in times
    ]
    print(markdown(head, lines))
    over = [t["label"] for t in times if t["own"] > t["limit"]]
    print("over the limit: " + (", ".join(over) or "none"))


if __name__ == "__main__":
    main()
