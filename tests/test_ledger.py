"""The ledger's closed forms against the published columns, and its totals against a count by hand."""

import copy
import json
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, MistralConfig, StaticCache

import mmcompress
from mmcompress import create
from mmcompress.ledger import Decoder, ItemCount, LayerCost, Ledger, SampleCount, held_bytes
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


def sample(rows, kept, **more):
    return SampleCount(rows, {0: kept}, [ItemCount("image", rows - 2, 0, {0: kept - 2})], **more)


def test_totals_are_exact_and_samples_are_the_last():
    decoder = Decoder(3, 8, 16, 2, 1, 4)
    whole, short = Ledger(decoder, window=1000), Ledger(decoder, window=7)
    for n in range(500):
        for ledger in (whole, short):
            ledger.add([sample(20 + n % 13, 8 + n % 5), sample(30, 10 + n % 3)])
    assert whole.totals() == short.totals() and whole.totals()["prefills"] == 1000 == len(whole.samples)
    assert short.samples == whole.samples[-7:] and len(short.items) == 7
    assert whole.flops == sum(decoder.flops(s.rows(3)) for s in whole.samples)
    assert whole.sequence_in == sum(s.sequence_in for s in whole.samples)
    assert Ledger(decoder).window == 256
    short.clear()
    assert short.samples == () and short.tokens_in == 0 and short.totals() == Ledger(decoder).totals()
    with pytest.raises(ValueError, match="window must be an int of at least 1, got 0"):
        Ledger(decoder, window=0)


def test_what_was_counted_stays():
    """Neither a change of the sample that went in nor one of the total that came out is seen."""
    ledger, one = Ledger(Decoder(3, 8, 16, 2, 1, 4)), sample(20, 8)
    ledger.add([one])
    before = ledger.to_json()
    one.rows_from[0] = one.items[0].kept_from[0] = 1
    ledger.totals()["flops"] = 0
    assert ledger.to_json() == before
    with pytest.raises(AttributeError):
        ledger.samples.append(one)


def test_threads_lose_nothing():
    ledger, per_thread = Ledger(Decoder(2, 8, 16, 2, 1, 4), window=5), 400
    wrong = []

    def work():
        for _ in range(per_thread):
            ledger.add([sample(20, 8), sample(20, 8)])
            t = ledger.totals()
            if t["tokens_in"] != 18 * t["prefills"] or t["sequence_kept"] != 8 * t["prefills"] or len(ledger.samples) > 5:
                wrong.append(t)

    threads = [threading.Thread(target=work) for _ in range(8)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong and ledger.totals()["prefills"] == 8 * 2 * per_thread and ledger.tokens_in == 18 * 8 * 2 * per_thread


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deep", "flat", "pickle"]
)
def test_copies(copied):
    ledger = Ledger(Decoder(2, 8, 16, 2, 1, 4), window=3)
    for _ in range(5):
        ledger.add([sample(20, 8)])
    other = copied(ledger)
    assert other.to_json() == ledger.to_json() and str(other) == str(ledger)
    other.add([sample(20, 8)])
    assert (
        other.totals()["prefills"] == 6 and ledger.totals()["prefills"] == 5 and len(other.samples) == len(ledger.samples) == 3
    )
    other.clear()
    assert ledger.tokens_in == 90


def test_a_second_turn():
    """Five new rows on a cache of 12 (of 20 tokens seen; from layer 1 on 6): every new row meets all that are held."""
    decoder = Decoder(2, 8, 16, 2, 1, 4)
    ledger = Ledger(decoder)
    ledger.add([SampleCount(5, {0: 4}, [ItemCount("image", 3, 0, {0: 2})], past={0: 12, 1: 6}, past_in=20)])
    row, pair = 4 * 8 * 4 * 3 + 6 * 8 * 16, 4 * 4 * 2
    assert ledger.flops == 2 * 4 * row + pair * 4 * (4 + 12 + 4 + 6)
    assert ledger.flops_in == 2 * (5 * row + pair * 5 * 25)
    assert ledger.kv_bytes == 2 * 4 * 2 * (16 + 10) and ledger.kv_bytes_in == 2 * 4 * 2 * 2 * 25
    assert (ledger.sequence_in, ledger.sequence_kept) == (5, 4)
    whole = SampleCount(5, past={0: 12})
    assert whole.seen == 12 and whole.held(2) == [12, 12] and SampleCount(5, past_in=7).held(2) == [7, 7]


