"""Alone = in a copy = in a pickle = from a saved folder; a returned cache may be copied, pickled, cropped, and outlives its
block only with a sentence."""

import copy
import io
import json
import pickle
import warnings

import pytest
import torch
from seam_methods import CHAINS

import mmcompress
from mmcompress import create
from mmcompress.testing import tiny_inputs, tiny_model

chains = pytest.mark.parametrize("chain", CHAINS)
GREEDY = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


@pytest.fixture
def model():
    return tiny_model("llava_next")


@pytest.fixture
def inputs():
    return tiny_inputs("llava_next")


def stack(out):
    return torch.stack(out.logits)


def by_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": by_torch_save}
ways = pytest.mark.parametrize("way", WAYS)


@chains
@ways
@torch.no_grad()
def test_a_copy_is_compressed_as_the_original_and_on_its_own(model, inputs, chain, way):
    mmcompress.compress_(model, CHAINS[chain]())
    twin = WAYS[way](model)  # before the first call: after it stock transformers models cannot be pickled
    logits, tokens = model(**inputs).logits, stack(model.generate(**inputs, **GREEDY))
    mmcompress.ledger(model).clear()
    assert torch.equal(twin(**inputs).logits, logits) and torch.equal(stack(twin.generate(**inputs, **GREEDY)), tokens)
    assert mmcompress.ledger(twin).totals()["prefills"] == 4 and not mmcompress.ledger(model).samples
    for parameter in twin.model.language_model.layers.parameters():
        parameter.mul_(0.5)
    assert not torch.equal(twin(**inputs).logits, logits) and torch.equal(model(**inputs).logits, logits)
    mmcompress.restore_(model)
    stock, greedy = model(**inputs).logits, stack(model.generate(**inputs, **GREEDY))
    assert not torch.equal(logits, stock)
    with pytest.raises(ValueError, match="no compressor is installed"):
        mmcompress.restore_(model)
    for parameter in twin.model.language_model.layers.parameters():
        parameter.mul_(2)
    assert torch.equal(twin(**inputs).logits, logits), "the copy stays compressed until it is restored itself"
    mmcompress.restore_(twin)
    assert torch.equal(twin(**inputs).logits, stock) and torch.equal(stack(twin.generate(**inputs, **GREEDY)), greedy)
    assert "mmcompress" not in twin.config.to_dict() and "mmcompress" not in dict(twin.named_modules())


@torch.no_grad()
def test_restoring_a_copy_leaves_the_original(model, inputs):
    stock = model(**inputs).logits
    mmcompress.compress_(model, CHAINS["prefill"]())
    logits = model(**inputs).logits
    reference = copy.deepcopy(model)
    mmcompress.restore_(reference)
    assert torch.equal(reference(**inputs).logits, stock) and torch.equal(model(**inputs).logits, logits)


@torch.no_grad()
def test_a_copy_made_inside_a_block_outlives_it(model, inputs):
    stock = model(**inputs).logits
    with CHAINS["prefill"]()(model) as run:
        logits, twin = model(**inputs).logits, copy.deepcopy(model)
    counted = run.ledger.totals()
    assert torch.equal(model(**inputs).logits, stock) and torch.equal(twin(**inputs).logits, logits)
    assert run.ledger.totals() == counted, "the closed block's ledger is not written to"
    mmcompress.restore_(twin)
    assert torch.equal(twin(**inputs).logits, stock)


@torch.no_grad()
def test_a_copy_of_a_part_is_the_stock_part(model, inputs):
    x, position = torch.randn(1, 5, 64), torch.arange(5)[None]
    stock = model.model.language_model(inputs_embeds=x, position_ids=position).last_hidden_state
    with CHAINS["two_places"]()(model):
        text = copy.deepcopy(model.model.language_model)
        layer = copy.deepcopy(model.model.language_model.layers[3])
    assert torch.equal(text(inputs_embeds=x, position_ids=position).last_hidden_state, stock)
    assert sum(p.numel() for p in layer.parameters()) == sum(
        p.numel() for p in model.model.language_model.layers[3].parameters()
    )
    assert not any(isinstance(v, type(model)) for v in vars(layer.forward).values())


# what is installed belongs to the model


