"""Evidence recall against painted masks: what a token shows is counted in pixels that went the way of the picture."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from mmcompress.eval.evidence import evidence_recall
from mmcompress.eval.tasks import Box, Evidence, Sample
from mmcompress.models.generic import ItemSpec
from mmcompress.models.items import Item
from mmcompress.models.llava_next import anyres

PATCH = 14


def trace(spec, kept):
    """A trace in which the tokens `kept` ([N] bool) stayed as they were."""
    assignment = torch.where(kept, kept.cumsum(0) - 1, -1)
    anchor = kept.nonzero()[:, 0]
    empty = torch.zeros(0, dtype=torch.long)
    return Item(
        0, spec.kind, spec.layout, spec.position, spec.group, anchor, anchor, assignment, torch.ones(len(anchor)), empty
    )


def shows(mask):
    """[h, w] bool: patches of a painted mask [H, W] (0 or 1) of which a third is painted, or that hold half of all paint."""
    h, w = (n // PATCH for n in mask.shape)
    paint = mask[: h * PATCH, : w * PATCH].reshape(h, PATCH, w, PATCH).sum((1, 3))
    return (paint / PATCH**2 >= 1 / 3) | (paint / mask.sum() >= 1 / 2)


def painted(size, box):
    mask = np.zeros((size[1], size[0]), dtype=np.uint8)
    mask[box.top : box.bottom, box.left : box.right] = 255
    return Image.fromarray(mask)


def recall_of(spec, kept, evidence, item=None, size=None, **settings):
    return evidence_recall(trace(spec, kept), Sample(item, "?", frozenset("a"), evidence), size, **settings)


def found(spec, evidence, item, size, **settings):
    """[N] bool: the tokens that count as evidence, one by one: those that alone give a recall above 0."""
    n = len(spec.position)
    return torch.tensor([recall_of(spec, torch.arange(n) == i, evidence, item, size, **settings) > 0 for i in range(n)])


@pytest.mark.parametrize(
    ("size", "crops", "box"),
    [
        ((640, 512), (2, 2), Box(301, 77, 402, 165)),
        ((384, 448), (2, 2), Box(200, 20, 290, 61)),
        ((900, 300), (1, 3), Box(610, 33, 800, 250)),
    ],
)
def test_anyres(size, crops, box):
    spec = anyres(16, *crops, (size[1], size[0]))
    wanted = found(spec, (Evidence(box),), None, size)
    picture = painted(size, box)
    thumbnail = np.asarray(picture.resize((224, 224), Image.Resampling.BOX)) / 255
    canvas_size = (crops[1] * 224, crops[0] * 224)
    scale = min(canvas_size[0] / size[0], canvas_size[1] / size[1])
    inner = math.ceil(size[0] * scale - 1e-6), math.ceil(size[1] * scale - 1e-6)
    canvas = Image.new("L", canvas_size)
    canvas.paste(
        picture.resize(inner, Image.Resampling.BOX), ((canvas_size[0] - inner[0]) // 2, (canvas_size[1] - inner[1]) // 2)
    )
    on_canvas = shows(np.asarray(canvas) / 255)
    expected = np.concatenate(
        [shows(thumbnail).flatten(), [on_canvas[y, x] for _, y, x in spec.position[256:].tolist()]]
    )  # the packed canvas has no rows of padding
    assert wanted.numpy().sum() > 8 and (wanted.numpy() != expected).mean() < 0.002
    kept = torch.rand(len(wanted), generator=torch.Generator().manual_seed(0)) < 0.4
    got = recall_of(spec, kept, (Evidence(box),), None, size)
    assert got == pytest.approx(float((kept & wanted).sum() / wanted.sum())) and 0 < got < 1


def test_by_hand():
    """A view of 4x4 tokens over 400x200 pixels: each covers 100x50."""
    spec, everything = ItemSpec.lattice("image", (1, 4, 4)), torch.ones(16, dtype=torch.bool)
    assert found(spec, (Evidence(Box(100, 50, 300, 100)),), None, (400, 200)).nonzero()[:, 0].tolist() == [5, 6]
    assert found(spec, (Evidence(Box(10, 10, 20, 20)),), None, (400, 200)).nonzero()[:, 0].tolist() == [0]  # it lies inside
    assert found(spec, (Evidence(Box(60, 0, 100, 50)),), None, (400, 200)).nonzero()[:, 0].tolist() == [0]
    corner = (Evidence(Box(95, 45, 105, 55)),)  # no token shows it well
    assert found(spec, corner, None, (400, 200)).nonzero()[:, 0].tolist() == [0, 1, 4, 5]
    both = (Evidence(Box(0, 0, 100, 50)), Evidence(Box(300, 150, 400, 200)))
    assert recall_of(spec, torch.arange(16) < 8, both, None, (400, 200)) == 0.5
    assert (
        recall_of(spec, everything, both, None, (400, 200)) == 1 and recall_of(spec, ~everything, both, None, (400, 200)) == 0
    )


def test_a_merged_token_is_kept():
    spec = ItemSpec.lattice("image", (1, 2, 2))
    item = trace(spec, torch.tensor([True, False, False, False]))
    item.assignment = torch.tensor([0, 0, -1, -1])
    sample = Sample(None, "?", frozenset("a"), (Evidence(Box(10, 0, 20, 10)), Evidence(Box(10, 10, 20, 20))))
    assert evidence_recall(item, sample, (20, 20)) == 0.5


@pytest.mark.parametrize(
    ("grid", "steps"),
    [((8, 4, 4), [3, 4]), ((4, 4, 4), [1, 2]), ((8 * 16, 1, 1), [3, 4]), ((8 * 16 + 1, 1, 1), [3, 4])],
    ids=["frames", "pairs of frames", "rows", "rows and a newline"],
)
def test_clip(grid, steps):
    """Frames 3 and 4 of eight; 4x4 tokens a time step."""
    spec, frames = ItemSpec.lattice("video", grid), [Image.new("RGB", (224, 224))] * 8
    wanted = found(spec, (Evidence(Box(0, 56, 56, 112), (3, 5)),), frames, (224, 224))
    assert wanted.nonzero()[:, 0].tolist() == [16 * t + 4 for t in steps]
    corner = found(spec, (Evidence(Box(0, 0, 56, 56)),), frames, (224, 224))  # of every frame
    assert corner.nonzero()[:, 0].tolist() == [16 * t for t in range(len(spec.position) // 16)]
    whole = found(spec, (Evidence(frames=(3, 5)),), frames, (224, 224))
    assert whole.nonzero()[:, 0].tolist() == [16 * t + i for t in steps for i in range(16)]


def test_recording():
    """100 tokens over four seconds, 40 ms each."""
    spec = ItemSpec.lattice("audio", (100, 1, 1))
    wave = np.zeros(64000, dtype=np.float32)
    assert found(spec, (Evidence(seconds=(1.0, 1.2)),), wave, 64000).nonzero()[:, 0].tolist() == [25, 26, 27, 28, 29]
    assert found(spec, (Evidence(seconds=(1.01, 1.02)),), wave, 64000).nonzero()[:, 0].tolist() == [25]
    assert found(spec, (Evidence(seconds=(1.0, 1.2)),), wave, 64000, sampling_rate=8000).nonzero()[:, 0].tolist() == [
        12,
        13,
        14,
    ]


def test_unknown_is_nan():
    spec = ItemSpec.lattice("image", (1, 2, 2))
    assert math.isnan(recall_of(spec, torch.ones(4, dtype=torch.bool), (), None, (20, 20)))
    line = ItemSpec.lattice("image", (7, 1, 1))
    assert math.isnan(recall_of(line, torch.ones(7, dtype=torch.bool), (Evidence(Box(0, 0, 9, 9)),), None, (20, 20)))
