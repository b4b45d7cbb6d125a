"""Run the tests of the models on every release of transformers that the package says it is tested with.

    python benchmarks/versions.py                                  # all of RELEASES; under an hour on two idle cores
    python benchmarks/versions.py --versions 5.24.0 --suites io    # a part of it, which writes no result
    python benchmarks/versions.py --torch 2.14.1                   # and the newest transformers on another torch (gigabytes)

Every release gets a folder in build/versions with transformers alone (and what it needs in another version than the running
environment has), so that all share one torch. A finished release x suite is not run again while the package and the tests stay
as they are. Logs lie beside the folders. Writes benchmarks/results/versions.json; the exit status is 1 unless all is green.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from mmcompress.models.tested import RELEASES
from mmcompress.report import table

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "versions"
RESULT = ROOT / "benchmarks" / "results" / "versions.json"
SUITES = {
    name: path
    for name, path in {
        "seam": "tests/test_seam.py",
        "models": "tests/models",
        "methods": "tests/test_methods_on_models.py",
        "io": "tests/test_io.py",
    }.items()
    if (ROOT / path).exists()
}
COUNTS = ("passed", "failed", "skipped", "seconds")


class FetchError(RuntimeError):
    """pip could not bring a package; the message is pip's last line."""


def fetch(folder: Path, *arguments: str) -> None:
    """`pip install --target folder`. Raises FetchError."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-warn-script-location"]
    done = subprocess.run([*command, "--target", str(folder), *arguments], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise FetchError(lines[-1] if lines else f"pip ended with status {done.returncode}")


def missing(folder: Path) -> list[str]:
    """What transformers in this folder requires in another version than the running environment has."""
    (found,) = metadata.distributions(name="transformers", path=[str(folder)])
    out = []
    for requirement in map(Requirement, found.requires or ()):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            if requirement.specifier.contains(metadata.version(requirement.name), prereleases=True):
                continue
        except metadata.PackageNotFoundError:
            pass
        out.append(f"{requirement.name}{requirement.specifier}")
    return out


def environment(version: str) -> Path:
    """The folder that holds this release of transformers, made on the first call. Raises FetchError."""
    target = FOLDER / f"transformers-{version}"
    if not target.exists():
        with made(target) as part:
            fetch(part, "--no-deps", f"transformers=={version}")
            if needed := missing(part):
                fetch(part, "--no-deps", *needed)
    return target


def other_torch(version: str) -> Path:
    """The folder that holds another torch with all that it needs, made on the first call. Raises FetchError."""
    target = FOLDER / f"torch-{version}"
    if not target.exists():
        with made(target) as part:
            fetch(part, f"torch=={version}", "torchvision", "torchaudio")
    return target


class made:
    """A folder beside `target` that takes its place once the block ends well: never half an environment, never two at once."""

    def __init__(self, target: Path):
        self.target = target

    def __enter__(self) -> Path:
        FOLDER.mkdir(parents=True, exist_ok=True)
        self.part = Path(tempfile.mkdtemp(dir=FOLDER, prefix="part-"))
        return self.part

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None and not self.target.exists():
            self.part.rename(self.target)
        shutil.rmtree(self.part, ignore_errors=True)


def pytest(folders: list[Path], *arguments: str, output: Any = None, timeout: float | None = None) -> Any:
    """Run pytest in a process of its own that finds the packages of `folders` first: its CompletedProcess.

    Raises RuntimeError where it would find others.
    """
    variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    variables |= {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, *folders))), "OMP_NUM_THREADS": "1"}
    for folder in folders:
        name = folder.name.split("-")[0]
        code = f"import {name}; print({name}.__file__)"
        seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=variables)
        if not seen.stdout.startswith(str(folder)):
            raise RuntimeError(f"{name} must be imported from {folder}, got {seen.stdout.strip() or seen.stderr.strip()}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT, text=True, timeout=timeout, check=False
    )


def counts(report: Path, status: int) -> dict[str, int]:
    """passed, failed (errors too) and skipped tests of a JUnit report; a run that died counts as one failure more."""
    suite = ElementTree.parse(report).getroot().find("testsuite") if report.exists() else None
    number = {k: int(suite.get(k, 0)) if suite is not None else 0 for k in ("tests", "failures", "errors", "skipped")}
    failed, skipped = number["failures"] + number["errors"], number["skipped"]
    died = not number["tests"] or (status != 0 and not failed)
    return {"passed": max(0, number["tests"] - failed - skipped), "failed": failed + died, "skipped": skipped}


def run(folders: list[Path], suite: str, log: Path, workers: int, timeout: float) -> dict[str, int]:
    """One suite on one environment: its counts and seconds."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        with log.open("w") as file:
            try:
                arguments = (SUITES[suite], "-n", str(workers), "--junitxml", str(report))
                status = pytest(folders, *arguments, output=file, timeout=timeout).returncode
            except subprocess.TimeoutExpired:
                file.write(f"\nstopped after {timeout:.0f} s\n")
                status = 1
        return {**counts(report, status), "seconds": round(time.monotonic() - start)}


