"""Installing a compressor in a model and taking it out again: `compress_`, `restore_`, `with compressor(model) as run`."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from mmcompress.compressor import Compressor

if TYPE_CHECKING:
    from mmcompress.ledger import Ledger
    from mmcompress.models.described import Description
    from mmcompress.models.seam import Item, Seam


_installing = threading.Lock()


def compress_(model: Any, compressor: Compressor, seam: Description | None = None) -> Any:
    """Install `compressor` in `model` for good; returns the model.

    Its configuration is kept in `model.config.mmcompress`; `model.save_pretrained` writes the compressor, weights included,
    beside the model, and `mmcompress.apply_from_config` installs it again. seam: where the parts of a model of your own are
    (`mmcompress.models.describe`). Its parameters are the model's until `restore_`.
    Raises TypeError for what is no model or no compressor; ValueError where the family is unsupported, a signal is missing,
    a compressor is installed already, or the model was compiled before.
    """
    _install(model, compressor, seam).keep_config()
    return model


def restore_(model: Any) -> Any:
    """Take the compressor out again, bit for bit; returns the model.

    Raises ValueError where none is installed, RuntimeError where something was wrapped around the model since or another
    thread does not leave it.
    """
    seam = _seam(model)
    if seam is None:
        raise ValueError(f"restore_: no compressor is installed in this {type(model).__name__}")
    seam.uninstall()
    return model


class installed:
    """`with compressor(model) as run`: installed inside the block, gone after it, also after an exception.

    run.ledger: counts of every prefill. run.items: traces of the last prefill's items (sample, kind, layout, position [N, 3],
    group [N], assignment [N], anchor [K]).
    """

    def __init__(self, model: Any, compressor: Compressor, seam: Description | None = None):
        self.model, self.compressor, self.description = model, compressor, seam
        self._seam: Seam | None = None

    def __enter__(self) -> installed:
        self._seam = _install(self.model, self.compressor, self.description)
        return self

    def __exit__(self, *_: Any) -> None:
        assert self._seam is not None
        self._seam.uninstall()

    @property
    def ledger(self) -> Ledger:
        return self._entered().ledger

    @property
    def items(self) -> list[Item]:
        return self._entered().items

    def _entered(self) -> Seam:
        if self._seam is None:
            raise RuntimeError("use it as `with compressor(model) as run:` first")
        return self._seam


def _seam(model: Any) -> Seam | None:
    from mmcompress.models.wrap import Wrapped, base_model

    if not hasattr(model, "modules"):
        return None
    base = base_model(model)
    parts = (base, getattr(base, "model", None), getattr(base, "thinker", None))
    for part in parts:
        for value in vars(part).values() if part is not None else ():
            if isinstance(value, Wrapped) and value.owner is not None and value.owner.model is base:
                return value.owner
    return None


def _install(model: Any, compressor: Compressor, description: Description | None = None) -> Seam:
    if not isinstance(compressor, Compressor):
        raise TypeError(f"compressor must be a Compressor such as mmcompress.create('k_center'), got {compressor!r}")
    from mmcompress.models import family
    from mmcompress.models.tested import warn_untested
    from mmcompress.models.wrap import is_compiled

    if hasattr(model, "_orig_mod") or (hasattr(model, "modules") and is_compiled(model)):
        raise ValueError(
            "model must not be compiled yet: install the compressor first and compile then (or load the model anew)"
        )
    adapter = family(model, description)
    with _installing:
        if (other := _seam(model)) is not None:
            raise ValueError(f"model has a compressor installed already ({other.compressor!r}); call restore_(model) first")
        seam = adapter.seam(model, compressor, adapter)
        seam.install()
    warn_untested()
    return seam
