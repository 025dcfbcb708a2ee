"""The journal: durable before and after, readable by others, and clear about what is wrong with it."""

import os
import resource
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from sortd.errors import JournalError
from sortd.events import Abstained, Assigned, Mode, Stamp
from sortd.store.checks import BY_DAY, GIVEN_SINCE, FiledImages
from sortd.store.history import History
from sortd.store.journal import Journal
from sortd.store.records import UNDONE, MoveFile, MoveProgress, MoveReason, MoveRecord, Role, Selection
from tests.filing_world import Clock

STAMP = Stamp(1, 2**63 + 5, 3, 4)


def move(token: str, name: str = "a.jpg", label: str = "cat", **changes: object) -> MoveRecord:
    """Return a move from Images/ to a class."""
    member = MoveFile(Role.IMAGE, name, name, STAMP, final=name, moved_stamp=STAMP)
    return MoveRecord(token, "Images", f"Dataset/{label}", (member,), **changes)  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the journal is to be made; its folder is missing."""
    return tmp_path / "state" / "journal.db"


def filed(journal: Journal, token: str, label: str = "cat", content: str = "", name: str = "a.jpg") -> None:
    """Write one whole move."""
    one = move(token, name, label)
    journal.intend([(one, MoveReason("filed", label, 0.9, 0.2, "dog", "mixed", content=content))])
    journal.settle([move(token, name, label, progress=MoveProgress.DONE)])


def test_history_move_has_all_recorded_values(path: Path) -> None:
    """What intent and outcome said comes back word for word, inode numbers of 64 bits included."""
    grounds = MoveReason("filed", "cat", 0.9, 0.2, "dog", "mixed", "why", 7, "clip", "ab" * 32)
    with Journal(path, clock=Clock(), run="first") as journal:
        journal.intend([(move("t"), grounds)])
        journal.settle([move("t", progress=MoveProgress.DONE, lost=("owner", "mtime"), message="said")])
        (record,) = journal.history.moves(Selection())
    assert record.move_reason == grounds
    assert record.move == move("t", progress=MoveProgress.DONE, lost=("owner", "mtime"), message="said")
    assert (record.run, record.intended_at, record.ended_at, record.undone_by) == ("first", 1, 2, None)
    assert (record.source_path, record.destination_path) == ("Images/a.jpg", "Dataset/cat/a.jpg")


def test_journal_files_dropped_by_recovery_leave_no_rows(path: Path) -> None:
    """A move that ends with fewer files than were intended has only those in its record."""
    with Journal(path) as journal:
        one = move("t")
        journal.intend([(one.with_file(MoveFile(Role.SHARED, "a.xmp", "a.xmp", STAMP)), MoveReason("filed", "cat"))])
        journal.settle([replace(one, progress=MoveProgress.DONE)])
        assert [file.name for file in journal.history.moves(Selection())[0].move.files] == ["a.jpg"]


def test_history_intent_without_outcome_is_unfinished(path: Path) -> None:
    """A process that dies between the two leaves the intent for the next one to find."""
    program = (
        "import os, sys; from pathlib import Path; from sortd.store.journal import Journal\n"
        "from sortd.store.records import MoveReason\n"
        "from tests.store.test_journal import move\n"
        "Journal(Path(sys.argv[1])).intend([(move('t'), MoveReason('filed'))]); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", program, path], check=False).returncode == 9
    with Journal(path) as journal:
        (record,) = journal.history.unfinished()
    assert record.move == move("t")
    assert record.move.progress is MoveProgress.INTENDED


def test_journal_failed_move_leaves_no_record(path: Path) -> None:
    """A move that failed is no history."""
    with Journal(path) as journal:
        journal.intend([(move("t"), MoveReason("filed"))])
        journal.settle([move("t").failed("no room")])
        assert journal.history.unfinished() == journal.history.moves(Selection()) == []


def test_journal_settle_keeps_the_progress_of_open_moves(path: Path) -> None:
    """A move that is settled while it is still under way keeps what ``advance`` wrote."""
    with Journal(path) as journal:
        journal.intend([(move("t"), MoveReason("filed"))])
        journal.advance(move("t", progress=MoveProgress.PUBLISHING))
        journal.settle([move("t")])
        assert journal.history.unfinished()[0].move.progress is MoveProgress.PUBLISHING


def test_history_moves_filters_by_every_condition(path: Path) -> None:
    """Label, run, outcome, time, path, number and limit each choose what they say, newest first."""
    with Journal(path, clock=Clock(), run="first") as journal:
        filed(journal, "one", "cat")
        journal.run = "second"
        filed(journal, "two", "dog", name="b.jpg")
        filed(journal, "three", "cat", name="c.jpg")

        def tokens(**conditions: object) -> list[str]:
            return [
                one.move.token
                for one in journal.history.moves(Selection(**conditions))  # type: ignore[arg-type]
            ]

        assert tokens() == ["three", "two", "one"]
        assert tokens(label="cat") == ["three", "one"]
        assert tokens(run="second") == ["three", "two"]
        assert tokens(limit=1) == ["three"]
        assert tokens(since=4, until=6) == ["two"]
        assert tokens(outcome="rejected") == []
        assert tokens(path="Images/b.jpg") == tokens(path="Dataset/dog/b.jpg") == tokens(id=2) == ["two"]
        assert tokens(path="Images/nothing.jpg") == []


def test_journal_names_that_are_not_utf8_are_kept(path: Path) -> None:
    """Bytes that are no text come back as the same bytes, in names, folders and classes."""
    name, label = os.fsdecode(b"caf\xe9\n.jpg"), os.fsdecode(b"ni\xf1o")
    with Journal(path) as journal:
        journal.intend([(move("t", name, label), MoveReason("filed", label, reason=label))])
        journal.settle([move("t", name, label, progress=MoveProgress.DONE, message=name)])
        (record,) = journal.history.moves(Selection(label=label, path=f"Images/{name}"))
        assert record.move_reason.label == label
        assert record.move.image.final == name
        assert journal.history.accuracy() == {label: FiledImages(filed=1, checked=0, corrected=0, undone=0)}


def test_move_reason_of_decision_has_its_values() -> None:
    """A filed image is told with its class, an abstention with its best guess and its reason."""
    assigned = Assigned("cat", 0.9, 0.2, "dog", Mode.MIXED)
    abstained = Abstained("far", "cat", 0.4, 0.1, None, Mode.MIXED)
    assert MoveReason.of(assigned, "filed") == MoveReason("filed", "cat", 0.9, 0.2, "dog", "mixed")
    assert MoveReason.of(abstained, "sent_to_review") == MoveReason(
        "sent_to_review", "cat", 0.4, 0.1, None, "mixed", "far"
    )
    assert MoveReason.of(None, "rejected") == MoveReason("rejected")


def test_history_other_process_reads_during_writes(path: Path) -> None:
    """A reader sees each commit at once and can change nothing."""
    with Journal(path) as journal, History.open(path) as history:
        assert history.moves(Selection()) == []
        filed(journal, "t")
        assert len(history.moves(Selection())) == 1
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            history._connection.execute("DELETE FROM moves")


def test_history_closed_journal_is_read_without_write_permission(path: Path) -> None:
    """Who may only read the file reads it, as long as nobody writes it."""
    with Journal(path) as journal:
        filed(journal, "t")
    path.chmod(0o444)
    path.parent.chmod(0o555)
    try:
        with History.open(path) as history:
            assert len(history.moves(Selection())) == 1
    finally:
        path.parent.chmod(0o755)


def test_journal_second_connection_writes_in_another_thread(path: Path) -> None:
    """A connection beside the first sees and writes the same journal."""
    with Journal(path, run="first") as journal:
        journal.intend([(move("t"), MoveReason("filed"))])
        with journal.second_connection() as other:
            other.settle([move("t", progress=MoveProgress.DONE)])
        assert journal.history.counts() == {"filed": 1}


def test_history_last_known_finds_by_inode_then_by_content(path: Path) -> None:
    """The newest standing move of this very version counts, whatever its device number is now."""
    with Journal(path) as journal:
        filed(journal, "t", content="c0")
        filed(journal, "u", "dog", content="c1")
        found = journal.history.last_known(Stamp(99, STAMP.inode, STAMP.size, STAMP.mtime_ns))
        assert found is not None
        assert found.move.token == "u"  # noqa: S105 - a move's
        other = Stamp(1, 1, 1, 1)
        assert journal.history.last_known(other) is None
        by_content = journal.history.last_known(other, "c0")
        assert by_content is not None
        assert by_content.move.token == "t"  # noqa: S105 - a move's


def test_journal_undo_marks_the_record_and_holds_the_image(path: Path) -> None:
    """The record is no longer undoable nor known, and the version is held under its restored path."""
    with Journal(path) as journal:
        filed(journal, "t")
        member = MoveFile(Role.IMAGE, "a.jpg", "a.jpg", STAMP, final="a (2).jpg", moved_stamp=STAMP)
        back = MoveRecord("u", "Dataset/cat", "Images", (member,))
        journal.intend([(back, MoveReason(UNDONE, undoes=1))])
        journal.settle([MoveRecord("u", "Dataset/cat", "Images", (member,), MoveProgress.DONE)])
        assert journal.history.moves(Selection(undoable=True)) == []
        assert journal.history.moves(Selection(id=1))[0].undone_by == 2
        assert journal.history.last_known(STAMP) is None
        assert journal.history.held() == {"Images/a (2).jpg": STAMP}
        assert journal.history.accuracy() == {"cat": FiledImages(filed=1, checked=1, corrected=0, undone=1)}


def test_journal_hold_lasts_until_release_or_move(path: Path) -> None:
    """One or all can be released; a file that is moved on is no longer held."""
    with Journal(path) as journal:
        for name in "bca":
            journal.hold(f"Images/{name}.jpg", STAMP, "guarded")
        assert list(journal.history.held()) == ["Images/b.jpg", "Images/c.jpg", "Images/a.jpg"]
        assert journal.release("Images/b.jpg") == 1
        assert journal.release("Images/b.jpg") == 0
        filed(journal, "t")
        assert list(journal.history.held()) == ["Images/c.jpg"]
        assert journal.release() == 1
        assert journal.history.held() == {}


def test_journal_corrections_count_once_for_each_image(path: Path) -> None:
    """Moved on to a third class it is still one mistake; moved back it is none."""
    with Journal(path, clock=Clock()) as journal:
        filed(journal, "t", content="c")
        filed(journal, "u", name="b.jpg")
        record = journal.history.moves(Selection(id=1))[0]
        assert journal.record_corrections([(record, "dog", "Dataset/dog/a.jpg")]) == [True]
        assert journal.record_corrections([(record, "dog", "Dataset/dog/a.jpg")]) == [False]
        assert journal.record_corrections([(record, "cow", "Dataset/cow/a.jpg")]) == [True]
        assert journal.history.accuracy() == {"cat": FiledImages(filed=2, checked=2, corrected=1, undone=0)}
        assert [one[:3] for one in journal.history.corrections()] == [("cat", "cow", "Dataset/cow/a.jpg")]
        assert journal.record_corrections([(record, None, "Dataset/cat/a.jpg")]) == [True]
        assert journal.history.accuracy() == {"cat": FiledImages(filed=2, checked=0, corrected=0, undone=0)}


def test_journal_checks_count_and_are_no_look_at_the_class(path: Path) -> None:
    """Answers of an audit are counted apart; a correction replaces that its image was found wrong."""
    with Journal(path, clock=Clock()) as journal:
        for number in range(6):
            filed(journal, f"t{number}", name=f"{number}.jpg")
        assert journal.history.to_audit() == [1, 2, 3, 4, 5, 6]
        assert journal.record_checks([(1, True), (2, False), (5, True), (99, True)]) == 3
        assert journal.history.to_audit() == [3, 4, 6]
        counts = FiledImages(filed=6, checked=3, corrected=0, undone=0, found_wrong=1, audited=3, audited_right=2)
        assert journal.history.accuracy() == {"cat": counts}
        assert counts.right == 2
        record = journal.history.moves(Selection(id=2))[0]
        journal.record_corrections([(record, "dog", "Dataset/dog/1.jpg")])
        assert journal.history.accuracy() == {"cat": replace(counts, corrected=1, found_wrong=0)}
        newest = journal.history.newest_checked("mixed", 2)
        assert [(one.is_right, one.is_acted_on, one.is_audited) for one in newest] == [
            (True, False, True),
            (False, True, True),
        ]
        assert journal.history.newest_checked("max", 9) == []
        later = journal.history.moves(Selection(id=3))[0]  # not audited: who corrects it has looked at its class
        journal.record_corrections([(later, "dog", "Dataset/dog/2.jpg")])
        assert journal.history.accuracy()["cat"].checked == 6
        assert sum(one.is_right for one in journal.history.newest_checked("mixed", 9)) == 4


def test_journal_confirmed_guesses_of_review_are_counted_apart(path: Path) -> None:
    """Moved to the guessed class, to another one, or assigned: none of them says anything of filed images."""
    with Journal(path, clock=Clock()) as journal:
        for number in range(3):
            file = replace(move("x").files[0], final=f"{number}.jpg", moved_stamp=STAMP._replace(inode=number))
            review = MoveRecord(f"r{number}", "Images", "Review/cat", (file,))
            journal.intend([(review, MoveReason("sent_to_review", "cat", 0.4, 0.1, "dog", "mixed"))])
            journal.settle([replace(review, progress=MoveProgress.DONE)])
        first, second = (journal.history.moves(Selection(id=number))[0] for number in (1, 2))
        assert journal.history.guesses() == (0, 0)
        journal.record_corrections([(first, "cat", "Dataset/cat/0.jpg"), (second, "dog", "Dataset/dog/1.jpg")])
        assert journal.history.guesses() == (1, 2)
        file = replace(file, name="2.jpg", stamp=STAMP._replace(inode=2), final="2.jpg")
        assigned = MoveRecord("a", "Review/cat", "Dataset/cat", (file,))
        journal.intend([(assigned, MoveReason("assigned", "cat"))])
        journal.settle([replace(assigned, progress=MoveProgress.DONE)])
        assert journal.history.guesses() == (2, 3)
        assert journal.history.accuracy() == {}
        journal.record_corrections([(first, "cow", "Dataset/cow/0.jpg")])
        assert journal.history.guesses() == (1, 3)


@pytest.mark.parametrize(("reason", "confirmed"), [("stranger", 2), ("margin", 0)])
def test_journal_image_of_no_class_confirms_that_it_looked_like_none(path: Path, reason: str, confirmed: int) -> None:
    """By request and by hand; where sortd guessed a class, the guess was wrong."""
    with Journal(path, clock=Clock()) as journal:
        for number in range(2):
            file = replace(move("x").files[0], final=f"{number}.jpg", moved_stamp=STAMP._replace(inode=number))
            review = MoveRecord(f"r{number}", "Images", "Review/_none", (file,))
            journal.intend([(review, MoveReason("sent_to_review", "cat", 0.4, 0.1, "dog", "mixed", reason))])
            journal.settle([replace(review, progress=MoveProgress.DONE)])
        (by_hand,) = journal.history.moves(Selection(id=1))
        journal.record_corrections([(by_hand, "_none", "Dataset/_none/0.jpg")])
        file = replace(file, name="1.jpg", stamp=STAMP._replace(inode=1), final="1.jpg")
        assigned = MoveRecord("a", "Review/_none", "Dataset/_none", (file,))
        journal.intend([(assigned, MoveReason("assigned", "_none"))])
        journal.settle([replace(assigned, progress=MoveProgress.DONE)])
        assert journal.history.guesses() == (confirmed, 2)
        assert journal.history.given_since(0.0) == {"assigned": 1, "corrected": 1}


def test_journal_guess_of_an_image_sent_to_review_twice_counts_once(path: Path) -> None:
    """A person may take an image back, or move it back, before it is assigned: the last guess counts."""
    with Journal(path, clock=Clock()) as journal:
        for token, label in (("r", "dog"), ("s", "cat")):
            review = replace(move(token), destination="Review/_none")
            journal.intend([(review, MoveReason("sent_to_review", label, 0.4, 0.1, "dog", "mixed"))])
            journal.settle([replace(review, progress=MoveProgress.DONE)])
        assigned = replace(move("a"), source="Review/_none")
        journal.intend([(assigned, MoveReason("assigned", "cat"))])
        journal.settle([replace(assigned, progress=MoveProgress.DONE)])
        assert journal.history.guesses() == (1, 1)


@pytest.mark.parametrize("ask", [History.accuracy, lambda history: history.newest_checked("mixed", 9)])
def test_history_checked_images_cost_time_in_proportion(path: Path, ask: Callable[[History], object]) -> None:
    """Four times as many images take four times as long, not sixteen times as long."""
    steps = []
    with Journal(path) as journal:
        for start in (0, 500):
            moves = [move(f"t{n}", f"{n}.jpg", f"c{n % 5}") for n in range(start, 4 * start or 500)]
            journal.intend([(one, MoveReason("filed", "cat", 0.9, 0.2, "dog", "mixed")) for one in moves])
            journal.settle([replace(one, progress=MoveProgress.DONE) for one in moves])
            records = journal.history.moves(Selection())[: len(moves)]
            journal.record_corrections([(one, "dog", f"Dataset/dog/{one.id}.jpg") for one in records[::2]])
            counted: list[int] = []
            journal.connection.set_progress_handler(partial(counted.append, 1), 100)
            ask(journal.history)
            journal.connection.set_progress_handler(None, 0)
            steps.append(len(counted))
    assert steps[1] < 7 * steps[0]


def test_journal_written_before_there_were_checks_is_read_and_completed(path: Path) -> None:
    """Readers find no checks in it, whoever may write it; the next writer makes the table."""
    with Journal(path) as journal:
        filed(journal, "t")
    _execute(path, "DROP TABLE checks")
    with History.open(path) as history:
        assert (history.to_audit(), history.guesses()) == ([1], (0, 0))
        assert history.accuracy()["cat"].checked == 0
    with Journal(path) as journal:
        assert journal.record_checks([(1, True)]) == 1
    with History.open(path) as history:
        assert history.accuracy()["cat"].audited_right == 1


def test_journal_facts_are_kept_and_replaced(path: Path) -> None:
    """A fact outlives the process, the newest value counts."""
    with Journal(path) as journal:
        assert journal.history.fact("generation") is None
        journal.note("generation", "6")
        journal.note("generation", "7")
    with History.open(path) as history:
        assert history.fact("generation") == "7"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.write_bytes(b"no database at all, but long enough to be looked at" * 9), "not a database"),
        (lambda path: _execute(path, "PRAGMA user_version = 99"), "version 99"),
        (lambda path: _execute(path, "PRAGMA application_id = 1"), "not a journal of sortd"),
        (lambda path: _overwrite(path, 2 * 4096), "damaged|malformed"),
    ],
)
def test_journal_unusable_file_is_refused_and_unchanged(path: Path, damage: object, said: str) -> None:
    """Garbage, another version, another program's file and a damaged page are each refused, with the path."""
    with Journal(path) as journal:
        for number in range(50):
            filed(journal, f"t{number}", name=f"{number}.jpg")
    damage(path)  # type: ignore[operator]
    before = path.read_bytes()
    with pytest.raises(JournalError, match=said) as caught:
        Journal(path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("forgery", "said"),
    [
        ("UPDATE moves SET progress = 'flown' WHERE token = 't1'", "record 2 has the unknown value 'flown'"),
        ("UPDATE members SET role = 'cousin' WHERE move = 2", "record 2 has the unknown value 'cousin'"),
        ("UPDATE members SET role = CAST(x'ff' AS TEXT) WHERE move = 2", "UTF-8"),
    ],
)
def test_journal_unknown_values_are_refused_at_opening(path: Path, forgery: str, said: str) -> None:
    """What a move cannot be recovered by is found before the first one, and the way out is the right one."""
    with Journal(path) as journal:
        filed(journal, "t0")
        filed(journal, "t1")
    _execute(path, forgery)
    with pytest.raises(JournalError, match=f"the journal is damaged .*{said}.*move it aside") as caught:
        Journal(path)
    assert "room" not in str(caught.value)
    with History.open(path) as history, pytest.raises(JournalError, match=said):
        history.verify()


