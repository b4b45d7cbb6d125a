"""Every family's tiny model: its inputs fit it, and what a family must keep is checked fast here, in full by
`make test-families`."""

import inspect

import pytest
import torch

import mmcompress
from mmcompress.testing import CHECKS, FAMILIES, assert_close, check_family, check_tiny, tiny_inputs, tiny_items, tiny_model
from mmcompress.testing.oracle import Rows, Without, decoder_layers, match
from mmcompress.testing.tested import TESTED as TESTED_FAMILIES

FAST = ("install", "identity", "batch")
TESTED = "qwen3_vl"


def here(family):
    """The family's tiny model, or a skip where this transformers lacks it."""
    try:
        return tiny_model(family)
    except ValueError as error:
        if not str(error).startswith("transformers must have"):
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize("family", FAMILIES)
def test_contract(family):
    here(family)
    report = check_tiny(family, FAST)
    if report.verdicts["install"].startswith("refused: ") and family not in TESTED_FAMILIES:
        pytest.skip(report.verdicts["install"])
    assert report.ok, str(report)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_inputs_fit_the_stock_model(family):
    """One placeholder for each row that the model makes, other logits without the items, rows alone as in the batch."""
    model = here(family)
    inputs, lengths = tiny_inputs(family, 2), tiny_items(family, 2)
    count = torch.isin(inputs["input_ids"], torch.tensor(FAMILIES[family].placeholders)).sum(1).tolist()
    assert count == [sum(own) for own in lengths] and all(count)
    try:
        logits = model(**inputs).logits
    except (AttributeError, ValueError) as error:  # llama4 of 5.24, clips of gemma4 in 5.20
        pytest.skip(f"the stock model fails: {error}")
    assert torch.isfinite(logits).all()
    own = tiny_inputs(family, 2, rows=[1])
    assert torch.equal(own["input_ids"][0], inputs["input_ids"][1][-own["input_ids"].shape[1] :])
    other = {k: v + torch.randn_like(v) if v.is_floating_point() and v.numel() > 9 else v for k, v in own.items()}
    if family not in ("chameleon", "emu3"):  # read codes, which noise need not change
        assert (model(**other).logits - model(**own).logits).abs().max() > 1e-3 * logits.abs().max()


# the check itself can fail: faults put in from outside, one at a time, that act only while a compressor is installed


@pytest.fixture
def faulty(monkeypatch):
    """faulty(module, change): module.forward is change(forward, …) while a compressor is installed, itself else."""
    from mmcompress.patch import installed

    inside = []
    enter, leave = installed.__enter__, installed.__exit__
    monkeypatch.setattr(installed, "__enter__", lambda self: inside.append(1) or enter(self))
    monkeypatch.setattr(installed, "__exit__", lambda self, *error: inside.pop() and leave(self, *error))

    def put(module, change):
        original = module.forward
        module.forward = lambda *args, **kw: change(original, *args, **kw) if inside else original(*args, **kw)

    return put


def verdicts(*checks, model=None, **options):
    if model is None:
        return dict(check_tiny(TESTED, checks, **options))
    inputs = lambda rows: tiny_inputs(TESTED, 2, rows=rows)  # noqa: E731
    return dict(check_family(model, inputs, samples=2, checks=checks, **options))


def text_of(model):
    return model.model.language_model


def test_whole_contract_of_a_family():
    report = check_tiny(TESTED)
    assert set(report.verdicts) == set(CHECKS) and set(report.verdicts.values()) == {"pass"}, str(report)
    assert report.ok and "pass" in str(report) and report.to_json()["checks"]["mask"] == "pass"


def test_fault_nothing_is_dropped(monkeypatch):
    from mmcompress.compressor import Compressor

    monkeypatch.setattr(Compressor, "is_identity", property(lambda self: True))
    found = verdicts("mask", "ledger")
    assert found["mask"].startswith("fail") and "0 rows were dropped" in found["mask"]
    assert found["ledger"].startswith("fail")


def test_fault_positions_renumbered(faulty):
    def change(forward, x, position_ids):
        n = position_ids.shape[-1]
        return forward(x, position_ids if n == 1 else torch.arange(n).expand_as(position_ids))

    model = tiny_model(TESTED)
    faulty(text_of(model).rotary_emb, change)
    found = verdicts("mask", "generate", model=model)
    assert all(v.startswith("fail") for v in found.values()), found


def test_fault_rows_put_back_one_off(faulty):
    def change(forward, *args, **kw):
        out = forward(*args, **kw)
        out.last_hidden_state = out.last_hidden_state.roll(1, 1)
        return out

    model = tiny_model(TESTED)
    faulty(text_of(model), change)
    found = verdicts("identity", "mask", "generate", model=model)
    assert found["mask"].startswith("fail") and found["identity"].startswith("fail"), found


def test_fault_decode_mask(faulty):
    """A decode step sees the padding of its row."""

    def change(forward, hidden, *args, **kw):
        if hidden.shape[1] == 1:
            kw["attention_mask"] = None
        return forward(hidden, *args, **kw)

    model = tiny_model(TESTED)
    for layer in text_of(model).layers:
        faulty(layer, change)
    found = verdicts("batch", "mask", "generate", model=model)
    assert found["batch"].startswith("fail") and found["mask"] == found["generate"] == "pass", found  # alone nothing is padded


