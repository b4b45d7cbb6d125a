"""The independent oracle of the seam: one sample at a time, a hand-written loop over decoder layers, rows removed by hand.

Eager attention, no cache, no padding, no batch, no code of `mmcompress.patch` or `mmcompress.models`. The only thing taken
from a running model is what its stock core hands to its text model (merged embeddings and position ids).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mmcompress.compressor import Compressor
from mmcompress.testing import AUDIO, IMAGE, MERGE, SIDE, VIDEO, anyres_canvas
from mmcompress.tokens import Tokens


def text_model(model):
    return model.model.language_model


def capture(model, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The keyword arguments of the text model in a stock forward without cache."""
    text, seen = text_model(model), {}
    original = text.forward

    def forward(*args, **kwargs):
        seen.update(kwargs)
        return original(*args, **kwargs)

    text.forward = forward
    try:
        model(**inputs, use_cache=False)
    finally:
        del text.forward
    return seen


def item_sizes(inputs: dict[str, Tensor]) -> dict[int, list[tuple[int, list[int]]]]:
    """For each placeholder id the items in order: (columns in the prompt, those among them that are separators)."""
    sizes: dict[int, list] = {IMAGE: [], VIDEO: [], AUDIO: []}
    if "pixel_values_videos" in inputs and inputs["pixel_values_videos"].dim() == 5:  # LLaVA-OneVision
        clips, frames = inputs["pixel_values_videos"].shape[:2]
        n = frames * (SIDE // 2) ** 2
        sizes[VIDEO] = [(n + 1, [n])] * clips
    if "image_sizes" in inputs:
        for size in inputs["image_sizes"].tolist():
            rows, columns = anyres_canvas(size)
            newlines = [SIDE**2 + (columns + 1) * r + columns for r in range(rows)]
            sizes[IMAGE].append((SIDE**2 + rows * (columns + 1), newlines))
    elif "image_grid_thw" in inputs or "video_grid_thw" in inputs:
        for token, name in ((IMAGE, "image_grid_thw"), (VIDEO, "video_grid_thw")):
            sizes[token] = [(t * h * w // MERGE**2, []) for t, h, w in inputs[name].tolist()] if name in inputs else []
    elif "pixel_values" in inputs:
        sizes[IMAGE] = [(SIDE**2, [])] * len(inputs["pixel_values"])
    elif "input_features" in inputs:
        sizes[AUDIO] = [((((n - 1) // 2 + 1) - 2) // 2 + 1, []) for n in inputs["feature_attention_mask"].sum(1).tolist()]
    return sizes


def find_items(inputs: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Of a prompt alone: for each item in order of the prompt its token columns and its separator columns."""
    ids, sizes, found = inputs["input_ids"][0], item_sizes(inputs), []
    for token, entries in sizes.items():
        columns = (ids == token).nonzero()[:, 0]
        assert len(columns) == sum(n for n, _ in entries)
        for n, separators in entries:
            mine, columns = columns[:n], columns[n:]
            is_separator = torch.zeros(n, dtype=torch.bool).index_fill(0, torch.tensor(separators, dtype=torch.long), True)
            found.append((mine[~is_separator], mine[is_separator]))
    return sorted(found, key=lambda pair: int(pair[0][0]))


def eager_layer(layer, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """One decoder layer on x [P, D] with visible [P, P]; also its attention probabilities [H, P, P]."""
    attention, P = layer.self_attn, len(x)
    h = layer.input_layernorm(x)
    d = cos.shape[-1]
    q, k, v = (
        f(h).view(P, -1, d).transpose(0, 1) for f in (attention.q_proj, attention.k_proj, attention.v_proj)
    )  # [heads, P, d]

    def rotate(y):
        a, b = y.chunk(2, -1)
        return y * cos + torch.cat([-b, a], -1) * sin

    norm = lambda name, y: getattr(attention, name, lambda z: z)(y)  # noqa: E731
    q, k = rotate(norm("q_norm", q)), rotate(norm("k_norm", k))
    share = len(q) // len(k)
    k, v = k.repeat_interleave(share, 0), v.repeat_interleave(share, 0)
    weights = (q @ k.transpose(1, 2) * d**-0.5).masked_fill(~visible, -torch.inf).softmax(-1)
    x = x + attention.o_proj((weights @ v).transpose(0, 1).reshape(P, -1))
    return x + layer.mlp(layer.post_attention_layernorm(x)), weights


@dataclass
class Step:
    """What one stage did to one item."""

    stage: int
    item: int
    num_tokens: int
    num_kept: int


@dataclass
class Result:
    """logits [S + T, V] on the caller's columns (a dropped one repeats the last kept before it), columns kept, rows a layer."""

    logits: Tensor
    columns: Tensor
    steps: list[Step] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


def cut_of(stage: Compressor, num_layers: int) -> int:
    if stage.layer is None:
        return 0
    return stage.layer if isinstance(stage.layer, int) else round(stage.layer * num_layers)


def reference(
    model, inputs: dict[str, Tensor], stages: Iterable[Compressor] = (), new_ids: Sequence[int] = (), wrong: str | None = None
) -> Result:
    """One prompt alone (batch of 1, no padding) through the stages, followed by `new_ids` that no stage touches.

    wrong: "positions" numbers the kept rows anew, "mask" hides the first row from all later ones, "slots" turns a token by its
    first position only, "decode" counts the new ids on from the number of rows: for negative controls.
    """
    text, stages = text_model(model), tuple(stages)
    call = capture(model, inputs)
    x = call["inputs_embeds"][0]
    S = len(x)
    position = call.get("position_ids")
    position = torch.arange(S)[None] if position is None else position.reshape(-1, S)[-3:]  # [1 or 3, S]
    if "mrope_section" in text.config.rope_parameters:
        position = position.expand(3, S)
    T = len(new_ids)
    if T:
        x = torch.cat([x, text.embed_tokens(torch.tensor(list(new_ids)))])
        first = len(x) // 2 if wrong == "decode" else position.max() + 1
        position = torch.cat([position, first + torch.arange(T).expand(len(position), T)], 1)
    column = torch.arange(S + T)
    deep = []  # DeepStack: what is added to every column after each of the first layers
    if call.get("deepstack_visual_embeds") is not None:
        visual = torch.cat([call["visual_pos_masks"][0], torch.zeros(T, dtype=torch.bool)])
        deep = [x.new_zeros(x.shape).index_put((visual,), level) for level in call["deepstack_visual_embeds"]]
    items = find_items(inputs)
    result = Result(x, column)
    weights = None
    carried: dict[int, tuple[Tensor, Tensor]] = {}  # item -> positions [K, P, 3], how many are no repeats [K]
    sizes: dict[int, Tensor] = {}  # item -> how many inputs its tokens stand for [1, K]
    window = getattr(model.config.text_config, "sliding_window", None)
    for i, layer in enumerate(text.layers):
        for number, stage in enumerate(stages):
            if cut_of(stage, len(text.layers)) == i:
                x, column, position, items = _reduce(
                    number, stage, x, column, position, items, weights, S, result.steps, carried, sizes, text.config
                )
        P = len(x)
        order = torch.arange(P)
        visible = order[:, None] >= order
        if window:
            visible &= order[:, None] - order < window
        if wrong == "mask":
            visible[1:, 0] = False
        p = torch.arange(P).expand(len(position), P) if wrong == "positions" else position
        if carried:
            cos, sin = turns(text.config, p, column, items, carried, wrong)
        else:
            cos, sin = (composed(t, text.config) for t in text.rotary_emb(x[None], p[:, None] if len(p) == 3 else p))
        x, weights = eager_layer(layer, x, cos, sin, visible)
        if i < len(deep):
            x = x + deep[i][column]
        result.rows.append(P - T)
    logits = model.lm_head(text.norm(x))
    source = (torch.isin(torch.arange(S + T), column).long().cumsum(0) - 1).clamp(min=0)
    result.logits, result.columns = logits[source], column
    return result


def frequencies_of_axes(config) -> list[list[int]]:
    """For each axis the numbers of its rotary frequencies, highest first, from the configuration."""
    rope = config.rope_parameters
    half = (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads) // 2
    if "mrope_section" not in rope:
        return [list(range(half))]
    t, h, w = rope["mrope_section"]
    if not rope.get("mrope_interleaved"):
        return [list(range(t)), list(range(t, t + h)), list(range(t + h, t + h + w))]
    of_h, of_w = list(range(1, 3 * h, 3)), list(range(2, 3 * w, 3))
    return [sorted(set(range(half)) - set(of_h) - set(of_w)), of_h, of_w]


def composed(table: Tensor, config) -> Tensor:
    """cos or sin [P, d] of one sample; transformers 5.16 gives one table an axis [3, 1, P, d] for contiguous sections."""
    if table.dim() == 3:
        return table[0]
    axes = frequencies_of_axes(config)
    half, out = sum(map(len, axes)), torch.empty(table.shape[2:], dtype=table.dtype)
    for a, frequencies in enumerate(axes):
        for f in (*frequencies, *(n + half for n in frequencies)):
            out[:, f] = table[a, 0, :, f]
    return out


def turns(config, position: Tensor, column: Tensor, items, carried, wrong: str | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin [P, d]: for each row and frequency the id that turns it, one by one. Of a token that carries several
    positions the i-th of the s frequencies of an axis reads slot i * P // s."""
    axes = frequencies_of_axes(config)
    half = sum(map(len, axes))
    ids = torch.zeros(len(column), half)
    for a, frequencies in enumerate(axes):
        for f in frequencies:
            ids[:, f] = position[a].float()
    for n, (slots, _) in carried.items():
        for token, own in zip(torch.searchsorted(column, items[n][0]).tolist(), slots, strict=True):
            for a, frequencies in enumerate(axes):
                for i, f in enumerate(frequencies):
                    ids[token, f] = own[0 if wrong == "slots" else i * len(own) // len(frequencies), a]
    angle = ids * config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
    angle = torch.cat([angle, angle], 1)
    return angle.cos(), angle.sin()


def _reduce(number, stage, x, column, position, items, weights, S, steps, carried, sizes, config):
    """An item's separators stay for as long as one of its tokens does."""
    dropped, left = [], []
    for n, (tokens, separators) in enumerate(items):
        rows = torch.searchsorted(column, tokens)
        signals = {}
        if "query_attention" in stage.reads:
            last = int(torch.searchsorted(column, S - 1))
            signals["query_attention"] = weights[:, last, rows].mean(0)[None]
        if "positions" in stage.reads:
            slots = math.gcd(8, *map(len, frequencies_of_axes(config)))
            fresh = position.expand(3, -1)[:, rows].T[:, None].expand(-1, slots, -1)
            signals["positions"] = carried[n][0][None] if n in carried else fresh[None]
            if n in carried:
                signals["num_positions"] = carried[n][1][None]
        tokens_in = Tokens.of(x[rows][None], **signals)
        r = stage(replace(tokens_in, size=sizes.get(n, tokens_in.size)))
        K = r.num_kept if r.mask is None else int(r.mask.sum())
        anchor = r.anchor[0, :K]
        sizes[n] = r.size[:, :K]
        if r.positions is not None:
            carried[n] = r.positions[0, :K], r.num_positions[0, :K]
        elif n in carried:
            carried[n] = carried[n][0][anchor], carried[n][1][anchor]
        x = x.index_put((rows[anchor],), r.x[0, :K])
        dropped.append(tokens[~torch.isin(torch.arange(len(tokens)), anchor)])
        if K == 0:
            dropped.append(separators)
        left.append((tokens[anchor], separators[: len(separators) * (K > 0)]))
        steps.append(Step(number, n, len(tokens), K))
    keep = ~torch.isin(column, torch.cat(dropped)) if dropped else torch.ones_like(column, dtype=torch.bool)
    return x[keep], column[keep], position[:, keep], left
