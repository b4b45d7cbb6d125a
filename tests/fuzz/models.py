"""Tiny models: random chains, batches, caches and calls, against the hand-written loop of `reference.py`.

What a stage decides is noted while the model runs (`spy`), looked up by content in the reference loop (`Replay`) and checked by
itself: the stage must decide the same for the item alone. So a decision that hangs on a rounding error is no failure, and rows,
positions, masks and caches are still checked by code that shares nothing with the seam.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import math
import pickle
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Any

import torch
from reference import capture, find_items, reference, text_model
from seam_methods import Attended, Direction, DropAll, MeanMerge, Watch
from torch import Tensor

import mmcompress
from mmcompress.compressor import Compressor, from_config
from mmcompress.testing import BOS, FAMILIES, FIRST_WORD, PLACEHOLDERS, VOCAB, tiny_model
from mmcompress.tokens import Reduction, Tokens, identity

from . import values
from .outcome import Failure, refusal
from .values import DTYPES, check_alone, check_reduction, in_order, is_tie, reduction_row, row_of


class MeanMergeOfSeveral(MeanMerge):
    """No token is above the mean of one."""

    def compress(self, tokens):
        return super().compress(tokens) if tokens.num_tokens > 1 else identity(tokens)


OWN: dict[str, type[Compressor]] = {
    "direction": Direction, "mean_merge": MeanMergeOfSeveral, "attended": Attended, "drop_all": DropAll, "watch": Watch,
}  # fmt: skip
PLAIN = ("direction", "mean_merge", "uniform_keep", "random_keep", "dpc_knn", "kmeans", "tome", "max_sum", "k_center")
"""Methods that every family takes at every place: refusing one of these in an ordinary call is a failure."""
MROPE = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl")
LOGITS = {torch.float32: 2e-4, torch.bfloat16: 0.25, torch.float16: 0.04}
"""Largest error of a logit, whose standard deviation is 1: a wrong mask or position shows at a multiple of it."""
SEEN = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.03}
"""Largest error of a token that a stage sees, relative to the item's largest number."""


# models and inputs


KEYS = ("family", "model_seed", "dtype", "attention", "text")
patched: dict[str, Model] = {}


def key_of(case: dict[str, Any]) -> str:
    return json.dumps([case[k] for k in KEYS], sort_keys=True)


def model_of(case: dict[str, Any]) -> Model:
    """The process's model of this kind, on which compressors are installed."""
    if (key := key_of(case)) not in patched:
        patched[key] = Model(case["family"], _make(key))
    return patched[key]


@functools.lru_cache(maxsize=256)
def stock_of(key: str) -> Any:
    """Its twin, on which nothing is ever installed: the reference reads this one."""
    return _make(key)


def _make(key: str) -> Any:
    family, seed, dtype, attention, text = json.loads(key)
    model = tiny_model(family, seed, text=text).to(DTYPES[dtype])
    if attention != "sdpa":
        model.set_attn_implementation(attention)
    return model


class Model:
    """A tiny model with what it was like before anything was installed."""

    def __init__(self, family: str, model: Any):
        self.family, self.model = family, model
        self.dtype = next(model.parameters()).dtype
        self.probe = inputs_of({"family": family, "seed": 0, "rows": [[2, PROBE[family], 3], [3]], "side": "left"}, self.dtype)
        model.gradient_checkpointing_enable()  # the stock model keeps attributes of it, and of this:
        model.gradient_checkpointing_disable()
        with torch.no_grad():
            model(**self.probe, output_hidden_states=True)
            self.logits = model(**self.probe).logits
        self.state = state_of(model)

    def check_clean(self) -> None:
        """Nothing that was installed is left: attributes, configuration, attention tables, training mode; same logits."""
        left = [f"{k}: {self.state.get(k)} → {v}" for k, v in state_of(self.model).items() if self.state.get(k) != v]
        if left:
            raise Failure(f"the model is as it was before, but {'; '.join(left)[:400]}")
        with torch.no_grad():
            if not torch.equal(self.model(**self.probe).logits, self.logits):
                raise Failure("the model's logits are as they were before, bit for bit")


PROBE: dict[str, Any] = {
    **dict.fromkeys(("llava", "llava_siglip", "llava_dinov2"), "view"),
    **{f: [20, 31] for f in ("llava_next", "llava_next_dinov2", "llava_onevision", "llava_onevision_dinov2")},
    **{f: ["image", 1, 6, 4] for f in MROPE},
    "qwen2_audio": 50,
}


def state_of(model: Any) -> dict[str, Any]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    out: dict[str, Any] = {}
    for name, module in model.named_modules():
        out[f"attributes of {name or 'model'}"] = (type(module), *sorted(k for k in vars(module) if k != "rope_deltas"))
        out[f"training of {name or 'model'}"] = module.training
    out["parameters"] = [(n, p.dtype, p.grad is None) for n, p in model.named_parameters()]
    out["config"] = str(model.config.to_dict()), hasattr(model.config, "mmcompress")
    out["generation_config"] = str(model.generation_config.to_dict())
    out["attention table"] = dict(ALL_ATTENTION_FUNCTIONS._local_mapping), dict(ALL_ATTENTION_FUNCTIONS._global_mapping)
    return out


