"""The safety net: whatever else renames itself, moves or goes past the wrappers, a call with items is compressed or an
error."""

import types

import pytest
import torch

import mmcompress
from mmcompress import Compressor, Scorer, Selector, create
from mmcompress.testing import tiny_inputs, tiny_model
from mmcompress.tokens import Reduction, identity, keep

PREFILL, LAYER = {"keep_ratio": 0.4}, {"keep_ratio": 0.4, "layer": 2}


@pytest.fixture
def model():
    return tiny_model("llava")


@pytest.fixture
def inputs():
    return tiny_inputs("llava", 4, rows=[1])


def instance(module, name, function):
    """Replace a method of this one module, as a change upstream would."""
    setattr(module, name, types.MethodType(function, module))


# breaking the seam on purpose


@torch.no_grad()
def test_a_renamed_argument(model, inputs):
    """The core takes its pixels under a name that nobody knows, and does not go through get_image_features."""
    core = model.model
    stock = type(core).forward

    def forward(self, input_ids=None, picture=None, **kw):
        embeds = self.get_input_embeddings()(input_ids)
        x = self.multi_modal_projector(self.vision_tower(picture).last_hidden_state[:, 1:])
        embeds = embeds.masked_scatter((input_ids == 3)[..., None], x)
        return stock(self, inputs_embeds=embeds, **kw)

    instance(core, "forward", forward)
    pixels = inputs.pop("pixel_values")
    with create("dpc_knn", **PREFILL)(model), pytest.raises(ValueError, match="got no pixels, sound or features") as error:
        core(**inputs, picture=pixels)
    assert "LlavaForConditionalGeneration" in str(error.value) and "transformers" in str(error.value)


@torch.no_grad()
def test_a_core_that_encodes_elsewhere(model, inputs):
    """Encoder outputs come in under a name of their own (as mm_encoder_outputs did in 5.18)."""
    core, stock = model.model, type(model.model).forward

    def forward(self, input_ids=None, encoded_items=None, **kw):
        embeds = self.get_input_embeddings()(input_ids)
        embeds = embeds.masked_scatter((input_ids == 3)[..., None], torch.cat(encoded_items))
        return stock(self, inputs_embeds=embeds, **kw)

    features = list(core.get_image_features(inputs.pop("pixel_values")).pooler_output)
    instance(core, "forward", forward)
    with create("dpc_knn", **PREFILL)(model), pytest.raises(ValueError, match="got no pixels, sound or features"):
        core(**inputs, encoded_items=features)


@torch.no_grad()
def test_a_placeholder_that_is_not_found(model, inputs):
    """The id that stands for pictures is another than the configuration says where the library looks."""
    with create("dpc_knn", **PREFILL)(model) as run:
        seam = mmcompress.patch._seam(model)
        seam.family.placeholder = lambda kind: 98 if kind == "image" else -1
        for call in (lambda: model(**inputs), lambda: model.generate(**inputs, max_new_tokens=2)):
            with pytest.raises(ValueError, match="must hold the ids that stand for image"):
                call()
    assert not run.ledger.samples


@torch.no_grad()
def test_a_layer_that_swallows_its_keyword_arguments(model, inputs):
    """The text model does not hand unknown arguments to its layers any more."""
    for layer in model.model.language_model.layers:
        forward = layer.forward

        def deaf(hidden, attention_mask=None, position_embeddings=None, position_ids=None, forward=forward, **kw):
            known = {k: v for k, v in kw.items() if k in ("past_key_values", "cache", "use_cache")}
            return forward(
                hidden,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                **known,
            )

        layer.forward = deaf
    mmcompress.compress_(model, create("dpc_knn", **LAYER))
    for layer in model.model.language_model.layers:
        wrapped = layer.forward
        layer.forward = lambda hidden, wrapped=wrapped, **kw: wrapped(hidden, **{k: v for k, v in kw.items() if "mmc" not in k})
    with pytest.raises(RuntimeError, match="layer 2 of this llava model ran without its stage"):
        model(**inputs)


@torch.no_grad()
def test_a_text_model_that_is_not_called(model, inputs):
    """The core runs its layers some other way than by a call of the text model."""
    core, text = model.model, model.model.language_model
    stock, forward = type(core).forward, type(text).forward

    def past_the_wrapper(self, **kw):
        wrapped = text.__dict__.pop("forward")
        try:
            return stock(self, **kw)
        finally:
            text.__dict__["forward"] = wrapped

    instance(core, "forward", past_the_wrapper)
    with create("dpc_knn", **PREFILL)(model), pytest.raises(RuntimeError, match="did not run in this call"):
        model(**inputs)
    assert forward is type(text).forward


