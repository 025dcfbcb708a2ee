"""What `once` and its dry run print: numbers by class and reason, and each image only if asked for."""

import json
from pathlib import Path

import pytest

from sortd.commands.console import load_config
from sortd.commands.run import file_once, show_dry_run
from sortd.errors import LayoutError
from tests.command_line import logs_as_before, write_config
from tests.daemon_process import draw_strangers, make_dataset, picture, teach
from tests.fast_sortd import load_encoder

REASONS = "unlike the references", "like images of no class", "between two classes"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration of a dataset with two images of its classes, two strangers and a broken file."""
    dataset = make_dataset(tmp_path / "Data")
    teach(dataset)
    for number in range(2):
        picture("red", 5000 + number, patches=40).save(dataset / "Images" / f"red{number}.png")
    draw_strangers(dataset / "Images", 2)
    (dataset / "Images" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return write_config(tmp_path, mode="best", settle_seconds=0.1, log="{format: console}")


def test_once_prints_what_its_dry_run_announces(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The numbers are the same, and no image has a line; off a terminal there are lines of progress."""
    with logs_as_before():
        show_dry_run(lambda: load_config(config), load_encoder=load_encoder)
    planned = capsys.readouterr()
    sentence, header, row = planned.out.splitlines()
    assert sentence.startswith("Colours: 2 would be filed, 2 would go to Review: 2 ")
    assert sentence.rpartition(": 2 ")[2].split(";")[0] in REASONS
    assert sentence.endswith("; 1 would be rejected")
    assert (header, row) == ("dataset\tclass\twould be filed", "Colours\tred\t2")
    assert "sortd: images: " in planned.err
    with logs_as_before():
        file_once(lambda: load_config(config), verbose=False, load_encoder=load_encoder)
    done = capsys.readouterr()
    assert done.out.splitlines()[0] == sentence.replace("would be ", "").replace("would go to", "sent to")
    assert ".png" not in planned.out + planned.err + done.out + done.err


def test_once_verbose_prints_a_line_for_each_image(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The dry run lists paths relative to the root; the run itself has its log."""
    with logs_as_before():
        show_dry_run(lambda: load_config(config), verbose=True, load_encoder=load_encoder)
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["image", "destination", "best class", "score", "second class", "reason"]
    assert ["Colours/Images/red0.png", "Colours/Dataset/red/"] in [row[:2] for row in rows]
    assert len([row for row in rows if row[0].startswith("Colours/Images/")]) == 5
    with logs_as_before():
        file_once(lambda: load_config(config), verbose=True, as_json=True, load_encoder=load_encoder)
    done = capsys.readouterr()
    assert len([line for line in done.err.splitlines() if "image." in line]) == 5
    facts = json.loads(done.out)["datasets"]["Colours"]
    assert (facts["filed"], sum(facts["review"].values()), facts["rejected"]) == ({"red": 2}, 2, 1)


@pytest.mark.parametrize("log", ["json", "console"])
def test_once_that_fails_still_prints_its_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], log: str
) -> None:
    """It says what was done before, here nothing; the format of the log makes no difference."""
    (tmp_path / "Data").mkdir()
    config = write_config(tmp_path, log=f"{{format: {log}}}")
    with logs_as_before(), pytest.raises(LayoutError, match="holds no dataset"):
        file_once(lambda: load_config(config), verbose=False, as_json=True, load_encoder=load_encoder)
    assert json.loads(capsys.readouterr().out)["datasets"] == {}
