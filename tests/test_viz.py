"""Traces as pictures: what is dimmed, what is merged, whose budget is counted; and the page made of them."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mmcompress import create, ops, viz
from mmcompress.models.llava_next import anyres
from mmcompress.testing import tiny_inputs
from mmcompress.testing.tested import TESTED
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


def clip(assignment, anchor, steps=3):
    """Steps of two by two tokens."""
    n = torch.arange(4 * steps)
    position = torch.stack([n // 4, n % 4 // 2, n % 2], -1)
    return trace(Layout("video", (steps, 2, 2)), position, n // 4, assignment, anchor)


def recording(assignment, anchor):
    n = torch.arange(len(assignment))
    return trace(Layout("audio", (len(n), 1, 1)), torch.stack([n, n * 0, n * 0], -1), n * 0, assignment, anchor)


def layer_of(view, picture):
    return viz.layers([view], [picture])[0]


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
    layer = layer_of(view, picture())
    assert layer[0, 0, 3] == layer[1, 1, 3] == 0
    assert tuple(layer[0, 1]) == tuple(layer[1, 0]) == viz.DIM


def test_merged_tokens_take_the_mean_colour_of_their_cluster():
    (view,) = viz.views(square([0, 1, 0, 1], [0, 1]))  # two columns of two, each half red, half blue
    layer = layer_of(view, picture())
    assert (layer[..., :3] == (100, 0, 100)).all() and (layer[..., 3] == viz.BLEND).all()
    (view,) = viz.views(square([0, 0, 1, 2], [0, 2, 3]))
    layer = layer_of(view, picture())
    assert (layer[0, :, :3] == (200, 0, 0)).all() and (layer[1, :, 3] == 0).all()


def test_a_few_codewords_have_a_colour_of_their_own_each():
    codes = [i % 3 for i in range(36)]
    (view,) = viz.views(square(codes, [0, 1, 2], side=6))
    layer = layer_of(view, picture())
    assert (layer[..., 3] == viz.CODE_BLEND).all() and len(np.unique(layer.reshape(-1, 4), axis=0)) == 3
    assert [tuple(layer[0, i, :3]) for i in range(3)] == [tuple(c) for c in viz.palette(3)]
    assert len(np.unique(viz.palette(64), axis=0)) == 64


def test_the_order_of_picks_reaches_the_picture():
    item = of_method("k_center", (64, 64), keep_ratio=0.25)
    assert all((v.picks < 0).all() for v in viz.views(item))
    tokens = Tokens.of(torch.randn(16, 8, generator=torch.Generator().manual_seed(0)))
    result = create("k_center", keep_ratio=0.25, first=5)(tokens)
    item = square(result.assignment[0], result.anchor[0], side=4)
    item.signals = {"order": result.order[0]}
    (view,) = viz.views(item)
    picked = [int((view.picks.ravel() == i).nonzero()[0][0]) for i in range(4)]
    assert picked[0] == 5 and picked == ops.k_center(tokens.x, 4, first=5)[0].tolist() and (view.picks >= 0).sum() == 4
    plain = viz.panel(view, picture(), layer_of(view, picture()), (64, 64))
    del item.signals
    assert plain.tobytes() != viz.panel(viz.views(item)[0], picture(), layer_of(view, picture()), (64, 64)).tobytes()


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
    item = clip([0, *[-1] * 10, 1], [0, 11])
    assert [(v.name, v.kept, v.total) for v in viz.views(item)] == [("step 1", 1, 4), ("step 2", 0, 4), ("step 3", 1, 4)]


def test_a_cluster_over_several_frames_has_one_colour_in_all():
    colours = [(200, 0, 0), (0, 100, 0), (0, 0, 40)]
    frames = [Image.new("RGB", (8, 8), c) for c in colours]
    shown = viz.views(clip([0, 1, -1, 2, 0, -1, -1, -1, 3, -1, -1, -1], [0, 1, 3, 8]))
    assert [v.merged.tolist() for v in shown] == [[[True, False], [False] * 2], [[True, False], [False] * 2], [[False] * 2] * 2]
    first, second, third = viz.layers(shown, frames)
    assert tuple(first[0, 0]) == tuple(second[0, 0]) == (100, 50, 0, viz.BLEND)
    assert first[0, 1, 3] == first[1, 1, 3] == third[0, 0, 3] == 0
    assert tuple(first[1, 0]) == tuple(second[1, 1]) == tuple(third[0, 1]) == viz.DIM


@pytest.mark.parametrize("num_frames, steps, wanted", [(3, 3, [0, 1, 2]), (6, 3, [0, 2, 4]), (5, 3, [0, 2, 4])])
def test_a_time_step_is_shown_by_its_first_frame(num_frames, steps, wanted):
    frames = [Image.new("RGB", (8, 8), (i, i, i)) for i in range(num_frames)]
    shown = viz.backdrops(frames, Layout("video", (steps, 2, 2)))
    assert [p.getpixel((0, 0))[0] for p in shown] == wanted


def test_the_strip_has_one_frame_per_time_step():
    levels = [90, 140, 190]
    frames = [Image.new("RGB", (64, 64), (v, v, v)) for v in levels]
    item = clip([0, 1, -1, -1, 2, -1, -1, -1, 3, -1, -1, -1], [0, 1, 4, 8])
    sheet = np.asarray(viz.picture_of(item, frames, "a method"))
    alpha = viz.DIM[3] / 255
    row = sheet[110]  # through the upper row of tokens
    for level in levels:
        assert 100 < (row == level).all(-1).sum() <= 256
    dimmed = [[round(d * alpha + v * (1 - alpha)) for d in viz.DIM[:3]] for v in levels]
    there = [(np.abs(sheet.astype(int) - colour) <= 1).all(-1).sum() for colour in dimmed]
    cell = 128 * 128
    assert [round(n / cell, 1) for n in there] == [2, 3, 3]
    with pytest.raises(ValueError, match="one for each of the 3 views, got 2"):
        viz.picture_of(item, frames[:2], "a method")


def tone(seconds=4.0, rate=16000, start=1.0, end=2.0, hertz=1000):
    t = np.arange(round(seconds * rate)) / rate
    return (np.sin(2 * np.pi * hertz * t) * ((t >= start) & (t < end))).astype("float32")


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_a_tone_stands_where_and_when_it_sounds(rate):
    shown = viz.spectrogram(tone(rate=rate), rate)
    assert shown.size == (400, viz.MEL_BINS)
    bright = np.asarray(shown).astype(int).sum(-1)
    loudest = bright.max(0)
    assert (loudest[103:197] > loudest[:95].max() + 200).all() and (loudest[103:197] > loudest[205:].max() + 200).all()
    mel = lambda hertz: 2595 * np.log10(1 + hertz / 700)  # noqa: E731
    wanted = viz.MEL_BINS * (1 - mel(1000) / mel(rate / 2))  # from above
    assert abs(bright[:, 150].argmax() + 0.5 - wanted) < 1.5
    higher = np.asarray(viz.spectrogram(tone(rate=rate, hertz=2000), rate)).astype(int).sum(-1)
    assert higher[:, 150].argmax() < bright[:, 150].argmax()


@pytest.mark.parametrize("wave", [np.zeros(16000), np.zeros(7), np.ones(300)])
def test_silence_and_short_recordings_can_be_drawn(wave):
    assert viz.spectrogram(wave.astype("float32"), 16000).width == max(1, len(wave) // 160)


def test_a_dropped_span_dims_exactly_its_columns():
    shown = viz.spectrogram(tone(), 16000)
    kept = [*range(4), *range(6, 10)]
    (view,) = viz.views(recording([i if i < 4 else -1 if i < 6 else i - 2 for i in range(10)], kept))
    assert view.output.shape == (1, 10) and (view.kept, view.total) == (8, 10)
    over = layer_of(view, shown)
    assert over.shape == (viz.MEL_BINS, 10, 4)
    drawn = np.asarray(viz.panel(view, shown, over, (400, 64))).astype(int)
    plain = np.asarray(shown).astype(int)
    alpha = viz.DIM[3] / 255
    dimmed = plain[:, 160:240] * (1 - alpha) + np.array(viz.DIM[:3]) * alpha
    assert np.abs(drawn[:, 163:238] - dimmed[:, 3:78]).max() <= 1 and (drawn[:, 163:238] <= plain[:, 163:238]).all()
    assert (drawn[:, :158] == plain[:, :158]).all() and (drawn[:, 242:] == plain[:, 242:]).all()


def test_a_merged_span_takes_its_mean_spectrum():
    shown = viz.spectrogram(tone(), 16000)
    (view,) = viz.views(recording([0, 0, 1, 1], [0, 2]))  # each half silence and tone in equal parts
    over = layer_of(view, shown).astype(int)
    plain = np.asarray(shown).astype(float)
    for half, span in ((over[:, :2], plain[:, :200]), (over[:, 2:], plain[:, 200:])):
        assert (half[..., 3] == viz.BLEND).all()
        assert np.abs(half[..., :3] - span.mean(1, keepdims=True)).max() <= 1
    assert viz.outlines(view) == [(2, 0, 2, 1)]


@pytest.mark.parametrize(
    "seconds, wanted", [(4.0, [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4]), (0.5, None), (30.0, [0, 5, 10, 15, 20, 25, 30])]
)
def test_ticks_are_round_and_few(seconds, wanted):
    times = viz.ticks(seconds)
    assert times == wanted if wanted else 2 < len(times) <= 9
    assert times[0] == 0 and times[-1] <= seconds
    assert len(viz.ticks(seconds, most=6)) <= 6


@pytest.mark.parametrize("family", TESTED)
def test_the_items_of_every_family_can_be_drawn(tiny, family):
    with torch.inference_mode(), create("pooling", keep_ratio=0.5)(tiny(family)) as run:
        tiny(family)(**tiny_inputs(family, batch_size=3))
    assert run.items
    for item in run.items:
        shown = viz.views(item)
        assert sum(v.kept for v in shown) == len(item.anchor) and sum(v.total for v in shown) == len(item.assignment)
        assert len(shown) == (item.layout.grid[0] if item.layout.kind == "video" else 2 if item.layout.crops else 1)
        assert item.layout.kind != "audio" or shown[0].output.shape == (1, len(item.assignment))


def test_what_cannot_be_drawn_is_refused():
    broken = square([0, 1, 2, 3], [0, 1, 2, 3])
    broken.position[3] = broken.position[0]
    with pytest.raises(ValueError, match="lattice"):
        viz.views(broken)


def test_the_sheet_shows_kept_pixels_as_they_are_and_dims_the_rest():
    white = Image.new("RGB", (64, 64), "white")
    item = square([0, -1, -1, 1], [0, 3])
    (view,) = viz.views(item)
    drawn = np.asarray(viz.panel(view, white, layer_of(view, white), (80, 80)))
    assert (drawn[10, 10] == 255).all() and (drawn[70, 70] == 255).all()
    alpha = viz.DIM[3] / 255
    dimmed = [round(255 * (1 - alpha) + alpha * d) for d in viz.DIM[:3]]
    assert np.abs(drawn[10, 70].astype(int) - dimmed).max() <= 1 and np.abs(drawn[70, 10].astype(int) - dimmed).max() <= 1
    sheet = viz.picture_of(item, [white], "a method", viz.describe(item))
    assert sheet.width > 300 and sheet.height > 300


def test_what_a_processor_cuts_is_not_shown():
    from mmcompress.ask import seen

    cropping = SimpleNamespace(do_center_crop=True, crop_size={"width": 10, "height": 10})
    processor = SimpleNamespace(
        image_processor=cropping, video_processor=cropping, feature_extractor=SimpleNamespace(n_samples=5)
    )
    wide = picture(40, 20)
    assert seen(processor, wide, Layout("image"), {}).size == (20, 20)
    assert seen(processor, wide, Layout("image", crops=(2, 2)), {}).size == (40, 20)
    assert [f.size for f in seen(processor, [wide, wide], Layout("video"), {})] == [(20, 20)] * 2
    assert seen(SimpleNamespace(), wide, Layout("image"), {}).size == (40, 20)
    sound, mask = Layout("audio"), {"feature_attention_mask": None}
    assert len(seen(processor, np.ones(9), sound, mask)) == len(seen(processor, np.ones(9), sound, {})) == 5
    assert seen(processor, np.ones(3), sound, mask).tolist() == [1, 1, 1]
    assert seen(processor, np.ones(3), sound, {}).tolist() == [1, 1, 1, 0, 0]  # no mask: the window's end is tokens too


def test_the_page_is_one_file_that_escapes_what_it_shows():
    from mmcompress.demo import Asked, Part, Result, Run, Section, Setting, Spot
    from mmcompress.page import page

    settings = [Setting("none", None), Setting("pooling", 0.25), Setting("pooling", 0.1)]
    frames = [picture(16, 16)] * 3
    kinds = {
        "image": (of_method("pooling", keep_ratio=0.25), [picture(64, 40)], [Spot(0, (1, 2, 9, 8))]),
        "video": (clip([0, *[-1] * 10, 1], [0, 11]), frames, [Spot(1, (1, 2, 9, 8)), Spot(2, None)]),
        "audio": (recording([0, 1, -1, -1], [0, 1]), [viz.spectrogram(tone(), 16000)], [Spot(0, (100, 0, 200, 64))]),
    }
    parts = []
    for kind, (item, pictures, evidence) in kinds.items():
        runs = [Run(s, "<b>no</b>", s.ratio is None, 80, 20, 8, 30.0, 2**20, 10**9, 5.0, viz.views(item)) for s in settings]
        asked = Asked("detail", kind, "Is 1 < 2 & 2 > 1?", ["yes"], pictures, evidence, runs)
        parts.append(Part(Section(kind, f"<{kind}>", "zoo:image", ("detail",), 1), [asked], settings, {"other": "a <reason>"}))
    environment = {"device": "cpu", "dtype": "float32", "torch": "2", "threads": 1}
    html = page(Result(parts, {"missing": "no <parts>"}, 1.0, environment))
    assert "Is 1 &lt; 2 &amp; 2 &gt; 1?" in html and "<b>no</b>" not in html and "a &lt;reason&gt;" in html
    assert "<b>missing</b>: no &lt;parts&gt;" in html and "3 questions about pictures, clips and recordings" in html
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", html) and "http" not in html and "@import" not in html
    assert html.count("<img ") == 2 * (2 + 3 + 1) and html.count("ratio-a") > html.count("<script") == 0
    assert html.count("background-image") == 1 + 3 + 1  # each picture once
    for tag in ("div", "figure", "table", "tr", "svg", "article", "section", "span"):
        assert len(re.findall(rf"<{tag}[ >]", html)) == html.count(f"</{tag}>"), tag
    image, video, audio = (part.split("</section>")[0] for part in html.split("<section ")[1:])
    assert image.count('class="evidence" x="1" y="2" width="8" height="6"') == 1 + 2 * 2
    assert video.count(" marked") == 3 * 2 and video.count('class="evidence"') == 3
    assert video.count('<span class="count">1</span>') == 2 * 2 and video.count('<span class="count">0</span>') == 2
    assert audio.count('<i style="left: 25.00%; width: 25.00%">') == 3 and ">1 s<" in audio
