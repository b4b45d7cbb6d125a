"""Tables for the terminal."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence

RULE, NARROWEST = "─", 14


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], align: str, wrap: tuple[int, ...] = ()) -> str:
    """Aligned columns under a ruled header (none where `headers` is empty).

    align: one of l, r per column. wrap: the columns that are folded where the terminal is too narrow.
    """
    cells = [[str(c) for c in row] for row in ([list(headers), *rows] if headers else rows)]
    widths = [max((len(row[i]) for row in cells), default=0) for i in range(len(align))]
    room = shutil.get_terminal_size((120, 24)).columns - 2 * (len(align) - 1) - sum(widths)
    while room < 0 and wrap:  # the widest gives first
        i = max(wrap, key=lambda i: widths[i])
        if widths[i] <= NARROWEST:
            break
        widths[i] -= 1
        room += 1
    lines = []
    for n, row in enumerate(cells):
        folded = [textwrap.wrap(c, widths[i], break_on_hyphens=False) or [""] for i, c in enumerate(row)]
        for k in range(max(len(f) for f in folded)):
            parts = [f[k] if k < len(f) else "" for f in folded]
            line = "  ".join(p.rjust(w) if a == "r" else p.ljust(w) for p, w, a in zip(parts, widths, align, strict=True))
            lines.append(line.rstrip())
        if headers and n == 0:
            lines.append("  ".join(RULE * w for w in widths))
    return "\n".join(lines)


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


def count(value: float) -> str:
    """A count, or a mean of counts with one decimal."""
    return f"{value:.0f}" if value == round(value) else f"{value:.1f}"


def mib(num_bytes: float | None) -> str:
    """Mebibytes; a dash for what was not counted."""
    if num_bytes is None or num_bytes != num_bytes:
        return "–"
    return f"{num_bytes / 2**20:.{1 if num_bytes >= 2**20 else 3}f}"


def gflop(flops: float | None) -> str:
    """GFLOP; a dash for what was not counted."""
    if flops is None or flops != flops:
        return "–"
    return f"{flops / 1e9:.{0 if flops >= 1e11 else 1 if flops >= 1e9 else 4}f}"
