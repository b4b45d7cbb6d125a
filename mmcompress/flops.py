"""What a prefill costs in a language model, layer by layer, read off the modules that it really has.

FLOPs, two per multiply-add. A layer with n rows costs n times its matrices, plus its attention: every row meets every row,
`2 n² H (e + v)` for H query heads, keys of width e and values of width v (`n min(n, w)` pairs under a window of w rows,
`n (P + n)` on a cache of P rows). For a plain gated layer of width d, MLP width m, Hq query and Hk key heads of width e this is
the closed form of the field, `4 n d e (Hq + Hk) + 6 n d m + 4 n² e Hq`, or `2n(4d² + 3dm) + 4dn²` without grouped heads
(GlobalCom², arXiv 2501.05179, tables 8-9).

Matrices are linear maps (low-rank ones, adapters, routers and shared experts too), short convolutions, and of the experts the
`top_k` that a token uses (all of them in models that run all, such as Llama 4). Not counted: the causal half that a kernel may
leave out, norms, softmax, rotary embeddings, biases, activations, the scan of a linear-attention or state-space layer
(`LayerCost.scan` says that there is one), the mixing of parallel streams (Gemma 3n), embeddings, output head, encoder.
`torch.utils.flop_counter` under plain SDPA counts the same numbers, but full squares under a window, the scan's and the
streams' products, and the columns that a convolution pads; it leaves out what runs in kernels that it does not know.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

EXPERTS_USED = ("top_k", "num_experts_per_tok", "moe_top_k", "moe_topk", "top_k_experts", "experts_per_token")
FUSED = ("qkv_proj", "query_key_value", "Wqkv")
OUTPUTS = ("o_proj", "out_proj", "dense", "wo")
SCANS = ("linear_attention", "mamba", "recurrent")
WITHOUT_SQUARES = (*SCANS, "conv", "moe", "mlp")
OWN = ("sinks",)
"""Parameters of an attention module itself that cost no product."""


@dataclass(frozen=True)
class LayerCost:
    """One decoder layer: FLOPs of a row in its matrices, FLOPs of a pair of query and key row, numbers cached per row, how many
    rows a row sees at most (None: all), FLOPs that every row of the cache costs again in each forward (latent attention makes
    its keys and values anew), and whether the layer also has a scan, which is not counted."""

    row: int
    pair: int
    cached: int
    window: int | None = None
    again: int = 0
    scan: bool = False

    def flops(self, rows: int, past: int = 0) -> int:
        """FLOPs of a forward with `rows` new rows on a cache that holds `past`."""
        seen = min(rows + past, self.window or rows + past)
        return rows * (self.row + self.pair * seen) + past * self.again

    def held(self, rows: int) -> int:
        """Numbers that a growing cache holds after `rows` rows; behind a window of w only w - 1, the next one is the last."""
        return self.cached * (min(rows, self.window - 1) if self.window else rows)


@dataclass(frozen=True)
class Decoder:
    """A language model's costs: those of its layers, and bytes per cached number.

    Made from its dimensions (layers L, width d, MLP width m, query heads, key heads, head width) it is the plain gated model in
    closed form. `Decoder.of(model)` reads the layers themselves; the dimensions are then only what the config names (0 where
    it names none), and `unknown` says why nothing is counted where a layer is not understood.
    """

    layers: int
    width: int
    mlp: int
    heads: int
    kv_heads: int
    head_width: int
    bytes: int = 2
    costs: tuple[LayerCost, ...] = ()
    unknown: str | None = None

    def __post_init__(self) -> None:
        if self.costs or self.unknown:
            return
        d, e = self.width, self.head_width
        row = 4 * d * e * (self.heads + self.kv_heads) + 6 * d * self.mlp
        one = LayerCost(row, 4 * e * self.heads, 2 * e * self.kv_heads)
        object.__setattr__(self, "costs", (one,) * self.layers)

    @classmethod
    def of(cls, text: Any, bytes: int = 2) -> Decoder:
        """From a transformers text model, or from its config (a model of that shape is made without memory).

        Raises ValueError for a config that transformers makes no model from.
        """
        model = text if isinstance(text, nn.Module) else _without_memory(text)
        blocks, config = _blocks(model)
        costs: tuple[LayerCost, ...] = ()
        unknown = None if len(blocks) else f"{type(model).__name__} has no list of layers"
        try:
            costs = tuple(_cost(layer, i, config) for i, layer in enumerate(blocks))
        except NotUnderstood as error:
            unknown = str(error)
        number = lambda *names: next((v for n in names if isinstance(v := _named(config, n), int)), 0)  # noqa: E731
        heads = number("num_attention_heads")
        return cls(
            layers=len(blocks) or number("num_hidden_layers"),
            width=number("hidden_size"),
            mlp=number("intermediate_size"),
            heads=heads,
            kv_heads=number("num_key_value_heads", "num_attention_heads"),
            head_width=number("head_dim") or number("hidden_size") // max(heads, 1),
            bytes=bytes,
            costs=costs,
            unknown=unknown,
        )

    @property
    def scans(self) -> int:
        """Layers whose scan is not in the FLOPs."""
        return sum(c.scan for c in self.costs)

    def flops(self, rows: Sequence[int], past: Sequence[int] = ()) -> int | None:
        """FLOPs of one prefill that sees rows[i] rows in layer i, on a cache that holds past[i] (none by default)."""
        if self.unknown:
            return None
        return sum(c.flops(n, p) for c, n, p in zip(self.costs, rows, past or [0] * self.layers, strict=True))

    def kv_bytes(self, rows: Sequence[int], element_size: int | None = None) -> int | None:
        """Bytes of keys and values in a cache that grew to rows[i] rows in layer i. element_size: bytes per number."""
        if self.unknown:
            return None
        return (element_size or self.bytes) * sum(c.held(n) for c, n in zip(self.costs, rows, strict=True))


class NotUnderstood(Exception):
    """A layer holds something whose cost is not known."""


def _without_memory(config: Any) -> nn.Module:
    from transformers import AutoModel

    try:
        with torch.device("meta"):
            return AutoModel.from_config(config)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"text must be a transformers text model or its config, got {type(config).__name__}") from error


def _named(config: Any, name: str) -> Any:
    """What a config says under a name; None where it says nothing, or refuses one value because its layers differ."""
    try:
        return getattr(config, name, None)
    except (ValueError, RuntimeError):
        return None


def _blocks(model: nn.Module) -> tuple[Sequence[nn.Module], Any]:
    """The decoder layers of a text model, or of what wraps it, and the config of the module that has them."""
    at: Any = model
    while at is not None:
        found = getattr(at, "layers", None)
        if isinstance(found, nn.ModuleList):
            return found, getattr(at, "config", None)  # type: ignore[return-value]
        names = ("model", "language_model", "text_model", "decoder")
        at = next((c for n in names if isinstance(c := getattr(at, n, None), nn.Module)), None)
    return (), getattr(model, "config", None)


def _cost(layer: nn.Module, i: int, config: Any) -> LayerCost:
    where = f"layer {i} ({type(layer).__name__})"
    pair, cached, window, again = _attention(layer, i, config, where)
    scan = _kind(config, i) in SCANS or any(n.endswith("A_log") for n, _ in layer.named_parameters())
    return LayerCost(2 * sum(_matrices(layer, config, where)), pair, cached, window, again, scan)


def _kind(config: Any, i: int) -> str | None:
    """What the config calls layer i."""
    types = _named(config, "layer_types") or _named(config, "layers_block_type")
    return types[i] if types and i < len(types) else None


def _is_linear(module: Any) -> bool:
    """A linear map, also a quantised one; what wraps another (an adapter) is none itself."""
    wide = lambda m: isinstance(getattr(m, "in_features", None), int) and isinstance(getattr(m, "out_features", None), int)  # noqa: E731
    one = getattr(getattr(module, "weight", None), "ndim", 2) < 3  # three: a matrix for every expert
    return one and wide(module) and not any(wide(m) for m in module.modules() if m is not module)


def _shape(parameter: Any) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))  # DeepSpeed leaves an empty tensor in its place


def _matrices(layer: nn.Module, config: Any, where: str) -> Iterator[int]:
    """Multiply-adds of one row in every matrix of a layer."""
    unused = _unused(layer)
    for name, module in layer.named_modules():
        if name in unused or isinstance(module, nn.Embedding) or "Norm" in type(module).__name__:
            continue
        if _is_linear(module):
            yield _of_experts(module.in_features * module.out_features, name, layer, config, where)  # type: ignore[operator]
            continue
        for own, parameter in module.named_parameters(recurse=False):
            shape = _shape(parameter)
            if sum(n > 1 for n in shape) < 2 or "bias" in own:
                continue
            size = math.prod(shape)
            if isinstance(module, nn.Conv1d) or (own == "weight" and len(shape) == 2):  # a convolution, a router
                yield _of_experts(size, name, layer, config, where)
            elif len(shape) == 3:  # all experts in one tensor
                yield _share(size, shape[0], name, layer, config, where)
            else:
                raise NotUnderstood(f"{where}: {name}.{own} of shape {list(shape)}")


def _unused(layer: nn.Module) -> set[str]:
    """Key and value maps of a layer that reads the keys and values of an earlier one."""
    return {
        f"{name}.{part}"
        for name, module in layer.named_modules()
        if getattr(module, "is_kv_shared_layer", False)
        for part in ("k_proj", "v_proj")
    }


def _of_experts(size: int, name: str, layer: nn.Module, config: Any, where: str) -> int:
    """The part of a matrix's multiply-adds that one row causes: all, or that of one expert in a list of them."""
    parts = name.split(".")
    for n in range(len(parts) - 1, 0, -1):
        if parts[n].isdigit():
            experts = ".".join(parts[:n])
            listed = layer.get_submodule(experts)
            if not parts[n - 1].endswith("experts"):
                raise NotUnderstood(f"{where}: a list of {len(listed)} modules {experts}")  # type: ignore[arg-type]
            return _share(size * len(listed), len(listed), experts, layer, config, where)  # type: ignore[arg-type]
    return size


