"""Definition, loading and dispatch of the operators `torch.ops.mmcompress.*`.

Every operator is defined once, in Python: it checks its arguments and then runs the compiled kernel of the input's device, or,
where there is none (no build, float64, another device), the PyTorch reference. Both give the same result, so the operators do
not depend on the build. The libraries `_C` (CPU) and `_C_cuda` register their kernels in a private namespace,
`mmcompress_kernels`, that nothing but this package calls. The references compute in float64: they are the definition, and where
the kernels (float32 accumulation) may be compared with them.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from itertools import pairwise

import torch
from torch import Tensor

LEVELS = ("avx512", "avx2", "scalar", "reference")
CUDA_NEIGHBORS = 32  # the CUDA kernels keep at most so many neighbours per row
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*KERNEL_DTYPES, torch.float64)
ZERO = 1e-12  # rows of at most this norm count as zero rows
TIE = 1e-6  # distances below this share of the norms are rounding noise: they count as zero

_library = torch.library.Library("mmcompress", "DEF")
_kernels = torch.library.Library("mmcompress_kernels", "DEF")  # outputs are arguments: allocated here, written there
_names: list[str] = []
_errors: dict[str, str] = {}  # device type → why its library is not loaded
_level = "avx512"
_wait: ContextVar[bool] = ContextVar("mmcompress_checks_wait", default=False)


def operator(schema: str, fake: Callable, kernel: str) -> Callable:
    """Define `mmcompress::<schema>` with the decorated function for every device and `fake` for tracing.

    `kernel` lists the arguments of the compiled form, inputs first, as in "Tensor x, bool check, Tensor(a!) out".
    """

    def register(function: Callable) -> Callable:
        name = schema.split("(")[0]
        _names.append(name)
        _library.define(schema, tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"mmcompress::{name}", fake, lib=_library)
        _kernels.define(f"{name}({kernel}) -> ()")
        return function

    return register


def load() -> None:
    """Load the compiled libraries that are there, once all operators are defined; what fails is kept for `status`."""
    _kernels.define("set_cpu_level(int highest) -> int")
    _kernels.define(
        "merge_mean_sorted(Tensor x, Tensor order, Tensor start, Tensor? size, bool check,"
        " Tensor(a!) mean, Tensor(b!) total, Tensor(c!) bad) -> ()"
    )  # the GPU's form of merge_mean
    for device, module in (("cpu", "_C"), ("cuda", "_C_cuda")):
        try:
            importlib.import_module(f"mmcompress.{module}")
        except ImportError as error:
            missing = isinstance(error, ModuleNotFoundError)
            _errors[device] = f"mmcompress.{module} is not built" if missing else f"mmcompress.{module} failed to load: {error}"
    if "cpu" not in _errors:
        set_cpu_level("avx512")


def kernel(name: str, *tensors: Tensor) -> Callable | None:
    """The compiled kernel for these inputs, or None where the reference runs."""
    device = tensors[0].device.type
    if not _compiled(name, device) or any(x.dtype not in KERNEL_DTYPES for x in tensors):
        return None
    if device == "cpu" and _level == "reference":
        return None
    return getattr(torch.ops.mmcompress_kernels, name).default


@functools.cache
def _compiled(name: str, device: str) -> bool:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return device in ("cpu", "cuda") and device not in _errors and has(f"mmcompress_kernels::{name}", device.upper())


def set_cpu_level(level: str) -> str:
    """Use at most this instruction set in the CPU kernels, or the references; returns the level that now runs.

    For tests: "avx512", "avx2", "scalar" or "reference". A processor without the level runs the next lower one.
    """
    global _level
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")
    _level = level
    if "cpu" in _errors:
        _level = "reference"
    elif level != "reference":
        _level = LEVELS[2 - torch.ops.mmcompress_kernels.set_cpu_level(2 - LEVELS.index(level))]
    return _level


def status() -> dict[str, dict[str, str]]:
    """Which implementation of every operator runs on "cpu" and on "cuda", and why if it is not the compiled one."""

    def describe(name: str, device: str) -> str:
        if device in _errors:
            return f"reference ({_errors[device]})"
        if device == "cuda":
            if name == "kmeans_lloyd":
                return "composed of compiled operators"
            sorted_form = name == "merge_mean" and _compiled("merge_mean_sorted", device)
            return (
                "compiled" if sorted_form or _compiled(name, device) else "reference (no kernel: PyTorch runs it on the device)"
            )
        return "reference (set by set_cpu_level)" if _level == "reference" else f"compiled ({_level})"

    return {name: {device: describe(name, device) for device in ("cpu", "cuda")} for name in _names}


def require(device: str = "cpu") -> None:
    """Raise RuntimeError unless the compiled kernels of this device run."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    if device in _errors:
        raise RuntimeError(
            f"the compiled kernels for {device} are missing: {_errors[device]}; build them with "
            f"MMCOMPRESS_BUILD={device} pip install --no-build-isolation -e ."
        )
    if device == "cpu" and _level == "reference":
        raise RuntimeError("the compiled kernels for cpu are switched off by set_cpu_level('reference')")


