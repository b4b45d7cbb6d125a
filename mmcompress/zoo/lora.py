"""Low-rank adapters: W x + (alpha / r) B A x, trained beside a frozen W and merged into it at load.

Source: Hu et al. 2021, arXiv 2106.09685.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

RANK, ALPHA = 8, 16


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable float32 low-rank path that computes in the input's dtype; starts as the layer
    itself (B = 0)."""

    def __init__(self, base: nn.Linear, generator: torch.Generator, rank: int = RANK) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        a, b = torch.randn(rank, base.in_features, generator=generator), torch.zeros(base.out_features, rank)
        self.a, self.b = (nn.Parameter(x.to(base.weight.device)) for x in (a * base.in_features**-0.5, b))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + (x @ self.a.T.to(x.dtype)) @ (self.b.T * (ALPHA / RANK)).to(x.dtype)


def add_lora_(model: nn.Module, generator: torch.Generator, rank: int = RANK) -> dict[str, LoRALinear]:
    """Put an adapter on every linear layer below `model`, in place; returns them by the layer's name."""
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    layers = {}
    for name, linear in linears:
        parent, _, child = name.rpartition(".")
        layers[name] = LoRALinear(linear, generator, rank)
        setattr(model.get_submodule(parent), child, layers[name])
    return layers


def lora_state(layers: dict[str, LoRALinear], prefix: str) -> dict[str, torch.Tensor]:
    """The adapters' tensors under the full names of the weights they belong to."""
    return {f"{prefix}{n}.weight.lora_{k}": getattr(m, k).detach() for n, m in layers.items() for k in "ab"}


def merge_lora(state: dict[str, torch.Tensor], lora: dict[str, torch.Tensor]) -> None:
    """Add every adapter to its weight in `state`, of whatever rank (alpha is twice the rank); an adapter without its weight
    raises ValueError."""
    for name in sorted({n.rpartition(".lora_")[0] for n in lora}):
        if name not in state:
            raise ValueError(f"lora must hold adapters of known weights, got one for {name!r}")
        b, a = lora[name + ".lora_b"].float(), lora[name + ".lora_a"].float()
        state[name] = state[name] + (b @ a * (ALPHA / RANK)).to(state[name].device)


def apply_parts_(state: dict[str, torch.Tensor], folder: Path) -> None:
    """Put the trained parts of a folder's *.safetensors into `state`: a tensor named like a weight replaces it, pairs
    NAME.lora_a, NAME.lora_b are added to weight NAME.

    A name that `state` lacks or a shape that differs raises ValueError; `model.image_newline` is left out where the model has
    none.
    """
    lora: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, value in load_file(file).items():
            if name.endswith((".lora_a", ".lora_b")):
                lora[name] = value
            elif name in state and state[name].shape == value.shape:
                state[name] = value.float()
            elif name in state or name != "model.image_newline":
                raise ValueError(f"{file.name} must hold weights of this model, got {name!r} of shape {tuple(value.shape)}")
    merge_lora(state, lora)
