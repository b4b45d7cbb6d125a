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
from mmcompress.viz import View, layer, outlines

if TYPE_CHECKING:
    from mmcompress.demo import Asked, Result, Run, Setting

LONGEST = 640  # pixels of an embedded picture


def page(result: Result) -> str:
    """The whole page."""
    n = len(result.asked)
    ratios = sorted({s.ratio for s in result.settings if s.ratio is not None}, reverse=True)
    control = result.settings[0]
    methods = {s.method for s in result.settings if s.ratio is not None}
    shares = " and ".join(f"{100 * r:g} %" for r in ratios)
    pictures = "".join(f".p{i} {{ background-image: url({jpeg(a.picture)}); }}\n" for i, a in enumerate(result.asked))
    articles = "\n".join(article(i, a, ratios) for i, a in enumerate(result.asked))
    skipped = "".join(f"<li><code>{escape(k)}</code>: {escape(v)}</li>" for k, v in result.skipped.items())
    skipped = f'<p>Not run on this model:</p><ul class="small">{skipped}</ul>' if skipped else ""
    env = result.environment
    threads = f"{env['threads']} CPU thread{'' if env['threads'] == 1 else 's'}"
    where = escape(f"{env['device']}, {env['dtype']}, {threads}, PyTorch {env['torch']}")
    num_runs = sum(len(a.runs) for a in result.asked)
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
<h1>{n} questions about pictures, answered with a fraction of the tokens</h1>
<p>A small vision-language model reads every picture as about {result.mean(control, "tokens_in"):,.0f} tokens. Here it answers
with all of them, and with {len(methods)} methods that keep {shares} of them. Under every answer you see
what the method left: dropped tokens are dimmed, merged tokens share one colour.</p>
<div class="facts">{facts(result, ratios)}</div>
</header>
<h2>At a glance</h2>
<p class="muted">✓ right, ✗ wrong; a mark leads to its question. The numbers are means over the {n} questions.</p>
<div class="scroll">{glance(result)}</div>
<h2>Question by question</h2>
<p class="muted">The dashed box holds the answer. Yellow lines are the borders of the high-resolution crops, with
how many of each crop's tokens stayed; the small view is the thumbnail, which the model reads first.</p>
<nav aria-label="share of tokens kept">{choice(ratios)}<span class="muted small">questions:
{" ".join(f'<a href="#q{i + 1}">{i + 1}</a>' for i in range(n))}</span></nav>
{articles}
<h2>What this shows, and what it does not</h2>
<p>The model ({escape(result.model)}) is tiny: a 135-million-parameter language model behind a small vision tower, with a
projector and adapters trained for a short time on questions of this kind (other pictures). It answers short questions about
digits, words, colours and shapes, and it is easily wrong about anything else.</p>
<p>{n} questions are an illustration, not a benchmark: one answer more or less moves a score by {100 / n:.0f} percentage
points, and the order of the methods would change with other questions. Nothing was picked: these are the first questions of
the test split for seed 0. The photographs come with scikit-image, scikit-learn and Matplotlib; shapes, digits and words were
painted on them, so that the place of the answer is known.</p>
<p>Tokens, sequence length, KV cache and FLOPs are exact counts. Sequence length is the mean over the decoder's layers and
includes text and separators (row ends, kept beside the tokens). FLOPs are those of the language model's prefill. Prefill ms is
measured once per question, from the call to the first token, vision tower and compression included,
on {where}: expect noise.</p>
{skipped}
<h2>Do it yourself</h2>
<pre>make demo                                   # this page
mmcompress run --model zoo:image --image FILE --prompt "What digit is in the picture?" \\
    --method k_center --keep-ratio 0.25 --compare
