"""Traces as pictures: what is dimmed, what is merged, whose budget is counted; and the page made of them."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mmcompress import create, viz
from mmcompress.models.llava_next import anyres
from mmcompress.tokens import Layout, Tokens


def picture(width=64, height=64):
    """Red above, blue below."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, :, 0] = 200
    pixels[height // 2 :, :, 2] = 200
    return Image.fromarray(pixels)


def trace(layout, position, group, assignment, anchor, separators=0):
    as_tensor = lambda values: torch.as_tensor(values).long()  # noqa: E731
    return SimpleNamespace(
        layout=layout,
        position=as_tensor(position),
        group=as_tensor(group),
        assignment=as_tensor(assignment),
        anchor=as_tensor(anchor),
        count=SimpleNamespace(separators=separators),
    )


def square(assignment, anchor, side=2):
    n = torch.arange(side * side)
    position = torch.stack([n * 0, n // side, n % side], -1)
    return trace(Layout("image", (1, side, side)), position, n * 0, assignment, anchor)


def of_method(name, size=(40, 64), crops=(2, 2), **config):
    """The trace of a method on an AnyRes picture of random features."""
    spec = anyres(4, *crops, size)
    n = len(spec.position)
    generator = torch.Generator().manual_seed(0)
    signals = {"cls_logits": torch.randn(1, n, generator=generator)}
    x = torch.randn(1, n, 8, generator=generator)
    tokens = Tokens(x, spec.position[None], spec.group[None], torch.ones(1, n), spec.layout, signals)
    result = create(name, **config)(tokens)
    return trace(spec.layout, spec.position, spec.group, result.assignment[0], result.anchor[0], spec.num_rows - n)


def test_dropped_tokens_are_dimmed_and_kept_ones_are_not_touched():
    (view,) = viz.views(square([0, -1, -1, 1], [0, 3]))
    assert view.output.tolist() == [[0, -1], [-1, 1]] and (view.kept, view.total) == (2, 4)
    layer = viz.layer(view, picture())
    assert layer[0, 0, 3] == layer[1, 1, 3] == 0
    assert tuple(layer[0, 1]) == tuple(layer[1, 0]) == viz.DIM


def test_merged_tokens_take_the_mean_colour_of_their_cluster():
    (view,) = viz.views(square([0, 1, 0, 1], [0, 1]))  # two columns of two, each half red, half blue
    layer = viz.layer(view, picture())
    assert (layer[..., :3] == (100, 0, 100)).all() and (layer[..., 3] == viz.BLEND).all()
    (view,) = viz.views(square([0, 0, 1, 2], [0, 2, 3]))
    layer = viz.layer(view, picture())
    assert (layer[0, :, :3] == (200, 0, 0)).all() and (layer[1, :, 3] == 0).all()


def test_outlines_run_between_clusters_or_around_the_dropped():
    (view,) = viz.views(square([0, 1, 0, 1], [0, 1]))
    assert sorted(viz.outlines(view)) == [(1, 0, 1, 1), (1, 1, 1, 2)]
    (view,) = viz.views(square([0, 1, 2, 3], [0, 1, 2, 3]))
    assert viz.outlines(view) == []
    (view,) = viz.views(square([0, 1, -1, 2], [0, 1, 3]))
    assert sorted(viz.outlines(view)) == [(0, 1, 1, 1), (1, 1, 1, 2)]
    (view,) = viz.views(square([-1, -1, -1, -1], []))
    assert viz.outlines(view) == [] and view.kept == 0


@pytest.mark.parametrize("name", ["global_guided", "k_center", "pooling", "uniform_keep"])
@pytest.mark.parametrize("size", [(40, 64), (64, 64), (64, 30)])
def test_budgets_of_thumbnail_and_crops_add_up(name, size):
    item = of_method(name, size, keep_ratio=0.25)
    thumbnail, canvas = viz.views(item)
    assert thumbnail.name == "thumbnail" and thumbnail.total == 16 and len(canvas.regions) == 4
    assert thumbnail.kept + canvas.kept == len(item.anchor) and thumbnail.total + canvas.total == len(item.assignment)
    for region in canvas.regions:
        left, top, right, bottom = region.box
        assert (right - left) * (bottom - top) == region.total
        if name != "pooling":
            assert (canvas.output[top:bottom, left:right] >= 0).sum() == region.kept
    assert viz.describe(item).endswith("separators beside them")


def test_frames_of_a_clip_are_views():
    n = torch.arange(12)
    position = torch.stack([n // 4, n % 4 // 2, n % 2], -1)
    item = trace(Layout("video", (3, 2, 2)), position, n // 4, [0, *[-1] * 10, 1], [0, 11])
    assert [(v.name, v.kept, v.total) for v in viz.views(item)] == [("step 1", 1, 4), ("step 2", 0, 4), ("step 3", 1, 4)]


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="audio"):
        viz.views(trace(Layout("audio", (4, 1, 1)), torch.zeros(4, 3), torch.zeros(4), [0, 1, 2, 3], [0, 1, 2, 3]))
    broken = square([0, 1, 2, 3], [0, 1, 2, 3])
    broken.position[3] = broken.position[0]
    with pytest.raises(ValueError, match="lattice"):
        viz.views(broken)


def test_the_sheet_shows_kept_pixels_as_they_are_and_dims_the_rest():
    white = Image.new("RGB", (64, 64), "white")
    item = square([0, -1, -1, 1], [0, 3])
    (view,) = viz.views(item)
    drawn = np.asarray(viz.panel(view, white, (80, 80)))
    assert (drawn[10, 10] == 255).all() and (drawn[70, 70] == 255).all()
    assert drawn[10, 70].max() < 120 and drawn[70, 10].max() < 120
    sheet = viz.picture_of(item, white, "a method", viz.describe(item))
    assert sheet.width > 300 and sheet.height > 300


def test_the_page_is_one_file_that_escapes_what_it_shows():
    from mmcompress.demo import Asked, Result, Run, Setting
    from mmcompress.page import page

    shown = viz.views(of_method("pooling", keep_ratio=0.25))
    settings = [Setting("none", None), Setting("pooling", 0.25), Setting("pooling", 0.1)]
    runs = [Run(s, "<b>no</b>", s.ratio is None, 80, 20, 8, 30.0, 2**20, 10**9, 5.0, shown) for s in settings]
    asked = Asked("detail", "Is 1 < 2 & 2 > 1?", ["yes"], picture(64, 40), (1, 2, 9, 8), runs)
    environment = {"device": "cpu", "dtype": "float32", "torch": "2", "threads": 1}
    html = page(Result("zoo:image", [asked], settings, {"other": "a <reason>"}, 1.0, environment))
    assert "Is 1 &lt; 2 &amp; 2 &gt; 1?" in html and "<b>no</b>" not in html and "a &lt;reason&gt;" in html
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", html) and "http" not in html and "@import" not in html
    assert html.count("<img ") == 2 * 2 and html.count("ratio-a") > html.count("<script") == 0
    for tag in ("div", "figure", "table", "tr", "svg", "article", "span"):
        assert len(re.findall(rf"<{tag}[ >]", html)) == html.count(f"</{tag}>"), tag
