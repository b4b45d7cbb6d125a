"""The visual half of a zoo model in training: pixels to tower features, features to embeddings of the language model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mmcompress.zoo.common import FEATURE_LAYERS, PATCH, PIXELS, SIDE

GRID = SIDE // PATCH
TOKENS = GRID * GRID


def patches(pixels: Tensor) -> Tensor:
    """Square views as Qwen's processor cuts them: [B, 3, 224, 224] -> [B * 256, 3 * 2 * 14 * 14], each patch twice in time."""
    x = pixels.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5)  # [B, 16, 16, 3, 14, 14]
    return x.unsqueeze(4).expand(*x.shape[:4], 2, PATCH, PATCH).reshape(-1, 3 * 2 * PATCH * PATCH)


def normalised(views: list[Image.Image]) -> Tensor:
    """Square 224-pixel pictures as the processors normalise them, [B, 3, 224, 224]."""
    x = torch.from_numpy(np.stack([np.asarray(v.convert("RGB")) for v in views])).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(PIXELS[k]).view(3, 1, 1) for k in ("image_mean", "image_std"))
    return (x - mean) / std


class Eye:
    """DINOv2 under a LLaVA's projector: features are the chosen hidden states without CLS, 256 rows a view."""

    tower_prefix = "model.vision_tower."
    projector_prefix = "model.multi_modal_projector."
    ends = ("linear_1", "linear_2")
    """The projector's first and last linear layer."""
    places: float = 52
    """Teach the tokens of shapes at most this high (pixels) to say where in their view they stand: one-dimensional positions do
    not. Larger ones are those of crops, whose places are not the picture's."""

    def __init__(self, model: Any) -> None:
        self.encoder: nn.Module = model.model.vision_tower
        self.tower, self.projector = self.encoder, model.model.multi_modal_projector
        self.mean: Tensor = torch.zeros(())  # of the features: taken away before the projector, folded into it at the end
        self.std: Tensor = torch.ones(())

    @property
    def like(self) -> Tensor:
        """Of the encoder's dtype and device."""
        return next(self.encoder.parameters())

    def features(self, pixels: Tensor) -> Tensor:
        """[B, 3, 224, 224] -> [B, 256, W], in the encoder's dtype."""
        states = self.encoder(pixels.to(self.like), output_hidden_states=True).hidden_states
        return torch.cat([states[i] for i in FEATURE_LAYERS], -1)[:, 1:]

    def project(self, x: Tensor) -> Tensor:
        """Rows of features -> embeddings of the language model, float32."""
        return self.projector(self.scaled(x)).float()

    def scaled(self, x: Tensor) -> Tensor:
        """Rows of features as the projector takes them, in its dtype."""
        return ((x.float() - self.mean) / self.std).to(next(self.projector.parameters()).dtype)

    @torch.no_grad()
    def calm_(self) -> None:
        """Make the random projector's first outputs small: large ones send its hidden units to where they stay silent."""
        self.projector.get_submodule(self.ends[1]).weight.mul_(0.1)  # type: ignore[union-attr, operator]

    def folded(self) -> dict[str, Tensor]:
        """The projector's tensors by their full names, the features' scale folded into its first layer."""
        state = {n: p.detach().float() for n, p in self.projector.named_parameters()}
        weight = state[f"{self.ends[0]}.weight"]
        weight = weight / self.std.to(weight)
        state[f"{self.ends[0]}.weight"] = weight
        state[f"{self.ends[0]}.bias"] = state[f"{self.ends[0]}.bias"] - weight @ self.mean.to(weight).expand(weight.shape[1])
        return {self.projector_prefix + n: p for n, p in state.items()}


class QwenEye(Eye):
    """Qwen2.5-VL's tower: features are the normalised rows that enter the merger's linear layers, in raster order."""

    tower_prefix = "model.visual.blocks."
    projector_prefix = "model.visual.merger."
    ends = ("mlp.0", "mlp.2")
    places = 0  # its rotary positions are relative, no token can know where it stands; m-RoPE tells the language model

    def __init__(self, model: Any) -> None:
        self.encoder = model.model.visual
        self.tower, self.projector = self.encoder.blocks, self.encoder.merger  # type: ignore[assignment]
        self.mean, self.std = torch.zeros(()), torch.ones(())

    def features(self, pixels: Tensor) -> Tensor:
        grid = torch.tensor([[1, GRID, GRID]]).expand(len(pixels), 3)
        return self.rows(patches(pixels), grid).view(len(pixels), TOKENS, -1)

    def rows(self, x: Tensor, grid: Tensor) -> Tensor:
        """The processor's pixel_values and grid (without a merge of patches) -> [rows, W]."""
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import get_vision_window_index

        config: Any = self.encoder.config
        grid = grid.to(self.like.device)
        window, _ = get_vision_window_index(grid, config.spatial_merge_size, config.window_size, config.patch_size)
        out = self.encoder(x.to(self.like), grid).last_hidden_state[torch.argsort(window)]
        return self.projector.ln_q(out.float())  # type: ignore[operator]

    def project(self, x: Tensor) -> Tensor:
        return self.projector.mlp(self.scaled(x)).float()  # type: ignore[operator]