def words(count: int, g: torch.Generator) -> list[int]:
    return torch.randint(FIRST_WORD, VOCAB, (count,), generator=g).tolist()


def inputs_of(case: dict[str, Any], dtype: torch.dtype, only: int | None = None) -> dict[str, Tensor]:
    """The batch of a case; only: row `only` alone, without padding. A row's content follows from the seed and its number."""
    spec, prompts, tensors = FAMILIES[case["family"]], [], {}
    for r, row in enumerate(case["rows"]):
        if only is not None and r != only:
            continue
        g, ids = torch.Generator().manual_seed(1000 * case["seed"] + r), [BOS]
        for part in row:
            if (isinstance(part, int) and not isinstance(part, bool) and case["family"] != "qwen2_audio") or (
                case["family"] == "qwen2_audio" and part < 10
            ):
                ids += words(part, g)
            else:
                item = spec.item(tuple(part) if isinstance(part, list) else part, g)
                ids += item.ids
                for name, one in item.tensors.items():
                    tensors.setdefault(name, []).append(one)
        prompts.append(ids)
    length = max(map(len, prompts))
    pad = [[0] * (length - len(p)) for p in prompts]
    pair = (lambda z, p: z + p) if case["side"] == "left" else (lambda z, p: p + z)
    inputs = {
        "input_ids": torch.tensor([pair(z, p) for z, p in zip(pad, prompts, strict=True)]),
        "attention_mask": torch.tensor([pair(z, [1] * len(p)) for z, p in zip(pad, prompts, strict=True)]),
        **{k: torch.cat(v) for k, v in tensors.items()},
    }
    if spec.batch_tensors:
        inputs |= spec.batch_tensors(inputs)
    return {k: v.to(dtype) if v.is_floating_point() and k != "second_per_grid_ts" else v for k, v in inputs.items()}


# stages


def stage_of(config: dict[str, Any]) -> Compressor:
    if config["method"] in OWN:
        return OWN[config["method"]](**{k: values.value(v) for k, v in config.items() if k != "method"})
    return values.method(config)


def travelled(stage: Compressor, made: str) -> Compressor:
    """The stage after a way through JSON or a folder, as far as its method has a name."""
    if made == "create" or not all(type(s).name for s in stage.stages):
        return stage
    if made == "json":
        return from_config(json.loads(json.dumps(stage.config())))
    with tempfile.TemporaryDirectory() as folder:
        mmcompress.save_pretrained(stage, folder)
        return mmcompress.from_pretrained(folder)


@dataclass
class Seen:
    """What one stage was given for one item, and what it made of it."""

    tokens: Tokens
    out: Reduction


def spy(stage: Compressor, seen: list[Seen]) -> Compressor:
    """The same stage, which notes what it sees."""
    base = type(stage)

    def forward(self, tokens):
        out = base.forward(self, tokens)
        check_reduction(tokens, out, bool(tokens.x.isfinite().all()), in_order(self))
        for b in range(len(tokens.x)):
            seen.append(Seen(detached(row_of(tokens, b)), reduction_row(out, b)))
        return out

    made = type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__, "__annotations__": {}})
    twin = made(**{f.name: getattr(stage, f.name) for f in fields(stage)})
    twin.load_state_dict(stage.state_dict())
    return twin


def detached(tokens: Tokens) -> Tokens:
    parts = [getattr(tokens, f).detach() for f in ("x", "position", "group", "size")]
    return Tokens(*parts, tokens.layout, {k: v.detach() for k, v in tokens.signals.items()})


def cut(layer: Any, depth: int) -> int | None:
    """The layer that a stage stands before, from the exact decimal value."""
    if layer is None or isinstance(layer, int):
        return layer
    share = Fraction(layer).limit_denominator(10**6) * depth
    return max(1, math.floor(share))


