"""What holds of every compressor as a value: fields are fixed and plain, places are in order, shares of the depth exact."""

import copy
import json
import math
import pickle
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from mmcompress import Scorer, Selector, create, list_methods, num_kept
from mmcompress.compressor import CacheCompressor, Chain, Compressor, TowerCompressor, from_config, layer_index, plain
from mmcompress.registry import field_names, get_method
from mmcompress.testing import tiny_inputs, tiny_model
from mmcompress.tokens import Reduction, Tokens, fault, keep

CLASSES = [name for name in list_methods() if isinstance(get_method(name), type)]


class Weighted(Scorer):
    """A trained method."""

    width: int = 4

    def setup(self):
        self.weight = torch.nn.Parameter(torch.zeros(self.width))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.seen = 0

    def score(self, tokens):
        self.seen += 1  # an attribute of its own
        return tokens.x @ self.weight


# fields are fixed


@pytest.mark.parametrize("name", CLASSES)
def test_fields_cannot_be_assigned(name):
    method = create(name)
    before = method.config()
    for field in field_names(get_method(name)):
        with pytest.raises(AttributeError, match=rf"^{field} of {name} is fixed once it is made: (at|but)\({field}="):
            setattr(method, field, getattr(method, field))
        with pytest.raises(AttributeError, match="is fixed once it is made"):
            delattr(method, field)
    assert method.config() == before


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c)), lambda c: c.but()])
def test_copies_are_equal_and_fixed_too(again):
    chain = create("position_merge", merger={"method": "tome", "metric": "keys"}) | create("pooling", layer=2)
    for method in (create("k_center", keep_ratio=0.5), chain, *chain.stages):
        other = again(method)
        assert other is not method and other.config() == method.config() and other.num_kept(100) == method.num_kept(100)
        with pytest.raises(AttributeError, match=r"keep_ratio of .* is fixed"):
            other.keep_ratio = 0.1


def test_a_dict_among_the_fields_is_fixed_and_nobody_elses():
    given = {"method": "tome", "metric": "x"}
    method = create("position_merge", merger=given)
    given["metric"] = method.config()["merger"]["metric"] = "keys"
    assert method.merger == {"method": "tome", "metric": "x"} == method.config()["merger"]
    for change in (lambda m: m.update(metric="keys"), lambda m: m.pop("metric"), lambda m: m.__setitem__("metric", "keys")):
        with pytest.raises(TypeError, match="fixed once its compressor is made"):
            change(method.merger)


def test_what_is_no_field_stays_free():
    method = Weighted()
    method(Tokens.of(torch.randn(5, 4)))
    assert method.seen == 1
    method.note, method.training = "mine", False
    method.weight = torch.nn.Parameter(torch.ones(4))
    method.half().eval().train()
    assert method.weight.dtype == torch.float16 and method.training and method.note == "mine"
    method.float().load_state_dict({"weight": torch.ones(4), "count": torch.tensor(3)})
    method.child = torch.nn.Linear(2, 2)
    del method.note, method.child
    assert set(method.state_dict()) == {"weight", "count"} and method.config()["width"] == 4


def test_but():
    method = create("k_center", keep_ratio=0.5, seed=3)
    other = method.but(keep_ratio=0.1)
    assert (other.num_kept(48), other.config()["keep_ratio"], other.seed, method.num_kept(48)) == (5, 0.1, 3, 24)
    with pytest.raises(ValueError, match=r"keep_ratio must be in \(0, 1\], got 2"):
        method.but(keep_ratio=2)
    with pytest.raises(ValueError, match="k_center has no field 'ratio'; fields: keep_ratio"):
        method.but(ratio=0.1)


def test_parameters_come_along():
    method = Weighted().to(torch.bfloat16).eval()
    method.weight.data.copy_(torch.tensor([1.0, 2, 3, 4]))
    method.weight.requires_grad_(False)
    for other in (method.but(keep_ratio=0.5), method.at(layer=2)):
        assert torch.equal(other.weight, method.weight) and other.weight.dtype == torch.bfloat16
        assert not other.training and not other.weight.requires_grad
        other.weight.zero_()
    assert method.weight.tolist() == [1, 2, 3, 4], "they are copies"
    with pytest.raises(ValueError, match="the parameters of Weighted do not fit width=5: create it anew"):
        method.but(width=5)


# values are plain