def test_fault_features_that_enter_inside(faulty):
    """DeepStack's features are lost."""

    def change(forward, *args, **kw):
        if kw["inputs_embeds"].shape[1] > 1:
            kw["deepstack_visual_embeds"] = [level * 0 for level in kw["deepstack_visual_embeds"] or ()]
        return forward(*args, **kw)

    model = tiny_model(TESTED)
    faulty(text_of(model), change)
    found = verdicts("batch", "mask", "machinery", model=model)
    assert found["mask"].startswith("fail") and found["machinery"].startswith("fail"), found
    assert found["batch"] == "pass"


def test_fault_something_is_left(monkeypatch):
    from mmcompress.patch import installed

    leave = installed.__exit__

    def forget(self, *error):
        leave(self, *error)
        self.model.lm_head.leftover = 1

    monkeypatch.setattr(installed, "__exit__", forget)
    assert "leftover" in verdicts("install", "items", "restore")["restore"]  # whichever check left it


def test_fault_counts(monkeypatch):
    from mmcompress.ledger import Ledger, SampleCount

    monkeypatch.setattr(Ledger, "separators", property(lambda self: 1))
    assert "placeholders" in verdicts("ledger")["ledger"]
    monkeypatch.undo()
    rows = SampleCount.rows
    monkeypatch.setattr(SampleCount, "rows", lambda self, layers: [n + 1 for n in rows(self, layers)])
    assert "they got" in verdicts("ledger")["ledger"]


def test_fault_items(monkeypatch):
    wrong = [[1, 2], [3], [4], []]
    assert verdicts("items", items=wrong)["items"].startswith("fail")


def test_stock_faults_are_told_apart():
    """A model whose own batch differs from its samples one by one: no fault of the library."""
    model = tiny_model("llava")
    head = model.lm_head
    head.forward = lambda x: type(head).forward(head, x) * (1 + 0.1 * (len(x) - 1))
    inputs = lambda rows: tiny_inputs("llava", 2, rows=rows)  # noqa: E731
    found = dict(check_family(model, inputs, samples=2, checks=["batch", "mask"]))
    assert found["batch"].startswith("stock") and found["mask"] == "pass"


def test_beams_that_the_stock_model_mixes_up_are_right():
    from mmcompress.testing.checks import Checks

    items = tiny_items("llava", 2)
    contract = Checks(
        tiny_model("llava"), lambda rows: tiny_inputs("llava", 2, rows=rows), 2, None, items, None, 2, 0.4, 1e-4, {}
    )
    with torch.no_grad():
        if "mm_encoder_outputs" not in inspect.signature(type(contract.model).forward).parameters:  # since then stock is right
            assert "score" in contract.check_beams(None)
    assert set(dict(check_tiny("llava", ["beams", "answers"])).values()) == {"pass"}


def test_refused_and_not_run():
    sample = tiny_inputs("llava", 1)
    report = check_family(tiny_model("llava"), sample, layer=99)
    assert report.verdicts["layer mask"].startswith("refused: layer must be below")
    assert report.verdicts["batch"].startswith("not run") and report.verdicts["items"].startswith("not run")
    assert report.ok
    with pytest.raises(ValueError, match="checks must be of"):
        check_family(tiny_model("llava"), sample, checks=["speed"])


# the oracle


@torch.no_grad()
def test_rows_hidden_and_rows_removed_agree():
    model, inputs = tiny_model(TESTED), tiny_inputs(TESTED, 2, rows=[0])
    inputs = {**inputs, "attention_mask": inputs["attention_mask"].clone()}
    layers = decoder_layers(model, lambda: model(**tiny_inputs(TESTED, 1, items=[[]])))
    assert layers == list(model.model.language_model.layers)
    S = inputs["input_ids"].shape[1]
    longer = {k: torch.nn.functional.pad(v, (2, 0)) if v.shape == (1, S) else v for k, v in inputs.items()}
    gone = [10, 11, 14]
    without = Without(layers, S + 2, gone, 1)
    stay = [c for c in range(2, S + 2) if c not in gone]
    plain = model(**longer).logits[0]
    with without.hide():
        hidden = model(**longer).logits[0]
    with without.remove():
        removed = model(**longer).logits[0]
    assert_close(hidden[stay], removed[stay])
    assert (hidden[stay] - plain[stay]).abs().max() > 1e-3
    assert torch.equal(model(**longer).logits[0], plain)


def test_match_finds_columns_in_order():
    full = torch.tensor([[0.0], [1.0], [2.0], [1.0], [0.0]])
    assert match(full[[0, 1, 4]], full) == [0, 1, 4]
    assert match(full[[2, 3]], full) == [2, 3]
    assert match(full[[3, 2, 1]], full) == [1, 2, 3]
    assert match(torch.tensor([[5.0]]), full) is None


@torch.no_grad()
def test_rows_see_what_the_layers_get():
    model, inputs = tiny_model("llava"), tiny_inputs("llava", 1)
    rows = Rows(list(model.model.language_model.layers))
    with rows.watch(), mmcompress.create("uniform_keep", keep_ratio=0.5, layer=2)(model) as run:
        model(**inputs)
    assert [len(rows.of[i]) for i in range(4)] == run.ledger.samples[0].rows(4)
    assert "forward" not in model.model.language_model.layers[0].__dict__
