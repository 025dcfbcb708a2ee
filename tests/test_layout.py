"""Each program's unfinished and own names are told from the user's, and a class may be called what it likes."""

import os
from pathlib import Path

import numpy as np
import pytest

from sortd.layout import CONTROLS, RULES, Reason, Rule, rule_below, rule_for, rule_for_folder
from sortd.watch.scan import scan, scan_steps
from tests.watch.test_scan import never

ORDINARY = [
    "IMG_1.jpg",
    "part.jpg",
    "sedan.jpg",
    "sediment1",
    "download",
    "tmp.png",
    "a~b.jpg",
    "ñandú (2).JPEG",
    "no suffix",
    "x.jpg.partly",
    "x.jpg.backup",
    "x.jpg.20240131",
    "x.jpg.bak",
    "x.jpg_original",
    "x.Street",
    "#1.jpg",
    "~1.jpg",
    "@home.jpg",
    "caf\udce9.jpg",
    "line\nbreak.jpg",
]
CLASSES = ["engine.part", "door.lock", "x~", "2019.temp", "C#", "st", "old.download", "part", "~$"]
NO_CLASSES = [".hidden", ".trash", "@eaDir", "lost+found", "#recycle", "$RECYCLE.BIN", "System Volume Information"]


@pytest.mark.parametrize("rule", RULES, ids=[f"{rule.program} {rule.pattern}" for rule in RULES])
def test_rule_for_example_returns_its_rule(rule: Rule) -> None:
    """The example of each row is known by that very row, in any letter case."""
    spellings = [rule.example] if rule.regex else [rule.example, rule.example.upper(), rule.example.lower()]
    assert [rule_for(spelled) for spelled in spellings] == [rule] * len(spellings)
    assert rule.program
    assert rule.source


def test_scan_examples_are_ignored(tmp_path: Path) -> None:
    """Neither a file nor a folder of such a name is taken; each is told of with the reason, a folder once."""
    for rule in RULES:
        (tmp_path / rule.example).touch()
        inside = tmp_path / "below" / rule.example
        inside.mkdir(parents=True)
        (inside / "inside.jpg").touch()
    assert list(scan(os.fspath(tmp_path), report=never)) == []
    folders = (tmp_path, tmp_path / "below")
    told = {os.fspath(folder / rule.example): rule.why for folder in folders for rule in RULES}
    assert dict(step for step in scan_steps(os.fspath(tmp_path), report=never) if step is not None) == told


@pytest.mark.parametrize("name", ORDINARY)
def test_rule_for_ordinary_name_is_none(name: str) -> None:
    """A name that merely contains such a word, or looks like one, is the user's."""
    assert rule_for(name) is None


def test_rule_for_parts_of_examples_is_that_of_the_first_match() -> None:
    """For names made of parts of two examples, the filter for most names changes no answer."""
    draw = np.random.default_rng(0)
    for one, other in draw.integers(len(RULES), size=(1500, 2)):
        first, second = RULES[one].example, RULES[other].example
        name = first[: draw.integers(1, len(first) + 1)] + second[draw.integers(len(second) + 1) :]
        assert rule_for(name) is next((rule for rule in RULES if rule.matches(name)), None), name


@pytest.mark.parametrize("rule", RULES, ids=[f"{rule.program} {rule.pattern}" for rule in RULES])
def test_rule_why_names_the_program(rule: Rule) -> None:
    """The message names the program, or says that the name is hidden; it never ends in a full stop."""
    message = rule.why.message
    assert ("begins with a dot" if rule.reason is Reason.HIDDEN else rule.program) in message
    assert not message.endswith(".")


def test_control_rules_are_endings() -> None:
    """The name of a control file is the other file's name and a fixed ending."""
    assert {rule.ending for rule in CONTROLS} >= {".aria2", ".lftp-pget-status", ".st"}
    for rule in CONTROLS:
        assert rule.example.endswith(rule.ending)
        assert rule_for(rule.example.removesuffix(rule.ending)) is None


@pytest.mark.parametrize("name", CLASSES)
def test_rule_for_folder_of_a_class_is_none(name: str) -> None:
    """What programs name their unfinished files does not forbid a class that name."""
    assert rule_for_folder(name) is None


@pytest.mark.parametrize("name", NO_CLASSES)
def test_rule_for_folder_hidden_or_system_folder_returns_its_rule(name: str) -> None:
    """A folder of a server, a desktop or a file system is neither class nor dataset."""
    assert rule_for_folder(name) is not None


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("/Data/Cars", None),
        ("/Data/Cars/Images/a.jpg", None),
        ("/Data/Cars/Images/.up/a.jpg", "/Data/Cars/Images/.up"),
        ("/Data/Cars/Images/2019.temp/sub/a.jpg", "/Data/Cars/Images/2019.temp"),
        ("/Data/Cars/Images/a.jpg.part", "/Data/Cars/Images/a.jpg.part"),
        ("/Data/Cars/Clases/engine.part/a.jpg", None),
        ("/Data/Cars/Clases/engine.part", None),
        ("/Data/Cars/Clases/engine.part/a.jpg.part", "/Data/Cars/Clases/engine.part/a.jpg.part"),
        ("/Data/Cars/Dataset/door.lock/a.jpg", None),
        ("/Data/Cars/Review/x~/a.jpg", None),
        ("/Data/Cars/Clases/@eaDir/a.jpg", "/Data/Cars/Clases/@eaDir"),
        ("/Data/Cars/Dataset/#recycle/a.jpg", "/Data/Cars/Dataset/#recycle"),
        ("/elsewhere.part/a.jpg", None),
    ],
)
def test_rule_below_applies_the_rules_of_each_level(path: str, place: str | None) -> None:
    """Only what lies below the dataset counts, and a class folder is judged as one."""
    left = rule_below(path, "/Data/Cars")
    assert (None if left is None else left[0]) == place


def test_rule_below_of_a_root_in_a_hidden_folder_is_none() -> None:
    """A dataset may live in a hidden folder."""
    assert rule_below("/home/eva/.local/Data/Cars/Images/a.jpg", "/home/eva/.local/Data/Cars") is None