class Replay:
    """A stage for the reference loop: looks up by content what the installed one did, and checks what it was told."""

    def __init__(self, number: int, stage: Compressor, seen: list[Seen], dtype: torch.dtype, depth: int):
        self.number, self.stage, self.seen, self.tolerance = number, stage, seen, SEEN[dtype]
        self.layer = cut(stage.layer, depth)
        self.reads = tuple(r for r in ("query_attention", "positions") if r in stage.reads and not stage.is_identity)

    def nearest(self, tokens: Tokens) -> Seen | None:
        """What was noted for these very tokens, up to rounding."""
        alike = [s for s in self.seen if s.tokens.x.shape == tokens.x.shape]
        errors = [float((s.tokens.x - tokens.x).abs().max().nan_to_num(math.inf)) for s in alike]
        scale = max(1.0, float(tokens.x.abs().max()))
        best = min(range(len(alike)), key=errors.__getitem__, default=None)
        return None if best is None or not errors[best] <= self.tolerance * scale else alike[best]

    def __call__(self, tokens: Tokens) -> Reduction:
        if self.stage.is_identity or not tokens.num_tokens:
            return identity(tokens)
        seen = self.nearest(tokens)
        if seen is None:
            raise Failure(
                f"stage {self.number} sees the reference's {tokens.num_tokens} tokens, it saw none that are near them"
            )
        if not torch.allclose(seen.tokens.size, tokens.size):
            raise Failure(f"stage {self.number} sees the reference's sizes, got {seen.tokens.size.tolist()}")
        out = seen.out
        for name in self.reads:
            mine, theirs = seen.tokens.signals[name], tokens.signals[name]
            if name == "positions":  # the batch's count from its first column, which may be padding
                shift = theirs.min() - mine.min()
                mine = mine + shift
                if out.positions is not None:
                    out = replace(out, positions=out.positions + shift)
            error = float((mine.float() - theirs.float()).abs().max())
            if not error <= (0 if name == "positions" else self.tolerance):
                raise Failure(f"stage {self.number} reads the reference's {name}: off by {error:.2g}")
        return out


class Run:
    """A case's compressor, installed; the reference with the decisions that it took."""

    def __init__(self, case: dict[str, Any]):
        self.case, self.dtype = case, DTYPES[case["dtype"]]
        self.entry = model_of(case)
        self.stock = stock_of(key_of(case))
        self.model = self.entry.model
        self.inputs = inputs_of(case, self.dtype)
        self.depth = len(text_model(self.stock).layers)
        self.ledger: Any = None

    def build(self) -> Compressor:
        chain = [part for config in self.case["stages"] for part in travelled(stage_of(config), self.case["made"]).stages]
        self.seen: list[list[Seen]] = [[] for _ in chain]
        spies = [spy(s, log) for s, log in zip(chain, self.seen, strict=True)]
        self.stages = chain
        return functools.reduce(lambda a, b: a | b, spies)

    def forget(self) -> list[list[Seen]]:
        """What the stages have seen so far, off their logs: in half precision the same item may be decided anew."""
        out = [log.copy() for log in self.seen]
        for log in self.seen:
            log.clear()
        return out

    @property
    def replays(self) -> list[Replay]:
        return [
            Replay(i, s, log, self.dtype, self.depth) for i, (s, log) in enumerate(zip(self.stages, self.seen, strict=True))
        ]

    def alone(self, r: int) -> dict[str, Tensor]:
        return inputs_of(self.case, self.dtype, r)

    def expected(self, r: int, new: list[int] = (), sample: dict[str, Tensor] | None = None) -> Any:
        return reference(self.stock, sample or self.alone(r), self.replays, new)

    def close(self, what: str, got: Tensor, wanted: Tensor, factor: float = 1.0) -> None:
        if got.shape != wanted.shape:
            raise Failure(f"{what}: shape {tuple(wanted.shape)}, got {tuple(got.shape)}")
        error = float((got.double() - wanted.double()).abs().max()) if got.numel() else 0.0
        if not error <= factor * LOGITS[self.dtype]:
            raise Failure(f"{what}: the reference's numbers, got some that differ by {error:.3g}")

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        compressor = self.build()
        if self.case["install"] == "with":
            with compressor(self.model) as run:
                self.ledger = run.ledger
                yield
            return
        mmcompress.compress_(self.model, compressor)
        try:
            self.ledger = getattr(mmcompress.patch._seam(self.model), "ledger", None)
            yield
        finally:
            try:
                mmcompress.restore_(self.model)
            except (ValueError, RuntimeError) as error:
                raise Failure(f"what compress_ did restore_ undoes, got {error}") from error


def must_answer(case: dict[str, Any]) -> bool:
    """Whether this is an ordinary call, which may not be refused."""
    layers = [s.get("layer") for s in case["stages"]]
    depth = case["text"].get("num_hidden_layers", 4)
    return (
        case["attention"] == "sdpa"
        and all(s["method"] in PLAIN and s.get("metric") != "keys" and s.get("first") != "cls" for s in case["stages"])
        and all(at is None or (isinstance(at, int) and at < depth) for at in layers)
        and layers == sorted(layers, key=lambda at: -1 if at is None else at)
        and all(call["op"] in ("forward", "train", "generate", "beams") and not call.get("item") for call in case["calls"])
    )


def must_refuse(case: dict[str, Any]) -> str | None:
    """Why a case can have no right result, where that is known."""
    depth = case["text"].get("num_hidden_layers", 4)
    for s in case["stages"]:
        at = s.get("layer")
        if isinstance(at, int) and at >= depth:
            return f"layer {at} of {depth}"
        if s["method"] == "attended" and at in (None, 0) and s.get("keep_ratio") != 1:
            return "query_attention before the decoder"
    return None


