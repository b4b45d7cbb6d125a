"""What the registry says about methods and families, as rows and as the tables of README.md.

python -m mmcompress.cards [README.md]     writes the tables between `<!-- NAME -->` and `<!-- /NAME -->` anew
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from mmcompress.compressor import Compressor
from mmcompress.registry import create, field_names, get_method, list_methods

EVERYWHERE = ("layer", "placement")
"""Fields that every method has with the same default; a method that changes the default shows it."""


def has_ratio(name: str) -> bool:
    """Whether the method listens to keep_ratio."""
    method = get_method(name)
    return "keep_ratio" in field_names(method) and getattr(method, "has_ratio", True)


def defaults(method: Callable) -> dict[str, Any]:
    """Fields and defaults of a method or preset."""
    if isinstance(method, type):
        return {f.name: f.default for f in fields(method)}
    return {p.name: p.default for p in inspect.signature(method).parameters.values()}


def method_row(name: str) -> dict[str, Any]:
    """Name, what it does (the first paragraph of the docstring), signals it reads, and fields with defaults."""
    method = get_method(name)
    common = {f.name: f.default for f in fields(Compressor) if f.name in EVERYWHERE}
    own = {k: v for k, v in defaults(method).items() if k not in common or v != common[k]}
    if not has_ratio(name):
        own.pop("keep_ratio", None)
    reads = [signal(r) for r in create(name).reads]
    return {"name": name, "what": first_paragraph(method), "reads": reads, "fields": own}


def signal(declared: str) -> str:
    """'cls_logits or tower' for "cls_logits|tower", 'cls_logits (if offered)' for "cls_logits|"."""
    names = declared.split("|")
    text = " or ".join(n for n in names if n)
    return text if names[-1] else f"{text} (if offered)"


def method_rows() -> list[dict[str, Any]]:
    return [method_row(name) for name in list_methods()]


def family_rows() -> list[dict[str, Any]]:
    """Name, modalities, encoder signals and notes of every supported family."""
    from mmcompress.models import families

    return families()


def first_paragraph(thing: Any) -> str:
    """The first paragraph of a docstring in one line."""
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split("\n")).strip()


def show_fields(values: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v!r}" for k, v in values.items())


def markdown(headers: list[str], rows: list[list[str]]) -> str:
    """A table of GitHub's Markdown."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def method_table() -> str:
    rows = [
        [f"`{r['name']}`", r["what"], ", ".join(r["reads"]) or "–", f"`{show_fields(r['fields'])}`" if r["fields"] else "–"]
        for r in method_rows()
    ]
    return markdown(["method", "what it does", "signals it reads", "fields and defaults"], rows)


def family_table() -> str:
    rows = [[f"`{r['name']}`", ", ".join(r["modalities"]), ", ".join(r["signals"]), r["notes"] or "–"] for r in family_rows()]
    return markdown(["family", "items", "encoder signals", "notes"], rows)


def zoo_table() -> str:
    from mmcompress.zoo.cards import table

    return table()


def pillars_table() -> str:
    """What `mmcompress bench --preset pillars` measured last, one table for all models and tasks."""
    from mmcompress.eval.bench import RESULTS

    file = RESULTS / "pillars.json"
    if not file.is_file():
        return "Not measured yet."
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    full = {(r["model"], r["task"]): r["accuracy"] for r in rows if r["label"] == "none"}
    head = ["model, task", "method", "tokens", "kept %", "accuracy %", "95 %", "of uncompressed", "evidence %"]
    lines = [
        [
            f"{r['model'].removeprefix('zoo:')}, {r['task']}",
            r["label"],
            f"{r['tokens_kept']:.0f}",
            f"{100 * r['tokens_kept'] / r['tokens_in']:.0f}",
            f"{100 * r['accuracy']:.1f}",
            " – ".join(f"{100 * v:.1f}" for v in r["interval"]),
            f"{100 * r['accuracy'] / full[r['model'], r['task']]:.0f} %",
            "–" if r["evidence_recall"] is None else f"{100 * r['evidence_recall']:.0f}",
            *(_points(r[name]) for name in ("to_random", "to_uniform")),
        ]
        for r in rows
    ]
    return markdown([*head, "to random_keep", "to uniform_keep"], lines)


def _points(gap: dict[str, Any] | None) -> str:
    """'+4.2 *' of a paired difference; the star says that its interval leaves out 0."""
    return "–" if gap is None else f"{100 * gap['mean']:+.1f}".replace("-", "−") + (" *" if gap["beyond"] else "")


TABLES = {"methods": method_table, "families": family_table, "zoo": zoo_table, "pillars": pillars_table}


def update(text: str) -> str:
    """`text` with every table written anew. Raises ValueError where the marks of a table are missing."""
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        if not pattern.search(text):
            raise ValueError(f"the text must hold <!-- {name} --> and <!-- /{name} -->, got neither or one")
        text = pattern.sub(lambda m, make=make: f"{m[1]}\n{make()}\n\n{m[2]}", text)  # type: ignore[misc]
    return text


def main(arguments: list[str] | None = None) -> None:
    """Update the file named, README.md by default."""
    path = Path((arguments if arguments is not None else sys.argv[1:] or ["README.md"])[0])
    path.write_text(update(path.read_text()))


if __name__ == "__main__":
    main()
