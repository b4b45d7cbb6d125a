"""Golden values: the published rows of TokDense in tests/golden/vq_hash_dev.npz and in the method's specification."""

import json
from pathlib import Path

import numpy as np
import pytest

from mmcompress.eval.metrics import tok_dense, tok_dense_adaptive, tok_dense_fixed

GOLDEN = Path(__file__).parent.parent / "golden" / "vq_hash_dev.npz"


def digits(value, published):
    """Equal to the digits that were printed."""
    text = np.format_float_positional(published, trim="-")
    return round(value, len(text.partition(".")[2])) == published


def test_published_rows():
    with np.load(GOLDEN, allow_pickle=False) as z:
        i = [c["kind"] for c in json.loads(str(z["meta"]))].index("tokdense")
        rows = list(zip(*(z[f"{i:02d}.{name}"].tolist() for name in ("accuracy", "tokens", "tokdense")), strict=True))
    assert len(rows) == 5
    for accuracy, tokens, published in rows:
        assert digits(tok_dense(accuracy, tokens), published), (accuracy, tokens, published)


@pytest.mark.parametrize("row", [(57.72, 13.08, 4.413), (57.46, 32, 1.796), (57.20, 3136, 0.018), (57.70, 1662.12, 0.035)])
def test_rows_of_the_specification(row):
    assert round(tok_dense(*row[:2]), 3) == row[2]


def test_fixed_and_adaptive():
    assert tok_dense_fixed(57.46, [32, 32, 32]) == tok_dense(57.46, 32)
    assert tok_dense_adaptive(50.0, [12, 13, 15]) == 50 / (40 / 3)
    assert tok_dense_adaptive(57.72, [13] * 92 + [14] * 8) == tok_dense(57.72, 13.08)
    with pytest.raises(ValueError, match=r"counts must be one number of tokens for all items, got \[12, 32\]"):
        tok_dense_fixed(50.0, [32, 12])


@pytest.mark.parametrize("call", [
    lambda: tok_dense(101, 4), lambda: tok_dense(-1, 4), lambda: tok_dense(float("nan"), 4), lambda: tok_dense(50, 0),
    lambda: tok_dense_fixed(50, []), lambda: tok_dense_adaptive(50, []), lambda: tok_dense_adaptive(50, [0, 0]),
])  # fmt: skip
def test_wrong_values(call):
    with pytest.raises(ValueError, match=r"must .*, got"):
        call()
