"""Methods by themselves: random fields, random tokens; the contract's invariants, alone = in a batch, JSON round trips."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmcompress import create, num_kept
from mmcompress.compressor import Compressor, from_config
from mmcompress.tokens import Layout, Reduction, Tokens

from .outcome import Failure, refusal

NUMPY = {"float32": np.float32, "float64": np.float64, "int64": np.int64, "bool": np.bool_}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
SIDE = 4
FINITE = ("normal", "equal", "zero", "big", "small", "whole", "twins", "one")


def value(plain: Any) -> Any:
    """A field's value from JSON, which has no numpy scalars, fractions or infinities."""
    if isinstance(plain, dict) and set(plain) == {"numpy", "value"}:
        return NUMPY[plain["numpy"]](plain["value"])
    if isinstance(plain, dict) and set(plain) == {"fraction"}:
        return Fraction(plain["fraction"])
    if isinstance(plain, dict) and set(plain) == {"float"}:
        return float(plain["float"])
    return plain


def method(config: dict[str, Any]) -> Compressor:
    """{"method": name, field: …} -> the compressor."""
    return create(config["method"], **{k: value(v) for k, v in config.items() if k != "method"})


# what must hold of a reduction


def in_order(stage: Compressor) -> bool:
    """Whether output j stands at its own anchor; position_merge in mode "official" emits by descending score."""
    return not any(getattr(s, "mode", "") == "official" and "positions" in s.reads for s in stage.stages)


def check_reduction(tokens: Tokens, out: Reduction, finite: bool = True, in_order: bool = True) -> None:
    """The contract: shapes, ascending anchors within range, a consistent assignment, sizes that add up."""
    B, N, D = tokens.x.shape
    K = out.anchor.shape[1]
    _same("shape of x", tuple(out.x.shape), (B, K, D))
    _same("shape of size", tuple(out.size.shape), (B, K))
    _same("shape of assignment", tuple(out.assignment.shape), (B, N))
    _same("dtype of x", out.x.dtype, tokens.x.dtype)
    _same("dtype of anchor", out.anchor.dtype, torch.int64)
    for b in range(B):
        real = torch.ones(K, dtype=torch.bool) if out.mask is None else out.mask[b]
        k = int(real.sum())
        _must(bool(real[:k].all()), "real outputs stand first")
        anchor, assignment = out.anchor[b, :k], out.assignment[b]
        _must(bool((anchor.diff() > 0).all()), f"anchors ascend without repeats, got {anchor.tolist()}")
        _must(k == 0 or (int(anchor.min()) >= 0 and int(anchor.max()) < N), f"anchors lie in 0…{N - 1}, got {anchor.tolist()}")
        _must(N == 0 or (int(assignment.min()) >= -1 and int(assignment.max()) < k), "assignments are outputs or -1")
        own = assignment[anchor].tolist()
        _same("outputs of the anchors", own if in_order else sorted(own), list(range(k)))
        held = [float(tokens.size[b][assignment == j].sum()) for j in range(k)]
        _must(np.allclose(out.size[b, :k].tolist(), held, rtol=1e-4), "sizes are sums over the inputs")
        _must(not finite or bool(out.x[b, :k].isfinite().all()), "finite tokens give finite tokens")


def row_of(tokens: Tokens, b: int) -> Tokens:
    """Item b alone."""
    parts = [getattr(tokens, f)[b : b + 1].clone() for f in ("x", "position", "group", "size")]
    return Tokens(*parts, tokens.layout, {k: v[b : b + 1].clone() for k, v in tokens.signals.items()})


def reduction_row(out: Reduction, b: int) -> Reduction:
    """Row b of a result, without the outputs that its mask takes away."""
    k = out.anchor.shape[1] if out.mask is None else int(out.mask[b].sum())
    cut = lambda t: None if t is None else t[b : b + 1, :k].detach().clone()  # noqa: E731
    return Reduction(
        cut(out.x), cut(out.anchor), out.assignment[b : b + 1].clone(), cut(out.size), cut(out.positions), None,
        cut(out.num_positions),
    )  # fmt: skip


def same_decision(a: Reduction, b: Reduction) -> bool:
    return torch.equal(a.anchor, b.anchor) and torch.equal(a.assignment, b.assignment)


