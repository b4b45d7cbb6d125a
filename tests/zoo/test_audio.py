import numpy as np
import pytest
import torch
from zoo_contract import check_round_trip, prompt

from mmcompress.zoo import _build, load

RATE = 16000
SOUND = np.random.default_rng(0).normal(size=4 * RATE).astype(np.float32) * 0.1


@pytest.fixture(scope="module")
def zoo_audio():
    return _build("audio")


def inputs(processor, sound=SOUND):
    return processor(text=prompt(processor, "audio"), audio=[sound], sampling_rate=RATE, return_tensors="pt")


def test_four_seconds_are_100_tokens(zoo_audio):
    model, processor = zoo_audio
    batch = inputs(processor)
    assert int((batch.input_ids == model.config.audio_token_id).sum()) == 100
    assert "<|audio_bos|><|AUDIO|><|AUDIO|>" in processor.tokenizer.decode(batch.input_ids[0])


@torch.no_grad()
def test_the_tower_is_whisper_s_encoder(zoo_audio):
    """Qwen2-Audio pools pairs of steps before the last norm."""
    model, processor = zoo_audio
    encoder = load("asr")[0].model.encoder
    batch = inputs(processor, np.resize(SOUND, 30 * RATE))
    last = []
    hook = encoder.layers[-1].register_forward_hook(lambda *a: last.append(a[2]))
    encoder(batch.input_features)
    hook.remove()
    expected = encoder.layer_norm(last[0].unflatten(1, (-1, 2)).mean(2))
    got = model.model.audio_tower(batch.input_features).last_hidden_state
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_save_and_load_round_trip(zoo_audio, tmp_path):
    check_round_trip(*zoo_audio, tmp_path, inputs)
