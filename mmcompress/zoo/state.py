"""A training's state on disk: parameters, optimizer moments and the step, in safetensors and JSON, replaced whole."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn


class State:
    """`save` and `load` of one stage; `path` without a suffix."""

    def __init__(self, path: Path, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        self.path, self.parameters, self.optimizer = path, parameters, optimizer

    def save(self, step: int, **more: float) -> None:
        tensors = {f"p{i}": p.detach().contiguous() for i, p in enumerate(self.parameters)}
        for i, p in enumerate(self.parameters):
            for k, v in self.optimizer.state.get(p, {}).items():
                tensors[f"{k}.{i}"] = v.contiguous()
        part = self.path.with_suffix(".tmp")
        save_file(tensors, part)
        os.replace(part, self.path.with_suffix(".safetensors"))
        self.path.with_suffix(".json").write_text(json.dumps({"step": step, **more}))

    def load(self) -> int:
        """Steps done, 0 if nothing was saved; `self.more` holds what else was."""
        file = self.path.with_suffix(".json")
        self.more = json.loads(file.read_text()) if file.is_file() else {"step": 0}
        if file.is_file():
            tensors = load_file(self.path.with_suffix(".safetensors"))
            for i, p in enumerate(self.parameters):
                p.data.copy_(tensors[f"p{i}"])
                moments = {k: tensors[f"{k}.{i}"] for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}.{i}" in tensors}
                if moments:
                    self.optimizer.state[p] = moments
        return int(self.more["step"])
