"""How long a prefill takes with a compressor, and how much of that the method itself costs.

Settings take turns, round after round, so that a change of the machine's load meets all of them; medians are reported. The
encoder is part of every prefill. A method's own cost is the time inside its stages and in reading the encoder's signals for
them; attention that is read inside the decoder counts as prefill.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mmcompress.eval.tasks import Sample, Task

if TYPE_CHECKING:
    from mmcompress.eval.bench import Setting

ROUNDS = 5


@contextlib.contextmanager
def own_time(seam: Any, wait: Callable[[], None]) -> Iterator[list[float]]:
    """The seconds that the stages of an installed compressor and the reading of their signals take meanwhile."""
    spent: list[float] = []

    def timed(f: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            wait()
            start = time.perf_counter()
            out = f(*args, **kwargs)
            wait()
            spent.append(time.perf_counter() - start)
            return out

        return run

    stages = [s for s in seam.compressor.stages if not s.is_identity]
    for stage in stages:
        stage.forward = timed(stage.forward)
    seam.family.signal = timed(seam.family.signal)
    try:
        yield spent
    finally:
        for stage in stages:
            del stage.forward
        del seam.family.signal


def prefill_times(
    model: Any,
    processor: Any,
    task: Task,
    samples: Sequence[Sample],
    settings: Sequence[Setting],
    model_name: str,
    rounds: int = ROUNDS,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """One entry per label and ratio, for the largest item among the first few: "ms" (median of the whole prefill, encoder
    included), "share" (of the uncompressed one) and "own" (the method's own median, as a share of the uncompressed prefill).

    Settings that do not run on this model or item are left out.
    """
    import torch

    from mmcompress.ask import prepare
    from mmcompress.eval.loop import UNCOMPRESSED, progress_bar, question, task_name

    def wait() -> None:
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)

    prompts = [prepare(model, processor, question(task, s, processor)) for s in samples[:8]]
    if getattr(model.config, "is_encoder_decoder", False):
        inputs, prefill = prompts[0], functools.partial(model.generate, max_new_tokens=1, do_sample=False)
    else:
        inputs = max(prompts, key=lambda p: p["input_ids"].shape[1])
        prefill = functools.partial(model, use_cache=True, logits_to_keep=1)
    chosen = list({(s.label, s.ratio): s for s in settings}.values())  # one seed stands for all
    whole: dict[int, list[float]] = {}
    own: dict[int, list[float]] = {}
    sequence: dict[int, float] = {}
    failed: set[int] = set()
    with torch.inference_mode(), progress_bar((rounds + 1) * len(chosen), "prefill", progress) as bar:
        for number in range(rounds + 1):  # the first round warms up, and shows what does not run
            for i, setting in enumerate(chosen):
                bar.update()
                if i in failed:
                    continue
                try:
                    with setting.compressor(model) as run, own_time(run._entered(), wait) as spent:
                        wait()
                        start = time.perf_counter()
                        prefill(**inputs)
                        wait()
                        seconds = time.perf_counter() - start
                        sequence[i] = run.ledger.sequence_kept
                except ValueError:
                    failed.add(i)
                    continue
                if number:
                    whole.setdefault(i, []).append(seconds)
                    own.setdefault(i, []).append(sum(spent))
    base = next(statistics.median(v) for i, v in whole.items() if chosen[i].label == UNCOMPRESSED)
    return [
        {
            "model": model_name,
            "task": task_name(task),
            "label": chosen[i].label,
            "ratio": chosen[i].ratio,
            "sequence": sequence[i],
            "rounds": rounds,
            "ms": round(1000 * statistics.median(v), 2),
            "share": round(statistics.median(v) / base, 4),
            "own_ms": round(1000 * statistics.median(own[i]), 3),
            "own": round(statistics.median(own[i]) / base, 5),
        }
        for i, v in whole.items()
    ]
