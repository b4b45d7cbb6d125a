"""Random use: 300 cases of a fixed seed and every case that failed once; thousands more with `make fuzz` (fuzz/__init__.py)."""

import json

import pytest
import torch
from fuzz import HERE
from fuzz.cases import BLOCK, block, case_of
from fuzz.models import patched
from fuzz.outcome import Failure, faults_of, refusal
from fuzz.run import outcome_of, run_case, signature
from fuzz.shrink import shrink

from mmcompress.ledger import SampleCount
from mmcompress.methods.uniform_keep import UniformKeep

SEED, CASES, PART = 0, 300, 25
KEPT = sorted((HERE / "kept").glob("*.json"))


@pytest.mark.parametrize("first", range(0, CASES, PART))
def test_random_use(first):
    """A right result or one sentence; most are right, for a library that refuses everything is none."""
    outcomes, failures = [], []
    for number in range(first, first + PART):
        case = case_of(SEED, number)
        outcome, error = outcome_of(case)
        outcomes.append(outcome)
        if error is not None:
            failures.append(f"case {number}: {signature(error)}\n{json.dumps(case)}")
    assert not failures, "\n".join(failures)
    assert outcomes.count("right") >= PART // 2, outcomes


@pytest.mark.parametrize("path", KEPT, ids=lambda p: p.stem)
def test_what_failed_once(path):
    run_case(json.loads(path.read_text()))


def test_cases_are_reproducible():
    again = block.__wrapped__(SEED, 1)
    assert again == block(SEED, 1) and len(again) == BLOCK and again != block(SEED, 2)
    assert json.loads(json.dumps(again)) == list(again)


# it can fail


def ordinary(**changes):
    case = {
        "kind": "model", "family": "llava", "model_seed": 0, "text": {"num_hidden_layers": 4}, "dtype": "float32",
        "attention": "sdpa",
        "seed": 3, "rows": [[2, "view", 3], [1, "view", 0, "view", 4], [3]], "side": "left",
        "stages": [{"method": "uniform_keep", "keep_ratio": 0.5}], "made": "create", "install": "with",
        "calls": [{"op": "forward"}],
    }  # fmt: skip
    return {**case, **changes}


def test_a_right_case_and_a_refused_one():
    assert run_case(ordinary()) == "right"
    assert run_case(ordinary(stages=[{"method": "uniform_keep", "layer": 9}])).startswith("refused: layer must be")


def test_a_wrong_count_is_found(monkeypatch):
    monkeypatch.setattr(SampleCount, "rows", lambda self, layers: [self.sequence_in + 1] * layers)
    with pytest.raises(Failure, match="the ledger's rows"):
        run_case(ordinary())


def test_a_decision_that_hangs_on_the_batch_is_found(monkeypatch):
    right = UniformKeep.select

    def select(self, tokens, K):
        return right(self, tokens, K) if len(tokens.x) == 1 else torch.arange(K).expand(len(tokens.x), K)

    monkeypatch.setattr(UniformKeep, "select", select)
    with pytest.raises(Failure, match="alone = in a batch"):
        run_case(ordinary())


@pytest.mark.parametrize("op", ["forward", "generate", "beams", "train", "manual"])
def test_other_numbers_are_found(op, monkeypatch):
    """A model whose last norm changes while a compressor is installed."""
    case = ordinary(calls=[{"op": op, "new": 2}])
    assert run_case(case) == "right"
    (entry,) = [m for key, m in patched.items() if '"llava"' in key and '"float32"' in key and ", 0," in key and "sdpa" in key][
        :1
    ]
    norm = entry.model.model.language_model.norm
    right = norm.forward
    entry.model.model.language_model.norm.forward = lambda x: right(x) * (1 + 1e-2)
    try:
        with pytest.raises(Failure):
            run_case(case)
    finally:
        del norm.forward


def test_what_is_left_behind_is_found():
    run_case(ordinary())
    entry = next(iter(patched.values()))
    entry.model.model.left_behind = 1
    with pytest.raises(Failure, match="as it was before"):
        entry.check_clean()
    del entry.model.model.left_behind


def test_what_is_no_refusal():
    for error in (RuntimeError("layer"), IndexError("layer"), KeyError("layer"), AssertionError("layer"), ValueError("layer")):
        with pytest.raises(type(error)):  # raised here, not by the library
            try:
                raise error
            except Exception as caught:
                refusal(caught)
    assert faults_of("layer must be an integer, got 'x'") == []
    for message in ("", "two\nlayer lines", "layer " * 100, "nothing that has a name here", "layer Traceback (most"):
        assert faults_of(message)


def test_a_failing_case_gets_smaller(monkeypatch):
    monkeypatch.setattr(SampleCount, "rows", lambda self, layers: [self.sequence_in + 1] * layers)
    case = ordinary(rows=[[2, "view", 3], [3]], calls=[{"op": "forward"}, {"op": "forward", "mask": False}], seed=9)
    outcome, error = outcome_of(case)
    assert outcome == "failed"
    least, _ = shrink(case, error, seconds=120, tries=20)
    assert len(least["rows"]) == 1 and len(least["calls"]) == 1 and least["seed"] == 0
    assert outcome_of(least)[0] == "failed"
