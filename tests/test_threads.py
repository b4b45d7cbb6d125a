"""Alone = in a thread = nested = in a stream: every call sees its own state only."""

import threading
import time

import pytest
import torch
from seam_methods import CHAINS
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import mmcompress
from mmcompress import create
from mmcompress.testing import tiny_inputs, tiny_model

chains = pytest.mark.parametrize("chain", CHAINS)
GREEDY = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llava_next")


@pytest.fixture
def table():
    """The process's attention table must be as it was."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions

    before = dict(functions._local_mapping), dict(functions._global_mapping)
    yield
    assert (dict(functions._local_mapping), dict(functions._global_mapping)) == before


def prompts(count):
    return [tiny_inputs("llava_next", 4, seed=n // 4, rows=[n % 4]) for n in range(count)] + [
        tiny_inputs("llava_next", 3, seed=90 + n) for n in range(2)
    ]


def logits_of(out):
    return torch.stack(out.logits)


def at_once(jobs, threads):
    """Run jobs over so many threads, in an order that mixes them; their results in the order of the jobs."""
    results, errors, turn, lock = [None] * len(jobs), [], iter(range(len(jobs))), threading.Lock()

    def work():
        while True:
            with lock:
                number = next(turn, None)
            if number is None:
                return
            try:
                results[number] = jobs[number]()
            except Exception as error:  # shown below, with its kind
                errors.append(repr(error))

    running = [threading.Thread(target=work) for _ in range(threads)]
    for t in running:
        t.start()
    for t in running:
        t.join()
    assert not errors, errors
    return results


@chains
@pytest.mark.parametrize("threads", [2, 8])
@torch.no_grad()
def test_threads_on_one_model(model, table, chain, threads):
    asked = prompts(8)
    with CHAINS[chain]()(model) as run:
        alone = [(logits_of(model.generate(**x, **GREEDY)), model(**x).logits) for x in asked]
        counted = run.ledger.totals()
        run.ledger.clear()
        jobs = [lambda x=x: logits_of(model.generate(**x, **GREEDY)) for x in asked] + [
            lambda x=x: model(**x).logits for x in asked
        ]
        with_grad_off = [lambda job=job: _quiet(job) for job in jobs]
        found = at_once(with_grad_off, threads)
        assert run.ledger.totals() == counted
    for n, (generated, forward) in enumerate(alone):
        assert torch.equal(found[n], generated) and torch.equal(found[n + len(asked)], forward)


def _quiet(job):
    with torch.no_grad():  # the setting of a thread is its own
        return job()


@torch.no_grad()
def test_threads_on_models_of_their_own(table):
    models = [tiny_model("llava_next", seed=s) for s in (0, 1)] + [tiny_model("qwen2_5_vl"), tiny_model("llava")]
    names = ["llava_next", "llava_next", "qwen2_5_vl", "llava"]
    methods = ["global_guided", "k_center", "tome", "max_sum"]

    def ask(m, name, method):
        out = []
        for seed in range(4):
            with torch.no_grad(), create(method, keep_ratio=0.4)(m):
                out.append(m(**tiny_inputs(name, seed=seed)).logits)
        return torch.cat([o.flatten() for o in out])

    jobs = [lambda a=a: ask(*a) for a in zip(models, names, methods, strict=True)]
    alone = [job() for job in jobs]
    for found, expected in zip(at_once(jobs, 4), alone, strict=True):
        assert torch.equal(found, expected)


@torch.no_grad()
def test_a_prefill_while_another_thread_decodes():
    """One thread is between two decode steps while the other reads a picture: both prefills are compressed."""
    model, a, b = tiny_model("llava"), tiny_inputs("llava", 4, rows=[1]), tiny_inputs("llava", 4, seed=1, rows=[1])
    decoding, encoding, stepped = (threading.Event() for _ in range(3))

    class Steps(StoppingCriteria):
        def __call__(self, ids, scores, **_):
            (stepped if decoding.is_set() else decoding).set()
            encoding.wait(5)
            return torch.zeros(len(ids), dtype=torch.bool)

    with CHAINS["prefill"]()(model) as run:
        stopping = StoppingCriteriaList([Steps()])
        thread = threading.Thread(target=lambda: model.generate(**a, max_new_tokens=6, stopping_criteria=stopping))
        thread.start()
        decoding.wait(5)
        hook = model.model.vision_tower.register_forward_pre_hook(lambda *_: (encoding.set(), stepped.wait(5), None)[2])
        model(**b)
        thread.join()
        hook.remove()
    assert len(run.ledger.samples) == 2


@chains
@torch.no_grad()
def test_generate_within_generate(model, chain):
    inputs, other = tiny_inputs("llava_next"), tiny_inputs("llava_next", seed=5)

    class Judge(StoppingCriteria):
        def __call__(self, ids, scores, **_):
            model.generate(**other, max_new_tokens=2)
            return torch.zeros(len(ids), dtype=torch.bool)

    with CHAINS[chain]()(model):
        plain = model.generate(**inputs, **GREEDY)
        nested = model.generate(**inputs, **GREEDY, stopping_criteria=StoppingCriteriaList([Judge()]))
    assert torch.equal(logits_of(plain), logits_of(nested))


@chains
@torch.no_grad()
def test_forwards_inside_a_logits_processor(model, chain):
    """Contrastive decoding: every forward with a distorted picture is compressed as it is alone, and the answer is as
    before."""
    inputs, seen = tiny_inputs("llava_next"), []
    distorted = {**inputs, "pixel_values": inputs["pixel_values"] + 0.5}

    class Contrast(LogitsProcessor):
        def __call__(self, ids, scores):
            seen.append(model(**distorted, use_cache=False).logits)
            return scores

    with CHAINS[chain]()(model):
        alone, plain = model(**distorted, use_cache=False).logits, model.generate(**inputs, **GREEDY)
        nested = model.generate(**inputs, **GREEDY, logits_processor=LogitsProcessorList([Contrast()]))
    assert len(seen) == GREEDY["max_new_tokens"] and all(torch.equal(x, alone) for x in seen)
    assert torch.equal(logits_of(plain), logits_of(nested))


@chains
@torch.no_grad()
def test_generate_of_the_class(model, chain):
    """A call that goes past the wrapped `generate` answers the same."""
    inputs = tiny_inputs("llava_next")
    with CHAINS[chain]()(model):
        a, b = model.generate(**inputs, **GREEDY), type(model).generate(model, **inputs, **GREEDY)
        static = type(model).generate(model, **inputs, **GREEDY, cache_implementation="static")
    assert torch.equal(logits_of(a), logits_of(b))
    assert (logits_of(a) - logits_of(static)).abs().max() < 1e-5


class Slow(StoppingCriteria):
    """Says when the first token is there, and takes its time."""

    def __init__(self):
        self.began = threading.Event()

    def __call__(self, ids, scores, **_):
        self.began.set()
        time.sleep(0.05)
        return torch.zeros(len(ids), dtype=torch.bool)


@chains
@torch.no_grad()
def test_a_block_that_ends_while_a_stream_runs_waits(model, chain):
    inputs, slow, out = tiny_inputs("llava_next"), Slow(), []

    def stream():
        with torch.no_grad():
            out.append(model.generate(**inputs, **GREEDY, stopping_criteria=StoppingCriteriaList([slow])))

    with CHAINS[chain]()(model):
        good = model.generate(**inputs, **GREEDY)
        thread = threading.Thread(target=stream)
        thread.start()
        slow.began.wait(10)
    assert out, "the block ended before the stream"
    thread.join()
    assert torch.equal(logits_of(out[0]), logits_of(good))
    assert "forward" not in model.model.__dict__


@torch.no_grad()
def test_a_stream_that_does_not_end_is_an_error(model, monkeypatch):
    from mmcompress.models import seam

    monkeypatch.setattr(seam, "WAIT", 0.1)
    inputs, slow = tiny_inputs("llava_next"), Slow()
    mmcompress.compress_(model, CHAINS["prefill"]())
    thread = threading.Thread(
        target=lambda: model.generate(**inputs, max_new_tokens=40, stopping_criteria=StoppingCriteriaList([slow]))
    )
    thread.start()
    slow.began.wait(10)
    with pytest.raises(RuntimeError, match="another thread is in generate"):
        mmcompress.restore_(model)
    assert "forward" in model.model.__dict__, "it is still installed"
    thread.join()
    mmcompress.restore_(model)
    assert "forward" not in model.model.__dict__


@torch.no_grad()
def test_taking_it_out_from_inside_is_an_error(model):
    class Takes(StoppingCriteria):
        def __call__(self, ids, scores, **_):
            mmcompress.restore_(model)

    mmcompress.compress_(model, CHAINS["prefill"]())
    with pytest.raises(RuntimeError, match="by a call of that model itself"):
        model.generate(**tiny_inputs("llava_next"), max_new_tokens=2, stopping_criteria=StoppingCriteriaList([Takes()]))
    mmcompress.restore_(model)


@torch.no_grad()
def test_data_parallel_is_refused(model):
    with CHAINS["prefill"]()(model):
        for module in (model, model.model):
            with pytest.raises(ValueError, match="DataParallel"):
                module._replicate_for_data_parallel()


@torch.no_grad()
def test_nothing_of_a_call_stays(model):
    """After a call neither q and k nor features of its pictures are held by the seam, the model or the cache."""
    import gc
    import weakref

    held = []
    with CHAINS["attention"]()(model) as run:
        pixels = tiny_inputs("llava_next")
        original = type(model.model).get_image_features

        def watched(*args, **kwargs):
            out = original(*args, **kwargs)
            held.extend(weakref.ref(f) for f in out.pooler_output)
            return out

        type(model.model).get_image_features, _features = watched, None
        try:
            model(**pixels, use_cache=False)
        finally:
            type(model.model).get_image_features = original
        assert all(set(item.signals) <= {"order"} for item in run.items)
        gc.collect()
        assert held and not any(ref() is not None for ref in held)
