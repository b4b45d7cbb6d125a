"""Cases by number: hypothesis draws them in blocks, each from a seed of its own; a case is plain JSON.

Hypothesis also draws constants that it finds in our sources, so a number means the same case only while these are the same:
a failing case is kept whole, never as a number.
"""

from __future__ import annotations

import functools
import json
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from mmcompress.registry import field_names, get_method, list_methods

from .models import MROPE, OWN, PROBE, SAME, WRONG

BLOCK = 50
FAMILY = tuple(PROBE)
ANYRES = ("llava_next", "llava_next_dinov2", "llava_onevision", "llava_onevision_dinov2")


def drawn(number: int, count: int) -> list[dict[str, Any]]:
    """`count` draws that follow from a seed."""
    out: list[dict[str, Any]] = []

    @seed(number)
    @settings(max_examples=count, phases=[Phase.generate], database=None, deadline=None, suppress_health_check=[*HealthCheck])
    @given(CASES)
    def draw(case):
        out.append(case)

    draw()
    return out[1:]  # the first is always the simplest


@functools.lru_cache(maxsize=64)
def block(root: int, number: int) -> tuple[dict[str, Any], ...]:
    """BLOCK cases, the same for the same root and number."""
    out: dict[str, dict[str, Any]] = {}
    for attempt in range(20):
        for case in drawn((root * 1_000_003 + number) * 100 + attempt, BLOCK + 10):
            out.setdefault(json.dumps(case, sort_keys=True), case)
        if len(out) >= BLOCK:
            break
    return tuple(out.values())[:BLOCK]


