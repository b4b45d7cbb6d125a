"""Whisper: the decoder by hand on encoder states that the method itself reduced is the oracle."""

import math

import pytest
import torch
from seam_methods import Direction, MeanMerge, watch
from transformers import GenerationConfig, WhisperConfig, WhisperForCausalLM, WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

import mmcompress
from mmcompress.testing import assert_close
from mmcompress.tokens import Tokens

BATCH, FRAMES, MEL, WIDTH, VOCAB, STEPS = 3, 24, 8, 32, 60, 5
STAGES = {
    "prune": lambda: Direction(keep_ratio=0.3),
    "pool": lambda: mmcompress.create("pooling", keep_ratio=0.5),
    "chain": lambda: mmcompress.create("tome", keep_ratio=0.7) | Direction(keep_ratio=0.5),
}
stages_ = pytest.mark.parametrize("name", STAGES)


@pytest.fixture(scope="module")
def model():
    sizes = {
        f"{s}_{k}": v for s in ("encoder", "decoder") for k, v in {"layers": 2, "attention_heads": 2, "ffn_dim": 48}.items()
    }
    ids = {"pad_token_id": 0, "bos_token_id": 1, "decoder_start_token_id": 1, "eos_token_id": None}
    config = WhisperConfig(
        vocab_size=VOCAB, d_model=WIDTH, num_mel_bins=MEL, max_source_positions=FRAMES, max_target_positions=40, **sizes, **ids
    )
    torch.manual_seed(0)
    made = WhisperForConditionalGeneration(config)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape) / math.sqrt(p[0].numel()) if p.dim() > 1 else p + 0.1 * torch.randn(p.shape))
    made.generation_config = GenerationConfig(**ids)
    yield made.eval()
    left = [f"{n}.{k}" for n, m in made.named_modules() for k in ("forward", "generate") if k in m.__dict__]
    assert not left


@pytest.fixture
def features():
    return torch.randn(BATCH, MEL, 2 * FRAMES, generator=torch.Generator().manual_seed(1))


ids = torch.tensor([[1, 5, 9, 7], [1, 8, 3, 2], [1, 4, 4, 11]])


def reduced(model, features, stages):
    """Encoder states after the method, without the seam."""
    x = model.model.encoder(features).last_hidden_state
    n = torch.arange(FRAMES)
    position = torch.stack([n, 0 * n, 0 * n], -1)
    tokens = Tokens.of(x, position=position.expand(len(x), -1, -1))
    for stage in stages.stages:
        tokens = tokens.take(stage(tokens))
    return tokens.x


def by_hand(model, states, decoder_ids):
    return model.proj_out(model.model.decoder(decoder_ids, encoder_hidden_states=states, use_cache=False).last_hidden_state)


@stages_
@torch.no_grad()
def test_forward(model, features, name):
    stages = STAGES[name]()
    expected = by_hand(model, reduced(model, features, stages), ids)
    full = model(features, decoder_input_ids=ids).logits
    with stages(model) as run:
        got = model(features, decoder_input_ids=ids)
    assert_close(got.logits, expected)
    assert (got.logits - full).abs().max() > 1e-2  # the oracle can tell a reduced sequence from a whole one
    assert got.encoder_last_hidden_state.shape[1] == run.ledger.tokens_kept / BATCH < FRAMES


@stages_
@torch.no_grad()
def test_greedy_and_beams(model, features, name):
    stages = STAGES[name]()
    states = reduced(model, features, stages)
    with stages(model) as run:
        out = model.generate(features, max_new_tokens=STEPS, do_sample=False)
        assert len(run.ledger.samples) == BATCH
        beams = model.generate(features, max_new_tokens=STEPS, num_beams=3, do_sample=False, num_return_sequences=1)
        alone = [model.generate(f[None], max_new_tokens=STEPS, num_beams=3, do_sample=False) for f in features]
        static = model.generate(features, max_new_tokens=STEPS, do_sample=False, cache_implementation="static")
    sequence = ids[:, :1]
    for _ in range(STEPS):
        sequence = torch.cat([sequence, by_hand(model, states, sequence)[:, -1:].argmax(-1)], 1)
    assert torch.equal(tail(out), sequence[:, -STEPS:])
    assert torch.equal(tail(static), tail(out))
    assert torch.equal(tail(beams), torch.cat([tail(a) for a in alone]))
    stock = model.generate(
        encoder_outputs=BaseModelOutput(states), max_new_tokens=STEPS, num_beams=3, do_sample=False, input_features=features
    )
    assert torch.equal(tail(beams), tail(stock))


def tail(sequences):
    return sequences[:, -STEPS:]