@torch.no_grad()
def test_a_rotary_module_that_is_not_called(model, inputs):
    text = model.model.language_model
    with create("position_merge", keep_ratio=0.5, num_positions=2)(model):
        wrapped = text.rotary_emb.__dict__.pop("forward")
        try:
            with pytest.raises(RuntimeError, match="did not call its rotary_emb"):
                model(**inputs)
        finally:
            text.rotary_emb.__dict__["forward"] = wrapped


# what callers do


@torch.no_grad()
def test_features_merged_by_the_caller(model, inputs):
    unmerged = embeds = model.get_input_embeddings()(inputs["input_ids"])
    features = torch.cat(list(model.get_image_features(inputs["pixel_values"]).pooler_output))
    embeds = embeds.masked_scatter((inputs["input_ids"] == 3)[..., None], features)
    rest = {k: v for k, v in inputs.items() if k != "pixel_values"}
    with create("dpc_knn", **PREFILL)(model):
        with pytest.raises(ValueError, match="inputs_embeds must be None"):
            model.generate(**rest, inputs_embeds=embeds, max_new_tokens=3)
        with pytest.raises(ValueError, match="got no pixels, sound or features"):
            model(**rest)
        with pytest.raises(ValueError, match="input_ids must be given"):
            model.model(inputs_embeds=unmerged, pixel_values=inputs["pixel_values"])
    with create("none")(model):  # what changes nothing refuses nothing
        model.generate(**rest, inputs_embeds=embeds, max_new_tokens=3)
        model(**rest)


@pytest.mark.parametrize("way", ["keyword", "configuration", "positional", "of the model", "of the class"])
@torch.no_grad()
def test_chunked_prefill(model, inputs, way):
    ids = inputs.pop("input_ids")
    config = model.generation_config.__class__(
        **{**model.generation_config.to_dict(), "prefill_chunk_size": 8, "max_new_tokens": 2}
    )
    calls = {
        "keyword": lambda: model.generate(ids, prefill_chunk_size=8, max_new_tokens=2, **inputs),
        "configuration": lambda: model.generate(ids, generation_config=config, **inputs),
        "positional": lambda: model.generate(ids, config, **inputs),
        "of the model": lambda: model.generate(ids, max_new_tokens=2, **inputs),
        "of the class": lambda: type(model).generate(model, ids, config, **inputs),
    }
    if way == "of the model":
        model.generation_config.prefill_chunk_size = 8
    with create("dpc_knn", **PREFILL)(model) as run, pytest.raises(ValueError):
        calls[way]()
    assert not run.ledger.samples