def case_of(root: int, number: int) -> dict[str, Any]:
    """Case `number` of a root seed."""
    made = block(root, number // BLOCK)
    return made[number % BLOCK % len(made)]


def record(**parts: Any) -> st.SearchStrategy:
    """A dict; a part that is None is left out."""
    plain = {k: v if isinstance(v, st.SearchStrategy) else st.just(v) for k, v in parts.items()}
    return st.fixed_dictionaries(plain).map(lambda d: {k: v for k, v in d.items() if v is not None})


def often(value: Any, other: st.SearchStrategy, share: int = 3) -> st.SearchStrategy:
    """`value` in `share` of share + 1 draws, else another."""
    return st.integers(0, share).flatmap(lambda i: other if i == share else st.just(value))


# compressors

RATIO = st.sampled_from([0.25, 0.5, 0.1, 0.45, 0.7, 0.02, 1 / 3, 0.9, 0.99, 1, 0.05, 0.6]) | st.floats(0.01, 1).map(
    lambda x: round(x, 4)
)
SEED = st.integers(0, 3)
FIELDS: dict[str, dict[str, st.SearchStrategy]] = {
    "dpc_knn": {"num_neighbors": st.integers(1, 9), "weights": st.sampled_from(["ones", "norm"]), "mode": st.just("official")},
    "global_guided": {
        "mode": st.just("official"), "temperature": st.sampled_from([0.1, 1.0, 50.0]), "alpha": st.sampled_from([0, 0.3, 1]),
        "scores": st.sampled_from(["cls", "centroid", "auto"]),
    },
    "k_center": {
        "first": st.sampled_from(["auto", "cls", "maxmin", "random"]), "seed": SEED,
        "metric": st.sampled_from(["cosine", "sqeuclidean"]),
    },
    "kmeans": {"num_iterations": st.integers(1, 12), "seed": SEED},
    "max_sum": {"first": st.sampled_from(["auto", "cls", "maxmin", "random"]), "seed": SEED},
    "pooling": {"stride": st.integers(1, 9), "tail": st.sampled_from(["partial", "drop"])},
    "position_merge": {
        "merger": st.sampled_from(["dpc_knn", "kmeans", "tome", "pooling"]),
        "positions": st.sampled_from(["carry", "anchor", "renumber"]),
        "num_positions": st.sampled_from(["auto", 1, 2, 4, 8, 3]), "member_order": st.sampled_from(["center", "index_desc"]),
        "fill": st.sampled_from(["cyclic", "first", "spread"]), "cascade": st.sampled_from(["interleave", "inherit"]),
        "mode": st.just("official"),
    },
    "position_cascade": {
        "num_positions": st.sampled_from(["auto", 1, 2]), "cascade": st.sampled_from(["interleave", "inherit"]),
    },
    "random_keep": {"seed": SEED},
    "relevance_drop": {"threshold": st.sampled_from([0, 0.1, 0.5, 0.9, 1])},
    "tome": {"r": st.integers(0, 20), "metric": st.sampled_from(["x", "keys"])},
    "vidcom2": {
        "scorer": st.sampled_from(["gaussian", "cosine"]), "mode": st.just("official"),
        "temperature": st.sampled_from([0.01, 1.0]),
        "channel_ratio": st.sampled_from([0.1, 0.5, 1]),
    },
    "vq_hash": {
        "num_codes": st.integers(1, 12), "adaptive": st.booleans(), "rule": st.sampled_from(["knee", "silhouette"]),
        "codebook": st.sampled_from(["raw", "normalised"]), "mode": st.just("official"), "reseed_empty": st.booleans(),
        "seed": SEED,
        "max_iter": st.integers(1, 9),
    },
}  # fmt: skip
"""Values of the methods' own fields, most of them allowed."""
PRESETS = tuple(m for m in list_methods() if not isinstance(get_method(m), type))
LAYER = st.sampled_from([None, None, None, 0, 1, 2, 3, 0.25, 0.5, 0.75, 0.9, 0.1, 11 / 36])


@st.composite
def stage(draw: Any, layer: st.SearchStrategy, names: tuple[str, ...]) -> dict[str, Any]:
    name = draw(st.sampled_from(names))
    known = FIELDS.get(name, {})
    config: dict[str, Any] = {"method": name}
    fixed = name in ("vq_hash", "drop_all", "relevance_drop", "none") or (
        name in PRESETS and "keep_ratio" not in field_names(get_method(name))
    )
    if not fixed and draw(often(True, st.just(False), 5)):
        config["keep_ratio"] = draw(RATIO)
    if name not in PRESETS and (at := draw(layer)) is not None:
        config["layer"] = at
    for field in sorted(known):
        if draw(often(False, st.just(True), 2)):
            config[field] = draw(known[field])
    return config


def where(config: dict[str, Any]) -> float:
    at = config.get("layer")
    return -1 if at is None else at if isinstance(at, int) else at * 4


NAMES = (*list_methods(), *OWN, "direction", "mean_merge", "direction", "dpc_knn", "k_center")


@st.composite
def chain(draw: Any, names: tuple[str, ...] = NAMES) -> list[dict[str, Any]]:
    """One to three stages, their places ascending but rarely."""
    count = draw(st.sampled_from([1, 1, 1, 2, 2, 3]))
    stages = [draw(stage(LAYER, names)) for _ in range(count)]
    return stages if draw(st.integers(0, 19)) == 19 else sorted(stages, key=where)


# models


@st.composite
def rows(draw: Any, family: str) -> list[list[Any]]:
    if family in ANYRES:
        size: st.SearchStrategy = st.tuples(st.integers(6, 60), st.integers(6, 60)).map(list)
        if "onevision" in family:
            size = size | st.just("clip")
    elif family in MROPE:
        edge = st.integers(1, 5).map(lambda n: 2 * n)
        size = st.tuples(st.just("image"), st.just(1), edge, edge).map(list)
        size = size | st.tuples(st.just("video"), st.integers(1, 3), edge, edge).map(list)
    elif family == "qwen2_audio":
        size = st.integers(10, 96)
    else:
        size = st.just("view")
    count = st.integers(0, 4)
    out = []
    for _ in range(draw(st.sampled_from([1, 2, 2, 3, 4]))):
        row: list[Any] = [draw(count)]
        for _ in range(draw(st.sampled_from([1, 1, 1, 2, 0, 3] if family not in ANYRES else [1, 1, 1, 2, 0]))):
            row += [draw(size), draw(count)]
        out.append([*row, draw(often(3, st.integers(0, 6)))])
    return out


def calls(family: str) -> st.SearchStrategy:
    mask, new, cache = (
        often(True, st.just(False), 1),
        st.integers(1, 4),
        st.sampled_from(["dynamic", "dynamic", "static", "none"]),
    )
    item = st.none() if family in MROPE else often(None, st.just(PROBE[family]), 2)
    one = {
        "forward": record(
            op="forward", mask=mask, cache=st.booleans(), keep=st.sampled_from([0, 0, 1, 3]), row=st.integers(0, 3)
        ),
        "generate": record(
            op="generate", mask=mask, cache=cache, new=new, sample=st.booleans(), returns=st.sampled_from([1, 1, 1, 2])
        ),
        "turn": record(
            op="generate", mask=mask, cache="dynamic", new=new, turn=st.integers(1, 5), item=item,
            via=often(None, st.sampled_from(["deepcopy", "pickle"])),
        ),
        "beams": record(op="beams", mask=mask, cache=cache, new=new, beams=st.integers(2, 3)),
        "train": record(op="train", mask=mask, checkpointing=st.sampled_from([None, None, "reentrant", "other"])),
        "manual": record(op="manual", mask=mask, new=new),
        "copy": record(op="copy", restore=st.booleans()),
        "lookup": record(op="lookup", row=st.integers(0, 3)),
        "odd": record(op="odd", what=st.sampled_from([*SAME, *WRONG, "broken pixels"])),
    }  # fmt: skip
    kinds = [
        "forward",
        "forward",
        "generate",
        "generate",
        "generate",
        "turn",
        "turn",
        "beams",
        "train",
        "manual",
        "copy",
        "lookup",
        "odd",
        "odd",
    ]
    each = st.sampled_from(kinds).flatmap(one.__getitem__)
    return st.lists(each, min_size=1, max_size=1) | st.lists(each, min_size=1, max_size=2)


@st.composite
def model_case(draw: Any) -> dict[str, Any]:
    family = draw(st.sampled_from(FAMILY))
    text = {"num_hidden_layers": draw(often(4, st.sampled_from([2, 3, 5]), 4))}
    if family == "llava_next":
        text |= draw(often({}, st.sampled_from([{"sliding_window": 12}, {"sliding_window": 30}])))
    if family not in MROPE:
        text |= draw(often({}, st.sampled_from([{"num_key_value_heads": 1}, {"num_key_value_heads": 4}]), 5))
    wanted = draw(calls(family))
    left = any(c["op"] in ("generate", "beams", "manual") for c in wanted)  # the stock model wants it so
    dtype = draw(often("float32", st.sampled_from(["bfloat16", "float16"]), 7))
    exact = (
        "mean_merge",
        "position_merge",
        "position_cascade",
    )  # the first is written for float32, so is how the reference turns
    names = NAMES if dtype == "float32" else tuple(n for n in NAMES if n not in exact)
    return {
        "kind": "model",
        "family": family,
        "model_seed": draw(often(0, st.just(1), 4)),
        "text": text,
        "dtype": dtype,
        "attention": draw(often("sdpa", st.just("eager"), 6)),
        "seed": draw(st.integers(0, 10**6)),
        "rows": draw(rows(family)),
        "side": "left" if left else draw(st.sampled_from(["left", "right"])),
        "stages": draw(chain(names)),
        "made": draw(often("create", st.sampled_from(["json", "saved"]))),
        "install": draw(st.sampled_from(["with", "with", "compress_"])),
        "calls": wanted,
    }


# methods by themselves


@st.composite
def values_case(draw: Any) -> dict[str, Any]:
    item = draw(st.sampled_from(["image", "image", "video", "audio", "anyres"]))
    edge = st.integers(1, 8)
    grids = {
        "image": st.tuples(st.just(1), edge, edge), "video": st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4)),
        "audio": st.tuples(st.integers(0, 40), st.just(1), st.just(1)),
        "anyres": st.tuples(st.just(1), st.integers(1, 2), st.integers(1, 3)),
    }  # fmt: skip
    return {
        "kind": "values",
        "stages": draw(chain(tuple(list_methods()))),
        "item": item,
        "grid": list(draw(often([0, 1, 1], grids[item], 30) if item == "nothing" else grids[item])),
        "B": draw(st.integers(1, 4)),
        "D": draw(st.sampled_from([16, 8, 32, 1, 33])),
        "dtype": draw(often("float32", st.sampled_from(["bfloat16", "float16", "float64"]), 4)),
        "fill": draw(
            often(
                "normal",
                st.sampled_from(["equal", "zero", "big", "small", "whole", "twins", "one", "huge", "tiny", "nan", "inf"]),
                1,
            )
        ),
        "sizes": draw(st.booleans()),
        "start": draw(st.sampled_from([0, 7, 1000])),
        "backward": draw(st.booleans()),
        "seed": draw(st.integers(0, 10**6)),
    }


