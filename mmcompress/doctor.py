"""What this installation consists of, which implementation of each operator runs and why, and what would make it faster."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib import metadata
from typing import Any

PACKAGES = ("torch", "transformers", "safetensors", "numpy", "pillow", "torchvision", "torchaudio")
EXTRAS = {
    "zoo": ("torchvision", "gguf", "onnx", "easy_vqa", "skimage", "sklearn", "matplotlib"),
    "video": ("cv2",),
    "audio": ("torchaudio", "soundfile"),
}
"""extra -> the modules it brings, without which a command that needs it stops."""


def examine() -> dict[str, Any]:
    """The whole report as plain JSON values."""
    import torch

    import mmcompress
    from mmcompress import ops, zoo
    from mmcompress.models.tested import TESTED

    gpus = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(i)
        gpus.append({"name": p.name, "memory_gib": round(p.total_memory / 2**30, 1), "capability": f"{p.major}.{p.minor}"})
    report: dict[str, Any] = {
        "mmcompress": mmcompress.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "tested": {"transformers": list(TESTED)},
        "extras": {extra: [m for m in modules if importlib.util.find_spec(m) is None] for extra, modules in EXTRAS.items()},
        "cpu": {
            "name": cpu_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "vectors": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
        "gpus": gpus,
        "cuda_build": torch.version.cuda,
        "operators": ops.status(),
        "zoo": zoo.list_models(),
    }
    report["advice"] = advice(report)
    return report


def advice(report: dict[str, Any]) -> list[str]:
    """What would make it faster or more complete, most useful first; empty where nothing is known."""
    from mmcompress.models import tested

    out = []
    if (installed := report.get("packages", {}).get("transformers")) and not tested.is_tested(installed):
        out.append(tested.advice(installed))
    slow = {d: [n for n, s in report["operators"].items() if s[d].startswith("reference")] for d in ("cpu", "cuda")}
    if slow["cpu"]:
        out.append(
            f"{len(slow['cpu'])} of {len(report['operators'])} operators run their PyTorch reference on the CPU: "
            "with a C++ compiler, `MMCOMPRESS_BUILD=cpu pip install --no-build-isolation -e .` builds them"
        )
    if report["gpus"] and slow["cuda"]:
        out.append(
            f"{len(slow['cuda'])} of {len(report['operators'])} operators run their PyTorch reference on the GPU: "
            "with nvcc, `MMCOMPRESS_BUILD=cuda pip install --no-build-isolation -e .` builds them"
        )
    if not report["gpus"]:
        why = "this PyTorch was built without CUDA" if report["cuda_build"] is None else "PyTorch finds no CUDA device"
        out.append(f"{why}: models run on the CPU, where prefill takes most of the time")
    threads, cores = report["cpu"]["threads"], report["cpu"]["cores"]
    if threads < cores:
        out.append(f"PyTorch uses {threads} of {cores} cores: set OMP_NUM_THREADS={cores} or torch.set_num_threads({cores})")
    for extra, missing in report["extras"].items():
        if missing:
            out.append(f"{', '.join(missing)} missing: `pip install 'mmcompress[{extra}]'` brings what {extra} needs")
    return out


def text(report: dict[str, Any]) -> str:
    """The report for people."""
    from mmcompress.report import table

    cpu, tested = report["cpu"], report["tested"]["transformers"]
    gpus = [f"{g['name']}, {g['memory_gib']} GiB, compute capability {g['capability']}" for g in report["gpus"]]
    facts = [
        ["mmcompress", f"{report['mmcompress']} on Python {report['python']}, {report['platform']}"],
        *([name, version or "not installed"] for name, version in report["packages"].items()),
        ["tested with", f"transformers {tested[0]} to {tested[-1]} ({', '.join(tested)})"],
        ["CPU", f"{cpu['name']}, {cpu['cores']} cores, {cpu['vectors']}, {cpu['threads']} threads"],
        ["GPU", "; ".join(gpus) or f"none (PyTorch built for CUDA {report['cuda_build'] or 'none'})"],
        *(
            [f"extra {name}", "complete" if not missing else "missing " + ", ".join(missing)]
            for name, missing in report["extras"].items()
        ),
        ["zoo", ", ".join(report["zoo"])],
    ]
    operators = [[name, s["cpu"], s["cuda"]] for name, s in sorted(report["operators"].items())]
    hints = [f"  • {hint}" for hint in report["advice"]] or ["  nothing found"]
    return "\n".join(
        [
            table([], facts, "ll"),
            "",
            table(["operator", "on cpu", "on cuda"], operators, "lll"),
            "",
            "What would make it faster or more complete",
            *hints,
        ]
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor as the system calls it."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