def test_element_size_is_that_of_the_prefill():
    ledger = Ledger(Decoder(2, 8, 16, 2, 1, 4, bytes=4))
    ledger.add([sample(20, 8)])
    ledger.add([sample(20, 8)], element_size=2)
    assert ledger.kv_bytes == 2 * 4 * 2 * 8 * (4 + 2) and [s.element_size for s in ledger.samples] == [None, 2]


def test_longer():
    one = sample(20, 8, kv_bytes=5, kv_bytes_in=9)
    more = one.longer(3)
    assert (more.sequence_in, more.rows(2), more.kv_bytes, more.kv_bytes_in) == (23, [11, 11], None, None)
    more.items[0].kept_from[0] = 0
    assert one.items[0].kept_from[0] == 6 and one.rows(2) == [8, 8]


def test_the_line_says_what_passed_untouched():
    ledger = Ledger(Decoder(2, 8, 16, 2, 1, 4))
    ledger.add([SampleCount(9, {}, [ItemCount("image", 4, 0, {0: 4}, untouched="vidcom2")])])
    assert str(ledger).endswith("0 of 1 items were of a kind that vidcom2 compresses")
    ledger.add([SampleCount(9, {}, [ItemCount("video", 4, 0, {0: 2})])])
    assert "1 of 2 items were of a kind that vidcom2 compresses" in str(pickle.loads(pickle.dumps(ledger)))
    ledger.clear()
    assert "vidcom2" not in str(ledger)


def test_what_is_not_understood_is_said():
    unknown = Decoder(2, 8, 0, 0, 0, 0, unknown="layer 1 (OddLayer): odd.table of shape [3, 5]")
    ledger = Ledger(unknown)
    ledger.add([sample(20, 8)])
    assert ledger.flops is ledger.flops_in is ledger.kv_bytes is ledger.kv_bytes_in is None and ledger.tokens_kept == 6
    assert "KV not counted, prefill FLOPs not counted (layer 1 (OddLayer): odd.table of shape [3, 5])" in str(ledger)
    assert json.loads(json.dumps(ledger.totals()))["flops"] is None
    measured = Ledger(unknown)
    measured.add([sample(20, 8)], cache=())
    assert (measured.kv_bytes, measured.flops) == (0, None)
    scans = Ledger(Decoder(2, 8, 0, 0, 0, 0, costs=(LayerCost(10, 0, 0, scan=True), LayerCost(10, 2, 4))))
    scans.add([sample(20, 8)])
    assert "GFLOP (−76 %) without the scans of 1 layers" in str(scans)  # 20 · 20 + 2 · 400 -> 20 · 8 + 2 · 64


# the cache really held


def filled(cache, rows, batch=3, layers=2, dtype=torch.float32):
    for i in range(layers):
        cache.update(torch.zeros(batch, 2, rows, 4, dtype=dtype), torch.zeros(batch, 2, rows, 6, dtype=dtype), i)
    return cache


def config(**more):
    return LlamaConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2, head_dim=4, **more)


def test_a_growing_cache_holds_its_rows():
    cache = filled(DynamicCache(), 10, dtype=torch.bfloat16)
    assert held_bytes(cache, 25) == (2 * 2 * 10 * 10 * 2, 2 * 2 * 10 * 25 * 2) and held_bytes(cache) == (800, 800)


def test_a_static_cache_holds_what_it_allocates():
    cache = filled(StaticCache(config=config(), max_cache_len=64), 10)
    assert held_bytes(cache, 25) == (2 * 2 * 64 * 10 * 4,) * 2


