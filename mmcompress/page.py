"""The demo's page: one HTML file with everything inside, light and dark, without a request to anywhere.

A picture is embedded once; what a method did to it lies over it as a PNG of one pixel a token.
"""

from __future__ import annotations

import base64
import io
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np

from mmcompress.report import count, gflop, mib, percent
from mmcompress.viz import HOP, View, layers, outlines, ticks, under

if TYPE_CHECKING:
    from mmcompress.demo import Asked, Part, Result, Run, Setting

LONGEST = 640  # pixels of an embedded picture
ITEMS = {"image": ("picture", "pictures"), "video": ("clip", "clips"), "audio": ("recording", "recordings")}
ENCODERS = {"image": "vision tower", "video": "vision tower", "audio": "audio encoder"}
NOTES = {
    "image": "The dashed box holds the answer. Yellow lines are the borders of the high-resolution crops, with how many of each"
    " crop’s tokens stayed; the small view is the thumbnail, which the model reads first.",
    "video": "A clip is a strip of its frames in order; under each stands how many of its tokens stayed. A yellow edge marks a"
    " frame that holds the answer, a dashed box the place in it.",
    "audio": "A recording is its spectrogram: time runs to the right, high tones are above, bright is loud. The yellow line"
    " below marks the seconds that hold the answer. A merged span shows the mean of its sound.",
}


def page(result: Result) -> str:
    """The whole page."""
    asked = [a for part in result.parts for a in part.asked]
    n = len(asked)
    every = list(dict.fromkeys(s for part in result.parts for s in part.settings))
    ratios = sorted({s.ratio for s in every if s.ratio is not None}, reverse=True)
    methods = {s.method for s in every if s.ratio is not None}
    shares = " and ".join(f"{100 * r:g} %" for r in ratios)
    kinds = " and ".join(", ".join(ITEMS[k][1] for k in ITEMS if any(a.kind == k for a in asked)).rsplit(", ", 1))
    models = ", ".join(dict.fromkeys(part.section.model for part in result.parts))
    encoders = " or ".join(dict.fromkeys(ENCODERS[a.kind] for a in asked))
    pictures = "".join(
        f".{picture_class(i, j)} {{ background-image: url({jpeg(picture)}); }}\n"
        for i, a in enumerate(asked)
        for j, picture in enumerate(a.pictures)
    )
    first, parts, links = 0, [], []
    for part in result.parts:
        parts.append(section(part, first, ratios))
        numbers = " ".join(f'<a href="#q{i + 1}">{i + 1}</a>' for i in range(first, first + len(part.asked)))
        links.append(f'<a href="#{escape(part.section.name, quote=True)}">{escape(part.section.title)}</a> {numbers}')
        first += len(part.asked)
    body = "\n".join(parts)
    left_out = "".join(f"<li><b>{escape(name)}</b>: {escape(why)}</li>" for name, why in result.left_out.items())
    left_out = f'<p>Sections left out here:</p><ul class="small">{left_out}</ul>' if left_out else ""
    env = result.environment
    threads = f"{env['threads']} CPU thread{'' if env['threads'] == 1 else 's'}"
    where = escape(f"{env['device']}, {env['dtype']}, {threads}, PyTorch {env['torch']}")
    num_runs = sum(len(a.runs) for a in asked)
    style = files("mmcompress").joinpath("page.css").read_text()
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>mmcompress demo: {n} questions, a fraction of the tokens</title>
<style>{style}{pictures}</style>
</head>
<body>
<main>
<header>
<div class="eyebrow">mmcompress demo</div>
<h1>{n} question{"" if n == 1 else "s"} about {kinds}, answered with a fraction of the tokens</h1>
<p>A multimodal language model reads a picture, a clip or a recording as hundreds or thousands of tokens. Here small models
answer with all of them, and with {len(methods)} methods that keep {shares} of them. Under every answer you see what the method
left: dropped tokens are dimmed, merged tokens share one colour.</p>
<div class="facts">{"".join(facts(part, ratios) for part in result.parts)}</div>
</header>
{left_out}
<nav aria-label="share of tokens kept, and sections">{choice(ratios)}<span class="muted small">{" · ".join(links)}</span></nav>
{body}
<h2>What this shows, and what it does not</h2>
<p>The models ({escape(models)}) are tiny: a 135-million-parameter language model behind a small {encoders}, with a
projector and adapters trained for a short time on questions of this kind (about other items). They answer short questions
of these tasks, and are easily wrong about anything else.</p>
<p>{n} questions are an illustration, not a benchmark: one answer more or less moves the score of a section a long way, and the
order of the methods would change with other questions. Nothing was picked: these are the first items of the test split for
seed 0. The photographs come with scikit-image, scikit-learn and Matplotlib; what the questions are about was painted on them or
generated, so that the place of the answer is known.</p>
<p>Tokens, sequence length, KV cache and FLOPs are exact counts. Sequence length is the mean over the decoder's layers and
includes text and separators (row ends, kept beside the tokens). FLOPs are those of the language model's prefill. Prefill ms is
measured once per question, from the call to the first token, encoder and compression included,
on {where}: expect noise.</p>
<h2>Do it yourself</h2>
<pre>make demo                                   # this page
mmcompress run --image FILE --prompt "What digit is in the picture?" --method k_center --keep-ratio 0.25 --compare
mmcompress inspect --image FILE --method k_center,global_guided --keep-ratio 0.25 --out inspect
mmcompress inspect --video FILE --method vidcom2,tome --keep-ratio 0.25 --out inspect
mmcompress inspect --audio FILE --method k_center,pooling --keep-ratio 0.25 --out inspect</pre>
<details><summary>All {num_runs} runs</summary><div class="scroll">{everything(asked)}</div></details>
</main>
</body>
</html>
"""


def section(part: Part, first: int, ratios: list[float]) -> str:
    """A section: the table at a glance, then its questions; `first`: how many questions stand before it."""
    articles = "\n".join(article(first + i, a, ratios) for i, a in enumerate(part.asked))
    skipped = "".join(f"<li><code>{escape(k)}</code>: {escape(v)}</li>" for k, v in part.skipped.items())
    skipped = f'<details class="small"><summary>Not run on this model</summary><ul>{skipped}</ul></details>' if skipped else ""
    control = part.settings[0]
    one = ITEMS[part.asked[0].kind][0]
    return f"""<section id="{escape(part.section.name, quote=True)}">
