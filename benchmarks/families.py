"""The contract of every family on every version of transformers at hand: families x checks.

    python benchmarks/families.py                            the transformers that is installed
    python benchmarks/families.py --with DIR --with DIR      and those of folders filled by `pip install --target DIR`
    python benchmarks/families.py llava gemma3               these families only

Goes on where it was stopped: what results/families.json holds of the same sources is not measured again (--fresh: all anew).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "families.json"
LIMIT = 600
"""Seconds that one family may take."""


def fingerprint() -> str:
    """What the results follow from: the sources of the package without its methods, models to download and pages."""
    names = ["compressor.py", "ledger.py", "patch.py", "tokens.py", "models/**/*.py", "testing/**/*.py"]
    digest = hashlib.sha256()
    for path in sorted(p for n in names for p in (ROOT / "mmcompress").glob(n)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def environment(folder: str | None) -> dict[str, str]:
    """Variables of a process that imports this checkout, and the transformers of `folder` where one is given."""
    paths = [*([folder] if folder else []), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), "OMP_NUM_THREADS": "1"}


def version(folder: str | None) -> str:
    code = "import transformers; print(transformers.__version__)"
    run = subprocess.run([sys.executable, "-c", code], env=environment(folder), capture_output=True, text=True, check=False)
    if run.returncode:
        raise ValueError(f"--with must name a folder with an importable transformers, got {folder!r}")
    return run.stdout.strip()


# the worker: families on stdin, one line of JSON each on stdout


def measure(name: str) -> dict[str, Any]:
    """One family: its type, items, checks, and seconds of processor time."""
    from mmcompress.testing import FAMILIES, check_tiny, tiny_model

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took longer than {LIMIT} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    row: dict[str, Any] = {"kinds": list(FAMILIES[name].kinds)}
    start = time.process_time()
    try:
        row["model_type"] = tiny_model(name).config.model_type
        report = check_tiny(name)
        row |= {"ok": report.ok, "checks": report.verdicts}
    except ValueError as error:
        row |= {"ok": None, "missing": str(error)}
    except Exception as error:  # the stock model cannot be built or asked here
        row |= {"ok": None, "missing": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"}
    finally:
        signal.alarm(0)
    return {**row, "seconds": round(time.process_time() - start, 1)}


def work() -> None:
    import torch
    from transformers.utils import logging

    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps({"name": line.strip(), **measure(line.strip())}), flush=True)


# the runner


def load() -> dict[str, Any]:
    return json.loads(OUT.read_text(encoding="utf-8")) if OUT.is_file() else {"versions": {}}


def save(results: dict[str, Any]) -> None:
    """Whole or not at all."""
    part = OUT.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(OUT)


def sweep(names: list[str], folder: str | None, jobs: int, fresh: bool) -> str:
    """Measure what is not known yet on one version, `jobs` processes at a time; returns the version."""
    what, mark, results = version(folder), fingerprint(), load()
    known = results["versions"].setdefault(what, {})
    todo = [n for n in names if fresh or known.get(n, {}).get("sources") != mark]
    print(f"transformers {what}: {len(todo)} of {len(names)} families to check", flush=True)
    waiting: queue.Queue[str] = queue.Queue()
    for n in todo:
        waiting.put(n)
    lock, done, start = threading.Lock(), 0, time.monotonic()

    def one() -> None:
        nonlocal done
        worker: Any = None
        while True:
            try:
                name = waiting.get_nowait()
            except queue.Empty:
                break
            if worker is None:
                command = [sys.executable, __file__, "--worker"]
                pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
                pipes["stderr"] = subprocess.DEVNULL
                worker = subprocess.Popen(command, env=environment(folder), text=True, **pipes)
            worker.stdin.write(name + "\n")
            worker.stdin.flush()
            line = worker.stdout.readline()
            if not line:  # the process died: its family counts as one that cannot be asked
                row: dict[str, Any] = {"ok": None, "missing": f"the process ended with {worker.wait()}", "kinds": []}
                worker = None
            else:
                row = json.loads(line)
            with lock:
                done += 1
                row.pop("name", None)
                known[name] = {**row, "sources": mark}
                save(results)
                left = (time.monotonic() - start) / done * (len(todo) - done)
                print(f"{done:3d}/{len(todo)} {name:24s} {told(row)}  ({left / 60:.0f} min left)", flush=True)
        if worker is not None:
            worker.stdin.close()
            worker.wait()

    threads = [threading.Thread(target=one) for _ in range(min(jobs, max(1, len(todo))))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return what


def told(row: dict[str, Any]) -> str:
    if row["ok"] is None:
        return f"not here: {row['missing']}"
    wrong = [f"{n}: {v}" for n, v in row["checks"].items() if v.startswith(("fail", "refused"))]
    return "passes" if not wrong else "; ".join(wrong)[:160]


def table(results: dict[str, Any], versions: list[str]) -> str:
    """Families x checks of these versions: + passes, X fails, s the stock model cannot, R refused, – not run."""
    from mmcompress.report import table as columns
    from mmcompress.testing import CHECKS

    sign = {"pass": "+", "fail": "X", "stoc": "s", "refu": "R", "not ": "–"}
    blocks = []
    for what in versions:
        rows = results["versions"][what]
        head = ["family", *CHECKS]
        lines = [
            [n, *(sign[r["checks"][c][:4]] if c in r.get("checks", {}) else "" for c in CHECKS)]
            for n, r in rows.items()
            if r["ok"] is not None
        ]
        blocks.append(f"transformers {what}\n\n{columns(head, lines, 'l' + 'l' * len(CHECKS))}\n\n{summary(rows)}")
    return "\n\n".join(blocks)


def summary(rows: dict[str, Any]) -> str:
    """How many configurations and model types pass in full."""
    here = {n: r for n, r in rows.items() if r["ok"] is not None}
    types = {r["model_type"] for r in here.values()}
    bad = {r["model_type"] for r in here.values() if not r["ok"]}
    passed = sum(r["ok"] for r in here.values())
    told = f"{passed} of {len(here)} configurations and {len(types - bad)} of {len(types)} model types"
    missing = f"{len(rows) - len(here)} configurations are not in this version"
    return f"{told} pass; {missing}. Wrong or refused: {', '.join(sorted(bad)) or 'none'}."


def main(arguments: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("names", nargs="*", metavar="FAMILY", help="families (default: all)")
    p.add_argument("--with", dest="folders", action="append", default=[], metavar="DIR", help="a folder with transformers")
    p.add_argument("--only-with", action="store_true", help="leave out the transformers that is installed")
    p.add_argument("--jobs", type=int, default=2, metavar="N", help="processes (default: 2)")
    p.add_argument("--fresh", action="store_true", help="measure again what is known")
    p.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args(arguments)
    if args.worker:
        work()
        return 0
    sys.path.insert(0, str(ROOT))
    from mmcompress.testing import FAMILIES

    if unknown := [n for n in args.names if n not in FAMILIES]:
        p.error(f"families must be of {', '.join(FAMILIES)}; got {', '.join(unknown)}")
    folders = [*([] if args.only_with else [None]), *args.folders]
    versions = [sweep(args.names or list(FAMILIES), f, args.jobs, args.fresh) for f in folders]
    results = load()
    print("\n" + table(results, versions))
    rows = [r for v in versions for n, r in results["versions"][v].items() if not args.names or n in args.names]
    return 0 if all(r["ok"] is not False for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
