"""The items of a call: which rows of the merged embeddings are tokens of which picture, clip or recording."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmcompress.ledger import ItemCount, SampleCount
from mmcompress.models import compat, signals
from mmcompress.models.call import Call
from mmcompress.models.generic import KINDS, Family, ItemSpec
from mmcompress.models.items import Item, runs


def find_items(
    family: Family, call: Call, x: Tensor, encoder_reads: list[str], text_reads: bool
) -> tuple[list[Item], dict[int, SampleCount]]:
    """The items of this call, whose signals of the encoder are made, and one count per batch row that holds some.

    Raises ValueError where features came that no placeholder stands for, or placeholders for which nothing came.
    """
    B, S = x.shape[:2]
    kinds = family.kinds(call)
    if call.ids is None:
        if kinds:
            raise ValueError(
                "input_ids must be given together with pixels or sound while a compressor is installed, got inputs_embeds only"
            )
        return [], {}
    if tuple(call.ids.shape) != (B, S):
        raise ValueError(f"input_ids must hold one id per row of the text model {(B, S)}, got {tuple(call.ids.shape)}")
    host = call.ids.cpu()
    real = torch.full((B,), S, device="cpu") if call.mask is None else (call.mask[:, -S:] != 0).sum(1).cpu()
    items: list[Item] = []
    samples: dict[int, SampleCount] = {}
    for kind in kinds:
        found = places(family, call, kind, host)
        values = encoder_signals(family, call, kind, encoder_reads) if found else {}
        for spec, at in found:
            b = int(at[0]) // S
            if int(at[-1]) // S != b:
                raise ValueError(f"every {kind} item must lie within its sample, one of {spec.num_rows} rows leaves sample {b}")
            items.append(item_of(spec, b, at % S, x, values))
            count = samples.setdefault(b, SampleCount(int(real[b])))
            items[-1].count = ItemCount(kind, len(spec.rows), spec.num_rows - len(spec.rows), {0: len(spec.rows)})
            count.items.append(items[-1].count)
    if items and text_reads:
        words = word_columns(family, call, x, host)
        for name in signals.of_source("text"):
            values_of = signals.known()[name].make(x, words)  # type: ignore[misc]
            for item in items:
                item.signals[name] = values_of[item.sample].detach()
    return items, samples


def check_found(family: Family, call: Call, items: list[Item], model: Any) -> None:
    """Raise ValueError where something of items is in this call and nothing was found: it would pass uncompressed."""
    if items or call.ids is None:
        return
    ids = {kind: family.placeholder(kind) for kind in KINDS if family.placeholder(kind) >= 0}
    who = f"{type(model).__name__} under {compat.installed()}"
    if call.encoded:
        raise ValueError(
            f"input_ids must hold the ids that stand for {', '.join(call.encoded)} features while a compressor is "
            f"installed: {who} "
            f"made such features, and none of {ids} was found"
        )
    prompt = call.ids[:, : call.ids.shape[1] - call.extra]
    here = [kind for kind, i in ids.items() if bool((prompt == i).any())]
    if here:
        raise ValueError(
            f"input_ids hold {', '.join(here)} placeholders, but {who} got no pixels, sound or features for them in this "
            "call: a "
            f"compressor is installed, and nothing would be compressed (looked for arguments of {', '.join(here)} and "
            "get_…_features; merged inputs_embeds, chunked prefill and features made elsewhere are not supported)"
        )


def places(family: Family, call: Call, kind: str, host: Tensor) -> list[tuple[ItemSpec, Tensor]]:
    """Every item of a kind with the flat places of its rows in ids [B, S]."""
    place = torch.eq(host, family.placeholder(kind)).flatten().nonzero()[:, 0]
    if not len(place) and kind == "video" and "image" not in call.encoded and kind in call.encoded:
        place = torch.eq(host, family.placeholder("image")).flatten().nonzero()[:, 0]  # GLM writes clips with image ids
    if not len(place):
        return []
    S = host.shape[1]
    order = call.order.get(kind)
    own = type(family).specs is not Family.specs
    specs: list[ItemSpec] | None
    if family.per_sample:
        specs = None
    elif order is None:
        specs = family.specs(call, kind, len(place))
    else:  # several answers to a prompt: items as they were encoded, each for every answer of its sample
        copies = len(order) // (max(order) + 1)
        specs = family.specs(call, kind, len(place) // copies)
        specs = specs and [specs[i] for i in order]
    if specs is None or (not own and not fits(specs, kind, place, S)):
        specs = runs(kind, place, S)
    elif kind == "video" and not own:
        specs = clips(specs, runs(kind, place, S))
    if sum(s.num_rows for s in specs) != len(place):
        raise ValueError(
            f"the {kind} features stand for {sum(s.num_rows for s in specs)} rows, input_ids hold {len(place)} placeholders"
        )
    return list(zip(specs, place.split([s.num_rows for s in specs]), strict=True))


def encoder_signals(family: Family, call: Call, kind: str, names: list[str]) -> dict[str, Tensor]:
    """The encoder's signals over its flattened output, as far as something was seen of them."""
    values = {name: family.signal(call, kind, signals.known()[name]) for name in names}
    seen = call.of(kind)
    seen.attention, seen.tower = [], []  # what was made of them is enough
    return {name: v for name, v in values.items() if v is not None}


