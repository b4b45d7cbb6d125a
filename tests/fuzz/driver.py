"""`python -m tests.fuzz --cases 10000 --seed 0 --jobs 2 --state build/fuzz`: many cases, resumable.

The state folder keeps the numbers of finished cases (`SEED/done.txt`, one "number outcome" a line) and every failure
(`SEED/fail/NUMBER.json`: the case, a smaller one, the traceback). A second call goes on where the first stopped and runs failed
cases again. Exit code 1 if any fails.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import multiprocessing as mp
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from . import HERE
from .cases import BLOCK, block, case_of
from .run import outcome_of, quiet, signature
from .shrink import shrink


def work(root: int, numbers: list[int], smaller: bool) -> list[dict[str, Any]]:
    """Run these cases in this process."""
    quiet()
    out = []
    for number in numbers:
        case, start = case_of(root, number), time.monotonic()
        result, error = outcome_of(case)
        row: dict[str, Any] = {"number": number, "outcome": result, "kind": case["kind"], "seconds": time.monotonic() - start}
        if error is not None:
            row["signature"] = signature(error)
            least, last = shrink(case, error) if smaller else (case, error)
            row |= {"case": case, "smaller": least, "traceback": "".join(traceback.format_exception(last))[-6000:]}
        out.append(row)
    return out


def _start() -> None:
    import torch

    torch.set_num_threads(1)


def finished(path: Path) -> dict[int, str]:
    if not path.exists():
        return {}
    lines = [line.split(" ", 1) for line in path.read_text().splitlines() if " " in line]
    return {int(n): outcome for n, outcome in lines}


def main(arguments: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    p.add_argument("--cases", type=int, default=10_000, help="case numbers 0 to N - 1 (default: 10000)")
    p.add_argument("--seed", type=int, default=0, help="root seed of the cases (default: 0)")
    p.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    p.add_argument(
        "--state", type=Path, default=Path("build/fuzz"), help="folder that remembers finished cases (default: build/fuzz)"
    )
    p.add_argument("--case", type=Path, help="run this JSON file only, and print what comes out")
    p.add_argument("--no-shrink", action="store_true", help="keep failing cases as they are")
    args = p.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.case:
        return one(args.case)
    folder = args.state / str(args.seed)
    (folder / "fail").mkdir(parents=True, exist_ok=True)
    print_of = hashlib.sha256(json.dumps([block(args.seed, n) for n in (0, 1, 2)]).encode()).hexdigest()
    if (folder / "cases.txt").exists() and (folder / "cases.txt").read_text() != print_of:
        print("the sources changed, so the numbers mean other cases: starting anew", file=sys.stderr)
        (folder / "done.txt").unlink(missing_ok=True)
    (folder / "cases.txt").write_text(print_of)
    done = finished(folder / "done.txt")
    todo = [n for n in range(args.cases) if n not in done]
    parts = [todo[i : i + BLOCK] for i in range(0, len(todo), BLOCK)]
    counts = collections.Counter("right" if o == "right" else "refused" for n, o in done.items() if n < args.cases)
    kinds: collections.Counter[str] = collections.Counter()
    spent: collections.Counter[str] = collections.Counter()
    start, ran = time.monotonic(), 0
    log = (folder / "done.txt").open("a")
    with mp.get_context("spawn").Pool(args.jobs, initializer=_start) as pool:
        jobs = [pool.apply_async(work, (args.seed, part, not args.no_shrink)) for part in parts]
        for job in jobs:
            for row in job.get():
                ran += 1
                kinds[row["kind"]] += 1
                spent[row["kind"]] += row["seconds"]
                path = folder / "fail" / f"{row['number']}.json"
                if row["outcome"] == "failed":
                    counts["failed"] += 1
                    path.write_text(json.dumps(row, indent=2) + "\n")
                else:
                    counts["right" if row["outcome"] == "right" else "refused"] += 1
                    path.unlink(missing_ok=True)
                    print(row["number"], " ".join(row["outcome"].split()), file=log, flush=True)
            rate = ran / (time.monotonic() - start)
            left = (len(todo) - ran) / rate
            print(
                f"\r{len(done) + ran}/{args.cases}: {counts['right']} right, {counts['refused']} refused, "
                f"{counts['failed']} failed; "
                f"{rate:.1f} a second, {left / 60:.1f} minutes left ",
                end="", file=sys.stderr, flush=True,
            )  # fmt: skip
    log.close()
    print(file=sys.stderr)
    for kind, n in kinds.most_common():
        print(f"{kind}: {n} cases, {1000 * spent[kind] / n:.0f} ms each")
    rows = [json.loads(f.read_text()) for f in (folder / "fail").glob("*.json") if int(f.stem) < args.cases]
    for name, group in collections.Counter(r["signature"] for r in rows).most_common():
        first = min((r for r in rows if r["signature"] == name), key=lambda r: len(json.dumps(r["smaller"])))
        print(f"\n{group} x {name}\n  {folder / 'fail' / str(first['number'])}.json: {json.dumps(first['smaller'])}")
    if rows:
        print(f"\n{len(rows)} cases failed. Copy `smaller` of each into {HERE / 'kept'}, mend, and run it with --case FILE.")
    return 1 if rows else 0


def one(path: Path) -> int:
    quiet()
    case = json.loads(path.read_text())
    case = case.get("smaller", case)
    result, error = outcome_of(case)
    print(json.dumps(case, indent=1))
    print(result)
    if error is not None:
        traceback.print_exception(error)
    return int(error is not None)
