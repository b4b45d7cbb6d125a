"""The seam of encoder-decoder models: rows are taken out where the encoder gives them, so that cross-attention reads fewer.

The decoder's own sequence is untouched, and so are its positions, masks, labels and self-attention cache. The encoder's rows
carry their positions in their values, nothing is renumbered. Cross-attention takes no mask in these models: within one batch
all items must end with the same number of rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmcompress.compressor import Compressor
from mmcompress.ledger import Decoder, ItemCount, Ledger, SampleCount
from mmcompress.models.generic import Call, ItemSpec
from mmcompress.models.items import run_stages
from mmcompress.models.rows import pack, packed_column, rows
from mmcompress.models.seam import Seam
from mmcompress.models.signals import last_block, watch
from mmcompress.models.wrap import Wrapper

KIND = "audio"


class CrossAttention(Decoder):
    """Costs of n encoder rows in the decoder's cross-attention, in every layer, for one run of the encoder.

    FLOPs: keys and values of the rows, `4 n d e Hk`, once; scores and mix for one decoder row, `4 n e Hq` (each generated token
    costs that again). KV bytes: the cross-attention cache, `2 n e Hk` elements a layer. The encoder, the decoder's
    self-attention and its MLPs do not depend on n and are not counted.
    """

    @classmethod
    def of(cls, config: Any, bytes: int = 2) -> CrossAttention:
        heads = config.decoder_attention_heads
        head_width = config.d_model // heads
        return cls(config.decoder_layers, config.d_model, config.decoder_ffn_dim, heads, heads, head_width, bytes)

    def flops(self, rows: list[int]) -> int:
        return sum(4 * n * self.head_width * (self.width * self.kv_heads + self.heads) for n in rows)


class EncoderDecoderSeam(Seam):
    """A compressor installed in an encoder-decoder model. One entry of the ledger is one window of one batch row."""

    anywhere = ()

    def __init__(self, model: Any, compressor: Compressor):
        super().__init__(model, compressor)
        text = self.family.text
        self.ledger = Ledger(CrossAttention.of(text.config, next(text.parameters()).element_size()))

    @staticmethod
    def layer(layer: int | float | None, depth: int) -> int:
        if layer is not None:
            raise ValueError(f"layer must be None in an encoder-decoder model, whose decoder holds no items; got {layer!r}")
        return 0

    def install(self) -> None:
        encoder: Any = self.family.tower(self.family.core, KIND)
        try:
            for module, name, make in (
                (encoder, "forward", self.on_encoder),
                (self.model, "generate", self.on_generate),
            ):
                self.wrappers.append(Wrapper(module, name, make, self))
        except BaseException:
            self.uninstall()
            raise

    def on_encoder(self, encoder: nn.Module, forward: Callable) -> Callable:
        def run(*args, **kw):
            call = Call({}, None, None)
            with self.encoder_tap(encoder, call):
                out = forward(*args, **kw)
            x: Tensor = out[0]
            B, N = x.shape[:2]
            flat: dict[str, Tensor] = {r: self.family.signal(call, KIND, r) for r in self.encoder_reads}
            specs = [ItemSpec.lattice(KIND, (N, 1, 1), b * N) for b in range(B)]
            self.items = [self.item(spec, b, torch.arange(N), x, flat) for b, spec in enumerate(specs)]
            counts = [ItemCount(KIND, N, 0, {0: N}) for _ in specs]
            for item, count in zip(self.items, counts, strict=True):
                item.count = count
            samples = [SampleCount(N, {}, [count]) for count in counts]
            if self.prefill:
                x, keep = run_stages(self.prefill, self.items, x, self.plan.reads.get(0, []))
                index, real = pack(keep, left=False)
                if not bool(real.all()):
                    raise ValueError(
                        f"every item of a batch must keep the same number of tokens in {self.family.name} models, whose "
                        f"cross-attention takes no mask; got {real.sum(1).tolist()}: pass the recordings one by one"
                    )
                source = packed_column(keep, real, left=False)
                for item, sample in zip(self.items, samples, strict=True):
                    item.move(source)
                    sample.rows_from[0] = index.shape[1]
                x = rows(x, index)
                out = (x, *out[1:]) if isinstance(out, tuple) else replaced(out, x)
            self.ledger.samples.extend(samples)
            return out

        return run

    def encoder_tap(self, core: nn.Module, call: Call) -> contextlib.AbstractContextManager:
        if "keys" not in self.encoder_reads:
            return contextlib.nullcontext()
        seen = call.attention.setdefault(KIND, [])
        return watch([last_block(core)], lambda module, q, k, mask, scaling: seen.append((q, k)))

    def on_generate(self, model: nn.Module, generate: Callable) -> Callable:
        def run(*args, **kw):
            config = kw.get("generation_config")
            if kw.get("assistant_model") is not None:
                raise ValueError("assistant_model must be None while a compressor is installed")
            if kw.get("return_token_timestamps") or getattr(config, "return_token_timestamps", False):
                raise ValueError(
                    "return_token_timestamps must be False while a compressor is installed: they are read from the places of "
                    "cross-attention (return_timestamps works)"
                )
            if kw.get("encoder_outputs") is not None:
                raise ValueError("encoder_outputs must be None while a compressor is installed: it acts where the encoder runs")
            return generate(*args, **kw)

        return run


def replaced(out: Any, x: Tensor) -> Any:
    out.last_hidden_state = x
    return out
