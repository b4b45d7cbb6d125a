"""Rebuild the zoo from its pinned wheels and see whether it does what its cards say: `python -m mmcompress.zoo.verify`."""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from pathlib import Path
from typing import Any

from mmcompress.zoo import card_file, card_of, list_models, load, parts_dir
from mmcompress.zoo.measure import measure


def possible(got: dict[str, Any], said: dict[str, Any]) -> tuple[float, float]:
    """The accuracies that a sample leaves possible: of all of a card's questions the very one, of fewer Wilson's 95 % interval
    (a bootstrap of a sample that is all right has no width)."""
    if got["n"] >= said["n"]:
        return got["accuracy"], got["accuracy"]
    from scipy.stats import binomtest

    interval = binomtest(round(got["accuracy"] * got["n"]), got["n"]).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def verify(name: str, n: int, cache_dir: str | Path | None) -> list[str]:
    """Everything that is wrong with one model; empty if it is as its card says.

    A sample of n questions of each task must have an interval that meets the card's.
    """
    card, problems = card_of(name), []
    for file, sha256 in card["sha256"].items():
        found = hashlib.sha256((parts_dir(name) / file).read_bytes()).hexdigest()
        if found != sha256:
            return [f"{name}: {file} has the hash {found}, its card says {sha256}; not measured"]
        print(f"{name}: {file} has the card's hash", flush=True)
    model, processor = load(name, cache_dir=cache_dir)
    for task, said in card["measured"].items():
        try:
            got = measure(name, model, processor, task, n, seed=card["measure_seed"])
        except FileNotFoundError as error:  # data that does not come with the package
            print(f"{name}: {task} not measured: {error}", flush=True)
            continue
        low, high = possible(got, said)
        least, most = said["interval"]
        line = (
            f"{name}: {task} {got['accuracy']:.3f} [{low:.3f}, {high:.3f}] of {got['n']} questions; "
            f"card {said['accuracy']:.3f} [{least:.3f}, {most:.3f}]"
        )
        print(line, flush=True)
        if low > most or high < least:
            problems.append(line)
    return problems


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mmcompress.zoo.verify", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"models of {', '.join(list_models())} (all)")
    parser.add_argument("--n", type=int, default=50, help="test questions of each task (50)")
    parser.add_argument(
        "--use-cache", action="store_true", help="trust the converted weights in the cache, do not rebuild them"
    )
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.names) - set(list_models())):
        parser.error(f"NAME must be one of {', '.join(list_models())}, got {unknown[0]}")
    with tempfile.TemporaryDirectory() as fresh:
        problems = []
        for name in args.names or list_models():
            if not card_file(name).is_file():
                print(f"{name}: not trained yet, nothing to verify", flush=True)
                continue
            problems += verify(name, args.n, None if args.use_cache else fresh)
    print("\n".join(problems) or "all as the cards say", file=sys.stderr if problems else sys.stdout)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
