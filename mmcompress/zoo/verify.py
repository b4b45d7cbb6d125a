"""Rebuild the zoo from its pinned wheels and see whether it does what its cards say: `python -m mmcompress.zoo.verify`."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile

from mmcompress.zoo import list_models, load, parts_dir
from mmcompress.zoo.measure import measure
from mmcompress.zoo.wheels import check_hash


def verify(name: str, pictures: int, cache_dir: str | None) -> list[str]:
    """Everything that is wrong with one model; empty if it is as its card says."""
    folder, problems = parts_dir(name), []
    card = json.loads((folder / "card.json").read_text())
    for file, sha256 in card["sha256"].items():
        check_hash(folder / file, sha256)
        print(f"{name}: {file} has the card's hash")
    model, processor = load(name, cache_dir=cache_dir)
    for task, said in card["measured"].items():
        got = measure(model, processor, task, pictures, seed=card["measure_seed"])
        low, high = said["interval"]
        apart = got["interval"][0] > high or got["interval"][1] < low
        print(f"{name}: {task} {got['accuracy']:.3f} (n {got['n']}); card {said['accuracy']:.3f} [{low:.3f}, {high:.3f}]")
        if apart:
            problems.append(f"{name}: {task} measured {got['accuracy']:.3f} {got['interval']}, card says {said['interval']}")
    return problems


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mmcompress.zoo.verify", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="models (all)")
    parser.add_argument("--pictures", type=int, default=9, help="test pictures of each task (9: about 50 questions)")
    parser.add_argument(
        "--use-cache", action="store_true", help="trust the converted weights in the cache, do not rebuild them"
    )
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as fresh:
        problems = [p for n in args.names or list_models() for p in verify(n, args.pictures, None if args.use_cache else fresh)]
    print("\n".join(problems) or "all as the cards say", file=sys.stderr if problems else sys.stdout)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