def is_tie(stage: Compressor, tokens: Tokens) -> bool:
    """Whether noise of the size of a rounding error changes what the stage decides: then two right results may differ."""
    first, g = stage(tokens), torch.Generator().manual_seed(0)
    noise = lambda t: t * (1 + 4 * torch.finfo(t.dtype).eps * torch.randn(t.shape, generator=g).to(t.dtype))  # noqa: E731
    for _ in range(8):
        shaken = {k: noise(v) if v.is_floating_point() else v for k, v in tokens.signals.items()}
        if not same_decision(first, stage(replace(tokens, x=noise(tokens.x), signals=shaken))):
            return True
    return False


def check_alone(stage: Compressor, tokens: Tokens, row: Reduction) -> None:
    """The result of one item within a batch is the one that it has alone."""
    alone = reduction_row(stage(tokens), 0)
    if not same_decision(alone, row):
        _must(is_tie(stage, tokens), f"alone = in a batch: anchors {alone.anchor.tolist()} alone, {row.anchor.tolist()} in it")
    elif bool(tokens.x.isfinite().all()):
        scale = float(tokens.x.float().abs().max()) if tokens.x.numel() else 1.0
        error = float((alone.x.float() - row.x.float()).abs().max()) if row.x.numel() else 0.0
        _must(error <= 1e-5 * scale + 4 * torch.finfo(row.x.dtype).eps * scale, f"alone = in a batch: x differs by {error:.2g}")


def _must(holds: bool, what: str) -> None:
    if not holds:
        raise Failure(f"must hold: {what}")


def _same(what: str, got: Any, wanted: Any) -> None:
    _must(got == wanted, f"{what} is {wanted}, got {got}")


# tokens


def tokens_of(case: dict[str, Any]) -> Tokens:
    """Random tokens of a case, with every signal that a seam may offer."""
    B, D, g = case["B"], case["D"], torch.Generator().manual_seed(case["seed"])
    layout, position, group = _lattice(case["item"], case["grid"])
    N = len(position)
    x = _fill(case["fill"], B, N, D, g).to(DTYPES[case["dtype"]])
    rand = lambda *shape: torch.rand(*shape, generator=g)  # noqa: E731
    ids = (position + position.new_tensor(case.get("start", 0)))[None, :, None].expand(B, N, 8, 3)
    flat = case["fill"] in ("equal", "zero")
    signals: dict[str, Tensor] = {
        "cls_logits": torch.zeros(B, N) if flat else torch.randn(B, N, generator=g),
        "keys": torch.ones(B, N, 12) if flat else torch.randn(B, N, 12, generator=g),
        "tower": torch.ones(B, N, 10) if flat else torch.randn(B, N, 10, generator=g),
        "query_attention": rand(B, N) / max(N, 1),
        "text": torch.randn(B, 5, D, generator=g),
        "text_mask": torch.arange(5).expand(B, 5) < torch.randint(1, 6, (B, 1), generator=g),
        "relevance": rand(B, 1, 2).expand(B, N, 2) * 0.3,
        "positions": ids,
    }
    sizes = torch.randint(1, 5, (B, N), generator=g).float() if case["sizes"] else torch.ones(B, N)
    return Tokens(x, position.expand(B, N, 3), group.expand(B, N), sizes, layout, signals)