def item_of(spec: ItemSpec, b: int, columns: Tensor, x: Tensor, values: dict[str, Tensor]) -> Item:
    """The item that lies at these columns of sample b; without encoder signals where its rows cannot be traced."""
    seen = {} if spec.source is None else {k: v[spec.source.to(v.device)].to(x.device) for k, v in values.items()}
    n = torch.arange(len(spec.rows), device=x.device)
    separator = torch.ones(spec.num_rows, dtype=torch.bool, device="cpu")
    separator[spec.rows] = False
    return Item(
        sample=b,
        kind=spec.kind,
        layout=spec.layout,
        position=spec.position.to(x.device),
        group=spec.group.to(x.device),
        columns=columns[spec.rows].to(x.device),
        anchor=n,
        assignment=n,
        size=torch.ones(len(n), device=x.device),
        separators=columns[separator].to(x.device),
        signals=seen,
    )


def word_columns(family: Family, call: Call, x: Tensor, host: Tensor) -> list[Tensor]:
    """Columns of each sample's own text [T]."""
    text = torch.ones_like(host, dtype=torch.bool)
    for kind in KINDS:
        text &= host != family.placeholder(kind)
    if call.mask is not None:
        text &= (call.mask[:, -x.shape[1] :] != 0).cpu()
    return [row.nonzero()[:, 0] for row in text]


def fits(specs: list[ItemSpec], kind: str, place: Tensor, S: int) -> bool:
    """Whether items of these lengths can lie at these places: each within its sample, and none a lone row of a longer run."""
    if sum(s.num_rows for s in specs) != len(place):
        return False
    parts = place.split([s.num_rows for s in specs])
    if any(int(p[0]) // S != int(p[-1]) // S for p in parts if len(p)):
        return False
    return any(s.num_rows != 1 for s in specs) or len(runs(kind, place, S)) >= len(specs)


def clips(specs: list[ItemSpec], loose: list[ItemSpec]) -> list[ItemSpec]:
    """Frames that were given one by one: those of one run of rows are one clip."""
    out: list[ItemSpec] = []
    i = 0
    for run in loose:
        mine, n = [], 0
        while i < len(specs) and n < run.num_rows:
            mine.append(specs[i])
            n += specs[i].num_rows
            i += 1
        if n != run.num_rows or len({s.num_rows for s in mine}) != 1:
            return specs
        one = mine[0]
        if len(mine) == 1:
            out.append(one)
            continue
        t, h, w = one.layout.grid
        start = None if one.source is None else int(one.source[0])
        out.append(ItemSpec.lattice("video", (len(mine) * t, h, w), start))
    return out


# several answers to a prompt


def repeated(family: Family, given: dict[str, Any], input_ids: Tensor, copies: int) -> dict[str, Tensor]:
    """Arguments with one entry (or one pack of patches) per item, for so many answers to every prompt: all items of a prompt
    once for each of its answers. transformers repeats them item by item, which mixes up the items of a prompt with several."""
    B, S = input_ids.shape
    host, out = input_ids.cpu(), {}
    wise = {n: v for n, v in given.items() if isinstance(v, Tensor) and v.dim() and tuple(v.shape[:2]) != (B, S)}
    for kind in KINDS:
        place = torch.eq(host, family.placeholder(kind)).flatten().nonzero()[:, 0]
        mine = {n: v for n, v in wise.items() if family.belongs(n, kind)}
        if not len(place) or not mine:
            continue
        extents = next((v for v in mine.values() if v.dim() == 2 and v.shape[1] in (2, 3) and not v.is_floating_point()), None)
        n = len(extents) if extents is not None else len(next(iter(mine.values())))
        sizes = None if extents is None else extents.prod(-1).tolist()
        call = Call(None, given, input_ids, given.get("attention_mask"))
        known = family.specs(call, kind, len(place))
        if known and len(known) == n and sum(s.num_rows for s in known) == len(place):
            owner: list[int] | None = [int(p[0]) // S for p in place.split([s.num_rows for s in known])]
        else:
            owner = owners(place, S, n, kind, sizes)
        if owner is None:
            raise ValueError(
                f"{next(iter(mine))} must hold one entry per item for several answers to a prompt, got {n} for items of "
                "unknown "
                "sizes: give prompts with several items one by one"
            )
        order = expanded_order(owner, B, copies)
        for name, v in mine.items():
            if len(v) == n:
                out[name] = v[order]
            elif sizes is not None and len(v) == sum(sizes):  # packed patches
                parts = v.split(sizes)
                out[name] = torch.cat([parts[i] for i in order])
    return out


def expanded_order(owner: list[int], B: int, copies: int) -> list[int]:
    """The items of a batch in the order in which so many answers to every prompt read them."""
    return [i for b in range(B) for _ in range(copies) for i in range(len(owner)) if owner[i] == b]


def owners(place: Tensor, S: int, n: int, kind: str, sizes: list[int] | None) -> list[int] | None:
    """The sample of each of n entries, in order; None where it cannot be told without the features."""
    lengths = [s.num_rows for s in runs(kind, place, S)]
    if len(lengths) != n:
        if sizes is not None and all(len(place) * s % sum(sizes) == 0 for s in sizes):
            lengths = [len(place) * s // sum(sizes) for s in sizes]
        elif len(place) % n == 0:
            lengths = [len(place) // n] * n
        else:
            return None
    parts = place.split(lengths)
    if any(int(p[0]) // S != int(p[-1]) // S for p in parts):
        return None
    return [int(p[0]) // S for p in parts]