class Anything(Compressor):
    """Any value."""

    value: object = None


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (np.int64(3), 3),
        (np.float32(0.1), 0.1),
        (np.float64(0.1), 0.1),
        (np.float16(0.1), 0.1),
        (np.bool_(True), True),
        (np.str_("a"), "a"),
        (np.array(7), 7),
        (np.array(0.3, dtype=np.float32), 0.3),
        (torch.tensor(5), 5),
        (torch.tensor(0.2), 0.2),
        (torch.tensor(0.1, dtype=torch.bfloat16), 0.1),
        (torch.tensor(1 / 3, dtype=torch.float64), 1 / 3),
        (Fraction(1, 3), 1 / 3),
        (Fraction(1, 4), 0.25),
        (Decimal("0.1"), 0.1),
        ({"a": np.float32(0.1), "b": [np.int32(1), (Fraction(1, 2),)]}, {"a": 0.1, "b": [1, (0.5,)]}),
        (2**70, 2**70),
        (None, None),
        ("0.5", "0.5"),
        (True, True),
    ],
)
def test_values_are_pythons_own(given, kept):
    value = Anything(value=given).value
    assert value == kept and isinstance(value, type(kept))
    json.dumps(Anything(value=given).config())
    assert plain(value) == value


@pytest.mark.parametrize("name", CLASSES)
def test_numpy_fields_of_every_method(name):
    """What numpy and torch give for the same numbers makes the same compressor, fit for JSON."""
    method = create(name)
    numbers = {k: v for k, v in method.config().items() if type(v) in (int, float)}
    if name not in ("none", "relevance_drop", "vq_hash"):
        numbers["keep_ratio"] = 0.3
    wanted = create(name, **numbers).config()
    for cast in (
        lambda v: np.array(v)[()],
        np.asarray,
        lambda v: np.float32(v) if type(v) is float else np.int32(v),
        lambda v: torch.tensor(v, dtype=torch.float64 if type(v) is float else torch.long),
        lambda v: Fraction(str(v)) if type(v) is float else v,
    ):
        made = create(name, **{k: cast(v) for k, v in numbers.items()})
        assert json.loads(json.dumps(made.config())) == made.config() == wanted
        assert all(type(a) is type(b) for a, b in zip(made.config().values(), wanted.values(), strict=True))


def test_nan_is_no_ratio_whatever_its_type():
    for nan in (math.nan, np.float32("nan"), torch.tensor(torch.nan)):
        with pytest.raises(ValueError, match=r"keep_ratio must be in \(0, 1\], got nan"):
            create("pooling", keep_ratio=nan)
    with pytest.raises(TypeError, match=r"keep_ratio must be a number in \(0, 1\], got True"):
        create("pooling", keep_ratio=np.bool_(True))


@pytest.mark.parametrize(
    "ratio", [0.1, 0.45, np.float32(0.1), np.float16(0.15), Fraction(1, 3), Fraction(1, 6), Decimal("0.35")]
)
def test_counts_follow_what_the_config_shows(ratio):
    method = create("uniform_keep", keep_ratio=ratio)
    shown = Fraction(str(json.loads(json.dumps(method.config()))["keep_ratio"]))
    for N in range(1, 200):
        exact = max(1, math.floor(N * shown + Fraction(1, 2)))
        assert method.num_kept(N) == exact == num_kept(N, method.keep_ratio)


# shares of the depth


