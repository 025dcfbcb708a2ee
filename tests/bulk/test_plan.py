"""The manifest of a bulk run: what it has, in which parts, and that it is complete or not there."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sortd.bulk.plan import MANIFEST, MANIFEST_SCHEMA, make_plan, parts_of, read_run
from sortd.errors import DataError
from tests.command_line import sortd
from tests.test_architecture import REPOSITORY


def images(folder: Path, count: int) -> Path:
    """Make so many files of images, ten thousand in each folder, which are links of one file."""
    for number in range(count):
        if number % 10_000 == 0:
            place = folder if number == 0 else folder / f"{number // 10_000}"
            place.mkdir()
            (place / "first.jpg").write_bytes(b"x")
        else:
            os.link(place / "first.jpg", place / f"{number}.jpg")
    return folder


def test_manifest_has_one_row_for_each_version_of_an_image(tmp_path: Path) -> None:
    """The id stays while the file does, and another version has another one."""
    source = images(tmp_path / "photos", 3)
    facts = make_plan(os.fspath(source), tmp_path / "run")
    assert facts["count"] == 3
    assert read_run(tmp_path / "run")["source"] == os.fspath(source)
    first = pq.read_table(parts_of(tmp_path / "run" / MANIFEST)[0])
    assert first.schema.equals(MANIFEST_SCHEMA)
    rows = {row["uri"]: row for row in first.to_pylist()}
    status = (source / "first.jpg").stat()
    row = rows[os.fspath(source / "first.jpg")]
    assert (row["size"], row["mtime_ns"], row["etag"]) == (1, status.st_mtime_ns, None)
    (source / "new.jpg").write_bytes(b"new")
    make_plan(os.fspath(source), tmp_path / "again")
    again = {row["uri"]: row for row in pq.read_table(parts_of(tmp_path / "again" / MANIFEST)[0]).to_pylist()}
    assert rows.items() <= again.items()
    assert len({row["id"] for row in again.values()}) == 4


@pytest.mark.slow
def test_plan_of_many_images_holds_few_names_in_memory(tmp_path: Path) -> None:
    """A hundred thousand names take no more memory than a few, and parts grow with what stands before them."""
    peaks = {}
    for count in (1000, 100_000):
        source = images(tmp_path / f"photos{count}", count)
        code = (
            "import resource, sys; from pathlib import Path; from sortd.bulk.plan import make_plan\n"
            "facts = make_plan(sys.argv[1], Path(sys.argv[2]))\n"
            "print(facts['count'], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        run = tmp_path / f"run{count}"
        done = subprocess.run(
            [sys.executable, "-c", code, source, run], capture_output=True, text=True, check=True, cwd=REPOSITORY
        )
        found, peaks[count] = map(int, done.stdout.split())
        assert found == count
    parts = [pq.ParquetFile(part).metadata.num_rows for part in parts_of(run / MANIFEST).values()]
    assert sum(parts) == 100_000
    assert parts[:-1] == sorted(parts[:-1])
    assert 256 == parts[0] < parts[-2] <= 100_000 // 64
    assert peaks[100_000] - peaks[1000] < 40_000  # kilobytes: the names alone, as Python has them, take as much


def test_run_that_exists_is_refused(tmp_path: Path) -> None:
    """Nothing is overwritten, be it a run or another folder."""
    source = images(tmp_path / "photos", 2)
    make_plan(os.fspath(source), tmp_path / "run")
    for taken in (tmp_path / "run", source, source / "first.jpg"):
        with pytest.raises(DataError, match="exists"):
            make_plan(os.fspath(source), taken)


def test_plan_that_was_not_finished_is_no_plan(tmp_path: Path) -> None:
    """A run without its last file is refused by the later commands."""
    make_plan(os.fspath(images(tmp_path / "photos", 2)), tmp_path / "run")
    (tmp_path / "run" / "plan.json").unlink()
    ran = sortd("bulk", "report", tmp_path / "run")
    assert ran.code == 65
    assert "sortd bulk plan" in ran.err


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": 2, "count": 1}', '{"version": 1}', "[" * 100_000])
def test_damaged_plan_is_refused(tmp_path: Path, content: str) -> None:
    """The message names the file or the run."""
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(DataError, match=str(tmp_path)):
        read_run(tmp_path)


def test_source_without_images_is_refused(tmp_path: Path) -> None:
    """There is nothing to decide on."""
    (tmp_path / "photos").mkdir()
    ran = sortd("bulk", "plan", tmp_path / "photos", "--out", tmp_path / "run", "--json")
    assert ran.code == 65
    assert "has no image" in ran.err
    assert not (tmp_path / "run").exists()  # so that the command can be corrected and repeated


def test_source_as_a_url_of_this_disk_is_its_folder(tmp_path: Path) -> None:
    """The manifest is that of the path."""
    source = images(tmp_path / "a b", 2)
    assert make_plan(f"file://{tmp_path}/a%20b", tmp_path / "run")["source"] == os.fspath(source)


def test_source_with_a_password_is_refused(tmp_path: Path) -> None:
    """It would be written into the plan and each row; the message does not repeat it."""
    ran = sortd("bulk", "plan", "https://someone:pa55word@localhost/x", "--out", tmp_path / "run")
    assert (ran.code, "from the environment" in ran.err, "pa55word" in ran.err) == (65, True, False)
    assert not (tmp_path / "run").exists()


def test_plan_prints_its_facts(tmp_path: Path) -> None:
    """As JSON, and for people on stderr."""
    source = images(tmp_path / "photos", 2)
    facts = sortd("bulk", "plan", source, "--out", tmp_path / "run", "--json").facts
    assert (facts["count"], facts["parts"], facts["errors"]) == (2, 1, 0)
    assert "2 images in 1 part" in sortd("bulk", "plan", source, "--out", tmp_path / "other").err