@pytest.fixture
def trained():
    torch.manual_seed(0)
    method = create("vq_hash", num_codes=4, mapper=True, width=64)
    with torch.no_grad():
        for p in method.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return method


def test_parameters_are_the_models_while_installed(trained):
    model = tiny_model("llava")
    names, count = list(model.state_dict()), len(list(model.parameters()))
    mmcompress.compress_(model, trained)
    mine = {id(p) for p in model.parameters()}
    assert len(list(trained.parameters())) == 9 and all(id(p) in mine for p in trained.parameters())
    assert any(name.startswith("mmcompress.") for name in model.state_dict())
    model.eval()
    assert not trained.training
    model.train()
    assert trained.training
    model.to(torch.bfloat16)
    assert {p.dtype for p in trained.parameters()} == {torch.bfloat16}
    model.float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == count + 9
    mmcompress.restore_(model)
    assert list(model.state_dict()) == names and len(list(model.parameters())) == count


def test_a_trained_compressor_is_in_one_model_at_a_time(trained):
    """What happens to one model must not change another."""
    a, b = tiny_model("llava"), tiny_model("llava", seed=1)
    mmcompress.compress_(a, trained)
    with pytest.raises(ValueError, match="must be in one model at a time"):
        mmcompress.compress_(b, trained)
    assert "forward" not in b.model.__dict__ and "mmcompress" not in dict(b.named_modules())
    mmcompress.compress_(b, trained.but())
    b.half()
    assert {p.dtype for p in a.mmcompress.parameters()} == {torch.float32}
    mmcompress.restore_(a)
    with trained(a):  # taken out and installed anew inside a block: the block's end leaves the new one alone
        mmcompress.restore_(a)
        mmcompress.compress_(a, trained)
    assert "mmcompress" in a._modules
    mmcompress.restore_(a)


def test_a_step_of_training_reaches_the_compressor(trained):
    model, inputs = tiny_model("llava"), tiny_inputs("llava", 2, padding_side="right")
    mmcompress.compress_(model, trained)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] < 10, -100)
    model.train()
    model(**inputs, labels=labels).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.parameters())


@pytest.mark.parametrize("way", ["plain", "with parameters"])
@torch.no_grad()
def test_a_saved_model_keeps_its_compressor(tmp_path, trained, way, caplog):
    from transformers import LlavaForConditionalGeneration

    inputs, model = tiny_inputs("llava"), tiny_model("llava")
    stock = model(**inputs).logits
    mmcompress.compress_(model, trained if way == "with parameters" else CHAINS["prefill"]())
    logits = model(**inputs).logits
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "mmcompress.json").read_text())["format_version"] == 1
    with caplog.at_level("WARNING"), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    said = caplog.text + "".join(str(w.message) for w in seen)
    assert "mmcompress" in said, "a folder that was saved compressed and is loaded without says so"
    assert torch.equal(loaded(**inputs).logits, stock)
    assert mmcompress.apply_from_config(loaded) is loaded
    assert torch.equal(loaded(**inputs).logits, logits)
    mmcompress.restore_(loaded)
    assert torch.equal(loaded(**inputs).logits, stock)


@torch.no_grad()
def test_a_saved_adapter_keeps_its_compressor(tmp_path, trained):
    peft = pytest.importorskip("peft")
    inputs = tiny_inputs("llava")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(tiny_model("llava"), config)
    mmcompress.compress_(model, trained)
    logits = model(**inputs).logits
    model.save_pretrained(tmp_path)
    assert {"adapter_config.json", "mmcompress.json", "mmcompress.safetensors"} <= {p.name for p in tmp_path.iterdir()}
    again = peft.PeftModel.from_pretrained(tiny_model("llava"), tmp_path)
    mmcompress.apply_from_config(again, tmp_path)
    assert torch.equal(again(**inputs).logits, logits)
    mmcompress.restore_(model)
    assert "save_pretrained" not in model.__dict__


def test_restore_gives_back_the_configuration_that_was_there():
    model = tiny_model("llava")
    model.config.mmcompress = {"method": "pooling"}
    mmcompress.compress_(model, CHAINS["prefill"]())
    assert model.config.mmcompress["method"] == "dpc_knn"
    mmcompress.restore_(model)
    assert model.config.mmcompress == {"method": "pooling"}