@torch.no_grad()
def test_keep_everything_and_restore_are_bit_identical(model, features):
    logits = model(features, decoder_input_ids=ids).logits
    tokens = model.generate(features, max_new_tokens=STEPS)
    with mmcompress.create("k_center", keep_ratio=1)(model) as run:
        assert torch.equal(model(features, decoder_input_ids=ids).logits, logits)
        assert torch.equal(model.generate(features, max_new_tokens=STEPS), tokens)
    assert run.ledger.tokens_in == run.ledger.tokens_kept == 2 * BATCH * FRAMES
    with watch()(model):  # all through the machinery
        assert_close(model(features, decoder_input_ids=ids).logits, logits)
    with pytest.raises(RuntimeError, match="on purpose"), Direction(keep_ratio=0.3)(model):
        raise RuntimeError("on purpose")
    mmcompress.compress_(model, Direction(keep_ratio=0.3))
    with pytest.raises(ValueError, match="installed already"):
        mmcompress.compress_(model, Direction(keep_ratio=0.3))
    assert not torch.equal(model(features, decoder_input_ids=ids).logits, logits)
    mmcompress.restore_(model)
    assert torch.equal(model(features, decoder_input_ids=ids).logits, logits)


def test_loss_and_gradients(model, features):
    stages, labels = STAGES["pool"](), ids[:, 1:]
    grad = {}
    for which in ("seam", "hand"):
        model.zero_grad()
        if which == "seam":
            with stages(model):
                loss = model(features, labels=labels).loss
                loss.backward()
        else:
            states = reduced(model, features, stages)
            start = torch.cat([torch.ones(BATCH, 1, dtype=torch.long), labels[:, :-1]], 1)
            hand = torch.nn.functional.cross_entropy(by_hand(model, states, start).flatten(0, 1), labels.flatten())
            hand.backward()
        grad[which] = model.model.encoder.conv1.weight.grad.clone()
    model.zero_grad()
    assert_close(loss, hand)
    assert grad["seam"].abs().max() > 0
    assert_close(grad["seam"], grad["hand"])


@torch.no_grad()
def test_keys_are_those_of_the_last_block(model, features):
    seen = watch("keys")
    with seen(model):
        model(features, decoder_input_ids=ids)
    last = []
    hook = model.model.encoder.layers[-1].register_forward_pre_hook(lambda m, a: last.append(a[0]))
    model.model.encoder(features)
    hook.remove()
    block = model.model.encoder.layers[-1]
    assert_close(seen.seen[0].signals["keys"], block.self_attn.k_proj(block.self_attn_layer_norm(last[0])))


@torch.no_grad()
def test_traces_and_ledger(model, features):
    stage = Direction(keep_ratio=0.25)
    with stage(model) as run:
        model(features, decoder_input_ids=ids)
    K, L, d, heads = 6, 2, WIDTH, 2
    assert [i.sample for i in run.items] == [0, 1, 2]
    item = run.items[1]
    assert item.layout.kind == "audio" and item.layout.grid == (FRAMES, 1, 1) and len(item.anchor) == K
    assert item.columns.tolist() == list(range(K)) and item.position[:, 0].tolist() == list(range(FRAMES))
    ledger = run.ledger
    assert (ledger.tokens_in, ledger.tokens_kept) == (BATCH * FRAMES, BATCH * K)
    assert (ledger.sequence_in, ledger.sequence_kept) == (BATCH * FRAMES, BATCH * K)
    projections, attention = 2 * (2 * K * d * d), 2 * (2 * K * (d // heads) * heads)  # k and v; scores and mix of one row
    assert ledger.flops == BATCH * L * (projections + attention)
    assert ledger.kv_bytes == BATCH * L * 2 * K * d * 4
    assert ledger.flops_in == ledger.flops * FRAMES // K


@torch.no_grad()
def test_counts_that_differ(model, features):
    """No mask, no batch: alone each recording may keep what it likes."""
    with MeanMerge()(model):
        with pytest.raises(ValueError, match=r"same number of tokens in whisper models.*got \[\d+, \d+, \d+\]: pass"):
            model(features, decoder_input_ids=ids)
        for f, i in zip(features, ids, strict=True):
            model(f[None], decoder_input_ids=i[None])


def test_refusals(model, features):
    with pytest.raises(ValueError, match=r"layer must be None in an encoder-decoder model.*got 1"):
        mmcompress.compress_(model, Direction(keep_ratio=0.5, layer=1))
    with pytest.raises(ValueError, match=r"reads the signal 'text', which whisper models lack at prefill; offered: keys"):
        mmcompress.compress_(model, watch("text"))
    with Direction(keep_ratio=0.5)(model):
        for bad in ({"assistant_model": model}, {"return_token_timestamps": True}, {"encoder_outputs": (features,)}):
            with pytest.raises(ValueError, match=next(iter(bad))):
                model.generate(features, **bad)
    with pytest.raises(ValueError, match="must be a Whisper with its encoder, got WhisperForCausalLM"):
        mmcompress.compress_(WhisperForCausalLM(model.config), Direction(keep_ratio=0.5))