def run_model(case: dict[str, Any]) -> str:
    run = Run(case)
    outcome = "right"
    try:
        try:
            with run.installed():
                for call in case["calls"]:
                    CALLS[call["op"]](run, call)
                    check_decisions(run)
                    run.forget()
        except Exception as error:
            outcome = refusal_here_or_there(run, error)
        run.model.zero_grad(set_to_none=True)
        run.model.eval()
        run.entry.check_clean()
    except BaseException:
        patched.pop(key_of(case), None)  # the next case must not meet what this one left
        raise
    if outcome != "right" and must_answer(case):
        raise Failure(f"an ordinary call must be answered, got {outcome!r}")
    if outcome == "right" and (why := must_refuse(case)):
        raise Failure(f"must be refused: {why}")
    return outcome


class StockRefuses(Exception):
    """The call does not work on the stock model either."""


def refusal_here_or_there(run: Run, error: Exception) -> str:
    if isinstance(error, StockRefuses):
        return f"refused: the stock model raises {error}"
    return refusal(error)


# calls


def real(inputs: dict[str, Tensor], r: int) -> Tensor:
    return inputs["attention_mask"][r].bool()


def without_mask(run: Run, call: dict[str, Any]) -> dict[str, Tensor]:
    """The inputs of a call; without attention_mask where the call wants so and no row is padded."""
    if call.get("mask", True) or not bool(run.inputs["attention_mask"].all()):
        return dict(run.inputs)
    return {k: v for k, v in run.inputs.items() if k != "attention_mask"}


def check_logits(run: Run, logits: Tensor, what: str = "forward", counted: list | None = None) -> None:
    for r in range(len(run.case["rows"])):
        expected = run.expected(r)
        run.close(f"{what}, row {r}", logits[r][real(run.inputs, r)], expected.logits)
        if counted is not None:
            check_counts(run, r, expected, counted)
    if counted is not None and counted:
        raise Failure(f"the ledger counts rows with items only, {len(counted)} are left")


def check_counts(run: Run, r: int, expected: Any, counted: list) -> None:
    """Row r of the ledger against what the reference did; taken off the front of `counted`."""
    sample = run.alone(r)
    items = find_items(sample)
    if not items:
        return
    if not counted:
        raise Failure(f"the ledger counts row {r}")
    count, L = counted.pop(0), run.depth
    kept = [[len(t)] * L for t, _ in items]
    for step in expected.steps:
        at = run.replays[step.stage].layer or 0
        kept[step.item][at:] = [step.num_kept] * (L - at)
    mine = sorted((i.tokens_in, i.separators, i.kept(L)) for i in count.items)  # in any order
    theirs = sorted((len(t), len(s), k) for (t, s), k in zip(items, kept, strict=True))
    for what, got, wanted in (
        ("sequence_in", count.sequence_in, sample["input_ids"].shape[1]),
        ("tokens in, separators, tokens kept", mine, theirs),
        ("rows", count.rows(L), expected.rows),
    ):
        if got != wanted:
            raise Failure(f"the ledger's {what} of row {r}: {wanted}, got {got}")


def new_counts(run: Run, before: int) -> list | None:
    return None if run.ledger is None else list(run.ledger.samples[before:])


def num_counts(run: Run) -> int:
    return 0 if run.ledger is None else len(run.ledger.samples)


@torch.no_grad()
def forward(run: Run, call: dict[str, Any]) -> None:
    """model(**inputs): logits of every real column, the ledger, one row alone, the same columns masked."""
    inputs, before = without_mask(run, call), num_counts(run)
    out = run.model(**inputs, use_cache=call.get("cache", True))
    counted = new_counts(run, before)
    check_logits(run, out.logits, counted=counted)
    r = call.get("row", 0) % len(run.case["rows"])
    check_decisions(run)
    batch = run.forget()
    single = run.model(**run.alone(r)).logits[0]
    check_signals(run, batch)
    expected = run.expected(r)
    run.close(f"row {r} alone", single, expected.logits)
    masked_columns(run, r, expected)
    check_rows_of_cache(run, r, expected)
    keep = call.get("keep", 0)
    if keep and run.case["family"] != "qwen2_audio":
        run.close("logits_to_keep", run.model(**inputs, logits_to_keep=keep).logits, out.logits[:, -keep:])


def check_rows_of_cache(run: Run, r: int, expected: Any) -> None:
    cache = run.model(**run.alone(r), use_cache=True).past_key_values
    rows = [layer.keys.shape[-2] for layer in cache.layers]
    window = run.case["text"].get("sliding_window")
    if not window and rows != expected.rows:
        raise Failure(f"the cache holds the reference's rows {expected.rows}, got {rows}")