@pytest.mark.parametrize(
    ("forgery", "said"),
    [
        ("UPDATE moves SET reason = CAST(x'ff' AS TEXT)", "UTF-8"),
        ("UPDATE moves SET ended_at = NULL", "record 1: it has no time of its end"),
        ("UPDATE members SET moved_size = NULL", "record 1: incomplete stamp"),
        ("DELETE FROM members", "record 1: it has no image"),
    ],
)
def test_history_forged_rows_are_journal_errors(path: Path, forgery: str, said: str) -> None:
    """A row that no sortd writes is named, whoever asks for it."""
    with Journal(path) as journal:
        filed(journal, "t0")
    _execute(path, forgery)
    with Journal(path) as journal, pytest.raises(JournalError, match=f"the journal is damaged .*{said}"):
        journal.history.moves(Selection())


@pytest.mark.parametrize("value", ["many", "1e3", "9" * 30, "9" * 5000, ""])
def test_history_number_of_other_fact_is_a_journal_error(path: Path, value: str) -> None:
    """A fact by which sortd counts is a number of 64 bits, or the journal is damaged."""
    with Journal(path) as journal:
        assert journal.history.number("generation") == 0
        journal.note("generation", "7")
        assert journal.history.number("generation") == 7
        journal.note("generation", value)
        with pytest.raises(JournalError, match=r"the journal is damaged .*the fact generation"):
            journal.history.number("generation")