NUMBERS = [
    0,
    1,
    -1,
    2,
    7,
    10**30,
    0.5,
    0.25,
    -0.1,
    1.5,
    1e-9,
    1e300,
    {"float": "nan"},
    {"float": "inf"},
    {"float": "-inf"},
    True,
    False,
]
STRANGE = [
    None, "", "0.5", "auto", "x", "corrected", [], [1], {}, {"a": 1}, {"fraction": "1/4"}, {"numpy": "float32", "value": 0.5},
    {"numpy": "float64", "value": 0.3}, {"numpy": "int64", "value": 2}, {"numpy": "bool", "value": True},
]  # fmt: skip
ANY = st.sampled_from([*NUMBERS, *STRANGE])


@st.composite
def config_case(draw: Any) -> dict[str, Any]:
    name = draw(st.sampled_from(list_methods()))
    if draw(st.integers(0, 3)) == 3:
        return {"kind": "config", "config": draw(mutated(name))}
    names = field_names(get_method(name))
    config: dict[str, Any] = {"method": name}
    for _ in range(draw(st.integers(0, 2))):
        field = draw(st.sampled_from([*names, "keep_ratio", "layer", "keep_ratoi"]))
        config[field] = draw(ANY)
    case: dict[str, Any] = {"kind": "config", "method": config}
    if draw(st.booleans()):
        field = draw(st.sampled_from(names))
        good = {"keep_ratio": RATIO, "layer": LAYER, **FIELDS.get(name, {})}.get(field)
        case["set"] = [field, draw(good | ANY if good is not None else ANY)]
    return case