def _share(size: int, experts: int, name: str, layer: nn.Module, config: Any, where: str) -> int:
    """Multiply-adds of one row in `experts` equal matrices of `size` numbers together, of which it takes `top_k`."""
    parts = name.split(".")
    around = [layer.get_submodule(".".join(parts[:n])) for n in range(len(parts), 0, -1)]
    if not isinstance(around[0], nn.ModuleList) and len(inspect.signature(around[0].forward).parameters) == 1:
        return size  # told the rows alone, not which experts they go to: all experts read all rows
    beside = [child for module in around for child in (module, *module.children())]
    for holder in (*beside, config):
        for attribute in EXPERTS_USED:
            used = _named(holder, attribute)
            if isinstance(used, int) and 0 < used <= experts:
                return size // experts * used
    raise NotUnderstood(f"{where}: {name} holds {experts} matrices, and nothing says how many a row uses")


def _attention(layer: nn.Module, i: int, config: Any, where: str) -> tuple[int, int, int | None, int]:
    """FLOPs per pair of rows, numbers cached per row, window, and FLOPs per cached row of a layer's attention."""
    kind = _kind(config, i)
    if kind in WITHOUT_SQUARES:
        return 0, 0, None, 0
    found = [
        (m, o) for m in layer.modules() if (o := _first(m, OUTPUTS)) is not None and _first(m, ("q_proj", "q_b_proj", *FUSED))
    ]
    if len(found) != 1:
        raise NotUnderstood(f"{where}: {len(found)} attention modules that are understood")
    (attention, output), at = found[0], f"{where}: {type(found[0][0]).__name__}"
    for name, child in attention.named_children():
        if not (_is_linear(child) or hasattr(child, "base_layer") or not list(child.parameters()) or "orm" in name):
            raise NotUnderstood(f"{at} holds {name} ({type(child).__name__})")
    for name, _ in attention.named_parameters(recurse=False):
        if name not in OWN:
            raise NotUnderstood(f"{at} holds {name}")
    keys = next((v for n in ("qk_head_dim", "head_dim", "head_size") if (v := getattr(attention, n, None)) is not None), None)
    values = getattr(attention, "v_head_dim", None) or keys
    if not isinstance(keys, int) or not isinstance(values, int):
        raise NotUnderstood(f"{at} names no head width")
    heads, rest = divmod(output.in_features, values)
    groups = getattr(attention, "num_key_value_groups", None)
    k = _first(attention, ("k_proj",))
    kv_heads = heads // groups if isinstance(groups, int) else (k.out_features // keys if k is not None else heads)
    queries = _first(attention, ("q_proj", "q_b_proj", *FUSED)).out_features
    fused = heads * keys + kv_heads * (keys + values)
    if rest or queries not in (heads * keys, 2 * heads * keys, fused) or (k is not None and k.out_features != kv_heads * keys):
        raise NotUnderstood(f"{at}: widths {queries} and {output.in_features} do not fit heads of {keys} and {values}")
    makes_keys = any(_first(attention, (n,)) is not None for n in ("k_proj", "kv_b_proj", *FUSED))
    cached = 0 if getattr(attention, "is_kv_shared_layer", False) or not makes_keys else kv_heads * (keys + values)
    again = 0
    if hasattr(attention, "expand_kv"):  # the cache holds latents
        latent: Any = attention
        rank, out = latent.kv_b_proj.in_features, latent.kv_b_proj.out_features
        cached, again = rank + latent.qk_rope_head_dim, 2 * rank * out
    return 2 * heads * (keys + values), cached, _window(attention, kind, config), again


def _first(module: nn.Module, names: Sequence[str]) -> Any:
    """The first child of these names that is a linear map, or wraps one."""
    found = (getattr(module, n, None) for n in names)
    return next((c for c in found if isinstance(c, nn.Module) and hasattr(c, "in_features")), None)


def _window(attention: nn.Module, kind: str | None, config: Any) -> int | None:
    """How many rows a row of this layer sees at most."""
    if kind == "chunked_attention":
        return _named(config, "attention_chunk_size")
    if kind is not None and kind != "sliding_attention":
        return None
    window = attention.sliding_window if hasattr(attention, "sliding_window") else _named(config, "sliding_window")
    return window if isinstance(window, int) else None