@torch.no_grad()
def test_positional_arguments_of_inner_models(model, inputs):
    ids = torch.tensor([[20, 21, 22]])
    stock, whole = model.model.language_model(ids).last_hidden_state, model(**inputs).logits
    with create("dpc_knn", **PREFILL)(model) as run:
        assert torch.equal(model.model.language_model(ids).last_hidden_state, stock)
        by_name = model(**inputs).logits
        assert torch.equal(model(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"]).logits, by_name)
    assert run.ledger.totals()["prefills"] == 2 and not torch.equal(by_name, whole)


@torch.no_grad()
def test_continuous_batching_is_refused(model):
    with create("dpc_knn", **PREFILL)(model), pytest.raises(ValueError, match="generate_batch"):
        model.generate_batch([[1, 2, 3]])


def test_packed_rows_are_isolated_as_in_stock(model):
    rows = [tiny_inputs("llava", 4, rows=[r]) for r in (1, 2)]
    packed = {
        "input_ids": torch.cat([r["input_ids"] for r in rows], 1),
        "pixel_values": torch.cat([r["pixel_values"] for r in rows]),
        "position_ids": torch.cat([torch.arange(r["input_ids"].shape[1]) for r in rows])[None],
    }
    for method in (
        create("dpc_knn", **PREFILL),
        create("dpc_knn", **LAYER),
        create("dpc_knn", keep_ratio=0.7) | create("pooling", keep_ratio=0.5, layer=1),
    ):
        with torch.no_grad(), method(model):
            together = model(**packed, use_cache=False).logits
            alone = torch.cat([model(**r).logits for r in rows], 1)
        assert (together - alone).abs().max() < 1e-5
    with create("todre", keep_ratio=0.5)(model), pytest.raises(ValueError, match="packed samples"):
        model(**packed, use_cache=False)


@torch.no_grad()
def test_eager_attention_after_installing(inputs):
    """Signals do not hang on the backend, nor on when it was chosen."""
    model = tiny_model("llava_next")
    inputs = tiny_inputs("llava_next")
    for method, fields in (("global_guided", {"keep_ratio": 0.4}), ("todre", {"keep_ratio": 0.5})):
        mmcompress.compress_(model, create(method, **fields))
        sdpa = model(**inputs).logits
        model.set_attn_implementation("eager")
        assert (model(**inputs).logits - sdpa).abs().max() < 1e-4
        model.set_attn_implementation("sdpa")
        mmcompress.restore_(model)


@torch.no_grad()
def test_sizes_as_lists():
    model, inputs = tiny_model("llava_next"), tiny_inputs("llava_next")
    with create("dpc_knn", **PREFILL)(model):
        wanted = model(**inputs).logits
        assert torch.equal(model(**{**inputs, "image_sizes": inputs["image_sizes"].tolist()}).logits, wanted)


# what methods answer


class Twice(Selector):
    def select(self, tokens, K):
        return torch.zeros(len(tokens.x), K, dtype=torch.long)


class Descending(Compressor):
    def compress(self, tokens):
        r = keep(tokens, torch.arange(4).expand(len(tokens.x), 4))
        return Reduction(r.x.flip(1), r.anchor.flip(1), r.assignment, r.size)


class Outside(Compressor):
    def compress(self, tokens):
        r = keep(tokens, torch.arange(4).expand(len(tokens.x), 4))
        return Reduction(r.x, r.anchor + tokens.num_tokens, r.assignment, r.size)


class NotNumbers(Scorer):
    def score(self, tokens):
        return tokens.x.sum(-1) * float("nan")


class NotFinite(Compressor):
    def compress(self, tokens):
        r = keep(tokens, torch.arange(4).expand(len(tokens.x), 4))
        return Reduction(r.x / 0, r.anchor, r.assignment, r.size)


@pytest.mark.parametrize("method", [Twice, Descending, Outside, NotNumbers, NotFinite])
@pytest.mark.parametrize("layer", [None, 2])
@torch.no_grad()
def test_malformed_answers_of_methods(model, inputs, method, layer):
    stock = model(**inputs).logits
    with method(keep_ratio=0.5, layer=layer)(model) as run, pytest.raises(ValueError) as error:
        model(**inputs)
    assert method.__name__ in str(error.value) or method.name in str(error.value)
    assert not run.ledger.samples and torch.equal(model(**inputs).logits, stock)


@torch.no_grad()
def test_a_picture_that_is_not_a_number(model, inputs):
    for bad in (float("nan"), float("inf")):
        pixels = inputs["pixel_values"].clone()
        pixels[0, 0, 0, 0] = bad
        for name in ("k_center", "tome", "global_guided"):
            try:
                with create(name, keep_ratio=0.5)(model), pytest.raises(ValueError):
                    model(**{**inputs, "pixel_values": pixels})
            except ValueError as error:
                assert "reads the signal" in str(error)


# the layer's real attention


class See(Compressor):
    reads = ("relevance",)

    def setup(self):
        self.seen = []

    def compress(self, tokens):
        self.seen.append(tokens.signals["relevance"][0, 0])
        return identity(tokens)


@pytest.mark.parametrize("text", [{"sliding_window": 12}, {"sliding_window": None}])
@torch.no_grad()
def test_relevance_is_that_of_the_layers_own_mask(text):
    """Against the eager attention weights of layer 0, with a window shorter than the prompt and without."""
    model, inputs = tiny_model("llava_next", text=text), tiny_inputs("llava_next", 4, rows=[1])
    stage = See(layer=1)
    with stage(model):
        model(**inputs)
    model.set_attn_implementation("eager")
    weights = model(**inputs, output_attentions=True).attentions[0][0].mean(0)
    visual = inputs["input_ids"][0] == 3
    text_rows = ~visual & (torch.arange(len(visual)) > visual.nonzero()[0])
    onto = weights[text_rows]
    expected = onto[:, visual].sum() / onto.sum()
    assert abs(float(stage.seen[0][0]) - float(expected)) < 1e-4


@pytest.mark.parametrize("method", ["todre", "k_center"])
@torch.no_grad()
def test_a_second_picture_on_a_sliding_window(method):
    model = tiny_model("llava_next", text={"sliding_window": 12})
    one, two = (tiny_inputs("llava_next", 4, seed=s, rows=[1]) for s in (0, 1))
    compressor = create(method, keep_ratio=0.5, layer=2) if method == "k_center" else create(method, keep_ratio=0.5)
    with compressor(model) as run:
        cache = model(**one, use_cache=True).past_key_values
        n = cache.get_seq_length()
        mask = torch.cat([one["attention_mask"], two["attention_mask"]], 1)
        position = torch.arange(n, n + two["input_ids"].shape[1])[None]
        model(**{**two, "attention_mask": mask}, past_key_values=cache, position_ids=position)
    assert run.ledger.totals()["prefills"] == 2


@torch.no_grad()
def test_optional_signals_of_items_that_cannot_be_traced():
    """A picture that OneVision shrinks has no rows of its own in the encoder: methods that can do without do."""
    model = tiny_model("llava_onevision_dinov2", vision_aspect_ratio="anyres_max_1")
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    from mmcompress.models import family
    from mmcompress.models.call import Call

    sizes = torch.tensor([[32, 32]])
    spec = family(model).specs(Call(None, {"image_sizes": sizes}, None, None), "image", 0)[0]
    assert spec.source is None
    ids = torch.tensor([[1, 20, *[3] * spec.num_rows, 21, 22]])
    pixels = torch.randn(1, 5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "pixel_values": pixels, "image_sizes": sizes, "attention_mask": torch.ones_like(ids)}
    for name in ("k_center", "max_sum"):
        with create(name, keep_ratio=0.4)(model) as run:
            model(**inputs)
        assert run.ledger.kept_ratio < 0.5 and side == 4
    with create("global_guided", keep_ratio=0.4)(model), pytest.raises(ValueError, match="cannot tell which encoder outputs"):
        model(**inputs)


@torch.no_grad()
def test_a_mask_longer_than_the_call():
    """Stock models read the first columns of a mask that is as long as a static cache."""
    from transformers import StaticCache

    model, inputs = tiny_model("llava"), tiny_inputs("llava", 2)
    S = inputs["input_ids"].shape[1]
    for more in (torch.zeros(2, 8, dtype=torch.long), torch.ones(2, 8, dtype=torch.long)):
        mask = torch.cat([inputs["attention_mask"], more], 1)
        with create("dpc_knn", **PREFILL)(model) as run:
            caches = [StaticCache(config=model.config.get_text_config(), max_cache_len=S + 8) for _ in range(2)]
            a = model(**inputs, past_key_values=caches[0]).logits
            rows = run.ledger.totals()["sequence_in"]
            b = model(**{**inputs, "attention_mask": mask}, past_key_values=caches[1]).logits
            assert torch.equal(a, b) and run.ledger.totals()["sequence_in"] == 2 * rows
            assert torch.equal(model(**{**inputs, "attention_mask": mask}).logits, model(**inputs).logits)
            with pytest.raises(ValueError, match="attention_mask must have one column for each"):
                model(**{**inputs, "attention_mask": inputs["attention_mask"][:, 1:]})


@torch.no_grad()
def test_features_that_never_come_back(model, inputs):
    """Features made under a compressor, merged by the caller and handed to inner or outer models as embeddings."""
    ids, rest = inputs["input_ids"], {k: v for k, v in inputs.items() if k == "attention_mask"}

    def merged():
        features = torch.cat(list(model.get_image_features(inputs["pixel_values"]).pooler_output))
        return model.get_input_embeddings()(ids).masked_scatter((ids == 3)[..., None], features)

    with create("dpc_knn", **PREFILL)(model) as run:
        ways = (
            lambda: model.model.language_model(inputs_embeds=merged(), **rest),
            lambda: model(inputs_embeds=merged(), **rest),
            lambda: model.generate(inputs_embeds=merged(), **rest, max_new_tokens=2),
            lambda: type(model.model).forward(model.model, **inputs),
        )
        for way in ways:
            with pytest.raises(ValueError, match="inputs_embeds must not hold features"):
                way()
        model.get_image_features(inputs["pixel_values"])  # looked at, and never used
        model(**inputs)
        text = model.get_input_embeddings()(torch.tensor([[1, 20, 21]]))
        model.model.language_model(inputs_embeds=text)
    assert run.ledger.totals()["prefills"] == 1


@torch.no_grad()
def test_wrappers_that_another_library_took_off(model, inputs):
    import copy

    hooks = pytest.importorskip("accelerate.hooks")
    for module in model.modules():
        hooks.add_hook_to_module(module, hooks.ModelHook())
    mmcompress.compress_(model, create("dpc_knn", **PREFILL))
    for module in model.modules():
        hooks.remove_hook_from_module(module)
    for call in (lambda: model(**inputs), lambda: model.generate(**inputs, max_new_tokens=2)):
        with pytest.raises(RuntimeError, match="was taken off or the module replaced"):
            call()
    other = tiny_model("llava")
    mmcompress.compress_(other, create("dpc_knn", **PREFILL))
    other.model = copy.deepcopy(other.model)
    for call in (lambda: other(**inputs), lambda: other.generate(**inputs, max_new_tokens=2)):
        with pytest.raises(RuntimeError, match="was taken off or the module replaced"):
            call()


@torch.no_grad()
def test_a_cache_of_layers_under_another_compressor(model):
    inputs, turn = tiny_inputs("llava", 2), torch.randint(10, 99, (2, 3))
    with create("k_center", keep_ratio=0.25, layer=2)(model):
        cache = model(**inputs, use_cache=True).past_key_values
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 3, dtype=torch.long)], 1)
    others = (create("none"), create("dpc_knn", **PREFILL), *(create("k_center", keep_ratio=0.5, layer=i) for i in (1, 3)))
    for other in others:
        with other(model), pytest.raises(ValueError, match="at layer 2, before which"):
            model(input_ids=turn, attention_mask=mask, past_key_values=cache)
    with (create("k_center", keep_ratio=0.25, layer=1) | create("dpc_knn", keep_ratio=0.25, layer=2))(model):
        model(input_ids=turn, attention_mask=mask, past_key_values=cache)