def test_a_share_of_the_depth_is_exact():
    for depth in range(2, 129):
        for other in range(2, 129):
            for k in range(1, other):
                exact = max(1, k * depth // other)
                if other == depth or other in (22, 26, 52, 46, 94):
                    assert layer_index(k / other, depth) == exact, (k, other, depth)
        for k in range(1, depth):
            assert layer_index(np.float32(k / depth), depth) == layer_index(Fraction(k, depth), depth) == k
            assert layer_index(k, depth) == layer_index(np.int64(k), depth) == k


@pytest.mark.parametrize(("layer", "depth", "at"), [(None, 4, 0), (0, 4, 0), (0.01, 4, 1), (0.999, 4, 3), (1 - 2**-53, 4, 3)])
def test_ends_of_the_depth(layer, depth, at):
    assert layer_index(layer, depth) == at


@pytest.mark.parametrize("layer", [4, 0.5, 10**9])
def test_a_layer_that_is_not_there(layer):
    depth = 1 if layer == 0.5 else 4
    with pytest.raises(ValueError, match=f"layer must be below the model's {depth} decoder layers, got {layer}"):
        layer_index(layer, depth)


@pytest.mark.parametrize("layer", [-1, 1.5, 1.0, 0.0, -0.5, math.nan])
def test_no_layer_at_all(layer):
    for call in (
        lambda: layer_index(layer, 4),
        lambda: create("pooling", layer=layer),
        lambda: create("pooling").at(layer=layer),
    ):
        with pytest.raises(ValueError, match=r"layer must be None, an int >= 0 or a float in \(0, 1\), got"):
            call()


# where it stands


def test_at_is_what_layer_says():
    pooling = create("pooling", stride=4)
    for layer in (0, 2, 0.5, np.int64(2), Fraction(1, 2)):
        placed = pooling.at(layer=layer)
        assert placed.config() == create("pooling", stride=4, layer=layer).config()
        assert (
            placed.placement == "layer"
            and type(placed) is type(pooling)
            and from_config(placed.config()).config() == placed.config()
        )
    assert pooling.placement == "prefill" and pooling.layer is None
    back = pooling.at(layer=2).at(placement="prefill")
    assert (
        back.config()
        == pooling.config()
        == pooling.at(layer=2).at(layer=None).config()
        == pooling.at(layer=2).but(layer=None).config()
    )
    assert pooling.at(layer=2).at(layer=0.5).layer == pooling.at(placement="layer", layer=0.5).layer == 0.5
    assert pooling.at(layer=2).but(stride=2).config() == create("pooling", stride=2, layer=2).config()
    assert "placement" not in repr(placed)


@pytest.mark.parametrize(
    "place", [{"placement": "prefill", "layer": 2}, {"placement": "tower", "layer": 2}, {"placement": "cache", "layer": 0.5}]
)
def test_places_that_contradict_themselves(place):
    sentence = rf"layer must be None at placement '{place['placement']}', got {place['layer']}"
    for call in (lambda: create("pooling", **place), lambda: create("pooling").at(**place)):
        with pytest.raises(ValueError, match=sentence):
            call()


def test_no_place():
    pooling = create("pooling")
    with pytest.raises(ValueError, match="placement 'layer' needs the field layer"):
        pooling.at(placement="layer")
    with pytest.raises(ValueError, match="placement must be one of tower, prefill, layer, cache; got 'somewhere'"):
        pooling.at(placement="somewhere")
    with pytest.raises(ValueError, match="at takes placement and layer, got 'depth'"):
        pooling.at(depth=2)
    with pytest.raises(TypeError, match="at needs a place, placement or layer, got none"):
        pooling.at()
    with pytest.raises(ValueError, match="layer of relevance_drop must be"):
        create("relevance_drop").at(placement="prefill")
    for chain in (pooling | create("pooling", layer=2), create("todre")):
        with pytest.raises(ValueError, match="a chain has no place of its own, its parts have; got 2"):
            chain.at(layer=2)


def test_other_doors():
    assert TowerCompressor().placement == "tower" and CacheCompressor().placement == "cache"
    assert create("tome").at(placement="tower").config()["placement"] == "tower"
    with pytest.raises(ValueError, match="layer must be None at placement 'tower', got 2"):
        TowerCompressor(layer=2)


# chains stand in the order of the model


PREFILL, TOWER, CACHE = {"placement": "prefill"}, {"placement": "tower"}, {"placement": "cache"}


def chain(*places):
    return [create("pooling").at(**(p if isinstance(p, dict) else {"layer": p})) for p in places]


RISING = [
    (PREFILL, PREFILL),
    (PREFILL, 0, 0, 2, 2, 5),
    (0, PREFILL, 1),
    (TOWER, PREFILL, 0.2, 0.2, 0.9, CACHE),
    (PREFILL, 0.5, 3, 0.6, 4),
    (TOWER, CACHE),
]
FALLING = [
    (2, PREFILL),
    (3, 2),
    (0.5, 0.25),
    (0.5, 2, 0.25),
    (2, 0.5, 1),
    (0.5, PREFILL),
    (0.5, 0),
    (CACHE, 2),
    (PREFILL, TOWER),
]


@pytest.mark.parametrize("places", RISING)
def test_rising_chains(places):
    parts = chain(*places)
    assert [p.layer for p in Chain(parts=parts).stages] == [p.layer for p in parts]
    joined = parts[0]
    for part in parts[1:]:
        joined = joined | part
    assert from_config(joined.config()).config() == joined.config()


@pytest.mark.parametrize("places", FALLING)
def test_falling_chains_are_refused(places):
    parts = chain(*places)
    for call in (lambda: Chain(parts=parts), lambda: from_config({"chain": [p.config() for p in parts]})):
        with pytest.raises(
            ValueError, match=r"the parts of a chain must stand in the order of the model, .*; got pooling at .* behind"
        ):
            call()


def test_a_preset_before_prefill_is_refused():
    with pytest.raises(ValueError, match=r"got uniform_keep at prefill behind relevance_drop at layer 0\.875"):
        create("todre") | create("uniform_keep")


def test_numbers_and_shares_are_compared_where_the_depth_is_known():
    mixed = Chain(parts=chain(PREFILL, 0.5, 3))
    mixed.check_order(6)  # 3, 3
    mixed.check_order(4)  # 2, 3
    with pytest.raises(ValueError, match=r"got pooling at layer 3 behind pooling at layer 0\.5 of 8 layers"):
        mixed.check_order(8)
    with pytest.raises(ValueError, match="layer must be below the model's 3 decoder layers, got 3"):
        mixed.check_order(3)
    create("pooling", layer=2).check_order(3)
    with pytest.raises(ValueError, match="layer must be below the model's 2 decoder layers, got 2"):
        create("pooling", layer=2).check_order(2)


def test_parts_of_a_chain():
    inner = create("pooling", keep_ratio=0.5) | create("pooling", layer=2)
    outer = Chain(parts=[inner, create("tome", layer=3)])
    assert outer.stages == (*inner.stages, outer.stages[-1]) and isinstance(outer.parts, tuple)
    with pytest.raises(TypeError, match="parts of a chain must be compressors, got 'pooling'"):
        Chain(parts=("pooling",))
    with pytest.raises(ValueError, match="keep_ratio has no effect on Chain"):
        Chain(parts=(inner,), keep_ratio=0.5)
    with pytest.raises(AttributeError, match="parts of Chain is fixed"):
        outer.parts = ()


# scores


def test_ties_of_scores_go_to_the_lowest_index():
    class Given(Scorer):
        def score(self, tokens):
            return tokens.signals["cls_logits"]

    g = torch.Generator().manual_seed(0)
    for B, N, K in ((1, 1, 1), (3, 40, 7), (2, 400, 100)):
        score = torch.randint(0, 9, (B, N), generator=g).float()
        score[:, -1] = -torch.inf
        out = Given(keep_ratio=K / N)(Tokens.of(torch.randn(B, N, 2), cls_logits=score))
        best = sorted(range(N), key=lambda i: (-score[-1, i], i))[:K]
        assert out.anchor[-1].tolist() == sorted(best)
    with pytest.raises(ValueError, match=r"Given must score \[B, N\] = \[1, 4\] tokens, got shape \[4\]"):
        Given(keep_ratio=0.5)(Tokens.of(torch.randn(4, 2), cls_logits=torch.zeros(4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_scores_do_not_win(dtype):
    method = Weighted(keep_ratio=0.5)
    method.weight.data.fill_(1)
    x = torch.randn(2, 6, 4)
    x[1, 2] = torch.nan
    x[0, :2, 0] = torch.nan
    method.to(dtype)
    with pytest.raises(ValueError, match="scores of Weighted must not be NaN, got 3 of 12"):
        method(Tokens.of(x.to(dtype)))
    with pytest.raises(ValueError, match="score must not be NaN"):
        torch.compile(method.forward, backend="aot_eager")(Tokens.of(x.to(dtype)))


# reductions


def reduction(**changes):
    """Tokens 1, 3, 4 of 6 stay; 0 and 2 join their neighbours, 5 is dropped."""
    anchor, assignment = torch.tensor([[1, 3, 4]] * 2), torch.tensor([[0, 0, 1, 1, 2, -1]] * 2)
    out = {"x": torch.ones(2, 3, 2), "anchor": anchor, "assignment": assignment, "size": torch.ones(2, 3), **changes}
    return Reduction(**out)


def second(**changes):
    """The same, with something else in item 1 alone."""
    out = reduction()
    return reduction(**{k: torch.stack([getattr(out, k)[0], torch.tensor(v)]) for k, v in changes.items()})


GIVEN = torch.ones(2, 6, 2)
FAULTY = {
    "twice": (second(anchor=[1, 1, 4]), "anchors must ascend without repeats; got [1, 1, 4] in item 1"),
    "falling": (second(anchor=[3, 1, 4]), "anchors must ascend without repeats; got [3, 1, 4] in item 1"),
    "outside": (second(anchor=[1, 3, 6]), "anchors must be columns 0…5 of the item; got [1, 3, 6] in item 1"),
    "negative": (second(anchor=[-1, 3, 4]), "anchors must be columns 0…5 of the item; got [-1, 3, 4] in item 1"),
    "no such output": (
        second(assignment=[0, 0, 1, 1, 2, 3]),
        "assignment must hold the number of a real output, or -1; got [0, 0, 1, 1, 2, 3] in item 1",
    ),
    "below -1": (
        second(assignment=[0, 0, 1, 1, 2, -2]),
        "assignment must hold the number of a real output, or -1; got [0, 0, 1, 1, 2, -2] in item 1",
    ),
    "not its own": (
        second(assignment=[0, 1, 1, 0, 2, -1]),
        "every anchor must be assigned to its own output; got [1, 0, 2] in item 1",
    ),
    "dropped anchor": (
        second(assignment=[0, -1, 1, 1, 2, -1]),
        "every anchor must be assigned to its own output; got [-1, 1, 2] in item 1",
    ),
    "NaN": (
        second(x=[[1.0, 1], [torch.nan, 2], [1, 1]]),
        "x must be finite where the tokens were; got [nan, 2.0] in item 1",
    ),
    "infinity": (
        second(x=[[1.0, torch.inf], [1, 2], [1, 1]]),
        "x must be finite where the tokens were; got [1.0, inf] in item 1",
    ),
}


@pytest.mark.parametrize("case", FAULTY)
def test_faults_of_a_reduction(case):
    out, said = FAULTY[case]
    assert fault(out, list(GIVEN)) == said


def test_no_fault():
    assert fault(reduction(), list(GIVEN)) is None
    assert fault(keep(Tokens.of(GIVEN), torch.zeros(2, 0, dtype=torch.long)), list(GIVEN)) is None
    swapped = second(assignment=[0, 1, 1, 0, 2, -1])
    assert fault(swapped, list(GIVEN), swaps_places=True) is None
    assert fault(second(assignment=[0, 1, 1, 1, 2, -1]), list(GIVEN), swaps_places=True) is not None
    given = GIVEN.clone()
    given[1, 0] = torch.nan  # what came in with NaN may go out with it
    assert fault(FAULTY["NaN"][0], list(given)) is None


def test_only_real_outputs_count():
    mask = torch.tensor([[True] * 3, [True, True, False]])
    out = reduction(mask=mask, anchor=torch.tensor([[1, 3, 4], [1, 3, 3]]), x=torch.ones(2, 3, 2))
    out.x[1, 2] = torch.nan
    out.assignment[1, 4] = -1
    assert fault(out, list(GIVEN)) is None
    out.assignment[1, 4] = 2
    assert (
        fault(out, list(GIVEN)) == "assignment must hold the number of a real output, or -1; got [0, 0, 1, 1, 2, -1] in item 1"
    )
    mask = torch.tensor([[True] * 3, [True, False, True]])
    assert (
        fault(reduction(mask=mask), list(GIVEN)) == "mask must have its real outputs first; got [True, False, True] in item 1"
    )


def test_a_model_refuses_a_malformed_reduction():
    class Twice(Selector):
        def select(self, tokens, K):
            return torch.zeros(len(tokens.x), K, dtype=torch.long)

    class Lost(Compressor):
        def compress(self, tokens):
            out = keep(tokens, tokens.group[:, :2] * 0 + torch.arange(2))
            return Reduction(out.x / 0, out.anchor, out.assignment, out.size)

    model, inputs = tiny_model("llava"), tiny_inputs("llava", batch_size=1)
    with (
        pytest.raises(ValueError, match=r"Twice returned a malformed reduction: anchors must ascend .*; got \[0, 0,"),
        Twice(keep_ratio=0.5)(model),
    ):
        model(**inputs)
    with (
        pytest.raises(ValueError, match=r"Lost returned a malformed reduction: x must be finite where the tokens were; got"),
        Lost(keep_ratio=0.5, layer=2)(model),
    ):
        model(**inputs)
    official = create("position_merge", mode="official", num_positions=2)
    with official(model) as run:  # stands at others' anchors on purpose
        model(**inputs)
    assert run.items
