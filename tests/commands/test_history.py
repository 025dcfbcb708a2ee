"""The history of any number of moves is printed as it is read, in one document."""

import subprocess
import sys
from pathlib import Path

import pytest

from sortd.layout import JOURNAL_FILE, Layout
from sortd.store.journal import Journal
from tests.command_line import sortd, write_config
from tests.daemon_process import make_dataset
from tests.filed_images import file_images

MANY = 20_000
COPIES = """BEGIN;
WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {count})
INSERT INTO moves (token, ended_at, {kept})
SELECT printf('%016d', n), ended_at - 2 * n, {kept} FROM numbers JOIN moves ON moves.id = 1;
INSERT INTO members SELECT moves.id, position, role, name, wanted, members.content, body, copy_inode, final,
    device, inode, size, mtime_ns, moved_device, moved_inode, moved_size, moved_mtime_ns
FROM moves JOIN members ON members.move = 1 WHERE moves.id > 1;
COMMIT"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets, one of which has many moves, copies of the first one a second apart."""
    folder = tmp_path_factory.mktemp("history")
    write_config(folder)
    for name in ("Colours", "Others"):
        dataset = make_dataset(folder / "Data", name, references=1)
        file_images(dataset, folder / "state", {f"{name}.png": "red"})
    with Journal(Layout(folder / "Data" / "Colours").state_folder(folder / "state") / JOURNAL_FILE) as journal:
        rows = journal.connection.execute("PRAGMA table_info(moves)").fetchall()
        kept = ", ".join(row["name"] for row in rows if row["name"] not in {"id", "token", "ended_at"})
        journal.connection.executescript(COPIES.format(kept=kept, count=MANY - 1))
    return folder


def test_history_of_many_moves_is_streamed_in_flat_memory(site: Path) -> None:
    """The process that prints twenty thousand moves needs hardly more memory than one that prints fifty."""
    program = (
        "import resource, sys; from sortd.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )
    peaks, lines = [], []
    for limit in ("50", "0"):
        command = [sys.executable, "-c", program, "history", "-c", str(site / "config.yaml"), "--limit", limit]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            lines.append(sum(1 for _ in process.stdout))
            peaks.append(int(process.stderr.read().splitlines()[-1]))
    assert lines == [51, MANY + 2]
    assert peaks[1] - peaks[0] < 15_000  # kilobytes; so many records need 60,000


def test_history_of_several_datasets_is_newest_first(site: Path) -> None:
    """Whatever the journal, the one that ended last is first; the document is valid and has a move on each line."""
    ran = sortd("history", "-c", site / "config.yaml", "--limit", "300", "--json")
    moves = ran.facts["moves"]
    times = [one["at"] for one in moves]
    assert (len(moves), times) == (300, sorted(times, reverse=True))
    assert {one["dataset"] for one in moves} == {"Colours", "Others"}
    assert len(ran.out.splitlines()) == 300 + 5


def test_history_without_moves_is_a_document(tmp_path: Path) -> None:
    """Its list is empty."""
    make_dataset(tmp_path / "Data", references=1)
    ran = sortd("history", "-c", write_config(tmp_path), "--json")
    assert ran.facts == {"command": "history", "schema": 1, "moves": []}
    assert "the journal has no such move" in sortd("history", "-c", tmp_path / "config.yaml").err