# Checks: one sentence each, the same whichever implementation runs.


def check_rows(x: Tensor, name: str = "x") -> Tensor:
    """[M, D] floating point rows, contiguous along D."""
    if x.dim() != 2 or x.shape[1] < 1:
        raise ValueError(f"{name} must have shape [M, D] with D >= 1, got {list(x.shape)}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def check_same(x: Tensor, y: Tensor, names: str) -> None:
    if x.dtype != y.dtype:
        raise TypeError(f"{names} must have one dtype, got {x.dtype} and {y.dtype}")
    if x.device != y.device:
        raise ValueError(f"{names} must be on one device, got {x.device} and {y.device}")


def check_offsets(offsets: Tensor, num_rows: int | None, device: torch.device, name: str = "offsets") -> None:
    """int64 [B + 1] on `device`, not decreasing from 0 to num_rows (values are read on the CPU only: no device sync)."""
    if offsets.dim() != 1 or len(offsets) < 1 or offsets.dtype != torch.int64:
        raise ValueError(f"{name} must be int64 of shape [B + 1], got {offsets.dtype} of shape {list(offsets.shape)}")
    if offsets.device != device:
        raise ValueError(f"{name} must be on x's device {device}, got {offsets.device}")
    if device.type == "cpu":
        values = offsets.tolist()
        falls = any(a > b for a, b in pairwise(values))
        if values[0] != 0 or (num_rows is not None and values[-1] != num_rows) or falls:
            raise ValueError(
                f"{name} must rise from 0 to {num_rows}, got {values if len(values) < 9 else [*values[:8], '...']}"
            )


def check_counts(offsets: Tensor, out_offsets: Tensor, num_out: int, limit: str = "k") -> None:
    """Each item gives at least one and at most all of its rows (an empty item gives none)."""
    if len(out_offsets) != len(offsets):
        raise ValueError(f"out_offsets must have the length of offsets, {len(offsets)}, got {len(out_offsets)}")
    if offsets.device.type == "cpu":
        for item, (n, k) in enumerate(zip(offsets.diff().tolist(), out_offsets.diff().tolist(), strict=True)):
            if not min(n, 1) <= k <= n:
                raise ValueError(f"{limit} must be between 1 and N = {n} in item {item}, got {k}")


def raise_not_finite(first: Tensor, name: str) -> None:
    """Raise for the first row that is not finite (-1: none), see `refuse`."""
    refuse(first, f"{name} must be finite (no NaN, no infinity, squared norms within float32), got a bad value in row {{}}")


def refuse(first: Tensor, sentence: str) -> None:
    """ValueError with the row where `first` (one element) is a row, none where it is -1.

    On a GPU an asynchronous assertion, without a sync; inside `checks_wait` it is read and raised as on the CPU (not while a
    graph is captured: its replays run no Python).
    """
    if _on_host(first) or (_wait.get() and not (first.is_cuda and torch.cuda.is_current_stream_capturing())):
        if (row := int(first)) >= 0:
            raise ValueError(sentence.format(row))
    else:
        torch._assert_async((first < 0).all(), sentence.format("(unknown: found on the device)"))


@contextlib.contextmanager
def checks_wait() -> Iterator[None]:
    """Inside the block, operators on a GPU read what they check, and raise the ValueError of the CPU: a failed assertion on the
    device would end the process's use of it, and a kernel that met a NaN leaves no indices to go on with.

    Holds for operators in compiled regions too, where the block is outside of them.
    """
    token = _wait.set(True)
    try:
        yield
    finally:
        _wait.reset(token)


def _on_host(first: Tensor) -> bool:
    return first.device.type == "cpu"


def first_not_finite(x: Tensor) -> Tensor:
    """Lowest row of x [M, D] whose squared norm is not finite in float32 (float64 for float64 input), or -1."""
    bad = ~(x if x.dtype == torch.float64 else x.float()).square().sum(-1).isfinite()
    return torch.where(bad.any(), bad.int().argmax(), -1) if len(x) else torch.full((), -1, device=x.device)


def new_flags(x: Tensor, num: int = 1) -> Tensor:
    """Where a kernel writes the first row that is not finite, one per checked input."""
    return torch.full((num,), -1, dtype=torch.int64, device=x.device)


def check_finite(x: Tensor, name: str = "x") -> None:
    raise_not_finite(first_not_finite(x), name)


# Pieces of the references.


def wide(x: Tensor) -> Tensor:
    """x in the precision of the references: float64 where the device has it."""
    return x.float() if x.device.type == "mps" else x.double()


def narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A reference's value as returned: float32, float64 only for float64 input. Rounding also makes equal rows tie exactly."""
    return x if dtype == torch.float64 else x.float()


def reciprocal_norm(x: Tensor) -> Tensor:
    """1 / norm of every row; 0 for a zero row, which therefore has similarity 0 to everything."""
    norm = x.norm(dim=-1)
    return torch.where(norm > ZERO, 1 / norm, 0)


def items(offsets: Tensor, *more: Tensor) -> list[tuple[slice, ...]]:
    """The row slices of every item, one per offsets tensor."""
    ends = [t.tolist() for t in (offsets, *more)]
    return [tuple(slice(e[i], e[i + 1]) for e in ends) for i in range(len(offsets) - 1)]


# Dense and ragged forms of the public functions.


def pack(x: Tensor, offsets: Tensor | Sequence[int] | None, name: str = "x", width: bool = True) -> tuple[Tensor, Tensor, int]:
    """x [N, D], [B, N, D] or ragged [M, D] with offsets → (rows [M, D], offsets [B + 1], B). Without `width` x lacks D."""
    shape, dims = ("[N, D] or [B, N, D]", 2) if width else ("[N] or [B, N]", 1)
    if offsets is not None:
        if x.dim() != dims:
            raise ValueError(
                f"{name} must have shape {'[M, D]' if width else '[M]'} when offsets are given, got {list(x.shape)}"
            )
        if not isinstance(offsets, Tensor):
            offsets = torch.tensor(list(offsets), dtype=torch.int64, device=x.device)
        return x, offsets, len(offsets) - 1
    if x.dim() not in (dims, dims + 1):
        raise ValueError(f"{name} must have shape {shape}, got {list(x.shape)}")
    num_items, n = (1, x.shape[0]) if x.dim() == dims else x.shape[:2]
    rows = x if x.dim() == dims else x.reshape(num_items * n, *x.shape[2:])
    return rows, torch.arange(num_items + 1, device=x.device) * n, num_items


def pack_counts(
    k: int | Sequence[int], x: Tensor, ragged: bool, num_items: int, width: bool = True, name: str = "k"
) -> tuple[Tensor, int]:
    """Counts per item → (out_offsets [B + 1], their sum)."""
    if isinstance(k, Sequence):
        if len(k) != num_items or not ragged:
            raise ValueError(
                f"{name} must be an integer, or with offsets one integer per item, got {list(k)} for {num_items} items"
            )
        ends = [0]
        for count in k:
            ends.append(ends[-1] + count)
        return torch.tensor(ends, dtype=torch.int64, device=x.device), ends[-1]
    if not isinstance(k, (int, torch.SymInt)) or isinstance(k, bool):
        raise TypeError(f"{name} must be an integer, got {type(k).__name__}")
    n = None if ragged else x.shape[-2 if width else -1]
    if num_items and ((n is not None and not 1 <= k <= n) or k < 1):
        raise ValueError(f"{name} must be between 1 and N{'' if n is None else f' = {n}'}, got {k}")
    return torch.arange(num_items + 1, device=x.device) * k, num_items * k


def unpack(
    rows: Tensor,
    x: Tensor,
    offsets: Tensor | Sequence[int] | None,
    empty: int | Sequence[int],
    width: bool = True,
    local: bool = True,
) -> Tensor:
    """Row ids (with local=False per-row values) in the shape of a dense input ([0, `empty`] if B = 0); ragged ones stay."""
    if offsets is not None or x.dim() == (2 if width else 1):
        return rows
    num_items, n = x.shape[:2]
    out: Tensor = rows.reshape(num_items, rows.shape[0] // num_items if num_items else empty, *rows.shape[1:])  # type: ignore[arg-type]
    return out - (torch.arange(num_items, device=x.device) * n)[:, None] if local else out


def is_cosine(metric: str) -> bool:
    if metric not in ("cosine", "sqeuclidean"):
        raise ValueError(f"metric must be 'cosine' or 'sqeuclidean', got {metric!r}")
    return metric == "cosine"
