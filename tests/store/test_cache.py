"""The cache gives back what was put in, or nothing; never garbage, and never an error."""

import os
import random
import resource
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

from sortd.arrays import FloatArray
from sortd.classify.build import build
from sortd.classify.prototypes import PrototypeSet
from sortd.classify.types import DecisionSettings, SupportSet
from sortd.events import Stamp, signed
from sortd.store.cache import MAGIC, Cache, packed

ENCODER = "clip-512-torch-0"
STAMP = Stamp(device=1, inode=2, size=3, mtime_ns=4_000_000_005)


def embeddings(count: int, *, seed: int = 0, dimensions: int = 512) -> dict[str, FloatArray]:
    """Random unit rows under random contents."""
    chance = np.random.default_rng(seed)
    rows = chance.standard_normal((count, dimensions)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return {chance.bytes(32).hex(): row for row in rows}


def prototypes(labels: tuple[str, ...] = ("cross", "torx", "\udcff")) -> PrototypeSet:
    """A small set as the rebuild makes it, one class with a name that is no UTF-8."""
    rows = np.stack(list(embeddings(6, dimensions=8).values()))
    support = SupportSet(
        labels=labels,
        embeddings=rows,
        classes=np.array([0, 0, 1, 1, 2, 2], np.int64),
        sources=tuple("abcdef"),
        encoder_id=ENCODER,
    )
    return build(support, DecisionSettings(), generation=7)


def same(first: PrototypeSet | None, second: PrototypeSet) -> bool:
    """Are two sets equal in every array and word?"""
    if first is None:
        return False
    (arrays, metadata), (wanted, expected) = first.to_arrays(), second.to_arrays()
    is_equal = {name: np.array_equal(arrays[name], wanted[name]) for name in wanted}
    return metadata == expected and arrays.keys() == wanted.keys() and all(is_equal.values())


@pytest.fixture
def reports() -> list[str]:
    """What the cache complained of."""
    return []


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the cache lies."""
    return tmp_path / "cache" / "embeddings.sqlite"


@pytest.fixture
def cache(path: Path, reports: list[str]) -> Iterator[Cache]:
    """An open cache in a folder that did not exist."""
    with Cache(path, report=reports.append) as opened:
        yield opened


class TestWhatIsRemembered:
    """Embeddings, contents and prototypes come back as they were."""

    def test_cache_embeddings_are_identical_after_a_restart(self, cache: Cache, path: Path) -> None:
        """A row read by another process's cache equals the one put in, and cannot be written to."""
        known = embeddings(3)
        cache.remember_embeddings(known, ENCODER)
        cache.close()
        with Cache(path) as again:
            found = again.embeddings([*known, "00" * 32], ENCODER)
        assert found.keys() == known.keys()
        assert all(np.array_equal(found[content], known[content]) for content in known)
        assert all(row.dtype == np.float32 and not row.flags.writeable for row in found.values())

    def test_cache_encoders_are_separate(self, cache: Cache) -> None:
        """An embedding is known to the encoder that made it and to no other."""
        known = embeddings(1)
        cache.remember_embeddings(known, ENCODER)
        assert cache.embeddings(known, "another") == {}
        cache.remember_embeddings({key: -row for key, row in known.items()}, "another")
        ((key, row),) = known.items()
        assert np.array_equal(cache.embeddings([key], ENCODER)[key], row)
        assert np.array_equal(cache.embeddings([key], "another")[key], -row)

    def test_cache_content_of_rewrite_with_old_mtime_is_unknown(self, cache: Cache) -> None:
        """Only the time of change tells; it counts where both sides know it."""
        known, rewritten, unknown = (Stamp(1, 2, 3, 4_567, ctime_ns) for ctime_ns in (10, 11, 0))
        cache.remember_contents({("/in/a.jpg", known): "ab" * 32})
        images = [("/in/a.jpg", one) for one in (known, rewritten, unknown)]
        assert cache.contents(images) == {images[0]: "ab" * 32, images[2]: "ab" * 32}

    def test_cache_of_the_previous_version_is_kept(self, path: Path, reports: list[str]) -> None:
        """Its contents are believed, and new ones stand beside them with their time of change."""
        with Cache(path) as cache:
            cache.remember_embeddings(embeddings(2), ENCODER)
            cache.remember_contents({("/in/a.jpg", STAMP): "ab" * 32})
        with closing(sqlite3.connect(path)) as database:
            database.execute("ALTER TABLE contents DROP COLUMN ctime_ns")
            database.execute("PRAGMA user_version = 1")
        changed = Stamp(1, 2, 3, 4_567, 10)
        with Cache(path, report=reports.append) as cache:
            assert cache.facts().embeddings == 2
            cache.remember_contents({("/in/b.jpg", changed): "cd" * 32})
            images = [("/in/a.jpg", STAMP), ("/in/b.jpg", changed)]
            assert cache.contents(images) == {images[0]: "ab" * 32, images[1]: "cd" * 32}
        assert reports == []

    def test_cache_content_is_found_by_stamp(self, cache: Cache) -> None:
        """An unchanged file, renamed or not, needs no second reading; a changed one does."""
        cache.remember_contents({("/in/a.jpg", STAMP): "ab" * 32})
        changed = Stamp(STAMP.device, STAMP.inode, STAMP.size + 1, STAMP.mtime_ns)
        images = [("/in/a.jpg", STAMP), ("/out/b.jpg", STAMP), ("/in/a.jpg", changed)]
        assert cache.contents(images) == {images[0]: "ab" * 32, images[1]: "ab" * 32}

    @pytest.mark.parametrize(
        "stamp",
        [
            Stamp(1, 2, 3, signed(15_000_000_000 * 10**9)),  # the year 2445, which ext4 and XFS hold
            Stamp(1, 2, 3, signed(-62_135_596_800 * 10**9)),  # the year 1
            Stamp(1, 2, 3, signed(2**55 * 10**9)),  # as tmpfs takes it
            Stamp(2**64 - 1, 2**64 - 2, 2**63 - 1, -(2**63)),
        ],
    )
    def test_cache_stamp_beyond_what_sqlite_holds_is_remembered(
        self, cache: Cache, reports: list[str], stamp: Stamp
    ) -> None:
        """Whatever time, size and inode number a file has, its content is known again, and another version's is not."""
        cache.remember_contents({("/in/a.jpg", stamp): "ab" * 32})
        other = Stamp(stamp.device, stamp.inode, stamp.size, stamp.mtime_ns + 1)
        known = ("/in/a.jpg", stamp)
        assert cache.contents([known, ("/in/a.jpg", other)]) == {known: "ab" * 32}
        assert not reports

    def test_cache_renamed_file_with_whole_seconds_is_unknown(self, cache: Cache) -> None:
        """Where a file system keeps seconds only, an inode used again could pass for the file before it."""
        coarse = Stamp(1, 2, 3, 4_000_000_000)
        cache.remember_contents({("/in/a.bmp", coarse): "ab" * 32})
        assert cache.contents([("/in/a.bmp", coarse), ("/in/b.bmp", coarse)]) == {("/in/a.bmp", coarse): "ab" * 32}

    def test_cache_name_that_is_not_utf8_is_stored(self, cache: Cache) -> None:
        """Paths are bytes in truth."""
        image = (os.fsdecode(b"/in/\xff\xfe\n.jpg"), Stamp(1, 2, 3, 4_000_000_000))
        cache.remember_contents({image: "cd" * 32})
        assert cache.contents([image]) == {image: "cd" * 32}

    def test_cache_prototypes_are_identical_after_a_restart(self, cache: Cache, path: Path) -> None:
        """Arrays, labels that are no UTF-8, settings and calibration survive a restart; the newest set wins."""
        cache.prototypes.write("Tornillos", prototypes(("a", "b", "c")))
        cache.prototypes.write("Tornillos", prototypes())
        cache.close()
        with Cache(path) as again:
            assert same(again.prototypes.read("Tornillos"), prototypes())
            assert again.prototypes.read("Ropa") is None

    def test_cache_empty_query_returns_nothing(self, cache: Cache) -> None:
        """Empty batches are no special case."""
        cache.remember_embeddings({}, ENCODER)
        cache.remember_contents({})
        assert cache.embeddings([], ENCODER) == {}
        assert cache.contents([]) == {}


class TestDamage:
    """A flipped byte means that it is computed again."""

    def test_cache_damaged_row_is_ignored(self, cache: Cache, path: Path) -> None:
        """The others are still known, and writing the row again heals it."""
        known = embeddings(5)
        cache.remember_embeddings(known, ENCODER)
        damaged = next(iter(known))
        vector = bytearray(known[damaged].tobytes())
        vector[100] ^= 1
        with sqlite3.connect(path) as database:
            database.execute(
                "UPDATE embeddings SET vector = ? WHERE content = ?", (bytes(vector), bytes.fromhex(damaged))
            )
        database.close()
        assert cache.embeddings(known, ENCODER).keys() == known.keys() - {damaged}
        cache.remember_embeddings({damaged: known[damaged]}, ENCODER)
        assert cache.embeddings(known, ENCODER).keys() == known.keys()

    @pytest.mark.parametrize(
        "damage",
        [
            "UPDATE contents SET content = 7",
            "UPDATE contents SET path = NULL",
            "UPDATE contents SET content = 'text'",
            "UPDATE embeddings SET vector = 'text'",
            "UPDATE embeddings SET vector = 7.5",
            "UPDATE embeddings SET content = 'text'",
        ],
    )
    def test_cache_row_of_another_type_is_no_error(self, path: Path, reports: list[str], damage: str) -> None:
        """A flipped bit makes a number of a text: as if it were not there, or the file is set aside."""
        ((content, row),) = embeddings(1).items()
        image = ("/in/a.jpg", Stamp(1, 2, 3, 4_000_000_000))
        with Cache(path, report=reports.append) as cache:
            cache.remember_contents({image: content})
            cache.remember_embeddings({content: row}, ENCODER)
        with closing(sqlite3.connect(path)) as database:
            with suppress(sqlite3.IntegrityError):
                database.execute(damage)
            database.commit()
        with Cache(path, report=reports.append) as cache:
            assert cache.contents([image]) in ({}, {image: content})
            found = cache.embeddings([content], ENCODER)
            assert all(np.array_equal(known, row) for known in found.values())
            cache.remember_contents({image: content})
            assert cache.contents([image]) == {image: content}

    def test_cache_row_under_another_key_is_ignored(self, cache: Cache, path: Path) -> None:
        """The checksum covers the content's hash: an embedding that slipped to another image is no embedding of it."""
        known = embeddings(1)
        cache.remember_embeddings(known, ENCODER)
        with sqlite3.connect(path) as database:
            database.execute("UPDATE embeddings SET content = ?", (bytes(32),))
        database.close()
        assert cache.embeddings(["00" * 32], ENCODER) == {}

    @pytest.mark.parametrize("seed", range(12))
    def test_cache_random_damage_returns_no_wrong_values(self, path: Path, reports: list[str], seed: int) -> None:
        """Whatever bytes of the file are flipped, each row read is right or absent, and the cache works on."""
        known = embeddings(40, dimensions=64)
        with Cache(path) as cache:
            cache.remember_embeddings(known, ENCODER)
        content = bytearray(path.read_bytes())
        chance = random.Random(seed)  # noqa: S311 - damage need not be secret
        for _ in range(1 + 40 * (seed % 3)):
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        with Cache(path, report=reports.append) as cache:
            found = cache.embeddings(known, ENCODER)
            assert all(np.array_equal(row, known[key]) for key, row in found.items())
            cache.remember_embeddings(known, ENCODER)
            again = cache.embeddings(known, ENCODER)
            assert all(np.array_equal(row, known[key]) for key, row in again.items())

    @pytest.mark.parametrize("content", [b"not a database at all, but long enough to be read as one" * 50, b"SQLite"])
    def test_cache_other_file_is_renamed(self, path: Path, reports: list[str], content: bytes) -> None:
        """It is kept under another name, said so once, and a new cache begun."""
        path.parent.mkdir()
        path.write_bytes(content)
        with Cache(path, report=reports.append) as cache:
            cache.remember_embeddings(embeddings(2), ENCODER)
            assert cache.facts().embeddings == 2
        assert path.with_name("embeddings.sqlite.broken").read_bytes() == content
        assert len(reports) == 1
        assert str(path) in reports[0]

    def test_cache_of_another_version_is_renamed(self, path: Path, reports: list[str]) -> None:
        """Tables of a later sortd are not guessed at."""
        with Cache(path) as cache:
            cache.remember_embeddings(embeddings(2), ENCODER)
        database = sqlite3.connect(path)
        database.execute("PRAGMA user_version = 99")
        database.close()
        with Cache(path, report=reports.append) as cache:
            assert cache.facts().embeddings == 0
        assert "schema 99" in reports[0]

    @pytest.mark.parametrize("position", [0, 20, 84, 90, 400, -1])
    def test_cache_damaged_prototypes_are_ignored(
        self, cache: Cache, path: Path, reports: list[str], position: int
    ) -> None:
        """A flipped byte anywhere in the file means a rebuild."""
        cache.prototypes.write("Tornillos", prototypes())
        (file,) = (path.parent / "prototypes").iterdir()
        content = bytearray(file.read_bytes())
        content[position] ^= 4
        file.write_bytes(content)
        assert cache.prototypes.read("Tornillos") is None
        assert str(file) in reports[0]

    def test_cache_truncated_prototypes_are_ignored(self, cache: Cache, path: Path) -> None:
        """A file that a crash cut short, at any length, means a rebuild."""
        cache.prototypes.write("Tornillos", prototypes())
        (file,) = (path.parent / "prototypes").iterdir()
        content = file.read_bytes()
        for length in range(0, len(content), 37):
            file.write_bytes(content[:length])
            assert cache.prototypes.read("Tornillos") is None

    def test_cache_prototypes_of_another_format_are_reported(
        self, cache: Cache, path: Path, reports: list[str]
    ) -> None:
        """An update is no damage: what is told is that another version wrote them."""
        cache.prototypes.write("Tornillos", prototypes())
        (file,) = (path.parent / "prototypes").iterdir()
        file.write_bytes(file.read_bytes().replace(MAGIC, b"sortd prototypes 1", 1))
        assert cache.prototypes.read("Tornillos") is None
        assert "another version of sortd wrote them" in reports[-1]

    def test_cache_prototypes_of_an_older_version_are_ignored(
        self, cache: Cache, path: Path, reports: list[str]
    ) -> None:
        """Whole, but of another shape: they are built anew."""
        cache.prototypes.write("Tornillos", prototypes())
        (file,) = (path.parent / "prototypes").iterdir()
        older: list[dict[str, object]] = [{}, {"labels": 3}, {"settings": []}]
        for metadata in older:
            file.write_bytes(packed({"old": np.zeros(3, np.float32)}, metadata))
            assert cache.prototypes.read("Tornillos") is None
        assert str(file) in reports[0]

    def test_packed_python_objects_are_refused(self) -> None:
        """Nothing is pickled, so an array of objects is refused when it is written, not when it is read."""
        with pytest.raises(SafetensorError, match="dtype"):
            packed({"objects": np.array([object()])}, {})


class TestTaken:
    """The cache may be deleted at any time, and the disk may refuse."""

    def test_cache_deleted_while_open_is_created_again(self, cache: Cache, path: Path, reports: list[str]) -> None:
        """Its whole folder may go; the next write makes another."""
        known = embeddings(3)
        cache.remember_embeddings(known, ENCODER)
        for file in path.parent.iterdir():
            file.unlink()
        path.parent.rmdir()
        assert cache.embeddings(known, ENCODER) == {}
        cache.remember_embeddings(known, ENCODER)
        assert cache.embeddings(known, ENCODER).keys() == known.keys()
        cache.prototypes.write("Tornillos", prototypes())
        assert same(cache.prototypes.read("Tornillos"), prototypes())
        assert path.exists()
        assert reports == []

    @pytest.mark.parametrize("suffix", ["", "-wal", "-shm"])
    def test_cache_deletion_of_one_file_is_no_error(self, path: Path, reports: list[str], suffix: str) -> None:
        """Without one of the files that make it up, rows are right or absent and writing works."""
        known = embeddings(30)
        with Cache(path, report=reports.append) as cache:
            cache.remember_embeddings(known, ENCODER)
            Path(f"{path}{suffix}").unlink()
            more = embeddings(30, seed=1)
            cache.remember_embeddings(more, ENCODER)
            found = cache.embeddings({**known, **more}, ENCODER)
            assert more.keys() <= found.keys()
            assert all(np.array_equal(row, {**known, **more}[key]) for key, row in found.items())

    def test_cache_overwritten_while_open_is_replaced(self, cache: Cache, path: Path, reports: list[str]) -> None:
        """Garbage written into the open file is noticed, told and left behind."""
        known = embeddings(200)
        cache.remember_embeddings(known, ENCODER)
        with sqlite3.connect(path) as database:
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        database.close()
        with path.open("r+b") as file:
            file.write(os.urandom(300_000))
        found = cache.embeddings(known, ENCODER)
        assert all(np.array_equal(row, known[key]) for key, row in found.items())
        cache.remember_embeddings(known, ENCODER)
        assert cache.embeddings(known, ENCODER).keys() == known.keys()
        assert all("damaged" in report for report in reports)

    def test_cache_missing_folder_is_reported_once(self, tmp_path: Path, reports: list[str]) -> None:
        """Where a file stands in the way, everything is answered as unknown."""
        blocker = tmp_path / "cache"
        blocker.write_text("in the way")
        with Cache(blocker / "embeddings.sqlite", report=reports.append) as cache:
            cache.remember_embeddings(embeddings(1), ENCODER)
            cache.remember_contents({("/a", STAMP): "ab" * 32})
            assert cache.embeddings(embeddings(1), ENCODER) == {}
            assert cache.contents([("/a", STAMP)]) == {}
            assert cache.facts().embeddings == 0
            assert len(reports) == 1
            assert "works without it" in reports[0]
            cache.prototypes.write("Tornillos", prototypes())
            assert cache.prototypes.read("Tornillos") is None
        assert all(str(tmp_path) in report for report in reports)

    def test_cache_full_disk_is_reported_once(self, cache: Cache, reports: list[str]) -> None:
        """What is there is still read, nothing more is written, and when there is room it is."""
        known = embeddings(3)
        cache.remember_embeddings(known, ENCODER)
        database = cache._open()
        (pages,) = database.execute("PRAGMA page_count").fetchone()
        database.execute(f"PRAGMA max_page_count = {pages}")  # SQLite says SQLITE_FULL beyond it
        more = embeddings(500, seed=1)
        for _ in range(3):
            cache._open().execute(f"PRAGMA max_page_count = {pages}")
            cache.remember_embeddings(more, ENCODER)
            assert cache.embeddings(known, ENCODER).keys() == known.keys()
        assert len(reports) == 1
        assert "full" in reports[0]
        cache.remember_embeddings(more, ENCODER)
        assert cache.embeddings(more, ENCODER).keys() == more.keys()

    def test_cache_full_disk_is_no_error(self, cache: Cache, path: Path, reports: list[str]) -> None:
        """Refused by the kernel in the middle of a write, rows and prototypes from before are still read."""
        known = embeddings(3)
        cache.remember_embeddings(known, ENCODER)
        cache.prototypes.write("Tornillos", prototypes(("a", "b", "c")))
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            cache.remember_embeddings(embeddings(500, seed=1), ENCODER)
            cache.prototypes.write("Tornillos", prototypes())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert cache.embeddings(known, ENCODER).keys() == known.keys()
        assert same(cache.prototypes.read("Tornillos"), prototypes(("a", "b", "c")))
        assert len(list((path.parent / "prototypes").iterdir())) == 1
        assert len(reports) == 2

    def test_cache_close_is_idempotent(self, cache: Cache) -> None:
        """Whoever made it closes it, and a with statement does too."""
        cache.close()
        cache.close()


class TestSize:
    """It stays within its limit, and it is fast."""

    def test_cache_above_the_limit_least_recently_used_rows_are_removed(self, path: Path) -> None:
        """What was asked for today outlives what nobody asked for."""
        day = [1.0]
        with Cache(path, max_bytes=400_000, clock=lambda: day[0] * 86_400) as cache:
            old, wanted = embeddings(60, seed=1), embeddings(60, seed=2)
            cache.remember_embeddings({**old, **wanted}, ENCODER)
            day[0] = 2.0
            cache.embeddings(wanted, ENCODER)
            day[0] = 3.0
            for seed in range(3, 30):
                cache.remember_embeddings(embeddings(2, seed=seed), ENCODER)
            assert cache.facts().size_bytes <= 400_000
            assert len(cache.embeddings(wanted, ENCODER)) > len(cache.embeddings(old, ENCODER))

    def test_cache_contents_without_embeddings_are_pruned(self, path: Path) -> None:
        """Pruning leaves no stamp that leads nowhere."""
        with Cache(path, max_bytes=100_000) as cache:
            for seed in range(8):
                rows = embeddings(20, seed=seed)
                cache.remember_contents(
                    {(f"/{key}", Stamp(1, index + 100 * seed, 1, 1)): key for index, key in enumerate(rows)}
                )
                cache.remember_embeddings(rows, ENCODER)
            facts = cache.facts()
        assert facts.contents <= facts.embeddings < 160

    def test_cache_many_rows_need_few_queries(self, cache: Cache) -> None:
        """A restart with 10,000 references reads their rows in a few statements, not in one for each."""
        known = embeddings(10_000)
        images = {(f"/r/{key}", Stamp(1, index, 1, 1)): key for index, key in enumerate(known)}
        cache.remember_embeddings(known, ENCODER)
        cache.remember_contents(images)
        contents = list(cache.contents(list(images)).values())
        statements: list[str] = []
        assert cache._database is not None
        cache._database.set_trace_callback(statements.append)
        assert len(cache.embeddings(contents, ENCODER)) == 10_000
        cache._database.set_trace_callback(None)
        assert 0 < len(statements) < 200


def test_cache_other_process_reads_and_writes(cache: Cache, path: Path, reports: list[str]) -> None:
    """The daemon and a command share the file: both write, nobody waits for long, every row of both is there."""
    theirs, ours = embeddings(200, seed=1), embeddings(200, seed=2)
    program = """
import sys
from pathlib import Path
from tests.store.test_cache import ENCODER, embeddings
from sortd.store.cache import Cache, packed
with Cache(Path(sys.argv[1])) as cache:
    for key, row in embeddings(200, seed=1).items():
        cache.remember_embeddings({key: row}, ENCODER)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    with subprocess.Popen([sys.executable, "-c", program, str(path)], env=environment) as process:
        while process.poll() is None:
            for key, row in ours.items():
                cache.remember_embeddings({key: row}, ENCODER)
    assert process.returncode == 0
    assert cache.embeddings({**theirs, **ours}, ENCODER).keys() == theirs.keys() | ours.keys()
    assert reports == []


def test_cache_encoder_row_lost_while_open_is_written_again(cache: Cache, path: Path) -> None:
    """A file that is restored in place loses the row of an encoder; what is stored later is found after a restart."""
    first, second = embeddings(1), embeddings(1, seed=1)
    cache.remember_embeddings(first, ENCODER)
    with closing(sqlite3.connect(path)) as other, other:
        other.execute("DELETE FROM encoders")
    cache.remember_embeddings(second, ENCODER)
    with Cache(path) as reopened:
        assert list(reopened.embeddings(second, ENCODER)) == list(second)
