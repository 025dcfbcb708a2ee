"""The report of a bulk run: counts, precision with intervals, and a page with a random sample."""

import csv
import shutil
from pathlib import Path

import pytest

from sortd.bulk.engines import decide_shard
from sortd.bulk.plan import DECISIONS, make_plan, part_name
from sortd.bulk.report import make_report, read_labels
from sortd.errors import DataError
from tests.bulk.bulk_run import decisions_of, draw_images, load_fake, save_classifier, settings_for
from tests.command_line import sortd
from tests.daemon_process import COLOURS

IMAGES = 42


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decided run of images in three colours, one of them broken; some are filed in no class."""
    folder = tmp_path_factory.mktemp("report")
    draw_images(folder / "photos", IMAGES - 1)
    (folder / "photos" / "broken \x1b[31m.jpg").write_bytes(b"\xff\xd8\xff")
    make_plan(str(folder / "photos"), folder / "run")
    decide_shard(folder / "run", settings_for(save_classifier(folder)), load=load_fake)
    return folder / "run"


def test_report_counts_what_the_decisions_are(run: Path) -> None:
    """Classes, reasons and unreadable images add up to what was planned."""
    facts = make_report(run)
    labels = decisions_of(run)["label"].to_pylist()
    assert facts["classes"] == {label: labels.count(label) for label in facts["classes"]}
    assert facts["classes"].keys() == COLOURS.keys()
    assert facts["decided"] == facts["planned"] == IMAGES
    assert facts["filed"] + sum(facts["reasons"].values()) + facts["unreadable"] == IMAGES
    assert facts["unreadable"] == len(facts["examples"]) == 1
    assert facts["checked"]["judged"] == 0


def test_report_of_known_classes_has_precision_and_interval(run: Path, tmp_path: Path) -> None:
    """Only filed images with a known class count."""
    rows = decisions_of(run).to_pylist()
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["uri", "label"])
        table.writerows([row["uri"], "blue" if row["label"] == "red" else row["label"] or ""] for row in rows)
    ran = sortd("bulk", "report", run, "--labels", tmp_path / "labels.csv", "--json").facts
    filed = [row["label"] for row in rows if row["label"] is not None]
    assert (ran["checked"]["judged"], ran["checked"]["right"]) == (len(filed), len(filed) - filed.count("red"))
    assert ran["checked_by_class"]["red"]["right"] == 0
    low, high = ran["checked"]["interval"]
    assert low < ran["checked"]["right"] / ran["checked"]["judged"] < high
    shown = sortd("bulk", "report", run, "--labels", tmp_path / "labels.csv")
    assert f"right: {len(filed) - filed.count('red')} of {len(filed)} (95 %" in shown.out


def test_report_of_a_run_that_is_not_complete_says_so(run: Path, tmp_path: Path) -> None:
    """What is missing is counted, and a damaged part is named."""
    shutil.copytree(run, tmp_path / "run")
    (part,) = (tmp_path / "run" / DECISIONS).iterdir()
    part.unlink()
    assert f"{IMAGES} are not decided yet" in sortd("bulk", "report", tmp_path / "run").out
    part.write_bytes(b"PAR1 no table")
    with pytest.raises(DataError, match=part_name(0)):
        make_report(tmp_path / "run")


def test_sample_is_drawn_by_the_seed(run: Path, tmp_path: Path) -> None:
    """One seed draws the same images, another one others; broken images are not drawn."""
    first, again, other = (make_report(run, sample=10, seed=seed)["sample"] for seed in (0, 0, 1))
    assert first == again != other
    assert len(first) == 10
    assert len(make_report(run, sample=1000)["sample"]) == IMAGES - 1
    page = tmp_path / "page.html"
    ran = sortd("bulk", "report", run, "--sample", 10, "--html", page)
    assert ran.code == 0
    assert "\x1b" not in ran.err
    text = page.read_text()
    assert text.count("data:image/jpeg") == 10
    assert f"10 images drawn at random (seed 0) from {IMAGES} " in text


@pytest.mark.parametrize("content", [b"", b"name,label\na,b\n", b"uri,label\n\xff,a\n"])
def test_labels_that_cannot_be_read_are_refused(tmp_path: Path, content: bytes) -> None:
    """The message names the file."""
    (tmp_path / "labels.csv").write_bytes(content)
    with pytest.raises(DataError, match=r"labels\.csv"):
        read_labels(tmp_path / "labels.csv")