def mutated(name: str) -> st.SearchStrategy:
    """What might stand in a JSON file in place of a configuration."""
    from mmcompress import create

    try:
        right = create(name).config()
    except (ValueError, TypeError):
        right = {"method": name}
    plain = st.sampled_from([v for v in (*NUMBERS, *STRANGE) if not isinstance(v, dict)])
    wrong = [
        plain, plain.map(lambda v: {"method": v}), plain.map(lambda v: {"chain": v}), plain.map(lambda v: {"chain": [v]}),
        plain.map(lambda v: {**right, "method": v} if "method" in right else {"chain": [*right["chain"], v]}),
        st.just({"chain": [right, right]}), st.just({"chain": [{"chain": [right]}]}), st.just({"chain": []}),
        st.just({**right, "more": 1}),
        st.just({**right, "format": 99}), st.just({**right, "version": "99"}), st.just({**right, "method": name, "chain": []}),
        st.just(functools.reduce(lambda inner, _: {"chain": [inner]}, range(3000), right)),
    ]  # fmt: skip
    if "method" in right:
        field = st.sampled_from(sorted(set(right) - {"method"}))
        wrong.append(st.tuples(field, plain).map(lambda kv: {**right, kv[0]: kv[1]}))
    return st.one_of(wrong)


# files and command lines


@st.composite
def files_case(draw: Any) -> dict[str, Any]:
    from .files import DAMAGE

    weights = draw(st.booleans())
    method = (
        {"method": "vq_hash", "mapper": True, "width": 16, "place_width": 8, "num_places": 4, "num_heads": 2}
        if weights
        else None
    )
    return {
        "kind": "files",
        "method": method or draw(stage(LAYER, tuple(m for m in list_methods() if m != "vq_hash"))),
        "damage": draw(
            st.lists(record(how=st.sampled_from(sorted(DAMAGE)), at=st.integers(0, 999), value=ANY), min_size=0, max_size=2)
        ),
    }


@st.composite
def command_case(draw: Any) -> dict[str, Any]:
    from .commands import arguments

    return {"kind": "command", "arguments": draw(arguments())}


KINDS = {
    "model": (model_case(), 11),
    "values": (values_case(), 5),
    "config": (config_case(), 2),
    "files": (files_case(), 1),
    "command": (command_case(), 1),
}
CASES = st.sampled_from([k for k, (_, share) in KINDS.items() for _ in range(share)]).flatmap(lambda k: KINDS[k][0])
