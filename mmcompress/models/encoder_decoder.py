"""The seam of encoder-decoder models: rows are taken out where the encoder gives them, so that cross-attention reads fewer.

The decoder's own sequence is untouched, and so are its positions, masks, labels and self-attention cache. The encoder's rows
carry their positions in their values, nothing is renumbered. Cross-attention takes no mask in these models: within one batch
all items must end with the same number of rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmcompress.compressor import Compressor
from mmcompress.ledger import Decoder, ItemCount, SampleCount
from mmcompress.models.call import NOTE, Call, running
from mmcompress.models.doors.layer import LayerDoor
from mmcompress.models.finding import encoder_signals, item_of
from mmcompress.models.generic import ItemSpec
from mmcompress.models.items import run_stages
from mmcompress.models.rows import pack, packed_column, rows
from mmcompress.models.seam import Seam
from mmcompress.models.wrap import Wrapped, bound

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

    def flops(self, rows: Sequence[int], past: Sequence[int] = ()) -> int:
        return sum(4 * n * self.head_width * (self.width * self.kv_heads + self.heads) for n in rows)


class NoLayers(LayerDoor):
    """The decoder holds no items."""

    name = ""

    def at(self, stage: Compressor) -> int:
        raise ValueError(f"layer must be None in an encoder-decoder model, whose decoder holds no items; got {stage.layer!r}")


class EncoderDecoderSeam(Seam):
    """A compressor installed in an encoder-decoder model. One entry of the ledger is one window of one batch row."""

    anywhere = ()

    def decoder(self) -> Decoder:
        text = self.family.text
        return CrossAttention.of(text.config, next(text.parameters()).element_size())

    def place(self, compressor: Compressor) -> None:
        self.standing["layer"] = NoLayers(self)
        super().place(compressor)

    def put_wrappers(self) -> None:
        core = self.family.core
        self.refuse_replicas(core)
        self.wrap_encoders(core)
        self.wrap(self.family.tower(core, KIND), "forward", "on_encoder")
        self.wrap(core, "forward", "on_core")
        self.wrap(self.model, "generate", "on_generate")

    def on_core(self, wrapped: Wrapped, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Refuse encoder states that did not come from the encoder as it is now: they would pass uncompressed."""
        if not args and kwargs.get("encoder_outputs") is None:
            return wrapped.original(**kwargs)
        given = bound(wrapped.module, "forward", args, kwargs).get("encoder_outputs")
        if given is not None and self.acts and not torch.compiler.is_compiling() and not self.knows(given):
            raise ValueError(
                "encoder_outputs must come from this model's own encoder while the compressor is installed, which acts "
                "where the "
                f"encoder runs; got {type(given).__name__} made elsewhere (pass input_features instead)"
            )
        return wrapped.original(*args, **kwargs)

    def knows(self, given: Any) -> bool:
        """Whether these states were made under this compressor (beams repeat them in place)."""
        states = given[0] if isinstance(given, (list, tuple)) else getattr(given, "last_hidden_state", given)
        return self.licence in (getattr(given, NOTE, None), getattr(states, NOTE, None))

    def on_encoder(self, wrapped: Wrapped, args: tuple, kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            raise RuntimeError("the encoder must not be compiled while a compressor is installed: compile the decoder alone")
        call = Call(self, {}, None, None, kind=KIND)
        with self.running.one(), running(call), self.hearing(call, KIND):
            out = wrapped.original(*args, **kwargs)
        x: Tensor = out[0]
        B, N = x.shape[:2]
        values = encoder_signals(self.family, call, KIND, self.encoder_reads)
        specs = [ItemSpec.lattice(KIND, (N, 1, 1), b * N) for b in range(B)]
        items = [item_of(spec, b, torch.arange(N, device="cpu"), x, values) for b, spec in enumerate(specs)]
        counts = [ItemCount(KIND, N, 0, {0: N}) for _ in specs]
        for item, count in zip(items, counts, strict=True):
            item.count = count
        samples = [SampleCount(N, {}, [count]) for count in counts]
        stages = self.standing["prefill"].stages.get(0, [])
        if stages:
            x, keep = run_stages(stages, items, x)
            index, real = pack(keep, left=False)
            if not bool(real.all()):
                raise ValueError(
                    f"every item of a batch must keep the same number of tokens in {self.family.name} models, whose "
                    f"cross-attention takes no mask; got {real.sum(1).tolist()}: pass the recordings one by one"
                )
            source = packed_column(keep, real, left=False)
            for item, sample in zip(items, samples, strict=True):
                item.move(source)
                item.forget()
                sample.rows_from[0] = index.shape[1]
            x = rows(x, index)
            if isinstance(out, tuple):
                out = (x, *out[1:])
            else:
                out.last_hidden_state = x
        for part in (out, x):
            with contextlib.suppress(AttributeError):  # a tuple cannot be marked, its tensor is
                setattr(part, NOTE, self.licence)
        self.items = items
        self.ledger.add(samples, x.element_size())
        return out

    def on_generate(self, wrapped: Wrapped, args: tuple, kwargs: dict[str, Any]) -> Any:
        given = bound(wrapped.module, "generate", args, kwargs)
        if given.get("assistant_model") is not None:
            raise ValueError("assistant_model must be None while a compressor is installed")
        configs = (given.get("generation_config"), self.model.generation_config)
        if given.get("return_token_timestamps") or any(getattr(c, "return_token_timestamps", False) for c in configs):
            raise ValueError(
                "return_token_timestamps must be False while a compressor is installed: they are read from the places of "
                "cross-attention (return_timestamps works, its segments may shift)"
            )
        if given.get("encoder_outputs") is not None and not self.knows(given["encoder_outputs"]):
            raise ValueError("encoder_outputs must be None while a compressor is installed: it acts where the encoder runs")
        with self.running.one():
            return wrapped.original(*args, **kwargs)