def _lattice(item: str, grid: list[int]) -> tuple[Layout, Tensor, Tensor]:
    t, h, w = grid
    if item == "anyres":  # a thumbnail, then h x w crops whole
        cells = torch.arange(h * w * SIDE * SIDE)
        rows, columns = cells // (w * SIDE), cells % (w * SIDE)
        small = torch.arange(SIDE * SIDE)
        position = torch.cat(
            [
                torch.stack([small * 0, small // SIDE, small % SIDE], 1),
                torch.stack([rows * 0, rows, columns], 1),
            ]
        )
        group = torch.cat([small * 0, 1 + rows // SIDE * w + columns // SIDE])
        return Layout("image", (1, h * SIDE, w * SIDE), (h, w), SIDE, (h * 16, w * 16)), position, group
    cells = torch.arange(t * h * w)
    position = torch.stack([cells // max(h * w, 1), cells // max(w, 1) % max(h, 1), cells % max(w, 1)], 1)
    return Layout(item, (t, h, w)), position, position[:, 0] if item == "video" else cells * 0


def _fill(name: str, B: int, N: int, D: int, g: torch.Generator) -> Tensor:
    x = torch.randn(B, N, D, generator=g)
    if name in ("equal", "zero"):
        return torch.ones_like(x) * (name == "equal")
    if name in ("big", "small", "huge", "tiny"):
        return x * {"big": 3e3, "small": 1e-4, "huge": 1e25, "tiny": 1e-38}[name]
    if name == "whole":
        return x.round()
    if name == "twins":
        return x[:, torch.arange(N) // 2]
    if name == "one":
        return torch.cat([x[:, :1], torch.zeros_like(x[:, 1:])], 1)
    if name in ("nan", "inf") and N and B:
        b, n = int(torch.randint(B, (1,), generator=g)), int(torch.randint(N, (1,), generator=g))
        x[b, n, 0] = math.nan if name == "nan" else math.inf
    return x


# cases


def run_values(case: dict[str, Any]) -> str:
    """One method (or chain) on random tokens."""
    try:
        stages = [method(c) for c in case["stages"]]
        stage = stages[0]
        for other in stages[1:]:
            stage = stage | other
        tokens = tokens_of(case)
        held = {"x": tokens.x.clone(), **{k: v.clone() for k, v in tokens.signals.items()}}
        out = stage(tokens)
    except Exception as error:
        return refusal(error)
    finite = case["fill"] in FINITE and bool(tokens.x.isfinite().all())
    check_reduction(tokens, out, finite, in_order(stage))
    now = {"x": tokens.x, **tokens.signals}
    _must(all(torch.equal(now[k].nan_to_num(), v.nan_to_num()) for k, v in held.items()), "the input is untouched")
    again = stage(tokens)
    _must(
        same_decision(out, again) and torch.equal(out.x.nan_to_num(), again.x.nan_to_num()), "the same input, the same result"
    )
    if len(stages) == 1 and type(stage).has_ratio and not {"stride", "r", "mode", "num_codes"} & set(case["stages"][0]):
        _same("number of tokens kept", out.num_kept, num_kept(tokens.num_tokens, stage.keep_ratio))
    if stage.is_identity:
        _must(torch.equal(out.x.nan_to_num(), tokens.x.nan_to_num()), "the identity keeps every bit")
    for b in range(case["B"]):
        if bool(tokens.x[b].isfinite().all()):
            check_alone(stage, row_of(tokens, b), reduction_row(out, b))
    if finite and case.get("backward") and tokens.x.dtype == torch.float32:
        x = tokens.x.clone().requires_grad_()
        r = stage(replace(tokens, x=x))
        if r.x.requires_grad and r.x.numel():
            (r.x if r.mask is None else r.x[r.mask]).sum().backward()
            _must(bool(x.grad.isfinite().all()), "gradients are finite")
            _must(not bool(x.grad[r.assignment < 0].any()), "what was dropped has no gradient")
    return "right"


def run_config(case: dict[str, Any]) -> str:
    """Fields of every type and size; a field set afterwards; a configuration that someone else wrote."""
    if "config" in case:
        try:
            made = from_config(case["config"])
        except Exception as error:
            return refusal(error)
        _round_trip(made)
        return "right"
    try:
        made = method(case["method"])
    except Exception as error:
        return refusal(error)
    given = {k: value(v) for k, v in case["method"].items() if k != "method"}
    if "keep_ratio" in given:
        ratio = given["keep_ratio"]
        _must(not isinstance(ratio, (bool, np.bool_, str)) and 0 < float(ratio) <= 1, f"keep_ratio {ratio!r} is refused")
    _round_trip(made)
    if "set" in case and not len(made.stages) > 1:
        name, new = case["set"][0], value(case["set"][1])
        try:
            setattr(made, name, new)
        except Exception as error:
            return refusal(error, kinds=(ValueError, TypeError, AttributeError))
        try:
            fresh = type(made)(**{f.name: getattr(made, f.name) for f in fields(made)})
        except (ValueError, TypeError) as error:
            raise Failure(f"a field set afterwards is checked, {name}={new!r} was taken") from error
        tokens = Tokens.of(torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(0)), Layout("image", (1, 4, 6)))
        if not made.reads:
            _must(same_decision(made(tokens), fresh(tokens)), f"a field set afterwards is followed: {name}={new!r}")
    return "right"


def _round_trip(made: Compressor) -> None:
    config = made.config()
    try:
        text = json.dumps(config, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise Failure(f"a configuration is plain JSON, got {config}: {error}") from error
    again = from_config(json.loads(text))
    _same("configuration after a round trip", again.config(), config)
    _same("stages after a round trip", [type(s) for s in again.stages], [type(s) for s in made.stages])
    repr(made)
