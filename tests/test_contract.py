"""The contract that every registered method passes; a new file in mmcompress/methods/ is picked up by itself.

Methods see synthetic Tokens: a single-view image, a clip of four frames and an AnyRes image, each with every signal that a seam
offers. A method that reads a signal of its own extends SIGNALS, as it extends the seam.
"""

import inspect
import json
from dataclasses import replace

import pytest
import torch

from mmcompress import Compressor, create, list_methods, num_kept
from mmcompress.compressor import from_config
from mmcompress.registry import get_method
from mmcompress.testing import devices
from mmcompress.tokens import Layout, Reduction, Tokens, fault

METHODS = list_methods()
WITH_RATIO = [m for m in METHODS if getattr(get_method(m), "has_ratio", False)]

SIGNALS = {  # name -> (B, N, generator) -> what the seam would give
    "cls_logits": lambda B, N, g: torch.randn(B, N, generator=g),
    "keys": lambda B, N, g: torch.randn(B, N, 12, generator=g),
    "tower": lambda B, N, g: torch.randn(B, N, 10, generator=g),
    "query_attention": lambda B, N, g: torch.rand(B, N, generator=g) / N,
    "text": lambda B, N, g: torch.randn(B, 5, 16, generator=g),
    "text_mask": lambda B, N, g: torch.ones(B, 5, dtype=torch.bool),
    "relevance": lambda B, N, g: torch.rand(B, 1, 2, generator=g).expand(B, N, 2),
}


def image_layout(N):
    side = round(N**0.5)
    return Layout("image", (1, side, side) if side * side == N else (1, 1, N))


