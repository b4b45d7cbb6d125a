"""The ledger's closed forms against the published columns, and its totals against a count by hand."""

import json
from pathlib import Path

import pytest

from mmcompress import create
from mmcompress.ledger import Decoder, ItemCount, Ledger, SampleCount
from mmcompress.testing import tiny_inputs, tiny_model

GROUPS = {
    g["id"]: g["rows"] for g in json.loads((Path(__file__).parent / "golden/closed_form_anchors.json").read_text())["groups"]
}


def dense(L, d, m, heads=32):
    return Decoder(layers=L, width=d, mlp=m, heads=heads, kv_heads=heads, head_width=d // heads, bytes=2)


@pytest.mark.parametrize("row", GROUPS["global_guided_cost"], ids=lambda r: f"{r['model']}-{r['visual_tokens']}")
def test_published_cost_columns(row):
    decoder = dense(row["L"], row["d"], row["m"])
    rows = [row["visual_tokens"]] * row["L"]
    assert decoder.flops(rows) / 1e12 == pytest.approx(row["tflops_value"], abs=5e-5)
    assert decoder.flops(rows) / 1e12 == pytest.approx(row["tflops_published"], abs=0.13)
    assert decoder.kv_bytes(rows) / 1e6 == pytest.approx(row["kv_mb_value"], abs=5e-5)


@pytest.mark.parametrize("row", GROUPS["pooling_stagewise_cost"], ids=lambda r: f"layer{r['layer']}-stride{r['stride']}")
def test_tokens_over_layers(row):
    """LLaVolta's column "tokens": 576 tokens before layer K, pooled by the stride behind it."""
    sample = SampleCount(576, {row["layer"]: 576 // row["stride"]})
    assert sum(sample.rows(32)) == row["tokens"]
    linear = 2 * 32 * (4 * 4096**2 + 3 * 4096 * 11008) * (sum(sample.rows(32)) / 32 + 62) / 1e12
    assert linear == pytest.approx(row["tflops_value"], abs=5e-5)


def test_grouped_heads_cost_less():
    full, grouped = dense(1, 64, 96, 8), Decoder(1, 64, 96, 8, 2, 8)
    assert full.flops([10]) - grouped.flops([10]) == 4 * 10 * 64 * 8 * 6  # k and v of the 6 heads that are gone
    assert grouped.kv_bytes([10]) * 4 == full.kv_bytes([10])


def test_totals_by_hand():
    ledger = Ledger(Decoder(4, 8, 16, 2, 1, 4))
    ledger.add([SampleCount(20, {0: 14, 2: 10}, [ItemCount("image", 12, 3, {0: 6, 2: 2})])])
    ledger.add([SampleCount(9, {}, [ItemCount("image", 4)])])
    assert (ledger.tokens_in, ledger.tokens_kept, ledger.separators, ledger.sequence_in) == (16, 4 + 4, 3, 29)
    assert ledger.sequence_kept == (14 + 14 + 10 + 10) / 4 + 9
    assert ledger.kept_ratio == 8 / 16
    assert ledger.kv_bytes == 2 * 1 * 4 * 2 * (14 + 14 + 10 + 10 + 4 * 9)
    assert "16 → 8 tokens (50.0 %) + 3 separators" in str(ledger)
    assert json.loads(json.dumps(ledger.to_json()))["totals"]["prefills"] == 2
    ledger.clear()
    assert "no image" in str(ledger)


def test_a_real_cache_holds_the_bytes_that_the_ledger_says():
    model, inputs = tiny_model("llava_next"), tiny_inputs("llava_next", batch_size=1)
    chain = create("random_keep", keep_ratio=0.5) | create("uniform_keep", keep_ratio=0.5, layer=2)
    with chain(model) as run:
        cache = model(**inputs, use_cache=True).past_key_values
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert held == run.ledger.kv_bytes < run.ledger.kv_bytes_in
