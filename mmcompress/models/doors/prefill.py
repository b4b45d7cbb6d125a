"""Before the language model: items are read and written in the merged embeddings."""

from __future__ import annotations

from mmcompress.models import signals
from mmcompress.models.doors import Door, Frame
from mmcompress.models.items import run_stages


class Prefill(Door):
    name = "prefill"
    order = 0

    def before(self, frame: Frame) -> None:
        frame.x, frame.keep = run_stages(self.stages.get(0, []), frame.items, frame.x)

    def enter(self, frame: Frame) -> None:
        if frame.turn is not None and self.wanted(0) & set(signals.of_source("rotary")):
            frame.call.turned = frame.turn(items=frame.items, like=frame.x)
