"""How much attention flows between the text and the visual columns of one layer (ToDRE, arXiv 2505.18757, stage 2)."""

from collections.abc import Callable

import torch
from torch import Tensor

ROWS = 256  # query rows at a time: [Hq, ROWS, M] probabilities


def relevance(
    q: Tensor,
    k: Tensor,
    visual: Tensor,
    text: Tensor,
    before: Tensor,
    scaling: float,
    real: Tensor | None = None,
    weights: Callable[[int, Tensor], Tensor] | None = None,
) -> Tensor:
    """(text to visual, visual to text) attention shares, [B, 2] float32, from queries q [B, Hq, N, d] and keys k [B, Hk, M, d]
    after rotary.

    visual, text, before [B, M] bool name columns: the visual ones, the prompt's other text, and what stands before the first
    visual column; the query rows are the last N of the M columns. A share is the sum of the causal softmax attention, averaged
    over heads, from the rows of one set onto the columns of the other, over the sum onto all three sets; 1 where there is no
    text, 0 where there is nothing visual. real [B, M]: columns that are no padding (default: those of the three sets). Where
    no text precedes a visual column the second share is 0 and costs nothing. weights(b, rows [R]) -> [Hq, R, M]:
    probabilities of query rows of item b, where the layer's attention is not plainly causal (windows, soft caps).
    """
    (B, Hq, N, _), (Hk, M) = q.shape, k.shape[1:3]
    if Hq % Hk or any(m.shape != (B, M) for m in (visual, text, before)):
        shapes = [list(t.shape) for t in (q, k, visual, text, before)]
        raise ValueError(
            f"relevance needs q [B, Hq, N, d], k [B, Hk, M, d] with Hk dividing Hq, and masks [B, M]; got {shapes}"
        )
    real = visual | text | before if real is None else real
    out = torch.zeros(B, 2, device=q.device)
    column = torch.arange(M, device=q.device)
    for b in range(B):
        union = (visual[b] | text[b] | before[b]).float()
        text_first = bool((text[b] & (column < torch.where(visual[b], column, -1).amax())).any())
        if not bool(text[b].any()):
            out[b] = 1  # without text nothing can be called irrelevant
            continue
        for side, (source, target) in enumerate(((text[b], visual[b]), (visual[b], text[b]))):
            if side and not text_first:
                continue
            rows = (source & (column >= M - N)).nonzero()[:, 0]
            onto, total = torch.zeros((), device=q.device), torch.zeros((), device=q.device)
            for part in rows.split(ROWS) if len(rows) else ():
                if weights is None:
                    query = q[b, :, part - (M - N)].float().reshape(Hk, Hq // Hk * len(part), -1)
                    score = (query @ k[b].float().transpose(1, 2) * scaling).view(Hq, len(part), M)
                    score = score.masked_fill((column > part[:, None]) | ~real[b], -torch.inf)
                    attention = score.softmax(-1).mean(0)  # [rows, M]
                else:
                    attention = weights(b, part - (M - N))[..., :M].mean(0)
                onto, total = onto + (attention * target).sum(), total + (attention * union).sum()
            out[b, side] = torch.where(total > 0, onto / total, 0)
    return out