def anyres():
    """1 × 2 crops of side 4; the picture's shape leaves rows 1 and 2 of the canvas: 16 + 2 · 8 tokens."""
    layout = Layout("image", (1, 4, 8), (1, 2), 4, (100, 400))
    raster = torch.arange(16)
    h, w = 1 + raster // 8, raster % 8
    thumbnail = torch.stack([raster * 0, raster // 4, raster % 4], 1)
    position = torch.cat([thumbnail, torch.stack([raster * 0, h, w], 1)])
    return layout, position, torch.cat([raster * 0, 1 + w // 4])


def make(B=3, N=32, kind="image", seed=0, dtype=torch.float32, x=None):
    """Tokens of B items with every signal; kind: image, video (N = 4 · M) or anyres (N = 32)."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, N, 16, generator=g) if x is None else x
    signals = {name: signal(B, N, g) for name, signal in SIGNALS.items()}
    if kind == "anyres":
        layout, position, group = anyres()
        ones = torch.ones(B, N)
        return Tokens(x.to(dtype), position.expand(B, -1, -1), group.expand(B, -1), ones, layout, signals)
    layout = Layout("video", (4, 1, N // 4) if N % 4 == 0 else (N, 1, 1)) if kind == "video" else image_layout(N)
    return Tokens.of(x.to(dtype), layout, **signals)


def row(value, i):
    """Item i of Tokens, alone."""
    parts = [getattr(value, f)[i : i + 1] for f in ("x", "position", "group", "size")]
    return Tokens(*parts, value.layout, {k: v[i : i + 1] for k, v in value.signals.items()})


def real(out, i=0):
    return slice(None) if out.mask is None else out.mask[i]


def same(a: Reduction, b: Reduction):
    assert torch.equal(a.anchor, b.anchor) and torch.equal(a.assignment, b.assignment) and torch.equal(a.size, b.size)
    torch.testing.assert_close(a.x, b.x, rtol=1e-5, atol=1e-6)


def valid(tokens: Tokens, out: Reduction):
    """What must hold of any reduction of these tokens."""
    B, N, D = tokens.x.shape
    K = out.num_kept
    assert out.x.shape == (B, K, D) and out.anchor.shape == out.size.shape == (B, K) and out.assignment.shape == (B, N)
    assert out.x.dtype == tokens.x.dtype and out.x.device == tokens.x.device and out.anchor.dtype == torch.int64
    assert out.positions is None or (out.positions.shape[:2] == (B, K) and out.positions.shape[3] == 3)
    assert out.x.isfinite().all()
    for i in range(B):
        keep = real(out, i)
        anchor, assignment = out.anchor[i][keep], out.assignment[i]
        assert out.mask is None or bool((out.mask[i].long().diff() <= 0).all()), "real outputs stand first"
        assert bool((anchor.diff() > 0).all()), "anchors ascend"
        assert len(anchor) == 0 or (anchor.min() >= 0 and anchor.max() < N)
        assert assignment.min() >= -1 and assignment.max() < len(anchor), "assignments are outputs or -1"
        assert assignment[anchor].tolist() == list(range(len(anchor))), "an anchor belongs to its own output"
        held = torch.zeros(len(anchor)).scatter_add(
            0, assignment.clamp(min=0)[assignment >= 0], tokens.size[i][assignment >= 0]
        )
        torch.testing.assert_close(out.size[i][keep].cpu(), held.cpu())
    assert fault(out, list(tokens.x)) is None, "what a model's seam refuses"


@pytest.fixture(params=METHODS)
def name(request):
    return request.param


def kinds(method):
    """The synthetic items that a method is for."""
    kinds = ["anyres", "image"] if "crops" in method.reads else ["image", "video", "anyres"]
    return [k for k in kinds if ("image" if k == "anyres" else k) in method.kinds]


def test_there_are_methods():
    assert {"none", "random_keep", "uniform_keep", "pooling", "k_center", "global_guided"} <= set(METHODS)


@pytest.mark.parametrize("field", ["anchor", "assignment", "size", "x"])
def test_the_contract_can_fail(field):
    tokens = make()
    out = create("uniform_keep")(tokens)
    wrong = {"anchor": out.anchor.flip(1), "assignment": out.assignment.flip(1), "size": out.size * 2, "x": out.x / 0}
    with pytest.raises(AssertionError):
        valid(tokens, replace(out, **{field: wrong[field]}))


def test_valid_and_untouched(name):
    method = create(name)
    for kind in kinds(method):
        tokens = make(kind=kind)
        tensors = {"x": tokens.x, "position": tokens.position, "group": tokens.group, "size": tokens.size, **tokens.signals}
        before = {k: v.clone() for k, v in tensors.items()}
        valid(tokens, method(tokens))
        assert all(torch.equal(v, before[k]) for k, v in tensors.items()), "the input is untouched"


@pytest.mark.parametrize("keep_ratio", [0.01, 0.1, 0.25, 0.333, 0.5, 0.9, 1])
@pytest.mark.parametrize("name", WITH_RATIO)
def test_counts(name, keep_ratio):
    method = create(name, keep_ratio=keep_ratio)
    for kind in kinds(method):
        for N in (32,) if kind == "anyres" else (4, 20, 36):
            out = method(make(kind=kind, N=N))
            assert out.mask is None and out.num_kept == method.num_kept(N) == num_kept(N, keep_ratio)


def test_identity(name):
    method = create(name, **getattr(get_method(name), "identity_config", {"keep_ratio": 1}))
    assert method.is_identity
    for kind in kinds(method):
        for dtype in (torch.float32, torch.bfloat16):
            tokens = make(kind=kind, dtype=dtype)
            out = method(tokens)
            assert torch.equal(out.x, tokens.x) and torch.equal(out.size, tokens.size) and out.mask is None
            assert torch.equal(out.anchor, torch.arange(32).expand(3, 32)) and torch.equal(out.assignment, out.anchor)


@pytest.mark.parametrize("name", WITH_RATIO)
def test_keep_ratio_one_is_the_identity(name):
    assert create(name, keep_ratio=1).is_identity and create(name, keep_ratio=1.0).is_identity


def test_alone_as_in_a_batch(name):
    method = create(name)
    for kind in kinds(method):
        tokens = make(kind=kind)
        batch = method(tokens)
        for i in range(3):
            alone = method(row(tokens, i))
            keep, own = real(batch, i), real(alone)
            assert torch.equal(batch.anchor[i][keep], alone.anchor[0][own])
            assert torch.equal(batch.assignment[i], alone.assignment[0])
            torch.testing.assert_close(batch.x[i][keep], alone.x[0][own], rtol=1e-5, atol=1e-6)


def test_same_input_same_result(name):
    for kind in kinds(create(name)):
        tokens = make(kind=kind)
        torch.manual_seed(0)
        first = create(name)(tokens)
        torch.manual_seed(1)
        again = create(name)(tokens)
        same(first, again)
        assert torch.equal(first.x, again.x)


def test_degenerate_tokens(name):
    method = create(name)
    for kind in kinds(method):
        for x in (torch.ones(2, 32, 16), torch.zeros(2, 32, 16), torch.full((2, 32, 16), 1e-30)):
            tokens = make(2, kind=kind, x=x)
            for key in tokens.signals:
                if key in ("cls_logits", "keys", "tower"):
                    tokens.signals[key] = torch.zeros_like(tokens.signals[key])
            valid(tokens, method(tokens))


@pytest.mark.parametrize("N", [0, 1, 2, 3])
def test_few_tokens(name, N):
    method = create(name)
    tokens = make(2, N, kinds(method)[-1] if "image" not in method.kinds else "image")
    out = method(tokens)
    if N:
        valid(tokens, out)
    assert out.x.shape == (2, out.num_kept, 16) and out.num_kept <= N
    if name in WITH_RATIO:
        assert out.num_kept == num_kept(N, method.keep_ratio)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name, dtype):
    method = create(name)
    for kind in kinds(method):
        half = make(kind=kind, dtype=dtype)
        out = method(half)
        valid(half, out)
        exact = method(replace(half, x=half.x.float()))  # the same values: scores are made in float32 from them
        assert torch.equal(out.anchor, exact.anchor) and torch.equal(out.assignment, exact.assignment)
        torch.testing.assert_close(out.x.float(), exact.x, rtol=2e-2, atol=1e-2)


def test_gradients(name):
    method = create(name)
    for kind in kinds(method):
        x = torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out = method(make(2, kind=kind, x=x))
        if out.num_kept == 0:
            continue
        out.x.square().sum().backward()
        assert x.grad is not None and x.grad.isfinite().all() and x.grad.abs().sum() > 0
        dropped = out.assignment < 0
        assert not x.grad[dropped].any(), "what was dropped has no gradient"


def test_config_round_trip(name):
    method = create(name)
    text = json.dumps(method.config())
    again = from_config(json.loads(text))
    assert again.config() == method.config() and type(again) is type(method)
    tokens = make(kind=kinds(method)[0])
    same(method(tokens), again(tokens))


def test_every_field_is_documented_and_settable(name):
    target = get_method(name)
    assert (target.__doc__ or "").strip(), "a class or preset has a docstring"
    assert (inspect.getmodule(target).__doc__ or "").strip(), "a file says what it is and where it comes from"
    if not isinstance(target, type):
        return
    own = {f for c in target.__mro__ if issubclass(c, Compressor) and c is not Compressor for f in inspect.get_annotations(c)}
    text = " ".join(c.__doc__ or "" for c in target.__mro__ if issubclass(c, Compressor))
    for field in own & set(create(name).config()):
        assert f"{field}:" in text, f"the docstring explains {field!r} ('{field}: …')"
        create(name, **{field: getattr(create(name), field)})


def test_device(name):
    method = create(name)
    for device in devices():
        tokens = make(kind=kinds(method)[0])
        moved = Tokens(
            *(getattr(tokens, f).to(device) for f in ("x", "position", "group", "size")),
            tokens.layout,
            {k: v.to(device) for k, v in tokens.signals.items()},
        )
        out = method.to(device)(moved)
        assert {out.x.device.type, out.anchor.device.type, out.assignment.device.type, out.size.device.type} == {
            torch.device(device).type
        }
        assert torch.equal(out.anchor.cpu(), create(name)(tokens).anchor)


def test_compiled_equals_eager(name):
    method = create(name)
    torch._dynamo.reset()
    compiled = torch.compile(method.forward, backend="aot_eager")
    for kind in kinds(method)[:2]:
        tokens = make(kind=kind)
        same(compiled(tokens), method(tokens))


@pytest.mark.parametrize("keep_ratio", [0, -0.5, 1.5, float("nan"), float("inf")])
def test_ratio_out_of_range(name, keep_ratio):
    with pytest.raises(ValueError, match=r"keep_ratio must be in \(0, 1\], got"):
        create(name, keep_ratio=keep_ratio)


@pytest.mark.parametrize("keep_ratio", ["0.5", None, True])
def test_ratio_of_a_wrong_type(name, keep_ratio):
    with pytest.raises(TypeError, match=r"keep_ratio must be a number in \(0, 1\], got"):
        create(name, keep_ratio=keep_ratio)


def test_unknown_field(name):
    with pytest.raises(ValueError, match=f"{name} has no field 'keep_ratoi', did you mean 'keep_ratio'"):
        create(name, keep_ratoi=0.5)


def test_nan_is_a_value_error_on_a_device_too(name, monkeypatch):
    """As on a GPU, where operators by themselves only assert: inside a method they raise as on the CPU."""
    method, said = create(name), []
    for on_host in (lambda first: True, lambda first: False):
        monkeypatch.setattr("mmcompress.ops.core._on_host", on_host)
        for kind in kinds(method):
            tokens = make(kind=kind)
            tokens.x[1, 7, 3] = torch.nan
            try:
                said.append(method(tokens).x.isfinite().all(-1).all(-1).tolist())
            except ValueError as error:
                said.append(str(error).split(",")[0])
    assert said[: len(said) // 2] == said[len(said) // 2 :]
