"""Tiny random models on disk with processors that fit them: what the command line loads by path."""

from pathlib import Path

from mmcompress.testing import AUDIO, BOS, END, IMAGE, MERGE, PAD, PATCH, PINPOINTS, START, VIDEO, VIEW, VOCAB, tiny_model

WORDS = {
    PAD: "<pad>",
    BOS: "<s>",
    2: "<unk>",
    IMAGE: "<image>",
    VIDEO: "<video>",
    AUDIO: "<audio>",
    START: "<start>",
    END: "<end>",
}
TEMPLATE = (
    "<s>{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<start><{{ part['type'] }}><end>{% endif %}"
    "{% endfor %}{% endfor %}"
)


def tokenizer(**special):
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {WORDS.get(i, f"w{i}"): i for i in range(VOCAB)}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in WORDS.values()])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        unk_token="<unk>",
        extra_special_tokens=special,
        padding_side="left",
    )


def llava():
    from transformers import CLIPImageProcessor, LlavaProcessor

    edge = VIEW["image_size"]
    images = CLIPImageProcessor(size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge})
    return LlavaProcessor(images, tokenizer(), image_token="<image>", **_views())


def llava_next():
    from transformers import LlavaNextImageProcessor, LlavaNextProcessor

    edge = VIEW["image_size"]
    images = LlavaNextImageProcessor(
        size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge}, image_grid_pinpoints=PINPOINTS
    )
    return LlavaNextProcessor(images, tokenizer(), image_token="<image>", **_views())


def _views():
    return {
        "patch_size": VIEW["patch_size"],
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": TEMPLATE,
    }


def qwen2_5_vl():
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    pixels = {"shortest_edge": 8 * 8, "longest_edge": 48 * 48}
    sizes = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2, "size": pixels}
    own = tokenizer(image_token="<image>", video_token="<video>")
    return Qwen2_5_VLProcessor(Qwen2VLImageProcessor(**sizes), own, Qwen2VLVideoProcessor(**sizes), chat_template=TEMPLATE)


def qwen2_audio():
    from transformers import Qwen2AudioProcessor, WhisperFeatureExtractor

    sound = WhisperFeatureExtractor(feature_size=8, sampling_rate=16000, hop_length=166, n_fft=400, chunk_length=1)
    marks = {"audio_token": "<audio>", "audio_bos_token": "<start>", "audio_eos_token": "<end>"}
    return Qwen2AudioProcessor(sound, tokenizer(**marks), chat_template=TEMPLATE, **marks)


PROCESSORS = {"llava": llava, "llava_next": llava_next, "qwen2_5_vl": qwen2_5_vl, "qwen2_audio": qwen2_audio}


def save(family: str, folder: Path) -> str:
    """Write the tiny model of a family and its processor; returns the folder's name."""
    tiny_model(family).save_pretrained(folder)
    PROCESSORS[family]().save_pretrained(folder)
    return str(folder)
