"""What holds for every model of the zoo: the prompt of a chat, and saving and loading by stock classes."""

import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor


def prompt(processor, kind, question="What is it?"):
    content = [{"type": kind}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)


def check_round_trip(model, processor, folder, make_inputs):
    """`make_inputs(processor)` gives the same inputs, logits and tokens after saving and loading; batches are padded left."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    again, processor2 = AutoModelForMultimodalLM.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert type(again) is type(model) and type(processor2) is type(processor)
    assert processor.tokenizer.padding_side == processor2.tokenizer.padding_side == "left"
    one, two = make_inputs(processor), make_inputs(processor2)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    with torch.no_grad():
        assert torch.equal(model(**one).logits, again.eval()(**two).logits)
        first, second = (m.generate(**one, max_new_tokens=3, min_new_tokens=3) for m in (model, again))
    assert torch.equal(first, second) and first.shape[1] == one["input_ids"].shape[1] + 3