@pytest.mark.parametrize(("rows", "before"), [(5, 7), (5, 25), (12, 25)])
def test_a_window_holds_its_rows_at_most(rows, before):
    types = ["sliding_attention", "full_attention"]
    mixed = MistralConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2, head_dim=4, sliding_window=9)
    mixed.layer_types = types
    cache = filled(DynamicCache(config=mixed), rows)
    number = 2 * 10 * 4
    assert held_bytes(cache, before) == (number * (min(rows, 8) + rows), number * (min(before, 8) + before))


def test_packed_layers_and_states():
    """Quantised rows as tuples of packed numbers; states of linear attention are the same for any number of rows."""

    class Packed:
        def __init__(self):
            self.keys = self.values = torch.zeros(0)
            self._quantized_keys = (torch.zeros(3, 2, 10, 2, dtype=torch.uint8), {"scale": torch.zeros(3, 2, 10)})
            self.cumulative_length = torch.tensor(10)

        def get_seq_length(self):
            return 10

    class States:
        def __init__(self):
            self.conv_states = {0: torch.zeros(3, 8, 4), 1: None}
            self.recurrent_states = torch.zeros(3, 2, 4, 4)

    packed, states = 2 * 10 * 2 + 4 * 2 * 10, 4 * (8 * 4 + 2 * 4 * 4)
    assert held_bytes([Packed(), States()], 25) == (packed + states, packed * 25 // 10 + states)


def test_measured_bytes_are_shared_out_over_the_batch():
    ledger = Ledger(Decoder(2, 8, 16, 2, 1, 4))
    ledger.add([sample(25, 10), sample(20, 8)], 4, filled(DynamicCache(), 10), 25)  # three rows, of which one had no item
    assert ledger.kv_bytes == 2 * (2 * 2 * 10 * 10 * 4) and ledger.kv_bytes_in == 2 * (2 * 2 * 10 * 25 * 4)
    again = Ledger(ledger.decoder)
    again.add(ledger.samples)  # what was measured goes with the sample
    assert again.totals() == ledger.totals()


# the handle


def test_the_ledger_of_a_model():
    model, inputs = tiny_model("llava"), tiny_inputs("llava", batch_size=1)
    with pytest.raises(ValueError, match="model must have a compressor installed to have a ledger, got a LlavaForConditional"):
        mmcompress.ledger(model)
    with pytest.raises(ValueError, match="got a int without one"):
        mmcompress.ledger(3)
    mmcompress.compress_(model, create("uniform_keep", keep_ratio=0.5))
    model(**inputs)
    found = mmcompress.ledger(model)
    assert isinstance(found, Ledger) and found is mmcompress.ledger(model) and found.tokens_in > found.tokens_kept > 0
    found.clear()
    assert mmcompress.ledger(model).tokens_in == 0
    mmcompress.restore_(model)


def test_the_handle_is_a_module_too():
    import mmcompress.ledger as module

    assert module is mmcompress.ledger is sys.modules["mmcompress.ledger"] and module.Ledger is Ledger
    assert isinstance(module, ModuleType) and callable(module) and module.__name__ == "mmcompress.ledger"
    for first in ("import mmcompress.ledger as L, mmcompress; assert L is mmcompress.ledger", "import mmcompress"):
        code = f"{first}\nfrom mmcompress.ledger import Ledger\nprint(callable(mmcompress.ledger), Ledger.__name__)"
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert said.split() == ["True", "Ledger"]


@torch.no_grad()
def test_bytes_follow_the_model_to_another_dtype():
    """Installed in float32, run in bfloat16: the bytes are those of the cache."""
    model, inputs = tiny_model("llava"), tiny_inputs("llava", 4, rows=[1])
    mmcompress.compress_(model, create("dpc_knn", keep_ratio=0.4)).to(torch.bfloat16)
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    cache = model(**inputs).past_key_values
    assert mmcompress.ledger(model).kv_bytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@torch.no_grad()
def test_a_mask_that_counts_samples_counts_each_row_once():
    model, inputs = tiny_model("llava"), tiny_inputs("llava", batch_size=1)
    with create("none")(model) as run:
        model(**inputs)
        once = run.ledger.sequence_in
        model(**inputs | {"attention_mask": 2 * inputs["attention_mask"]})
    assert once == inputs["input_ids"].shape[1] and run.ledger.sequence_in == 2 * once
