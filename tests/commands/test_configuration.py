"""`sortd config`: the example, and the values in force with their sources."""

from pathlib import Path

import pytest

from sortd.config import read_config
from tests.command_line import sortd

EXAMPLE = Path(__file__).parents[2] / "config.example.yaml"


def test_config_prints_the_example(tmp_path: Path) -> None:
    """What it prints is a valid configuration."""
    printed = sortd("config").out
    assert printed == EXAMPLE.read_text(encoding="utf-8")
    (tmp_path / "config.yaml").write_text(printed, encoding="utf-8")
    read_config(tmp_path / "config.yaml", {"HOME": "/"})
    assert sortd("config", "--json").code == 2


def test_config_effective_names_the_source_of_each_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of the file, a variable, also that of a group, or the default."""
    for name in ("SORTD_MODE", "SORTD_ROOT"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "config.yaml"
    file.write_text("root: Data\nabstain:\n  precision: 0.9\nstate_dir:\ndatasets:\n  Garden:\n    mode: max\n")
    environment = {"SORTD_THREADS": "2", "SORTD_LOG": "{level: debug}", "HOME": "/h"}
    ran = sortd("config", "--effective", "--json", "-c", file, environment=environment)
    values = {key: (one["value"], one["source"]) for key, one in ran.facts["values"].items()}
    assert ran.facts["config"] == str(file)
    assert values["root"] == (str(tmp_path / "Data"), f"{file}:1")
    assert values["abstain.precision"] == (0.9, f"{file}:3")
    assert values["abstain.strangers"] == ("auto", "default")
    assert values["state_dir"][1] == "default"
    assert values["threads"] == (2, "SORTD_THREADS")
    assert values["log.level"] == ("debug", "SORTD_LOG")
    assert values["log.format"] == ("auto", "default")
    assert values["datasets.Garden.mode"] == ("max", f"{file}:7")
    assert "datasets.Garden.guard" not in values


def test_config_effective_shows_groups_in_lists_without_secrets(tmp_path: Path) -> None:
    """They are groups in JSON too; an address of notifications is a secret."""
    file = tmp_path / "config.yaml"
    file.write_text(
        "notify: {urls: [{url: 'json://sesame@host', events: [disk_missing]}]}\nhooks: [{command: [/bin/true, -x]}]\n"
    )
    printed = [sortd("config", "--effective", *more, "-c", file) for more in ((), ("--json",))]
    assert not any("sesame" in ran.out + ran.err for ran in printed)
    (url,), (hook,) = (printed[1].facts["values"][key]["value"] for key in ("notify.urls", "hooks"))
    assert url == {"url": "**********", "url_file": None, "events": ["disk_missing"]}
    assert hook["command"] == ["/bin/true", "-x"]
    rows = dict(line.split("\t")[:2] for line in printed[0].out.splitlines())
    assert rows["notify.urls"] == "[{url: **********, events: [disk_missing]}]"
    assert rows["hooks"].startswith("[{command: [/bin/true, -x], events: [review_pile, ")


def test_config_effective_of_an_invalid_file_reports_its_mistakes(tmp_path: Path) -> None:
    """No value is in force then."""
    (tmp_path / "config.yaml").write_text("speed: fast\n")
    ran = sortd("config", "--effective", "-c", tmp_path / "config.yaml")
    assert (ran.code, ran.out, "speed: unknown key" in ran.err) == (78, "", True)