def test_a_projector_that_is_not_heard():
    """PEFT trains a copy of the projector: what it reads is not seen, and its output is not taken for it."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=r".*language_model.*(q_proj|v_proj)", modules_to_save=["multi_modal_projector"])
    inputs = tiny_inputs("llava_next", 2)
    model = tiny_model("llava_next", tower="siglip")
    mmcompress.compress_(model, create("global_guided", keep_ratio=0.4))
    model = peft.get_peft_model(model, config).eval()
    with torch.no_grad(), pytest.raises(ValueError, match="cannot tell which encoder outputs"):
        model(**inputs)


def test_a_second_turn_in_the_ledger():
    """What a turn on a cache costs follows from what the cache holds, and what it would hold had nothing been dropped."""
    model, one, two = tiny_model("llava"), tiny_inputs("llava", 2), tiny_inputs("llava", 2, seed=1)
    for chain in (create("k_center", keep_ratio=0.25), create("k_center", keep_ratio=0.25, layer=2)):
        with torch.no_grad(), chain(model) as run:
            cache = model(**one, use_cache=True).past_key_values
            first = run.ledger.samples[-2:]
            mask = torch.cat([one["attention_mask"], two["attention_mask"]], 1)
            position = (mask.cumsum(1) - 1).clamp(min=0)[:, -two["input_ids"].shape[1] :]
            model(**{**two, "attention_mask": mask}, past_key_values=cache, position_ids=position)
        for before, after, n in zip(first, run.ledger.samples[-2:], one["attention_mask"].sum(1).tolist(), strict=True):
            assert after.past_in == n == before.sequence_in
            assert after.held(4) == before.rows(4)


@torch.no_grad()
def test_the_mode_of_the_model_is_the_compressors():
    method = create("k_center", keep_ratio=0.5)
    assert method.training
    mmcompress.compress_(tiny_model("llava"), method)
    assert not method.training


@torch.no_grad()
def test_pictures_of_their_own_shape():
    """A Pixtral picture of 4 x 9 patches is told to be 4 x 9, not 6 x 6."""
    from mmcompress.models import family
    from mmcompress.models.call import Call, Encoded

    found = family(tiny_model("llava"))
    p = found.config.vision_config.patch_size
    call = Call(None, {"image_sizes": [[4 * p, 9 * p]]}, None, None, encoded={"image": Encoded({}, lengths=[36])})
    assert found.specs(call, "image", 36)[0].layout.grid == (1, 4, 9)


def test_another_default_device():
    """Structure is made on the host, whatever the process's default device is."""
    from mmcompress.models.generic import ItemSpec
    from mmcompress.models.llava_next import anyres

    torch.set_default_device("meta")
    try:
        made = ItemSpec.lattice("image", (1, 3, 5), 7), anyres(4, 2, 1, (33, 17))
    finally:
        torch.set_default_device(None)
    assert {t.device.type for spec in made for t in (spec.position, spec.rows, spec.source)} == {"cpu"}