def test_journal_locked_by_another_program_is_an_error(path: Path) -> None:
    """Neither a full disk nor damage is told of, and once the lock is gone it is opened."""
    with Journal(path) as journal:
        filed(journal, "t0")
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(JournalError, match=r"journal\.db: another program has locked the journal; .*fuser"):
            Journal(path)
        other.execute("ROLLBACK")
    with Journal(path) as journal:
        assert len(journal.history.moves(Selection())) == 1


@pytest.mark.parametrize(
    ("instead", "said"),
    [
        (Path.mkdir, "Is a directory; .* move away the folder"),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    ],
)
def test_journal_error_of_the_system_is_in_the_message(path: Path, instead: Callable[[Path], None], said: str) -> None:
    """SQLite only says that it is unable; the cause and the mend are the system's."""
    path.parent.mkdir()
    instead(path)
    with pytest.raises(JournalError, match=said):
        Journal(path)


def test_journal_without_a_descriptor_left_names_the_limit(path: Path) -> None:
    """Out of descriptors is told as that, with the limit to raise, and nothing of it is kept open."""
    with Journal(path) as journal:
        filed(journal, "t0")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = os.open("/", os.O_PATH)
    os.close(spare)
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare + 1, before[1]))
    try:
        with pytest.raises(JournalError, match=r"Too many open files; .*RLIMIT_NOFILE"):
            Journal(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    with Journal(path) as journal:
        assert len(journal.history.moves(Selection())) == 1


def test_history_missing_journal_is_not_created(path: Path) -> None:
    """Whoever only reads gets a clear error, and makes no file."""
    with pytest.raises(JournalError, match="no journal yet"):
        History.open(path)
    assert not path.parent.exists()


def test_journal_full_file_is_a_journal_error(path: Path) -> None:
    """A full or locked journal is a ``JournalError``, with the path and a way out."""
    with Journal(path) as journal:
        journal.connection.execute("PRAGMA max_page_count = 1")
        with pytest.raises(JournalError, match=r"journal\.db: .*full.* nothing is moved"):
            journal.note("key", "x" * 1_000_000)
        assert journal.history.fact("key") is None


@pytest.mark.parametrize(
    ("column", "value"),
    [("source", b"/etc"), ("source", b"Images/../../etc"), ("destination", b"Clases/cat"), ("source", b"")],
)
def test_journal_invalid_folder_is_refused(path: Path, column: str, value: bytes) -> None:
    """A journal that names a folder outside the four is not acted on."""
    with Journal(path) as journal:
        journal.intend([(move("t"), MoveReason("filed"))])
    _execute(path, f"UPDATE moves SET {column} = ?", value)  # noqa: S608 - our own words
    with Journal(path) as journal, pytest.raises(JournalError, match="is not below one of"):
        journal.history.unfinished()


@pytest.mark.parametrize("name", [b"../a", b"", b"..", b"a/b"])
def test_journal_invalid_name_is_refused(path: Path, name: bytes) -> None:
    """A journal that names a file in another folder is not acted on."""
    with Journal(path) as journal:
        journal.intend([(move("t"), MoveReason("filed"))])
    _execute(path, "UPDATE members SET name = ?", name)
    with Journal(path) as journal, pytest.raises(JournalError, match="not the name of a file"):
        journal.history.unfinished()


def test_journal_every_commit_is_synced(path: Path) -> None:
    """WAL mode with full syncs: without them a commit does not survive a power cut."""
    with Journal(path) as journal, journal.second_connection() as other:
        for connection in (journal.connection, other.connection):
            assert connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
            assert connection.execute("PRAGMA synchronous").fetchone()[0] == 2


def _execute(path: Path, statement: str, *values: object) -> None:
    connection = sqlite3.connect(path)
    connection.execute(statement, values)
    connection.commit()
    connection.close()


def _overwrite(path: Path, start: int) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(os.urandom(4096 * 4))


def test_history_queries_of_each_file_use_an_index(path: Path) -> None:
    """Nearly all moves are done: whoever looks through those takes seconds for a file, once a million were filed."""
    asked: list[str] = []
    with Journal(path) as journal:
        filed(journal, "1" * 16, content="abc")
        history = journal.history
        history._connection.set_trace_callback(asked.append)
        assert history.last_known(STAMP) is not None
        assert history.moved_elsewhere(STAMP, "Dataset/cat", "b.jpg") is not None
        assert history.moved_elsewhere(STAMP, "Dataset/cat", "a.jpg") is None
        assert history.last_known(None, "abc") is not None
        assert history.last_moved("Images", "a.jpg") is not None
        assert history.last_put("Dataset/cat", "a.jpg") is not None
        assert history.last_named("a.jpg", STAMP.size) is not None
        assert history.followers(["belongs to nothing"]) == []
        assert len(history.finished([1, 2])) == 1
        assert history.missing([1, 2]) == [2]
        assert history.held_version("Images/a.jpg") is None
        history._connection.set_trace_callback(None)
        plans = [
            step["detail"]
            for question in asked
            if question.startswith("SELECT")
            for step in history._connection.execute(f"EXPLAIN QUERY PLAN {question}")
        ]
    assert [step for step in plans if step.startswith("SCAN") or "moves_by_outcome" in step] == []
    assert any("members_by_inode" in step for step in plans)


@pytest.mark.parametrize("query", [GIVEN_SINCE, BY_DAY])
def test_history_queries_of_open_pages_read_only_newer_moves(path: Path, query: str) -> None:
    """A page that is open asks once a second; a journal may have a million moves."""
    with Journal(path):
        pass
    with closing(sqlite3.connect(path)) as connection:
        plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {query}", (0.0,))]
    assert [step for step in plan if " moves " in f"{step} "] == ["SEARCH moves USING INDEX moves_by_time (ended_at>?)"]


def test_history_newest_moves_are_read_without_sorting(path: Path) -> None:
    """Fifty of a million: whoever sorts them first takes seconds."""
    asked: list[str] = []
    with Journal(path) as journal:
        filed(journal, "1" * 16)
        history = journal.history
        history._connection.set_trace_callback(asked.append)
        for selection in (Selection(limit=50), Selection(undoable=True, limit=50), Selection(run="other", limit=50)):
            history.moves(selection)
        history._connection.set_trace_callback(None)
        questions = [question for question in asked if "LIMIT" in question]
        plans = [
            [step["detail"] for step in history._connection.execute(f"EXPLAIN QUERY PLAN {question}")]
            for question in questions
        ]
    assert plans == [["SCAN moves"]] * 3  # by its key, from the end on