<h2>{escape(part.section.title)}</h2>
<p>{escape(part.section.model)} reads a {one} as about {part.mean(control, "tokens_in"):,.0f} tokens.
<span class="muted">✓ right, ✗ wrong; a mark leads to its question. The numbers are means over the questions.</span></p>
<div class="scroll">{glance(part, first, ratios)}</div>
{skipped}
<p class="muted">{NOTES[part.asked[0].kind]}</p>
{articles}
</section>"""


def facts(part: Part, ratios: list[float]) -> str:
    """A card: how many answers stay right at the first ratio, and what the prefill costs then."""
    n, control = len(part.asked), part.settings[0]
    lines = [f"right with all tokens: {part.num_correct(control)} of {n}"]
    for ratio in ratios:
        counts = [part.num_correct(s) for s in part.settings if s.ratio == ratio]
        span = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
        lines.append(f"with {100 * ratio:g} %: {span} of {n}, worst to best of {len(counts)} methods")
    big = f"{part.mean(control, 'tokens_in'):,.0f} tokens"
    if ratios:
        less = next(s for s in part.settings if s.ratio == ratios[0])
        big += f" → {part.mean(less, 'tokens_kept'):,.0f}"
        saved = 1 - part.mean(less, "flops") / part.mean(control, "flops")
        smaller = part.mean(control, "kv_bytes") / part.mean(less, "kv_bytes")
        lines.append(f"prefill FLOPs −{100 * saved:.0f} %, KV cache {smaller:.1f} times smaller ({less.method})")
    items = "".join(f'<span class="muted">{escape(line)}</span>' for line in lines)
    return f'<div class="fact"><span>{escape(part.section.title)}</span><b>{escape(big)}</b>{items}</div>'


def glance(part: Part, first: int, ratios: list[float]) -> str:
    """One row per setting, in groups of one ratio: a mark per question, and the means."""
    control = part.settings[0]
    head = "".join(f'<th class="q"><a href="#q{first + i + 1}">{first + i + 1}</a></th>' for i in range(len(part.asked)))
    columns = len(part.asked) + 7
    body, group = [], object()
    for s in part.settings:
        if s.ratio != group and s != control:
            group = s.ratio
            title = "by a rule of their own" if s.ratio is None else f"keep {100 * s.ratio:g} %"
            body.append(f'<tr class="group{only(s, ratios)}"><th colspan="{columns}" scope="rowgroup">{title}</th></tr>')
        body.append(glance_row(part, s, control, first, only(s, ratios)))
    return (
        f'<table class="glance"><thead><tr><th>method</th>{head}<th>right</th><th>kept</th><th>sequence</th><th>KV MiB</th>'
        f"<th>GFLOP</th><th>prefill ms</th></tr></thead><tbody>{''.join(body)}</tbody></table>"
    )


def glance_row(part: Part, setting: Setting, control: Setting, first: int, group: str) -> str:
    marks = "".join(
        f'<td class="mark"><a class="{"right" if r.correct else "wrong"}" href="#q{first + i + 1}" '
        f'title="{escape(r.answer or "(nothing)", quote=True)}">{mark(r)}</a></td>'
        for i, r in enumerate(part.of(setting))
    )
    kept = percent(part.mean(setting, "tokens_kept"), part.mean(setting, "tokens_in"))
    whole = lambda value: f"{value:,.0f}"  # noqa: E731
    columns = (("sequence", whole), ("kv_bytes", mib), ("flops", gflop), ("prefill_ms", whole))
    bars = "".join(bar(show(v := part.mean(setting, name)), v / part.mean(control, name)) for name, show in columns)
    name = "uncompressed" if setting == control else setting.method
    return (
        f'<tr class="{"control" if setting == control else group}"><th scope="row">{escape(name)}</th>{marks}'
        f"<td><b>{part.num_correct(setting)}</b></td><td>{kept}</td>{bars}</tr>"
    )


def bar(text: str, part: float) -> str:
    return f'<td class="bar" style="--part: {100 * min(part, 1):.0f}%">{text}</td>'


def choice(ratios: list[float]) -> str:
    """Two buttons, one per ratio."""
    if len(ratios) < 2:
        return ""
    buttons = "".join(
        f'<label><input type="radio" name="ratio" id="only-{key}"{" checked" if key == "a" else ""}>keep {100 * r:g} %</label>'
        for key, r in zip("ab", ratios, strict=False)
    )
    return f'<span class="choice">{buttons}</span>'


def only(setting: Setting, ratios: list[float]) -> str:
    """The class of what is shown with one of the two buttons."""
    return f" ratio-{'ab'[ratios.index(setting.ratio)]}" if setting.ratio in ratios[:2] else ""


def article(i: int, asked: Asked, ratios: list[float]) -> str:
    """A question with its item and one tile per run."""
    control, rest = asked.runs[0], asked.runs[1:]
    shown = [frame(i, j, asked, f"{ITEMS[asked.kind][0]} of question {i + 1}") for j in range(len(asked.pictures))]
    tiles = "\n".join(tile(i, asked, run, ratios) for run in rest)
    cost = f"{control.sequence:,.0f} rows, {mib(control.kv_bytes)} MiB of KV cache, {gflop(control.flops)} GFLOP"
    return f"""<article id="q{i + 1}" class="{asked.kind}" style="--strip: {min(8, len(asked.pictures))}">