mmcompress inspect --image FILE --method k_center,global_guided --keep-ratio 0.25 --out inspect</pre>
<details><summary>All {num_runs} runs</summary><div class="scroll">{everything(result)}</div></details>
</main>
</body>
</html>
"""


def facts(result: Result, ratios: list[float]) -> str:
    n, control = len(result.asked), result.settings[0]
    out = [(f"{result.num_correct(control)} of {n}", "right with all tokens")]
    for ratio in ratios:
        counts = [result.num_correct(s) for s in result.settings if s.ratio == ratio]
        span = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
        out.append((f"{span} of {n}", f"right with {100 * ratio:g} % of them, worst to best of {len(counts)} methods"))
    if ratios:
        first = next(s for s in result.settings if s.ratio == ratios[0])
        less = 1 - result.mean(first, "flops") / result.mean(control, "flops")
        smaller = result.mean(control, "kv_bytes") / result.mean(first, "kv_bytes")
        what = f"prefill FLOPs at {100 * ratios[0]:g} % ({first.method}), and a KV cache {smaller:.1f} times smaller"
        out.append((f"−{100 * less:.0f} %", what))
    return "".join(
        f'<div class="fact"><b>{escape(big)}</b><span class="muted">{escape(small)}</span></div>' for big, small in out
    )


def glance(result: Result) -> str:
    """One row per setting, in groups of one ratio: a mark per question, and the means."""
    control = result.settings[0]
    head = "".join(f'<th class="q"><a href="#q{i + 1}">{i + 1}</a></th>' for i in range(len(result.asked)))
    columns = len(result.asked) + 7
    body, group = [], object()
    for s in result.settings:
        if s.ratio != group and s != control:
            group = s.ratio
            title = "by a rule of their own" if s.ratio is None else f"keep {100 * s.ratio:g} %"
            body.append(f'<tr class="group"><th colspan="{columns}" scope="rowgroup">{title}</th></tr>')
        body.append(glance_row(result, s, control))
    return (
        f'<table class="glance"><thead><tr><th>method</th>{head}<th>right</th><th>kept</th><th>sequence</th><th>KV MiB</th>'
        f"<th>GFLOP</th><th>prefill ms</th></tr></thead><tbody>{''.join(body)}</tbody></table>"
    )


def glance_row(result: Result, setting: Setting, control: Setting) -> str:
    marks = "".join(
        f'<td class="mark"><a class="{"right" if r.correct else "wrong"}" href="#q{i + 1}" '
        f'title="{escape(r.answer or "(nothing)", quote=True)}">{mark(r)}</a></td>'
        for i, r in enumerate(result.of(setting))
    )
    kept = percent(result.mean(setting, "tokens_kept"), result.mean(setting, "tokens_in"))
    whole = lambda value: f"{value:,.0f}"  # noqa: E731
    columns = (("sequence", whole), ("kv_bytes", mib), ("flops", gflop), ("prefill_ms", whole))
    bars = "".join(bar(show(v := result.mean(setting, name)), v / result.mean(control, name)) for name, show in columns)
    name = "uncompressed" if setting == control else setting.method
    return (
        f'<tr class="{"control" if setting == control else ""}"><th scope="row">{escape(name)}</th>{marks}'
        f"<td><b>{result.num_correct(setting)}</b></td><td>{kept}</td>{bars}</tr>"
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


def article(i: int, asked: Asked, ratios: list[float]) -> str:
    """A question with its picture and one tile per run."""
    control, rest = asked.runs[0], asked.runs[1:]
    width, height = asked.picture.size
    evidence = ""
    if asked.evidence is not None:
        left, top, right, bottom = asked.evidence
        evidence = (
            f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none"><rect class="evidence" x="{left}" y="{top}" '
            f'width="{right - left}" height="{bottom - top}"/></svg>'
        )
    tiles = "\n".join(tile(i, asked, run, ratios) for run in rest)
    label = f"the picture of question {i + 1}"
    cost = f"{control.sequence:,.0f} rows, {mib(control.kv_bytes)} MiB of KV cache, {gflop(control.flops)} GFLOP"
    return f"""<article id="q{i + 1}">
<div class="ask">
<figure><div class="view p{i}" role="img" aria-label="{label}" style="aspect-ratio: {width}/{height}">{evidence}</div></figure>
<div><div class="number">Question {i + 1} · {escape(asked.task)}</div><h3>{escape(asked.prompt)}</h3>
<p>Expected: <b>{escape(" or ".join(asked.answers))}</b></p>
<p>With all {control.tokens_in:,} tokens: {chip(control)}</p>
<p class="muted small">{cost} and {control.prefill_ms:,.0f} ms of prefill.</p></div>
</div>
<div class="tiles">{tiles}</div>
</article>"""


def tile(i: int, asked: Asked, run: Run, ratios: list[float]) -> str:
    """One run: what was left of the picture, and the answer."""
    ratio = run.setting.ratio
    group = "" if ratio not in ratios[:2] else f" ratio-{'ab'[ratios.index(ratio)]}"
    shown = "".join(view(i, asked, v, 1 if len(run.views) > 1 and v is run.views[0] else 2) for v in run.views)
    kept = f"{count(run.tokens_kept)} of {run.tokens_in} ({percent(run.tokens_kept, run.tokens_in)})"
    return (
        f'<figure class="tile{group}"><div class="views">{shown}</div><figcaption>'
        f"<b>{escape(run.setting.method)}</b>{chip(run)}<span>{kept}</span><span>{run.prefill_ms:,.0f} ms</span>"
        "</figcaption></figure>"
    )


def view(i: int, asked: Asked, v: View, grow: int) -> str:
    """A view of the picture under its layer."""
    h, w = v.output.shape
    width, height = asked.picture.size
    drawing = ""
    if (
        len(np.unique(v.output[v.output >= 0])) < (v.output >= 0).sum()
    ):  # outlines only where tokens were merged: they are bulky
        drawing += f'<path d="{"".join(f"M{x0} {y0}L{x1} {y1}" for x0, y0, x1, y1 in outlines(v))}"/>'
    budgets = ""
    if len(v.regions) > 1:
        for r in v.regions:
            left, top, right, bottom = r.box
            drawing += f'<rect x="{left}" y="{top}" width="{right - left}" height="{bottom - top}"/>'
            budgets += (
                f'<span class="budget" style="left: {100 * left / w:.1f}%; top: {100 * top / h:.1f}%">{r.kept}/{r.total}</span>'
            )
    if asked.evidence is not None:
        left, top, right, bottom = asked.evidence
        sx, sy = w / width, h / height
        drawing += (
            f'<rect class="evidence" x="{left * sx:.2f}" y="{top * sy:.2f}" '
            f'width="{(right - left) * sx:.2f}" height="{(bottom - top) * sy:.2f}"/>'
        )
    return (
        f'<div class="view p{i}" style="flex: {grow} 1 0; aspect-ratio: {width} / {height}" role="img" '
        f'aria-label="{escape(v.name)}: {v.kept} of {v.total} tokens"><img alt="" src="{png(layer(v, asked.picture))}">'
        f'<svg viewBox="0 0 {w} {h}" preserveAspectRatio="none">{drawing}</svg>{budgets}</div>'
    )


def everything(result: Result) -> str:
    """Every run with all its numbers."""
    rows = []
    for i, asked in enumerate(result.asked):
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