def check_signals(run: Run, before: list[list[Seen]]) -> None:
    """What a stage reads for an item alone is what it read for it in the batch."""
    for number, (log, old) in enumerate(zip(run.seen, before, strict=True)):
        replay = Replay(number, run.stages[number], old, run.dtype, run.depth)
        for seen in log:
            batch = replay.nearest(seen.tokens)
            ties = (is_tie(s, x.tokens) for s, log in zip(run.stages, before, strict=True) for x in log)
            if batch is None:  # an earlier stage decided otherwise by a rounding error
                if run.dtype == torch.float32 and not any(ties):
                    raise Failure(f"stage {number} sees alone what it saw in the batch")
                continue
            for name in seen.tokens.signals.keys() & batch.tokens.signals.keys():
                a, b = seen.tokens.signals[name], batch.tokens.signals[name]
                if name.startswith("text"):
                    a, b = (s.tokens.signals["text"][0][s.tokens.signals["text_mask"][0]] for s in (seen, batch))
                if name == "positions":
                    a, b = a - a.min(), b - b.min()
                scale = max(1.0, float(a.float().abs().max())) if a.numel() else 1.0
                if a.shape != b.shape or (a.numel() and not (a.float() - b.float()).abs().max() <= SEEN[run.dtype] * scale):
                    raise Failure(f"stage {number} reads the same {name} alone and in the batch")
            if seen.tokens.layout != batch.tokens.layout or not torch.equal(seen.tokens.position, batch.tokens.position):
                raise Failure(f"stage {number} reads the same layout alone and in the batch")


def masked_columns(run: Run, r: int, expected: Any) -> None:
    """Where rows are dropped before the decoder and none is merged: the stock model with the same columns hidden."""
    if run.case["text"].get("sliding_window"):
        return
    pure = all(s.layer is None and (s.is_identity or type(s).__name__ in PRUNERS) for s in run.stages)
    if not pure or run.case["attention"] != "sdpa" or run.dtype != torch.float32:
        return
    sample = run.alone(r)
    call = capture(run.stock, sample)
    visible = torch.zeros_like(sample["attention_mask"])
    visible[0, expected.columns] = 1
    call.update(attention_mask=visible, past_key_values=None, use_cache=False)
    logits = run.stock.lm_head(text_model(run.stock)(**call).last_hidden_state[0])
    run.close(f"row {r} with its columns masked", logits[expected.columns], expected.logits[expected.columns])


PRUNERS = ("Direction", "UniformKeep", "RandomKeep", "KCenter", "MaxSum", "GlobalGuided", "Vidcom2")


def check_decisions(run: Run) -> None:
    """Every stage decides for an item by itself as it did within the batch; the first few of each."""
    for stage, log in zip(run.stages, run.seen, strict=True):
        for seen in [s for s in log[:4] if bool(s.tokens.x.isfinite().all())]:
            check_alone(stage, seen.tokens, seen.out)


STEPS = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}


def generate(run: Run, inputs: dict[str, Any], **config: Any) -> Any:
    torch.manual_seed(run.case["seed"])
    return run.model.generate(**inputs, **{**STEPS, **config})


def cache_config(call: dict[str, Any]) -> dict[str, Any]:
    return {"dynamic": {}, "static": {"cache_implementation": "static"}, "none": {"use_cache": False}}[
        call.get("cache", "dynamic")
    ]


def fixed(run: Run) -> bool:
    """Whether what stays does not hang on tokens that come later."""
    return not any({"query_attention", "relevance", "text"} & set(s.reads) for s in run.stages)


@torch.no_grad()
def generated(run: Run, call: dict[str, Any]) -> None:
    """generate: every step's logits, the ledger, a second turn on the returned cache."""
    if call.get("cache") == "none" and not fixed(run):  # every step is a prefill whose newest token decides anew
        call = {**call, "cache": "dynamic"}
    inputs, new, returns = without_mask(run, call), call.get("new", 2), call.get("returns", 1)
    config = {"max_new_tokens": new, "num_return_sequences": returns, "do_sample": returns > 1 or call.get("sample", False)}
    before = num_counts(run)
    out = generate(run, inputs, **config, **cache_config(call))
    S = run.inputs["input_ids"].shape[1]
    if out.sequences.shape != (len(run.case["rows"]) * returns, S + new):
        raise Failure(f"generate returns {new} tokens a row, got {tuple(out.sequences.shape)}")
    counted = new_counts(run, before) if call.get("cache") != "none" and returns == 1 else None
    for i, sequence in enumerate(out.sequences):
        r, sample = i // returns, run.alone(i // returns)
        expected = run.expected(r, sequence[S:-1].tolist(), sample)
        if not (call.get("cache") == "none" and run.dtype != torch.float32):  # decided anew in every step
            logits = torch.stack([step[i] for step in out.logits])
            run.close(f"steps of row {r}", logits, expected.logits[sample["input_ids"].shape[1] - 1 :])
        if counted is not None:
            check_counts(run, r, expected, counted)
    if call.get("turn") and call.get("cache") != "none" and returns == 1:
        second_turn(run, call, out)