def sources() -> str:
    """One word for what is tested: the package's code and data, and the tests."""
    digest = hashlib.sha256()
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "mmcompress", "tests", "csrc"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in sorted(listed.stdout.splitlines()):
        path = ROOT / os.fsdecode(name)
        if path.is_file():
            digest.update(name + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def commit() -> str:
    """The commit, with "+" where files that are tested differ from it."""
    git = lambda *a: subprocess.run(["git", *a], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()  # noqa: E731
    changed = git("status", "--porcelain", "mmcompress", "tests", "csrc")
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")


def rows(result: dict[str, Any]) -> list[list[str]]:
    """The table version x suite."""
    out = []
    for one in result["runs"]:
        cells = [f"{s['passed']} passed, {s['failed']} failed, {s['seconds']} s" for s in one["suites"].values()]
        out.append([one["transformers"], one["torch"], *cells])
    return out


def is_green(result: dict[str, Any]) -> bool:
    return all(s["failed"] == 0 and s["passed"] > 0 for one in result["runs"] for s in one["suites"].values())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", default=list(RELEASES), metavar="X", help="releases of transformers")
    parser.add_argument("--suites", nargs="+", default=list(SUITES), choices=list(SUITES))
    parser.add_argument("--torch", metavar="X", help="run the newest of the releases on this torch as well")
    parser.add_argument("--again", action="store_true", help="run what is finished once more")
    parser.add_argument("-n", "--workers", type=int, default=2, help="processes of pytest (2)")
    parser.add_argument("--timeout", type=float, default=45, help="minutes that one suite may take (45)")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    here = metadata.version("torch").split("+")[0]
    plan = [(version, here) for version in arguments.versions]
    if arguments.torch:
        plan.append((arguments.versions[-1], arguments.torch))
    FOLDER.mkdir(parents=True, exist_ok=True)
    state_file, key = FOLDER / "state.json", sources()
    state: dict[str, Any] = json.loads(state_file.read_text()) if state_file.exists() else {}
    runs = []
    for version, torch in plan:
        print(f"transformers {version}, torch {torch}", flush=True)
        folders = [environment(version), *([other_torch(torch)] if torch != here else [])]
        suites = {}
        for suite in arguments.suites:
            name = f"{key} {platform.python_version()} {version} {torch} {suite}"
            log = FOLDER / f"{version}-torch{torch}-{suite}.log"
            if name in state and not arguments.again:
                print(f"  {suite}: done before", flush=True)
            else:
                print(f"  {suite}: running, see {log.relative_to(ROOT)}", flush=True)
                state[name] = run(folders, suite, log, arguments.workers, arguments.timeout * 60)
                part = state_file.with_suffix(".part")
                part.write_text(json.dumps(state, indent=1))
                part.replace(state_file)
            suites[suite] = state[name]
            print("    " + ", ".join(f"{state[name][k]} {k}" for k in COUNTS), flush=True)
        runs.append({"transformers": version, "torch": torch, "suites": suites})
    result = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version()},
        "runs": runs,
    }
    print(table(["transformers", "torch", *arguments.suites], rows(result), "l" * (2 + len(arguments.suites))))
    if set(arguments.versions) >= set(RELEASES) and set(arguments.suites) == set(SUITES):
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {RESULT.relative_to(ROOT)}")
    else:
        print(f"a part of the releases or suites: {RESULT.relative_to(ROOT)} stays as it is")
    sys.exit(0 if is_green(result) else 1)


if __name__ == "__main__":
    main()
