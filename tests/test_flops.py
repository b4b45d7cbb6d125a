"""FLOPs and cached numbers of text models against torch's flop counter and real caches."""

import pytest
import torch
import transformers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mmcompress.flops import Decoder, LayerCost

ROWS, PAST = 24, 10
D = 64
BASE = {"vocab_size": 48, "hidden_size": D, "num_hidden_layers": 4, "num_attention_heads": 4, "pad_token_id": 0}
DENSE = {"intermediate_size": 96, "num_key_value_heads": 2}
HEADS = {"head_dim": 16}
EXPERTS = {"moe_intermediate_size": 40, "num_experts_per_tok": 2}
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12}
ROUTED = {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 2}
STREAMS = {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 48, "laurel_rank": 8}
MIXED = ["sliding_attention", "full_attention"] * 2

MODELS = {
    "llama": DENSE,
    "mistral": DENSE,
    "qwen2": DENSE,
    "qwen3": DENSE | {"head_dim": 24},  # wider than the rows
    "phi": DENSE,  # no gate
    "phi3": DENSE,  # one map for q, k and v
    "olmo2": DENSE,
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": D},
    "gemma2": DENSE | HEADS,
    "gemma3_text": DENSE | HEADS | {"layer_types": MIXED},
    "mixtral": DENSE | {"num_local_experts": 8, "num_experts_per_tok": 2},
    "granitemoe": DENSE | {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": DENSE | EXPERTS | {"num_experts": 8, "shared_expert_intermediate_size": 56, "mlp_only_layers": [1]},
    "qwen3_moe": DENSE | HEADS | EXPERTS | {"num_experts": 8},
    "llama4_text": DENSE | HEADS | {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 112},
    "gpt_oss": DENSE | HEADS | {"num_local_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v2": DENSE | EXPERTS | LATENT | ROUTED | {"q_lora_rank": 24},
    "deepseek_v3": DENSE | EXPERTS | LATENT | ROUTED | {"q_lora_rank": None},
    "lfm2": DENSE | {"layer_types": ["conv", "full_attention"] * 2},
    "gemma3n_text": DENSE | HEADS | STREAMS | {"layer_types": MIXED, "intermediate_size": [96, 96, 128, 128]},
}
EAGER = ("gemma2", "gpt_oss")
NOT_OURS = {  # what the counter counts besides: padded columns of a convolution; the mixing of four streams and its router
    "lfm2": lambda n: 2 * (2 * D * 3 * 2),
    "gemma3n_text": lambda n: 4 * n * (2 * 4 * D + 2 * 4 * 4 * D),
}


def build(name, window=64, **more):
    """A tiny text model with random weights; every sliding window as given."""
    config = CONFIG_MAPPING[name](**BASE | MODELS.get(name, {}) | more)
    if hasattr(config, "activation_sparsity_pattern"):
        config.activation_sparsity_pattern = [0.0] * 4
    for attribute in ("sliding_window", "attention_chunk_size"):
        if getattr(config, attribute, None):
            setattr(config, attribute, window)
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config, attn_implementation="eager" if name in EAGER else "sdpa").eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


def counted(model, ids, **arguments):
    """Products that torch counts in each decoder layer of one forward: operator name -> FLOPs."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, **arguments)
    layers = {}
    for name, found in counter.get_flop_counts().items():
        *_, stack, number = ("", "", *name.split("."))
        if stack == "layers" and number.isdigit():
            layers[int(number)] = {str(op): flops for op, flops in found.items()}
    return [layers[i] for i in sorted(layers)]


@pytest.fixture(scope="module")
def ids():
    return torch.arange(ROWS)[None] % 40 + 3


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_that_torch_counts(name, ids):
    model = build(name)
    decoder = Decoder.of(model)
    assert decoder.unknown is None and decoder.layers == 4 and decoder.scans == 0
    torch_says = sum(sum(layer.values()) for layer in counted(model, ids, use_cache=False))
    assert decoder.flops([ROWS] * 4) + NOT_OURS.get(name, lambda n: 0)(ROWS) == torch_says
    assert Decoder.of(model.config) == decoder


@pytest.mark.parametrize("name", ["llama", "mixtral", "deepseek_v3", "gemma3_text", "phi"])
def test_a_second_turn_meets_what_the_cache_holds(name, ids):
    model = build(name)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :PAST], use_cache=True).past_key_values
    found = counted(model, ids[:, PAST:], past_key_values=cache, use_cache=True)
    n = ROWS - PAST
    assert Decoder.of(model).flops([n] * 4, [PAST] * 4) == sum(sum(layer.values()) for layer in found)


@pytest.mark.parametrize("name", MODELS)
def test_cached_numbers_are_those_of_a_real_cache(name, ids):
    """Behind a window of 9 rows the cache keeps 8, in key-sharing and convolution layers no keys."""
    model = build(name, window=9)
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    held = [getattr(layer, kind, None) for layer in cache.layers for kind in ("keys", "values")]
    assert Decoder.of(model).kv_bytes([ROWS] * 4, 4) == sum(t.nbytes for t in held if t is not None)


def test_windows():
    """A row sees a window's rows at most, also of those that the cache held."""
    decoder = Decoder.of(build("gemma3_text", window=9))
    assert [c.window for c in decoder.costs] == [9, None, 9, None]
    pair, row = 4 * 4 * 16, decoder.costs[0].row
    assert decoder.flops([ROWS] * 4) == 4 * ROWS * row + pair * ROWS * (2 * 9 + 2 * ROWS)
    assert decoder.flops([5] * 4, [30] * 4) == 4 * 5 * row + pair * 5 * (2 * 9 + 2 * 35)
    assert decoder.flops([5] * 4, [2] * 4) == 4 * 5 * row + pair * 5 * 4 * 7


def test_layers_differ():
    costs = Decoder.of(build("qwen2_moe")).costs
    dense, sparse = 6 * D * 96, 2 * (3 * D * (2 * 40 + 56) + 8 * D + D)  # two experts and the shared one; router, shared gate
    assert costs[0].row - costs[1].row == sparse - dense and costs[2] == costs[0]
    streams = Decoder.of(build("gemma3n_text")).costs
    assert [c.cached for c in streams] == [64, 64, 0, 0]


@pytest.mark.parametrize("name", sorted(MODELS.keys() & {"llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "gemma2"}))
def test_a_gated_layer_is_the_closed_form(name):
    model = build(name)
    c = model.config
    e = getattr(c, "head_dim", None) or D // 4
    closed = Decoder(4, D, 96, 4, 2, e)
    assert Decoder.of(model).flops([ROWS] * 4) == closed.flops([ROWS] * 4)
    grouped = 2 * ROWS * (2 * D * 4 * e + 2 * D * 2 * e + 3 * D * 96) + 4 * ROWS**2 * 4 * e
    assert closed.flops([ROWS] * 4) == 4 * grouped


def test_the_scan_of_a_linear_layer_is_named_and_not_counted(ids):
    linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    experts = EXPERTS | {"num_experts": 8, "shared_expert_intermediate_size": 56}
    model = build("qwen3_next", **DENSE | HEADS | linear | experts, layer_types=["linear_attention", "full_attention"] * 2)
    decoder = Decoder.of(model)
    assert [c.scan for c in decoder.costs] == [True, False] * 2 and decoder.scans == 2
    layers = counted(model, ids, use_cache=False)
    for i in (1, 3):
        assert LayerCost.flops(decoder.costs[i], ROWS) == sum(layers[i].values())
    channels, kernel = 4 * 8 + 2 * 2 * 8, 4
    matrices = {op: n for op, n in layers[0].items() if op in ("aten.mm", "aten.addmm", "aten.convolution")}
    assert decoder.costs[0].flops(ROWS) == sum(matrices.values()) - 2 * channels * kernel * (kernel - 1)  # its padded columns


def test_adapters_and_low_rank():
    model = build("llama")

    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer, self.lora_A, self.lora_B = base, nn.Linear(D, 2, False), nn.Linear(2, base.out_features, False)
            self.in_features, self.out_features = base.in_features, base.out_features

    before = Decoder.of(model).costs[0]
    model.layers[0].self_attn.q_proj = Adapted(model.layers[0].self_attn.q_proj)
    after = Decoder.of(model).costs[0]
    assert after.row - before.row == 2 * (2 * D + 2 * D) and after.pair == before.pair


class Mystery(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(3, 5))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.layers[2].mlp.register_module("odd", Mystery()), r"layer 2 \(LlamaDecoderLayer\): mlp.odd.table of shape"),
        (
            lambda m: m.layers[1].self_attn.register_module("index", nn.Sequential(nn.Linear(4, 4))),
            "LlamaAttention holds index",
        ),
        (lambda m: m.layers[0].self_attn.register_parameter("lambda_q", nn.Parameter(torch.zeros(4))), "holds lambda_q"),
        (lambda m: setattr(m.layers[0].self_attn, "head_dim", 5), "do not fit heads of 5"),
        (lambda m: delattr(m.layers[3], "self_attn"), "layer 3 .*: 0 attention modules"),
        (lambda m: setattr(m, "layers", None), "LlamaModel has no list of layers"),
    ],
)
def test_what_is_not_understood_is_not_counted(change, says):
    model = build("llama")
    change(model)
    decoder = Decoder.of(model)
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(decoder.unknown)
    assert decoder.flops([ROWS] * 4) is None and decoder.kv_bytes([ROWS] * 4) is None and decoder.layers == 4


@pytest.mark.parametrize("name", ["gpt2", "deepseek_v32", "bart"])
def test_models_that_are_not_understood(name):
    sizes = {"gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2}, "bart": {"d_model": 32}}.get(name, {"num_hidden_layers": 2})
    decoder = Decoder.of(CONFIG_MAPPING[name](**sizes))
    assert decoder.unknown and decoder.flops([3] * decoder.layers) is None


def test_what_is_no_config():
    with pytest.raises(ValueError, match="text must be a transformers text model or its config, got int"):
        Decoder.of(3)