def second_turn(run: Run, call: dict[str, Any], first: Any) -> None:
    """More words, and perhaps another item, on the returned cache: as a run over everything."""
    cache = first.past_key_values
    if call.get("cache") == "static":  # as long as the first turn needed
        return
    if call.get("via"):
        cache = {"deepcopy": copy.deepcopy, "pickle": lambda c: pickle.loads(pickle.dumps(c))}[call["via"]](cache)
    B, S, new = len(run.case["rows"]), run.inputs["input_ids"].shape[1], 2
    g, spec = torch.Generator().manual_seed(run.case["seed"] + 17), FAMILIES[run.case["family"]]
    more, tensors = [], {}
    size = call.get("item") if fixed(run) else None  # what an item kept then hung on the end of its own turn
    for _ in range(B):
        ids = words(call["turn"], g)
        if size is not None:
            item = spec.item(tuple(size) if isinstance(size, list) else size, g)
            ids = ids[:1] + item.ids + ids[1:]
            for name, one in item.tensors.items():
                tensors.setdefault(name, []).append(one)
        more.append(ids)
    pixels = {k: torch.cat(v) for k, v in tensors.items()}
    pixels = {k: v.to(run.dtype) if v.is_floating_point() else v for k, v in pixels.items()}
    ids = torch.cat([first.sequences, torch.tensor(more)], 1)
    mask = torch.cat([run.inputs["attention_mask"], torch.ones(B, ids.shape[1] - S, dtype=torch.long)], 1)
    out = generate(run, {"input_ids": ids, "attention_mask": mask, **pixels}, past_key_values=cache, max_new_tokens=new)
    for r in range(B):
        sample = run.alone(r)
        n, tail = sample["input_ids"].shape[1], out.sequences[r, S:].tolist()
        if size is None:
            expected = run.expected(r, tail[:-1], sample).logits[n - 1 + ids.shape[1] - S :]
        else:
            own = {k: v[r : r + 1] for k, v in pixels.items()}
            for name, value in own.items():
                sample[name] = joined(sample.get(name), value)
            whole = torch.cat([sample["input_ids"], ids[r : r + 1, S:]], 1)
            sample |= {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
            expected = run.expected(r, out.sequences[r, ids.shape[1] : -1].tolist(), sample).logits[whole.shape[1] - 1 :]
        run.close(f"second turn of row {r}", torch.stack([step[r] for step in out.logits]), expected)


def joined(first: Tensor | None, second: Tensor) -> Tensor:
    """Both along the first dimension; the views of an AnyRes picture are padded to the longer."""
    if first is None:
        return second
    if first.dim() == 5:
        most = max(first.shape[1], second.shape[1])
        first, second = (torch.cat([t, t.new_zeros(t.shape[0], most - t.shape[1], *t.shape[2:])], 1) for t in (first, second))
    return torch.cat([first, second])


@torch.no_grad()
def beams(run: Run, call: dict[str, Any]) -> None:
    """Beam search: the returned score is the reference's for the returned words."""
    if call.get("cache") == "none" and not fixed(run):
        call = {**call, "cache": "dynamic"}
    config = {"num_beams": call.get("beams", 2), "output_scores": True, "output_logits": False}
    out = generate(run, without_mask(run, call), max_new_tokens=call.get("new", 2), **config, **cache_config(call))
    S = run.inputs["input_ids"].shape[1]
    for r in range(len(run.case["rows"])):
        new, sample = out.sequences[r, S:], run.alone(r)
        if call.get("cache") == "none" and run.dtype != torch.float32:  # decided anew in every step
            continue
        logits = run.expected(r, new.tolist()[:-1], sample).logits[sample["input_ids"].shape[1] - 1 :].float()
        score = logits.log_softmax(-1).gather(1, new[:, None]).mean()
        run.close(f"score of row {r}", out.sequences_scores[r].float(), score)


def train(run: Run, call: dict[str, Any]) -> None:
    """Loss and gradients, with gradient checkpointing or without."""
    labels = run.inputs["input_ids"].clone()
    hidden = torch.isin(labels, torch.tensor([*PLACEHOLDERS, BOS])) | (run.inputs["attention_mask"] == 0)
    labels[hidden] = -100
    if not bool((labels[:, 1:] != -100).any()):
        return
    run.model.train()
    checkpointing = call.get("checkpointing")
    if checkpointing:
        run.model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    try:
        loss = run.model(**without_mask(run, call), labels=labels, use_cache=False).loss
        loss.backward()
    finally:
        if checkpointing:
            run.model.gradient_checkpointing_disable()
        run.model.eval()
    grads = [p.grad for p in run.model.parameters() if p.grad is not None]
    if not grads or not all(bool(g.isfinite().all()) for g in grads):
        raise Failure("gradients are finite")
    run.model.zero_grad(set_to_none=True)
    total, count = 0.0, 0
    with torch.no_grad():
        for r in range(len(run.case["rows"])):
            own = labels[r][real(run.inputs, r)]
            logits = run.expected(r).logits.float()
            total += float(torch.nn.functional.cross_entropy(logits[:-1], own[1:], reduction="sum"))
            count += int((own[1:] != -100).sum())
    run.close("loss", loss.detach().float(), torch.tensor(total / count))


@torch.no_grad()
def manual(run: Run, call: dict[str, Any]) -> None:
    """Plain forward calls on one cache, word by word."""
    if run.case["family"] in MROPE and _pixels(run.inputs) is None:  # the stock model keeps the offsets of the call before
        return
    B, mask, new, logits, extra = len(run.case["rows"]), run.inputs["attention_mask"], [], [], {}
    bare = not call.get("mask", True) and bool(mask.all())
    out = run.model(**without_mask(run, call), use_cache=True)
    for step in range(call.get("new", 2)):
        logits.append(out.logits[:, -1])
        allowed = out.logits[:, -1].clone()
        allowed[:, list(PLACEHOLDERS)] = -torch.inf
        new.append(allowed.argmax(-1))
        mask = torch.cat([mask, mask.new_ones(B, 1)], 1)
        if run.case["family"] in MROPE:  # the stock model does not find these by itself
            deltas = run.model.model.rope_deltas
            if deltas is None:
                return
            extra = {"position_ids": (run.inputs["attention_mask"].sum(1, keepdim=True) + step + deltas).expand(3, B, 1)}
        given = {} if bare else {"attention_mask": mask}
        out = run.model(input_ids=new[-1][:, None], past_key_values=out.past_key_values, **given, **extra)
    for r in range(B):
        sample = run.alone(r)
        tail = [int(t[r]) for t in new]
        expected = run.expected(r, tail[:-1], sample).logits[sample["input_ids"].shape[1] - 1 :]
        run.close(f"manual loop, row {r}", torch.stack([x[r] for x in logits]), expected)


@torch.no_grad()
def copied(run: Run, call: dict[str, Any]) -> None:
    """A deep copy answers as the model does, and goes its own way."""
    logits = run.model(**run.inputs).logits
    check_logits(run, logits)
    check_decisions(run)
    run.forget()
    twin = copy.deepcopy(run.model)
    if not torch.equal(twin(**run.inputs).logits, logits):
        raise Failure("a deep copy gives the model's logits")
    if call.get("restore") and run.case["install"] != "with":
        mmcompress.restore_(twin)
        if not torch.equal(twin(**run.inputs).logits, run.stock(**run.inputs).logits):
            raise Failure("a restored deep copy is the stock model")
    else:
        for p in text_model(twin).layers.parameters():
            p.zero_()
        twin(**run.inputs)
    if not torch.equal(run.model(**run.inputs).logits, logits):
        raise Failure("what is done to a deep copy leaves the model alone")
    run.forget()


@torch.no_grad()
def lookup(run: Run, call: dict[str, Any]) -> None:
    """Assisted decoding by prompt lookup: the words of plain decoding."""
    r = call.get("row", 0) % len(run.case["rows"])
    sample = run.alone(r)
    out = generate(run, sample, max_new_tokens=4, prompt_lookup_num_tokens=2, max_matching_ngram_size=2)
    n = sample["input_ids"].shape[1]
    logits = run.expected(r, out.sequences[0, n:-1].tolist(), sample).logits[n - 1 :]
    run.close("prompt lookup", torch.cat(list(out.logits))[: len(logits)], logits)


# odd calls: another way to say the same, or something that is wrong


@torch.no_grad()
def odd(run: Run, call: dict[str, Any]) -> None:
    what = call["what"]
    if what == "broken pixels":
        broken(run)
        return
    if what in WRONG:
        wrong = WRONG[what](dict(run.inputs))
        if wrong is not None:
            wrongly(run, what, wrong)
        return
    made = SAME[what](run, dict(run.inputs))
    if made is None:
        return
    try:
        run.stock(*made.get("*", ()), **{k: v for k, v in made.items() if k != "*"})
    except Exception as error:
        raise StockRefuses(type(error).__name__) from error
    made = SAME[what](run, dict(run.inputs))
    out = run.model(*made.get("*", ()), **{k: v for k, v in made.items() if k != "*"})
    check_logits(run, out[0] if isinstance(out, tuple) else out.logits, what)


def wrongly(run: Run, what: str, wrong: dict[str, Any]) -> None:
    """What the stock model refuses is refused."""
    try:
        run.stock(**wrong)
    except Exception as error:
        try:
            run.model(**wrong)
        except Exception as mine:
            if type(mine) is not type(error):
                refusal(mine)
            raise StockRefuses(type(error).__name__) from mine
        raise Failure(f"{what}: the stock model raises {type(error).__name__}, the compressed one answers") from error
    run.model(**wrong)


def broken(run: Run) -> None:
    """A picture with NaN: a sentence, or no finite answer for its row and right ones for the others."""
    name = _pixels(run.inputs)
    if name is None:
        return
    owner = next(r for r in range(len(run.case["rows"])) if name in run.alone(r))
    pixels = run.inputs[name].clone()
    pixels[0] = math.nan
    logits = run.model(**{**run.inputs, name: pixels}).logits
    for r in range(len(run.case["rows"])):
        own = logits[r][real(run.inputs, r)]
        if r != owner:
            run.close(f"row {r} beside a broken one", own, run.expected(r).logits)
        elif own.isfinite().all() and not any(type(s).__name__ == "DropAll" for s in run.stages):
            raise Failure("a picture of NaN gives no finite answer")


def _first(inputs: dict[str, Tensor], *names: str) -> str | None:
    return next((n for n in names if n in inputs), None)


def _pixels(inputs: dict[str, Tensor]) -> str | None:
    return _first(inputs, "pixel_values", "pixel_values_videos", "input_features")


def _less(inputs: dict[str, Tensor]) -> dict | None:
    if "pixel_values" not in inputs or "image_grid_thw" in inputs or len(inputs["pixel_values"]) < 2:
        return None
    return {k: v[:-1] if k in ("pixel_values", "image_sizes") else v for k, v in inputs.items()}


def _more(inputs: dict[str, Tensor]) -> dict | None:
    if "pixel_values" not in inputs or "image_grid_thw" in inputs:
        return None
    return {k: torch.cat([v, v[:1]]) if k in ("pixel_values", "image_sizes") else v for k, v in inputs.items()}


def _cut_ids(inputs: dict[str, Tensor]) -> dict | None:
    """One placeholder less than features."""
    if _pixels(inputs) is None:
        return None
    ids = inputs["input_ids"].clone()
    place = torch.isin(ids, torch.tensor(PLACEHOLDERS)).nonzero()[0]
    ids[place[0], place[1]] = FIRST_WORD
    extra = {"mm_token_type_ids": torch.zeros_like(ids)} if "mm_token_type_ids" in inputs else {}
    if extra:
        extra["mm_token_type_ids"] = inputs["mm_token_type_ids"].masked_fill(ids == FIRST_WORD, 0)
    return {**inputs, "input_ids": ids, **extra}


def _short_mask(inputs: dict[str, Tensor]) -> dict | None:
    return {**inputs, "attention_mask": inputs["attention_mask"][:, 1:]}


WRONG: dict[str, Callable] = {
    "one item less": _less,
    "one item more": _more,
    "a placeholder less": _cut_ids,
    "short mask": _short_mask,
}


def _embeds(run: Run, inputs: dict) -> dict | None:
    """A text-only prompt as embeddings."""
    if _pixels(inputs) is not None or run.case["family"] in MROPE:
        return None
    ids = inputs.pop("input_ids")
    inputs.pop("mm_token_type_ids", None)
    return {**inputs, "inputs_embeds": run.model.get_input_embeddings()(ids)}


def _positions(run: Run, inputs: dict) -> dict | None:
    if run.case["family"] in MROPE:
        return None
    B, S = inputs["input_ids"].shape
    return {**inputs, "position_ids": torch.arange(S).expand(B, S)}


def _sizes_as(kind: Callable) -> Callable:
    return lambda run, inputs: {**inputs, "image_sizes": kind(inputs["image_sizes"])} if "image_sizes" in inputs else None


def _strided(run: Run, inputs: dict) -> dict | None:
    name = _pixels(inputs)
    if name is None:
        return None
    return {**inputs, name: inputs[name].transpose(0, -1).contiguous().transpose(0, -1)}


def _own_cache(run: Run, inputs: dict) -> dict:
    from transformers import DynamicCache

    return {**inputs, "past_key_values": DynamicCache(config=run.model.config.get_text_config()), "use_cache": True}


SAME: dict[str, Callable] = {
    "boolean mask": lambda run, x: {**x, "attention_mask": x["attention_mask"].bool()},
    "float mask": lambda run, x: {**x, "attention_mask": x["attention_mask"].float()},
    "int32 ids": lambda run, x: {**x, "input_ids": x["input_ids"].int()},
    "position_ids": _positions,
    "positional ids": lambda run, x: {"*": (x.pop("input_ids"),), **x},
    "tuple": lambda run, x: {**x, "return_dict": False},
    "hidden states": lambda run, x: {**x, "output_hidden_states": True},
    "list of sizes": _sizes_as(lambda s: s.tolist()),
    "numpy sizes": _sizes_as(lambda s: s.numpy()),
    "strided pixels": _strided,
    "own cache": _own_cache,
    "embeddings": _embeds,
    "none labels": lambda run, x: {**x, "labels": None, "past_key_values": None},
}

CALLS: dict[str, Callable] = {
    "forward": forward, "generate": generated, "beams": beams, "train": train, "manual": manual, "copy": copied,
    "lookup": lookup,
    "odd": odd,
}  # fmt: skip
