"""The oldest and the newest transformers that the package says it is tested with, and whether it says so rightly.

All of the tests on all of the releases: `make test-versions`.
"""

import importlib.util
import inspect
import json
import warnings
from pathlib import Path

import pytest

from mmcompress.models import tested

ROOT = Path(__file__).parents[1]
SUBSET = "(test_greedy and (prefill or three)) or (test_second_turn and prefill)"  # of every family


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("versions_script", ROOT / "benchmarks" / "versions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("version", [tested.TESTED[0], tested.TESTED[-1]])
def test_the_ends_of_the_range(script, tmp_path, version):
    try:
        folder = script.environment(version)
    except script.FetchError as error:
        pytest.skip(f"transformers {version} cannot be fetched: {error}")
    report, log = tmp_path / "report.xml", tmp_path / "log"
    with log.open("w") as file:
        done = script.pytest([folder], "tests/test_seam.py", "-n", "0", "-k", SUBSET, "--junitxml", str(report), output=file)
    assert done.returncode == 0, log.read_text()[-4000:]
    found = script.counts(report, done.returncode)
    assert found["failed"] == 0 and found["passed"] >= 30, found


def test_a_failing_test_is_counted_and_a_dead_run_too(script, tmp_path):
    test, report = tmp_path / "test_one.py", tmp_path / "report.xml"
    test.write_text("def test_a():\n    assert False\n\n\ndef test_b():\n    pass\n")
    done = script.pytest([], str(test), "-n", "0", "--junitxml", str(report))
    assert script.counts(report, done.returncode) == {"passed": 1, "failed": 1, "skipped": 0}
    assert script.counts(report, 0)["failed"] == 1
    test.write_text("def test_b():\n    pass\n")
    script.pytest([], str(test), "-n", "0", "--junitxml", str(report))
    assert script.counts(report, 137) == {"passed": 1, "failed": 1, "skipped": 0}  # died behind its report
    assert script.counts(tmp_path / "none.xml", 137) == {"passed": 0, "failed": 1, "skipped": 0}
    result = {"runs": [{"suites": {"a": {"passed": 1, "failed": 0}, "b": {"passed": 1, "failed": 1}}}]}
    assert not script.is_green(result)


def test_an_environment_that_is_not_found_first_is_refused(script, tmp_path):
    (tmp_path / "transformers-0").mkdir()
    with pytest.raises(RuntimeError, match="must be imported from"):
        script.pytest([tmp_path / "transformers-0"], "--version")


def test_half_an_environment_is_never_left(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "FOLDER", tmp_path / "versions")
    monkeypatch.setattr(script, "fetch", lambda folder, *_: (folder / "begun").touch() or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        script.environment("5.0.0")
    assert list((tmp_path / "versions").iterdir()) == []


def test_the_committed_result_shows_the_range(script):
    result = json.loads(script.RESULT.read_text())
    here = [one for one in result["runs"] if one["torch"] == result["runs"][0]["torch"]]
    assert [one["transformers"] for one in here] == list(tested.RELEASES)
    assert all(set(one["suites"]) >= {"seam", "models", "methods", "io"} for one in result["runs"])
    green = [one["transformers"] for one in here if script.is_green({"runs": [one]})]
    assert green == list(tested.TESTED), "\n".join("  ".join(row) for row in script.rows(result))
    assert {tested.RELEASES[0], tested.RELEASES[-1]} <= set(green), "both ends are green"


def test_the_metadata_begin_with_the_oldest():
    assert f'"transformers>={tested.TESTED[0]},<6"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("version", "inside"),
    [("5.16.0", False), ("5.16.1", True), ("5.18.0", True), ("5.24.0", True), ("5.24.1", False), ("5.25.0.dev0", False)],
)
def test_what_lies_in_the_range(version, inside):
    assert tested.is_tested(version) is inside


def test_a_release_beyond_the_range_warns_once_where_the_user_stands(monkeypatch):
    monkeypatch.setattr("transformers.__version__", "5.99.0")
    tested._warn_once.cache_clear()

    def install():
        tested.warn_untested()

    def compress_():
        install()

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        line = inspect.currentframe().f_lineno + 1
        compress_()
        compress_()
    tested._warn_once.cache_clear()
    assert [str(w.message) for w in seen] == [tested.advice("5.99.0")]
    assert f"{tested.TESTED[-1]}, 5.99.0 is installed" in str(seen[0].message)
    assert (seen[0].filename, seen[0].lineno) == (__file__, line)


def test_doctor_says_the_range(monkeypatch):
    from mmcompress import doctor

    report = doctor.examine()
    assert report["tested"] == {"transformers": list(tested.TESTED)}
    assert f"transformers {tested.TESTED[0]} to {tested.TESTED[-1]}" in doctor.text(report)
    report["packages"]["transformers"] = "5.99.0"
    assert doctor.advice(report)[0] == tested.advice("5.99.0")
    report["packages"]["transformers"] = tested.TESTED[0]
    assert tested.advice(tested.TESTED[0]) not in doctor.advice(report)
