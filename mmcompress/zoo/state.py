"""What every training here shares: its learning rate, and its state on disk (parameters, optimizer moments and step, in
safetensors as NAME.state and in JSON, replaced whole)."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn


def rate(step: int, steps: int, warmup: int = 30) -> float:
    """The share of the peak learning rate: a linear warm-up, then half a cosine down to 0.02."""
    return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


class State:
    """`save` and `load` of one stage; `path` without a suffix. cpu_minutes: processor time of the stage in all calls."""

    def __init__(self, path: Path, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        self.path, self.parameters, self.optimizer = path, parameters, optimizer
        self.before, self.began = 0.0, time.process_time()
        self.saved = time.time()

    @property
    def cpu_minutes(self) -> float:
        return round(self.before + (time.process_time() - self.began) / 60, 1)

    def keep(self, step: int, seconds: float = 180) -> None:
        """`save` where the last time is that long ago."""
        if time.time() - self.saved > seconds:
            self.save(step)

    def save(self, step: int) -> None:
        tensors = {f"p{i}": p.detach().contiguous() for i, p in enumerate(self.parameters)}
        for i, p in enumerate(self.parameters):
            for k, v in self.optimizer.state.get(p, {}).items():
                tensors[f"{k}.{i}"] = v.contiguous()
        part = self.path.with_suffix(".tmp")
        save_file(tensors, part)
        os.replace(part, self.path.with_suffix(".state"))
        part.write_text(json.dumps({"step": step, "cpu_minutes": self.cpu_minutes}))
        os.replace(part, self.path.with_suffix(".json"))
        self.saved = time.time()

    def load(self) -> int:
        """Steps done, 0 if nothing was saved."""
        file = self.path.with_suffix(".json")
        if not file.is_file():
            return 0
        saved = json.loads(file.read_text())
        self.before = saved.get("cpu_minutes", 0.0)
        tensors = load_file(self.path.with_suffix(".state"))
        for i, p in enumerate(self.parameters):
            p.data.copy_(tensors[f"p{i}"])
            moments = {k: tensors[f"{k}.{i}"] for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}.{i}" in tensors}
            if moments:  # AdamW counts its steps on the CPU
                self.optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in moments.items()}
        return int(saved["step"])