def test_prefix_tuning_can_be_restored():
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, num_layers=4, token_dim=32, num_attention_heads=2
    )
    model = peft.get_peft_model(tiny_model("llava"), config)
    ids = torch.tensor([[1, 20, 21]])
    stock = model.generate(input_ids=ids, max_new_tokens=2)
    mmcompress.compress_(model, CHAINS["prefill"]())
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=2), stock)
    mmcompress.restore_(model)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=2), stock)


# the cache


TURN = torch.randint(10, 99, (2, 3), generator=torch.Generator().manual_seed(5))


def second_turn(model, inputs, first, cache=None):
    n = first.sequences.shape[1] - inputs["input_ids"].shape[1] + TURN.shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, n, dtype=torch.long)], 1)
    ids = torch.cat([first.sequences, TURN], 1)
    cache = first.past_key_values if cache is None else cache
    return stack(model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **GREEDY))


@chains
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@torch.no_grad()
def test_a_returned_cache_can_be_copied_and_pickled(model, inputs, chain, way):
    with CHAINS[chain]()(model):
        first = model.generate(**inputs, **GREEDY)
        twin = copy.deepcopy(first.past_key_values) if way == "deepcopy" else pickle.loads(pickle.dumps(first.past_key_values))
        wanted = second_turn(model, inputs, first)
        assert torch.equal(second_turn(model, inputs, first, twin), wanted)


@chains
@pytest.mark.parametrize("padded", [True, False])
@torch.no_grad()
def test_a_cache_outlives_its_block_only_with_a_sentence(model, chain, padded):
    inputs = tiny_inputs("llava_next") if padded else tiny_inputs("llava_next", 4, rows=[1])
    with CHAINS[chain]()(model):
        first = model.generate(**inputs, **GREEDY)
    ids = torch.cat([first.sequences, TURN[: len(first.sequences)]], 1)
    cache = first.past_key_values
    with pytest.raises(RuntimeError, match="holds fewer rows than tokens"):
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=2)
    with CHAINS[chain]()(model):  # installed again, it goes on
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=2)


@chains
@torch.no_grad()
def test_a_cache_can_be_cropped_back_to_the_picture(model, chain):
    inputs = tiny_inputs("llava_next", 4, rows=[1])

    def turn(*ids):
        ids = torch.cat([inputs["input_ids"], torch.tensor([ids])], 1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    with CHAINS[chain]()(model):
        cache = model(**inputs, use_cache=True).past_key_values
        n, physical = cache.get_seq_length(), [layer.keys.shape[-2] for layer in cache.layers]
        wanted = stack(model.generate(**turn(30, 31, 32), past_key_values=copy.deepcopy(cache), **GREEDY))
        stack(model.generate(**turn(20, 21, 22, 23), past_key_values=cache, **GREEDY))
        cache.crop(n - cache.get_seq_length())
        assert cache.get_seq_length() == n and [layer.keys.shape[-2] for layer in cache.layers] == physical
        assert torch.equal(stack(model.generate(**turn(30, 31, 32), past_key_values=cache, **GREEDY)), wanted)
        with pytest.raises(ValueError, match="crop must leave"):
            cache.crop(-cache.get_seq_length())


@torch.no_grad()
def test_crop_to_a_length_does_what_stock_caches_do(model):
    """Where transformers takes a positive number it is the length that stays, in tokens, not rows; where not it refuses."""
    from transformers import DynamicCache

    inputs = tiny_inputs("llava_next", 4, rows=[1])
    stock = DynamicCache()
    stock.update(torch.zeros(1, 1, 5, 2), torch.zeros(1, 1, 5, 2), 0)
    with CHAINS["prefill"]()(model):
        cache = model(**inputs, use_cache=True).past_key_values
        n = cache.get_seq_length()
        ids = torch.cat([inputs["input_ids"], torch.tensor([[20, 21]])], 1)
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=3)
        try:
            stock.crop(3)
        except ValueError:
            with pytest.raises(ValueError, match="positive"):
                cache.crop(n)
        else:
            assert stock.get_seq_length() == 3
            cache.crop(n)
            assert cache.get_seq_length() == n
