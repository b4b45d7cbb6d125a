"""Compress a model of your own: a class that transformers and mmcompress have never seen.

    python examples/own_model.py

The model below reads pictures as rows of patches: a plain `nn.Module` puts their features where the placeholder ids stand and
calls a text model of transformers with the merged embeddings. mmcompress needs to know three things about it: which module does
that (core), which module it calls (text), and which id stands for one row of a picture (placeholders).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, LlamaConfig, LlamaModel, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

import mmcompress
from mmcompress.models import describe
from mmcompress.testing import check_family

PAD, BOS, PATCH, FIRST_WORD, VOCAB = 0, 1, 3, 10, 99
NUM_PATCHES, PIXELS = 16, 48


class Reader(nn.Module):
    """The core: pictures [items, patches, pixels] and ids [batch, columns] in, hidden states out."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.eye = nn.Linear(PIXELS, config.hidden_size)
        self.words = LlamaModel(config)

    def forward(self, input_ids: Tensor, pictures: Tensor | None = None, **kwargs: Any) -> Any:
        x = self.words.get_input_embeddings()(input_ids)
        if pictures is not None:
            x = x.masked_scatter((input_ids == PATCH)[..., None], self.eye(pictures))
        return self.words(inputs_embeds=x, **kwargs)


class ReaderForAnswers(PreTrainedModel, GenerationMixin):
    """The generating class: the core and an output head."""

    config_class = LlamaConfig
    _supports_sdpa = True

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.reader = Reader(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.reader.words.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        pictures: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        passed_on = {"attention_mask": attention_mask, "past_key_values": past_key_values, **kwargs}
        out = self.reader(input_ids=input_ids, pictures=pictures, **passed_on)
        return CausalLMOutputWithPast(logits=self.head(out.last_hidden_state), past_key_values=out.get("past_key_values"))

    def prepare_inputs_for_generation(self, input_ids: Tensor, pictures: Tensor | None = None, **kwargs: Any) -> Any:
        """The pictures go in once, with the prompt."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if kwargs.get("is_first_iteration") or not kwargs.get("use_cache", True):
            inputs["pictures"] = pictures
        return inputs


def build() -> ReaderForAnswers:
    """A small one with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = ReaderForAnswers(LlamaConfig(vocab_size=VOCAB, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=None, **sizes))
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    model.generation_config = GenerationConfig(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=None, suppress_tokens=[PATCH])
    return model.eval()


def inputs(rows: list[int], padding_side: str = "left") -> dict[str, Tensor]:
    """A padded batch of prompts: row r has one picture, and row 0 has two."""
    prompts, pictures = [], []
    for r in rows:
        g = torch.Generator().manual_seed(r)
        words = torch.randint(FIRST_WORD, VOCAB, (6 + r,), generator=g).tolist()
        n = 2 if r == 0 else 1
        pictures.append(torch.randn(n, NUM_PATCHES, PIXELS, generator=g))
        prompts.append([BOS, words[0], *([PATCH] * NUM_PATCHES + words[1:3]) * n, *words[3:]])
    longest = max(map(len, prompts))
    pad = [[0] * (longest - len(p)) for p in prompts]
    left = padding_side == "left"
    ids = [z + p if left else p + z for z, p in zip(pad, prompts, strict=True)]
    mask = [z + [1] * len(p) if left else [1] * len(p) + z for z, p in zip(pad, prompts, strict=True)]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "pictures": torch.cat(pictures)}


def main() -> None:
    model = build()

    # 1. describe it: paths are those of model.named_modules()
    seam = describe(core="reader", text="reader.words", placeholders={"image": PATCH}, inputs={"image": "pictures"})

    # 2. see that it holds
    words = {"input_ids": torch.tensor([[BOS, 20, 30, 40]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    items = [[NUM_PATCHES] * 2, [NUM_PATCHES], [NUM_PATCHES]]
    report = check_family(model, inputs, text_only=words, items=items, placeholders=[PATCH], seam=seam)
    print(report)
    if not report.ok:
        raise SystemExit(1)

    # 3. use it
    mmcompress.compress_(model, mmcompress.create("k_center", keep_ratio=0.25), seam=seam)
    model.generate(**inputs([0, 1, 2]), max_new_tokens=8)
    print(mmcompress.ledger(model))
    mmcompress.restore_(model)


if __name__ == "__main__":
    main()