<div class="ask">
<figure class="views">{"".join(shown)}</figure>
<div><div class="number">Question {i + 1} · {escape(asked.task)}</div><h3>{escape(asked.prompt)}</h3>
<p>Expected: <b>{escape(" or ".join(asked.answers))}</b></p>
<p>With all {control.tokens_in:,} tokens: {chip(control)}</p>
<p class="muted small">{cost} and {control.prefill_ms:,.0f} ms of prefill.</p></div>
</div>
<div class="tiles">{tiles}</div>
</article>"""


def tile(i: int, asked: Asked, run: Run, ratios: list[float]) -> str:
    """One run: what was left of the item, and the answer."""
    over = layers(run.views, under(run.views, asked.pictures))
    shown = "".join(
        view(i, j if len(asked.pictures) > 1 else 0, asked, v, pixels)
        for j, (v, pixels) in enumerate(zip(run.views, over, strict=True))
    )
    kept = f"{count(run.tokens_kept)} of {run.tokens_in} ({percent(run.tokens_kept, run.tokens_in)})"
    return (
        f'<figure class="tile{only(run.setting, ratios)}"><div class="views">{shown}</div><figcaption>'
        f"<b>{escape(run.setting.method)}</b>{chip(run)}<span>{kept}</span><span>{run.prefill_ms:,.0f} ms</span>"
        "</figcaption></figure>"
    )


def view(i: int, j: int, asked: Asked, v: View, pixels: np.ndarray) -> str:
    """A view of picture j under its layer."""
    h, w = v.output.shape
    drawing = budgets = ""
    if v.merged.any():  # outlines only where tokens were merged: they are bulky
        drawing = f'<path d="{"".join(f"M{x0} {y0}L{x1} {y1}" for x0, y0, x1, y1 in outlines(v))}"/>'
    if len(v.regions) > 1:
        for r in v.regions:
            left, top, right, bottom = r.box
            drawing += f'<rect x="{left}" y="{top}" width="{right - left}" height="{bottom - top}"/>'
            budgets += (
                f'<span class="budget" style="left: {100 * left / w:.1f}%; top: {100 * top / h:.1f}%">{r.kept}/{r.total}</span>'
            )
    over = f'<img alt="" src="{png(pixels)}"><svg viewBox="0 0 {w} {h}" preserveAspectRatio="none">{drawing}</svg>{budgets}'
    below = f'<span class="count">{v.kept}</span>' if v.kind == "video" else ""
    grow = 1 if v.name == "thumbnail" else 2
    return frame(i, j, asked, f"{v.name}: {v.kept} of {v.total} tokens", over, below, grow)


def frame(i: int, j: int, asked: Asked, label: str, over: str = "", below: str = "", grow: int = 1) -> str:
    """Picture j of a question with its evidence, what lies over it, and what stands below."""
    width, height = asked.pictures[j].size
    spots = [s for s in asked.evidence if s.picture == j]
    marked = " marked" if asked.kind == "video" and spots else ""
    if asked.kind == "audio":
        below += axis(HOP * width, [(s.box[0] / width, s.box[2] / width) for s in spots if s.box is not None])
    else:
        boxes = "".join(
            f'<rect class="evidence" x="{x0}" y="{y0}" width="{x1 - x0}" height="{y1 - y0}"/>'
            for x0, y0, x1, y1 in (s.box for s in spots if s.box is not None)
        )
        over += f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none">{boxes}</svg>' if boxes else ""
    stretched = "4 / 1" if asked.kind == "audio" else f"{width} / {height}"
    return (
        f'<div class="frame" style="flex: {grow} 1 0"><div class="view{marked} {picture_class(i, j)}" '
        f'style="aspect-ratio: {stretched}" role="img" aria-label="{escape(label, quote=True)}">{over}</div>{below}</div>'
    )


def axis(seconds: float, spans: list[tuple[float, float]]) -> str:
    """The seconds of a recording under its spectrogram, and the spans (shares of its length) that hold the answer."""
    held = "".join(f'<i style="left: {100 * a:.2f}%; width: {100 * (b - a):.2f}%"></i>' for a, b in spans)
    times = [t for t in ticks(seconds, most=6) if t < 0.97 * seconds]
    marks = "".join(f'<span style="left: {100 * t / seconds:.2f}%">{t:g} s</span>' for t in times)
    return f'<div class="axis">{held}{marks}</div>'


def picture_class(i: int, j: int) -> str:
    return f"p{i}-{j}"


def everything(questions: list[Asked]) -> str:
    """Every run with all its numbers."""
    rows = []
    for i, asked in enumerate(questions):
        for r in asked.runs:
            cells = [
                f"{count(r.tokens_kept)}/{r.tokens_in}",
                str(r.separators),
                f"{r.sequence:.0f}",
                mib(r.kv_bytes),
                gflop(r.flops),
                f"{r.prefill_ms:.0f}",
            ]
            texts = (str(i + 1), escape(r.setting.label), chip(r))
            line = "".join(f'<td class="text">{c}</td>' for c in texts) + "".join(f"<td>{c}</td>" for c in cells)
            rows.append(f"<tr>{line}</tr>")
    names = ["no", "setting", "answer", "kept/in", "separators", "sequence", "KV MiB", "GFLOP", "prefill ms"]
    head = "".join(f"<th>{name}</th>" for name in names)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def mark(run: Run) -> str:
    return "✓" if run.correct else "✗"


def chip(run: Run) -> str:
    answer = " ".join(run.answer.split()) or "(nothing)"
    kind = "right" if run.correct else "wrong"
    return f'<span class="answer {kind}" title="{escape(answer, quote=True)}">{mark(run)} {escape(answer)}</span>'


def jpeg(picture: Any) -> str:
    """A picture as a data URI, at most LONGEST pixels long."""
    small = picture.convert("RGB").copy()
    small.thumbnail((LONGEST, LONGEST))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=84, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def png(pixels: np.ndarray) -> str:
    """RGBA pixels as a data URI."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
