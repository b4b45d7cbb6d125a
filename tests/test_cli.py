"""The command line: results, JSON, and one sentence with exit code 2 for everything that is wrong."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import checkpoints
import numpy as np
import pytest
from PIL import Image

import mmcompress
from mmcompress import viz
from mmcompress.cli import main
from mmcompress.eval import tasks
from mmcompress.registry import list_methods

DATA = Path(__file__).parent / "data"
PHOTO = str(DATA / "coffee.jpg")
RUN = ["run", "--prompt", "w20 w21"]


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """model(family) -> a folder with the tiny model and its processor."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = checkpoints.save(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get


def call(capsys, *arguments):
    capsys.readouterr()
    code = main([str(a) for a in arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


def result(capsys, *arguments):
    code, out, err = call(capsys, *arguments, "--json")
    assert code == 0 and err == "", err
    return json.loads(out)


def refused(capsys, *arguments, says):
    code, out, err = call(capsys, *arguments)
    assert code == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith("mmcompress: ") and "Traceback" not in err
    assert says in err, err


# what is wrong

BAD = {
    "no command": ([], "COMMAND"),
    "unknown command": (["rnu"], "did you mean 'run'?"),
    "unknown option": ([*RUN, "--image", PHOTO, "--keep", "1"], "--keep"),
    "no prompt": (["run", "--image", PHOTO], "--prompt"),
    "nothing to compress": (RUN, "nothing to compress"),
    "unknown method": ([*RUN, "--image", PHOTO, "--method", "k_centre"], "did you mean 'k_center'?"),
    "keep_ratio 0": ([*RUN, "--image", PHOTO, "--keep-ratio", "0"], "keep_ratio must be in (0, 1], got 0"),
    "keep_ratio 1.5": ([*RUN, "--image", PHOTO, "--keep-ratio", "1.5"], "keep_ratio must be in (0, 1], got 1.5"),
    "keep_ratio nan": ([*RUN, "--image", PHOTO, "--keep-ratio", "nan"], "keep_ratio must be in (0, 1], got nan"),
    "keep_ratio text": ([*RUN, "--image", PHOTO, "--keep-ratio", "half"], "keep_ratio must be a number in (0, 1], got 'half'"),
    "layer text": ([*RUN, "--image", PHOTO, "--layer", "late"], "layer must be"),
    "layer -1": ([*RUN, "--image", PHOTO, "--layer=-1"], "layer must be"),
    "unknown field": ([*RUN, "--image", PHOTO, "--set", "metrc=cosine"], "did you mean 'metric'?"),
    "bad value": ([*RUN, "--image", PHOTO, "--set", "metric=manhattan"], "metric must be"),
    "field without a value": ([*RUN, "--image", PHOTO, "--set", "metric"], "FIELD=VALUE"),
    "field given twice": ([*RUN, "--image", PHOTO, "--keep-ratio", "0.5", "--set", "keep_ratio=0.5"], "given twice"),
    "two methods": ([*RUN, "--image", PHOTO, "--method", "pooling,k_center"], "one method"),
    "max-new-tokens 0": ([*RUN, "--image", PHOTO, "--max-new-tokens", "0"], "--max-new-tokens must be"),
    "missing picture": ([*RUN, "--image", "nowhere.jpg"], "image must be an existing file, got 'nowhere.jpg'"),
    "a folder as picture": ([*RUN, "--image", str(DATA)], "image must be an existing file"),
    "missing clip": ([*RUN, "--video", "nowhere.mp4"], "video must be an existing file"),
    "missing recording": ([*RUN, "--audio", "nowhere.wav"], "audio must be an existing file"),
    "corrupt picture": ([*RUN, "--image", str(DATA / "README.md")], "image must be a picture that Pillow can read"),
    "corrupt clip": ([*RUN, "--video", str(DATA / "README.md")], "video must be a clip that OpenCV can read"),
    "corrupt recording": ([*RUN, "--audio", str(DATA / "README.md")], "audio must be a recording that soundfile can read"),
    "method without a name": ([*RUN, "--image", PHOTO, "--method", ""], "unknown method ''"),
    "a prompt that is no text": (
        ["run", "--prompt", "\udcff", "--image", PHOTO, "--model", "zoo:imge"],
        "did you mean 'image'?",
    ),
    "model without a name": ([*RUN, "--image", PHOTO, "--model", ""], "model must be zoo:NAME, a folder"),
    "a file as model": ([*RUN, "--image", PHOTO, "--model", PHOTO], "model must be zoo:NAME, a folder"),
    "a picture as clip": ([*RUN, "--video", PHOTO], "video must be a clip, got the picture"),
    "unknown zoo model": ([*RUN, "--image", PHOTO, "--model", "zoo:imge"], "did you mean 'image'?"),
    "no such folder": ([*RUN, "--image", PHOTO, "--model", "./no/such/folder"], "model must be"),
    "a folder without a model": ([*RUN, "--image", PHOTO, "--model", str(DATA)], "config.json"),
    "one file for two methods": (
        ["inspect", "--image", PHOTO, "--method", "pooling,k_center", "--out", "a.png"],
        "--out must be a folder",
    ),
    "a method named twice": (["inspect", "--image", PHOTO, "--method", "pooling,pooling"], "once"),
    "a picture that is not written": (["inspect", "--image", PHOTO, "--out", "a.jpg"], "--out must be a folder or a .png file"),
    "no room for sheets": (["inspect", "--image", PHOTO, "--out", PHOTO], "coffee.jpg"),
    "no room for one sheet": (["inspect", "--image", PHOTO, "--out", PHOTO + "/a.png"], "--out must be a folder that can be"),
    "no room for a demo": (["demo", "--out", PHOTO + "/new/folder"], "--out must be a folder that can be written to, got"),
    "no room for a bench": (["bench", "--out", PHOTO], "--out must be a folder that can be written to, got"),
    "no dtype": (["bench", "--dtype", ""], "dtype must be one of float32, "),
    "a number too large": (
        [*RUN, "--image", PHOTO, "--method", "pooling", "--set", f"stride={2**63}"],
        "stride must be a number of",
    ),
    "deep nonsense": ([*RUN, "--image", PHOTO, "--set", "metric=" + "[" * 100_000], "metric must be"),
    "no questions": (["demo", "--num-questions", "0"], "--num-questions must be"),
    "bench an unknown task": (["bench", "--tasks", "detial"], "did you mean 'detail'?"),
    "bench an unknown method": (["bench", "--methods", "pooling,k_centre"], "did you mean 'k_center'?"),
    "bench keep_ratio 0": (["bench", "--keep-ratio", "0.5,0"], "keep_ratio must be in (0, 1], got 0"),
    "bench no questions": (["bench", "--n", "0"], "n must be an integer >= 1, got 0"),
    "bench seed text": (["bench", "--seeds", "0,one"], "seed must be an integer"),
    "bench dtype": (["bench", "--dtype", "half"], "dtype must be one of float32, "),
    "bench an unknown preset": (["bench", "--preset", "imag"], "did you mean 'image'?"),
    "bench preset and methods": (["bench", "--preset", "image", "--methods", "tome"], "--preset takes the place of --methods"),
    "bench no such model": (["bench", "--models", "./no/such/folder"], "model must be"),
    "no such section": (["demo", "--sections", "vidoe"], "did you mean 'video'?"),
    "nothing to draw": (["inspect"], "inspect takes one item (--image, --video or --audio), got 0"),
    "two items to draw": (["inspect", "--image", PHOTO, "--audio", "a.wav"], "got 2"),
    "no frames to draw": (["inspect", "--video", "a.mp4", "--num-frames", "0"], "--num-frames must be"),
    "missing recording to draw": (["inspect", "--audio", "nowhere.wav"], "audio must be an existing file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(capsys, name):
    arguments, says = BAD[name]
    refused(capsys, *arguments, says=says)


def test_a_truncated_picture_is_one_sentence(capsys, tmp_path):
    broken = tmp_path / "half.jpg"
    broken.write_bytes(Path(PHOTO).read_bytes()[:9000])
    refused(capsys, *RUN, "--image", broken, says="half.jpg")


def test_an_unsupported_model_is_refused_before_its_weights_are_read(capsys, tmp_path):
    from transformers import BertConfig

    BertConfig().save_pretrained(tmp_path)
    refused(capsys, *RUN, "--image", PHOTO, "--model", tmp_path, says="supported family (llava, ")


def test_a_method_that_needs_crops_is_refused_on_a_model_without(capsys, model):
    arguments = [*RUN, "--image", PHOTO, "--model", model("llava"), "--method", "global_guided"]
    refused(capsys, *arguments, says="global_guided reads the signal 'crops'")


def test_what_a_model_does_not_take_is_refused(capsys, model, tmp_path):
    refused(capsys, *RUN, "--image", PHOTO, "--model", model("llava"), "--layer", "99", says="4 decoder layers")
    refused(capsys, *RUN, "--image", PHOTO, "--model", model("qwen2_audio"), says="takes audio, got image")
    refused(capsys, *RUN, "--image", PHOTO, "--model", model("llava"), "--method", "vidcom2", says="vidcom2 compresses video")
    refused(capsys, *RUN, "--image", PHOTO, "--model", model("qwen2_5_vl"), "--method", "vidcom2", says="compresses video only")


@pytest.mark.parametrize("family, mark", [("llava", "<image>"), ("qwen2_5_vl", "<video>"), ("qwen2_5_vl", "<image>")])
def test_a_mark_of_an_item_in_the_prompt_is_refused(capsys, model, family, mark):
    """A processor would take it for a further item."""
    arguments = ["run", "--image", PHOTO, "--model", model(family), "--prompt"]
    refused(capsys, *arguments, f"w20 {mark} w21", says=f"prompt must not hold '{mark}', which stands for an item of")
    refused(capsys, *arguments, "\udcff", says="prompt must be text in UTF-8")


def test_a_prompt_beyond_the_models_positions_is_refused(capsys, model):
    for family in ("llava", "qwen2_5_vl"):
        arguments = ["run", "--image", PHOTO, "--model", model(family), "--prompt", "w20 " * 10_000]
        refused(capsys, *arguments, says="a question must be of at most ")


def test_code_that_comes_with_a_model_is_never_run(capsys, model, tmp_path, monkeypatch):
    """Whatever its files name; nor does anybody ask on stdin."""
    asked, trace = [], tmp_path / "trace"
    monkeypatch.setattr("builtins.input", lambda *a: asked.append(a) or "y")
    source = f"open({str(trace)!r}, 'w')\nclass Evil: pass\n"
    autos = (
        "Config",
        "Model",
        "ModelForMultimodalLM",
        "ModelForImageTextToText",
        "Processor",
        "ImageProcessor",
        "VideoProcessor",
    )
    auto_map = {f"Auto{name}": "evil.Evil" for name in autos} | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    told = {"as it is": {}, "none": None, "unknown": {"processor_class": "EvilProcessor"}}
    types = {"image_processor_type": "Evil", "tokenizer_class": "Evil"}
    for name, change in {**told, "no model": {"model_type": "evil"}, "no types": types}.items():
        folder = tmp_path / name.replace(" ", "_")
        shutil.copytree(model("llava"), folder)
        (folder / "custom_generate").mkdir()
        for file in (folder / "evil.py", folder / "custom_generate" / "generate.py"):
            file.write_text(source)
        for file in (folder / f for f in ("config.json", "processor_config.json", "tokenizer_config.json")):
            config = json.loads(file.read_text())
            for part in (config, config.get("image_processor", {})):
                if change is None:
                    part.pop("processor_class", None)
                part.update({k: v for k, v in (change or {}).items() if k in part}, auto_map=auto_map)
            file.write_text(json.dumps(config))
        arguments = [*RUN, "--image", PHOTO, "--model", folder, "--max-new-tokens", 1]
        if name in told:
            assert result(capsys, *arguments)["ledger"]["totals"]["tokens_in"] == 16
        else:
            refused(capsys, *arguments, says="model must ")
        assert not trace.exists() and not asked, name


BROKEN = {
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "cut weights": lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-999]),
    "no processor": lambda f: (f / "processor_config.json").unlink(),
    "no tokenizer": lambda f: (f / "tokenizer.json").unlink(),
    "a list": lambda f: (f / "config.json").write_text("[]"),
    "no JSON": lambda f: (f / "config.json").write_text("{"),
    "no text": lambda f: (f / "config.json").write_bytes(b"\xff"),
    "no type": lambda f: (f / "config.json").write_text("{}"),
    "an odd type": lambda f: change(f / "config.json", model_type=5),
    "no language model": lambda f: change(f / "config.json", text_config=5),
    "other sizes": lambda f: change(f / "config.json", projector_hidden_act=5),
}


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_is_one_sentence(capsys, model, tmp_path, name):
    shutil.copytree(model("llava"), tmp_path / "m")
    BROKEN[name](tmp_path / "m")
    refused(capsys, *RUN, "--image", PHOTO, "--model", tmp_path / "m", says="model must ")


def test_a_model_without_some_of_its_weights_is_refused(capsys, model, tmp_path):
    """transformers would fill them up at random."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model("llava"), tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    lost = next(name for name in weights if "projector" in name)
    save_file({k: v for k, v in weights.items() if k != lost}, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    refused(capsys, *RUN, "--image", PHOTO, "--model", tmp_path / "m", says="model must hold all its weights, got")


def test_a_recording_beyond_the_window_is_not_cut(capsys, model, tmp_path):
    soundfile = pytest.importorskip("soundfile")
    wave = np.sin(np.arange(24000) / 9).astype("float32")
    for name, samples in {"whole": 16000, "long": 16001}.items():
        soundfile.write(tmp_path / f"{name}.wav", wave[:samples], 16000)
    asked = [*RUN, "--model", model("qwen2_audio"), "--audio"]
    assert result(capsys, *asked, tmp_path / "whole.wav")["ledger"]["totals"]["tokens_in"] > 0
    refused(capsys, *asked, tmp_path / "long.wav", says="audio must be at most 1 s for Qwen2Audio")
    drawn = ["inspect", "--model", model("qwen2_audio"), "--out", tmp_path, "--audio"]
    refused(capsys, *drawn, tmp_path / "long.wav", says="inspect draws one window of sound, at most 1 s; got 1.0 s in")


def test_a_recogniser_reads_a_long_recording_in_windows():
    """Oracle: stock long-form `generate`."""
    import torch

    from mmcompress import zoo
    from mmcompress.ask import Question, ask, prepare

    model, processor = zoo.load("asr")
    wave = np.random.default_rng(0).normal(scale=0.1, size=35 * 16000).astype("float32")
    inputs = prepare(model, processor, Question("", audio=[wave]))
    assert inputs["input_features"].shape[-1] == 3500
    stock = processor(
        audio=wave, sampling_rate=16000, return_tensors="pt", truncation=False, padding="longest", return_attention_mask=True
    )
    with torch.inference_mode():
        out = model.generate(**stock, return_timestamps=True, max_new_tokens=4, do_sample=False)
    answer = ask(model, processor, inputs, mmcompress.create("none"), 4)
    assert answer.text == processor.tokenizer.decode(out[0], skip_special_tokens=True).strip()
    few = ask(model, processor, inputs, mmcompress.create("pooling", keep_ratio=0.5), 4).ledger
    assert len(few.samples) >= 2 and few.tokens_kept * 2 == few.tokens_in == 1500 * len(few.samples)
    short = prepare(model, processor, Question("", audio=[wave[: 30 * 16000]]))
    assert short["input_features"].shape[-1] == 3000 and "return_timestamps" not in short


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_a_picture_of_one_pixel(capsys, model, tmp_path, family):
    for mode in ("RGB", "P", "LA", "CMYK", "1"):
        Image.new(mode, (1, 1)).save(file := tmp_path / f"{mode}.tiff")
        totals = result(capsys, *RUN, "--model", model(family), "--image", file)["ledger"]["totals"]
        assert 0 < totals["tokens_kept"] <= totals["tokens_in"]


@pytest.mark.parametrize("size", [(3, 16), (1, 16), (16, 3), (3, 3)])
def test_a_clip_of_few_pixels_keeps_its_colours(model, size):
    """A processor guesses which axis holds the channels."""
    from mmcompress.ask import Question, load_model, prepare

    loaded, processor = load_model(model("qwen2_5_vl"))
    colours = []
    for edges in (size, (32, 32)):
        frames = np.zeros((4, *edges, 3), "uint8") + np.array([200, 100, 50], "uint8")
        inputs = prepare(loaded, processor, Question("w20", videos=[(frames, [0, 1, 2, 3], 1.0)]))
        colours.append({round(float(v), 3) for v in inputs["pixel_values_videos"].unique()})
    assert colours[0] == colours[1] and len(colours[0]) == 3


def test_letters_that_a_terminal_lacks(monkeypatch):
    import io

    for arguments in (["methods"], ["methods", "--json"]):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
        assert main(arguments) == 0
        sys.stdout.flush()
        if arguments[1:]:
            assert {r["name"] for r in json.loads(written.getvalue().decode("ascii"))} == set(list_methods())
        else:
            assert b"\\u2500" in written.getvalue() and b"k_center" in written.getvalue()


def test_sheets_that_would_take_each_others_place(capsys, tmp_path):
    for part in ("a", "b"):
        mmcompress.save_pretrained(mmcompress.create("pooling"), tmp_path / part / "mine")
    both = ",".join(str(tmp_path / part / "mine") for part in ("a", "b"))
    refused(capsys, "inspect", "--image", PHOTO, "--method", both, "--out", tmp_path, says="whose last parts differ")


def test_an_error_for_machines(capsys):
    code, out, err = call(capsys, *RUN, "--image", PHOTO, "--keep-ratio", "0", "--json")
    assert code == 2 and json.loads(out)["error"] in err and err.count("\n") == 1


def test_traceback_on_request():
    with pytest.raises(ValueError, match="keep_ratio"):
        main([*RUN, "--image", PHOTO, "--keep-ratio", "0", "--traceback"])


def test_an_unexpected_error_keeps_its_traceback(capsys, monkeypatch):
    def broken(*_):
        raise RuntimeError("a defect")

    monkeypatch.setattr("mmcompress.cards.method_rows", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["methods"])
    code, out, err = call(capsys, "methods", "--json")
    assert code == 1 and json.loads(out) == {"error": "RuntimeError: a defect"} and err.count("\n") == 1


# results


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_run_compares_with_the_uncompressed_model(capsys, model, family):
    out = result(
        capsys, *RUN, "--model", model(family), "--image", PHOTO, "--keep-ratio", "0.25", "--compare", "--max-new-tokens", 3
    )
    assert out["method"]["method"] == "k_center" and out["method"]["keep_ratio"] == 0.25
    full, few = out["uncompressed"]["ledger"]["totals"], out["ledger"]["totals"]
    assert full["tokens_kept"] == full["tokens_in"] == few["tokens_in"]
    assert few["tokens_kept"] == mmcompress.num_kept(few["tokens_in"], 0.25)
    assert few["sequence_in"] - few["sequence_kept"] == few["tokens_in"] - few["tokens_kept"]
    assert isinstance(out["answer"], str) and isinstance(out["uncompressed"]["answer"], str)
    assert 0 < out["prefill_ms"] <= out["total_ms"]


def test_keep_ratio_1_answers_as_uncompressed(capsys, model):
    pictures = ["--image", PHOTO, "--image", DATA / "chelsea.jpg"]
    out = result(capsys, *RUN, "--model", model("llava"), *pictures, "--keep-ratio", "1", "--compare", "--max-new-tokens", 8)
    assert out["answer"] == out["uncompressed"]["answer"] and "w" in out["answer"]
    assert out["ledger"]["totals"]["kept_ratio"] == 1 and len(out["ledger"]["samples"][0]["items"]) == 2


def test_fields_and_layer_reach_the_method(capsys, model):
    fields = ["--method", "pooling", "--set", "stride=4", "--set", "tail=drop", "--layer", "0.5"]
    out = result(capsys, *RUN, "--model", model("llava"), "--image", PHOTO, *fields)
    assert (out["method"]["stride"], out["method"]["tail"], out["method"]["layer"]) == (4, "drop", 0.5)
    assert out["ledger"]["samples"][0]["items"][0]["kept_from"]["2"] == 4


def test_run_for_people(capsys, model):
    code, out, err = call(capsys, *RUN, "--model", model("llava"), "--image", PHOTO, "--compare", "--max-new-tokens", 2)
    assert code == 0 and err == ""
    assert out.startswith("uncompressed: ") and "16/16" in out and "2/16" in out and "KV MiB" in out


def test_run_on_a_clip(capsys, model, tmp_path):
    cv2 = pytest.importorskip("cv2")
    path = str(tmp_path / "clip.avi")
    clip = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    for i in range(20):
        clip.write(np.full((48, 64, 3), 10 * i, np.uint8))
    clip.release()
    arguments = [
        *RUN,
        "--model",
        model("qwen2_5_vl"),
        "--video",
        path,
        "--num-frames",
        4,
        "--method",
        "vidcom2",
        "--keep-ratio",
        "0.5",
    ]
    (item,) = result(capsys, *arguments)["ledger"]["samples"][0]["items"]
    assert item["kind"] == "video" and item["kept_from"]["0"] == mmcompress.num_kept(item["tokens_in"], 0.5)


def test_run_on_a_recording(capsys, model, tmp_path):
    soundfile = pytest.importorskip("soundfile")
    path = tmp_path / "tone.wav"
    soundfile.write(path, np.sin(np.arange(6000) / 9).astype("float32"), 8000)
    out = result(capsys, *RUN, "--model", model("qwen2_audio"), "--audio", path, "--method", "pooling", "--keep-ratio", "0.5")
    (item,) = out["ledger"]["samples"][0]["items"]
    assert item["kind"] == "audio" and 0 < item["kept_from"]["0"] == mmcompress.num_kept(item["tokens_in"], 0.5)


def test_inspect_writes_one_picture_per_method(capsys, model, tmp_path):
    out = result(
        capsys,
        "inspect",
        "--model",
        model("llava_next"),
        "--image",
        PHOTO,
        "--method",
        "global_guided,pooling",
        "--keep-ratio",
        "0.25",
        "--out",
        tmp_path,
    )
    assert [Path(w["file"]).name for w in out] == ["coffee_global_guided.png", "coffee_pooling.png"]
    pictures = [Image.open(w["file"]).convert("RGB") for w in out]
    assert min(min(p.size) for p in pictures) > 300 and pictures[0].tobytes() != pictures[1].tobytes()
    one = tmp_path / "new" / "one.png"
    code, text, _ = call(capsys, "inspect", "--model", model("llava"), "--image", PHOTO, "--out", one)
    assert code == 0 and text.strip() == str(one) and one.exists()


def test_inspect_shows_what_a_chain_had_before_it_drops_all(capsys, model, tmp_path):
    common = ("inspect", "--model", model("llava"), "--image", PHOTO, "--keep-ratio", "0.5", "--out", tmp_path)
    late, first = (
        result(capsys, *common, *rest)[0]
        for rest in (("--method", "todre", "--set", "threshold=0.999"), ("--method", "k_center"))
    )
    sheets = [np.asarray(Image.open(w["file"]).convert("RGB"))[:, :300] for w in (late, first)]
    assert (sheets[0][104:-60] == sheets[1][104:-60]).mean() > 0.99  # the same tokens; the legends differ
    assert Image.open(late["file"]).width > Image.open(first["file"]).width  # by the sentence that says what came of them


def test_inspect_draws_a_strip_of_a_clip_and_a_spectrogram_of_a_recording(capsys, model, tmp_path):
    cv2 = pytest.importorskip("cv2")
    soundfile = pytest.importorskip("soundfile")
    clip, tone = tmp_path / "clip.avi", tmp_path / "tone.wav"
    writer = cv2.VideoWriter(str(clip), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    for i in range(12):
        writer.write(np.full((48, 64, 3), 100 + 10 * i, np.uint8))
    writer.release()
    soundfile.write(tone, np.sin(np.arange(8000) / 9).astype("float32"), 16000)
    ways = {
        "video": (clip, "qwen2_5_vl", "vidcom2,tome", ("--num-frames", 6)),
        "audio": (tone, "qwen2_audio", "k_center,pooling", ()),
    }
    shown = {}
    for kind, (file, family, methods, rest) in ways.items():
        out = result(
            capsys,
            *("inspect", "--model", model(family), f"--{kind}", file, "--method", methods, "--keep-ratio", "0.5"),
            *("--out", tmp_path, *rest),
        )
        assert [Path(w["file"]).name for w in out] == [f"{file.stem}_{m}.png" for m in methods.split(",")]
        assert all(w["tokens_kept"] < w["tokens_in"] for w in out)
        shown[kind] = [np.asarray(Image.open(w["file"]).convert("RGB")).astype(int) for w in out]
    # three time steps of 64 x 48 frames side by side: three times as wide as high with the gaps, and nothing beyond
    inked = (np.abs(shown["video"][0][105:280] - viz.PAPER).max(-1) > 20).any(0)
    assert np.abs(np.diff(inked.astype(int))).sum() == 2 * 3
    assert all((a != b).any() for a, b in shown.values())


def test_methods(capsys):
    rows = {r["name"]: r for r in result(capsys, "methods")}
    assert list(rows) == list_methods()
    assert rows["k_center"]["reads"] == ["cls_logits (if offered)"] and rows["k_center"]["fields"]["keep_ratio"] == 0.1
    assert "keep_ratio" not in rows["none"]["fields"] and all(r["what"].endswith(".") for r in rows.values())
    code, out, _ = call(capsys, "methods")
    assert code == 0 and all(f"\n{name} " in out for name in list_methods())


def test_models(capsys):
    out = result(capsys, "models")
    assert {f["name"] for f in out["families"]} >= {"llava", "llava_next", "qwen2_5_vl", "qwen2_audio"}
    assert "zoo:image" in out["zoo"]
    code, text, _ = call(capsys, "models")
    assert code == 0 and "zoo:image" in text and "qwen2_audio" in text


def test_doctor_tells_what_runs_and_why(capsys):
    out = result(capsys, "doctor")
    assert out["mmcompress"] == mmcompress.__version__ and out["operators"] == mmcompress.ops.status()
    code, text, _ = call(capsys, "doctor")
    assert code == 0 and "k_center" in text and "What would make it faster" in text


def test_doctor_advises_what_is_missing():
    from mmcompress.doctor import advice

    report = {
        "operators": {"k_center": {"cpu": "reference (not built)", "cuda": "reference (not built)"}},
        "gpus": [{"name": "a GPU"}],
        "cuda_build": "13.0",
        "cpu": {"threads": 1, "cores": 8},
        "extras": {"video": ["cv2"], "audio": []},
    }
    hints = advice(report)
    assert len(hints) == 4 and "MMCOMPRESS_BUILD=cpu" in hints[0] and "MMCOMPRESS_BUILD=cuda" in hints[1]
    assert "OMP_NUM_THREADS=8" in hints[2] and "mmcompress[video]" in hints[3]
    fine = {
        **report,
        "operators": {"k_center": {"cpu": "compiled (avx2)", "cuda": "compiled"}},
        "cpu": {"threads": 8, "cores": 8},
        "extras": {},
    }
    assert advice(fine) == []


def test_a_missing_extra_names_the_command(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    refused(capsys, *RUN, "--video", PHOTO, says="pip install 'mmcompress[video]'")
    monkeypatch.setitem(sys.modules, "soundfile", None)
    refused(capsys, *RUN, "--audio", PHOTO, says="pip install 'mmcompress[audio]'")


@pytest.mark.parametrize("command", [[], *([c] for c in ("demo", "run", "inspect", "bench", "methods", "models", "doctor"))])
def test_help_fits_a_screen_and_has_an_example(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "example:\n  mmcompress" in out
    assert len(out.splitlines()) <= 40 and (not command or "--json" in out)


def test_the_process_itself(tmp_path):
    """Exit code, one line on stderr, nothing on stdout; and help without a heavy import."""
    command = [sys.executable, "-m", "mmcompress"]
    done = subprocess.run([*command, *RUN, "--image", "nowhere.jpg"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    code = """
import sys
from mmcompress.cli import main
for arguments in (["run", "--help"], ["methods"], ["models"], ["doctor"]):
    try: main(arguments)
    except SystemExit: pass
assert "transformers" not in sys.modules
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


# the demo, on tiny models and items


class TinyPictures(tasks.Task):
    name, kind, size = "tiny_picture", "image", (40, 30)

    def scene(self, split, seed, index):
        item = Image.fromarray(tasks.base.rng_of(seed, index).integers(0, 255, (30, 40, 3), np.uint8))
        return tasks.Scene(item, [tasks.Question("w20 w21", "w22", evidence=(tasks.Evidence(tasks.Box(4, 6, 20, 25)),))])


class TinyClips(tasks.Task):
    name, kind = "tiny_clip", "video"

    def scene(self, split, seed, index):
        pixels = tasks.base.rng_of(seed, index).integers(0, 255, (8, 32, 48, 3), np.uint8)
        seen = (tasks.Evidence(tasks.Box(4, 6, 20, 25), frames=(3, 5)),)
        return tasks.Scene([Image.fromarray(p) for p in pixels], [tasks.Question("w20 w21", "w22", evidence=seen)])


class TinyRecordings(tasks.Task):
    name, kind = "tiny_recording", "audio"

    def scene(self, split, seed, index):
        wave = tasks.base.rng_of(seed, index).standard_normal(16000).astype("float32")
        return tasks.Scene(wave, [tasks.Question("w20 w21", "w22", evidence=(tasks.Evidence(seconds=(0.25, 0.5)),))])


@pytest.fixture
def sections(model, monkeypatch):
    """One section for each kind of item, on tiny models, and one whose model does not exist."""
    from mmcompress import demo

    families = {TinyPictures: "llava_next", TinyClips: "qwen2_5_vl", TinyRecordings: "qwen2_audio"}
    for task in families:
        monkeypatch.setitem(tasks.TASKS, task.name, task)
    made = [demo.Section(t.kind, f"All {t.kind}s", model(f), (t.name,), 1) for t, f in families.items()]
    made.append(demo.Section("missing", "Missing", "zoo:no-such-model", ("tiny_clip",), 1))
    monkeypatch.setattr(demo, "SECTIONS", tuple(made))
    monkeypatch.setattr(demo, "MAX_NEW_TOKENS", 1)
    return made


def test_demo_runs_every_method_in_every_section(capsys, sections, tmp_path):
    from mmcompress import demo

    assert main(["demo", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr()
    lacking = {"image": {"vidcom2"}, "video": {"global_guided"}, "audio": {"global_guided", "vidcom2"}}
    ran = set()
    page = (tmp_path / "index.html").read_text()
    for section, following in zip(sections, [*(s.title for s in sections[1:3]), "Left out: "], strict=False):
        lines = out.out.split(section.title)[1].split(following)[0]
        skipped = set(re.findall(r"^Not run: (\w+): ", lines, re.M))
        wanted = [s for s in demo.settings() if s.method not in skipped]
        table = [line.split() for line in lines.split("prefill ms\n")[1].splitlines()[1:] if line[:2].strip().isdigit()]
        assert lacking[section.name] <= skipped < set(list_methods()) - {"none", "random_keep", "pooling"}
        assert len(table) == len(wanted) and all(len(row) >= 9 for row in table)
        shown = page.split(f'<section id="{section.name}">')[1].split("</section>")[0]
        assert all(f"<b>{s.method}</b>" in shown for s in wanted if s.method != "none")
        ran |= {s.method for s in wanted}
    assert ran == set(list_methods())
    assert "the section missing is left out: zoo:no-such-model" in out.err and "Left out: missing: zoo:no-such-model" in out.out
    assert "<b>missing</b>: zoo:no-such-model" in page
    assert "http://" not in page and "https://" not in page and "<script" not in page and 'src="data:image/png' in page


def test_demo_marks_the_evidence(sections):
    from mmcompress import demo

    image, video, audio = (p.asked[0] for p in demo.run(sections[:3], say=lambda _: None).parts)
    assert len(image.pictures) == 1 and image.evidence == [demo.Spot(0, (4, 6, 20, 25))]
    assert len(video.pictures) == 4  # frames 0, 2, 4 and 6 for two frames a step: frame 3 is not shown, frame 4 is
    assert video.evidence == [demo.Spot(1, None), demo.Spot(2, (4, 6, 20, 25))]
    assert audio.pictures[0].width == 100 and audio.evidence == [demo.Spot(0, (25, 0, 50, audio.pictures[0].height))]


def test_demo_takes_sections_and_a_number_of_questions(capsys, sections, tmp_path):
    out = result_of_demo(capsys, "--sections", "audio", "--num-questions", 2, "--out", tmp_path)
    (part,) = out["sections"]
    assert part["name"] == "audio" and len(part["questions"]) == 2 and out["left_out"] == {}
    assert {s["questions"] for s in part["summary"]} == {2} and part["questions"][0]["kind"] == "audio"
    refused_demo = ["demo", "--out", tmp_path, "--sections"]
    refused(capsys, *refused_demo, "audoi", says="did you mean 'audio'?")
    refused(capsys, *refused_demo, "audio,audio", says="once")
    code, text, err = call(capsys, *refused_demo, "missing")
    assert code == 2 and text == "" and err.splitlines()[-1].startswith("mmcompress: no section of the demo can run here: ")


def result_of_demo(capsys, *arguments):
    code, out, _ = call(capsys, "demo", *arguments, "--json")
    assert code == 0
    return json.loads(out)


def test_demo_asks_about_another_item_each_time():
    pytest.importorskip("easy_vqa")
    from mmcompress import demo

    asked = demo.questions(("detail", "easy_vqa"), 4)
    assert [task.name for task, _ in asked] == ["detail", "easy_vqa"] * 2
    assert len({s.item.tobytes() for _, s in asked}) == 4 and all(s.answers and s.prompt.endswith("?") for _, s in asked)
    assert asked[0][1].topic != asked[2][1].topic


# the benchmark, on a tiny model


def test_bench_measures_and_goes_on(capsys, model, tmp_path):
    plan = ["bench", "--models", model("llava_next"), "--tasks", "detail", "--methods", "global_guided,vidcom2"]
    plan += ["--keep-ratio", "0.5", "--n", "3", "--out", tmp_path]
    out = result(capsys, *plan)
    assert [r["label"] for r in out["rows"]] == ["none", "random_keep", "uniform_keep", "global_guided"]
    assert [(o["label"], o["ratio"]) for o in out["not_run"]] == [("vidcom2", 0.5)]
    assert {p.name for p in tmp_path.iterdir()} == {"results.jsonl", "results.json", "table.md", "plot.png"}
    assert out["rows"][3]["tokens_kept"] == pytest.approx(out["rows"][3]["tokens_in"] / 2, abs=0.5)
    assert all(r["evidence_recall"] is not None for r in out["rows"])
    written = (tmp_path / "results.jsonl").read_text()
    code, text, err = call(capsys, *plan)
    assert code == 0 and (tmp_path / "results.jsonl").read_text() == written  # nothing was measured again
    assert "global_guided" in text and "not run: vidcom2 at 0.5" in text and "plot.png" in text and "Traceback" not in err


def test_bench_refuses_a_task_that_the_model_does_not_take(capsys, model, tmp_path):
    plan = ["bench", "--models", model("qwen2_audio"), "--tasks", "detail", "--out", tmp_path]
    refused(capsys, *plan, says="task detail asks about image items, Qwen2AudioForConditionalGeneration takes audio")
