"""The README as a program: its tables are what the registry says, and its examples run as written."""

import functools
import re
import shlex
from pathlib import Path

import pytest

from mmcompress import cards, zoo
from mmcompress.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("mmcompress ")]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder that looks like the project's root, and a zoo that loads its model once."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "data").symlink_to(ROOT / "tests" / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(zoo, "load", _load)
    return tmp_path


_load = functools.lru_cache(maxsize=None)(zoo.load)


def test_tables_say_what_the_registry_says():
    """A new method may wait for `make lint`, which writes its row; a row that says something else is wrong."""
    wrong = set(README.splitlines()) - set(cards.update(README).splitlines())
    assert not wrong, "run `python -m mmcompress.cards`"


def test_an_outdated_table_is_noticed():
    assert cards.update(README.replace("`k_center`", "`k_centre`")) == cards.update(README)
    with pytest.raises(ValueError, match="methods"):
        cards.update("no tables here")


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links and [link for link in links if not (ROOT / link.split("#")[0]).exists()] == []


def test_the_two_commands_stand_at_the_top():
    first = blocks("bash")[0]
    assert [line.split("#")[0].strip() for line in first.splitlines()] == ["make demo", "make test"]
    targets = (ROOT / "Makefile").read_text()
    assert "\ndemo:" in targets and "\ntest:" in targets


def test_commands_of_the_readme_cover_every_command():
    from mmcompress.cli import COMMANDS as known

    assert {line.split()[1] for line in COMMANDS} == set(known)


def execute(number):
    names = {"__name__": "readme"}
    exec(compile(blocks("python")[number], f"README block {number}", "exec"), names)
    return names


@pytest.mark.parametrize("number", range(1, len(blocks("python"))))
def test_python_blocks_run(place, number):
    execute(number)


def test_the_first_example_is_answered_right_with_all_tokens_and_with_a_quarter(tmp_path, monkeypatch, capsys):
    """It runs where nothing of the repository is, and the README says what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(zoo, "load", _load)
    names = execute(0)
    printed = capsys.readouterr().out
    assert printed == blocks("text")[0]
    (answer,) = names["sample"].answers
    assert printed.splitlines()[0] == f"{names['sample'].prompt} {answer}"
    assert 4 * names["run"].ledger.totals()["tokens_kept"] == names["run"].ledger.totals()["tokens_in"] > 0
    inputs = names["inputs"]
    everything = names["model"].generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    assert names["processor"].decode(everything, skip_special_tokens=True) == answer


@pytest.mark.parametrize("line", COMMANDS)
def test_shell_lines_run(place, line, capsys):
    assert main(shlex.split(line)[1:]) == 0
    assert capsys.readouterr().out.strip()
    folder = re.search(r"--out (\S+)", line)
    assert folder is None or any((place / folder[1]).iterdir())
