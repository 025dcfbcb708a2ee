"""Decisions on the images of a part: hostile files, files that change, decoders that end, objects of a store."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sortd.api.classifier import Classifier
from sortd.api.images import LoadedEncoder
from sortd.bulk.decide import DecideSettings, PartDecider
from sortd.bulk.plan import DECISIONS_SCHEMA, MANIFEST, make_plan, part_name, parts_of, version_id
from sortd.bulk.storage import StoredFile, list_images, read_bytes, uri_of
from sortd.commands.console import load_config
from sortd.config import Config
from sortd.errors import ConfigError, DataError, DestinationError, ModelError
from sortd.files import sha256_of
from tests import bombs
from tests.bombs import png, write_hostile_files
from tests.bulk.bulk_run import draw_images, load_fake, save_classifier, settings_for
from tests.daemon_process import picture
from tests.fake_encoder import FakeEncoder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved classifier of three colours."""
    return save_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def decider(classifier: Path) -> Iterator[PartDecider]:
    """What decides, with one decoding process."""
    with PartDecider(settings_for(classifier, max_bytes=200_000), load=load_fake) as decider:
        yield decider


def planned(*sources: object) -> list[dict[str, Any]]:
    """Return rows of a manifest."""
    images = [image for source in sources for image in list_images(str(source), report=lambda _: None)]
    return [row_of(image) for image in images]


def row_of(image: StoredFile) -> dict[str, Any]:
    """Return the row of an image in a manifest."""
    return {"id": version_id(image), "uri": image.uri, "size": image.size, "mtime_ns": image.mtime_ns}


def by_name(decided: pa.Table) -> dict[str, dict[str, Any]]:
    """Return decisions by the name of the file."""
    return {os.path.basename(row["uri"]): row for row in decided.to_pylist()}


def test_decisions_are_those_of_the_library(decider: PartDecider, classifier: Path, tmp_path: Path) -> None:
    """Label, numbers and reason equal those of ``Classifier.classify``; hash and embedding are of the file."""
    draw_images(tmp_path / "photos", 20)
    table = decider.decide(planned(tmp_path / "photos"))
    assert table.schema.equals(DECISIONS_SCHEMA)
    assert table["id"].to_pylist() == sorted(table["id"].to_pylist())
    found = by_name(table)
    paths = sorted((tmp_path / "photos").iterdir())
    with LoadedEncoder(FakeEncoder()) as encoder:
        rows = encoder.encode_images(paths)
        decisions = Classifier.load(classifier, encoder=encoder).classify_rows(rows)
    for path, vector, decision in zip(paths, rows, decisions, strict=True):
        row = found[path.name]
        assert (row["label"], row["reason"]) == (decision.label, decision.reason)
        numbers = [row["probability"], row["margin"], row["familiarity"]]
        assert numbers == pytest.approx(
            [decision.probability, decision.margin, decision.familiarity], abs=1e-4
        )  # the batches are others
        assert row["sha256"] == sha256_of(path)
        assert np.allclose(row["embedding"], vector, atol=1e-3)
        assert row["encoder_id"] == "fake-48"
    assert {row["label"] for row in found.values()} == {"red", "green", "blue", None}


def test_hostile_files_have_their_reasons_and_the_rest_is_decided(
    decider: PartDecider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file has one row, whatever is in it; none raises. The corpora are decoded in tests of the pool."""
    monkeypatch.setattr(bombs, "CORPUS", tmp_path / "none")
    folder = tmp_path / "hostile"
    folder.mkdir()
    sound = write_hostile_files(folder)
    draw_images(folder, 3)
    rows = planned(folder)
    table = decider.decide(rows)
    assert sorted(table["id"].to_pylist()) == sorted(row["id"] for row in rows)
    found = by_name(table)
    for row in found.values():
        assert (row["sha256"] is None) == (row["reason"] or "").startswith("unreadable: ")
        assert (row["sha256"] is None) == (row["probability"] is None) == (row["embedding"] is None)
    assert all(found[path.name]["sha256"] == sha256_of(path) for path in sound)
    assert [found[f"00{number}.png"]["label"] for number in range(3)][1:] == ["green", "blue"]
    assert found["wide.png"]["sha256"] is None


def test_files_that_are_not_as_planned_are_not_decided(decider: PartDecider, tmp_path: Path) -> None:
    """A file that changed, went away or became another kind of file since has a reason that says so."""
    draw_images(tmp_path, 5)
    rows = planned(tmp_path)
    (tmp_path / "000.png").write_bytes((tmp_path / "001.png").read_bytes())
    (tmp_path / "002.png").unlink()
    os.utime(tmp_path / "003.png", ns=(1, 1))
    (tmp_path / "004.png").unlink()
    (tmp_path / "004.png").symlink_to("001.png")
    found = by_name(decider.decide(rows))
    assert found["001.png"]["label"] == "green"
    for name in ("000.png", "003.png"):
        assert found[name]["reason"] == "unreadable: it has changed since it was planned"
    for name in ("002.png", "004.png"):
        assert found[name]["reason"] == "unreadable: it does not exist any more"


def test_uri_that_no_file_can_have_is_not_decided(decider: PartDecider, tmp_path: Path) -> None:
    """It costs one row: a null byte, and what pyarrow refuses."""
    draw_images(tmp_path, 1)
    strange = [row_of(StoredFile(uri, 1, 1)) for uri in ("/a\0b.png", "file:///%00.png", "s3://bucket/a//b.png")]
    decided = by_name(decider.decide([*strange, *planned(tmp_path)]))
    assert [row["sha256"] is None for row in decided.values()].count(True) == len(strange)
    assert decided["000.png"]["sha256"]


def test_name_that_is_not_utf8_is_decided(decider: PartDecider, tmp_path: Path) -> None:
    """Its URI leads to it."""
    path = os.fsencode(tmp_path) + b"/\xff.png"
    picture("red", 7, patches=40).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", path)
    (row,) = decider.decide(planned(tmp_path)).to_pylist()
    assert (row["uri"], row["label"]) == (uri_of(os.fsdecode(path)), "red")


def test_objects_of_a_store_are_decided(decider: PartDecider, tmp_path: Path) -> None:
    """They are decided as files are; one over the limit, one that is gone and one that is no image have reasons."""
    draw_images(tmp_path, 4)
    store = fsspec.filesystem("memory")
    store.pipe({f"/objects/{path.name}": path.read_bytes() for path in tmp_path.iterdir()})
    store.pipe({"/objects/large.png": bytes(200_001), "/objects/gone.png": b"x", "/objects/text.png": b"no image"})
    rows = planned("memory:///objects")
    store.rm("/objects/gone.png")
    store.pipe("/objects/003.png", b"another")
    found = by_name(decider.decide(rows))
    files = by_name(decider.decide(planned(tmp_path)))
    same = ("label", "probability", "reason", "embedding", "sha256")
    for name in ("001.png", "002.png"):
        assert [found[name][key] for key in same] == [files[name][key] for key in same]
    assert "limit" in found["large.png"]["reason"]
    assert found["003.png"]["reason"] == "unreadable: it has changed since it was planned"
    assert all(found[name]["reason"].startswith("unreadable: ") for name in ("gone.png", "text.png"))
    assert not os.listdir(decider._scratch.name)


def test_image_that_ends_its_decoder_costs_one_image(classifier: Path, tmp_path: Path) -> None:
    """One that takes too long is refused after two processes; the images behind it are decided."""
    draw_images(tmp_path, 9)
    (tmp_path / "slow.png").write_bytes(png(7000, 7000, depth=16, channels=4))
    with PartDecider(settings_for(classifier, timeout_seconds=0.1), load=load_fake) as decider:
        found = by_name(decider.decide(planned(tmp_path)))
    assert "longer than 0.1 s" in found["slow.png"]["reason"]
    assert sum(row["sha256"] is not None for row in found.values()) == 9


def test_decoder_that_is_killed_costs_no_image(classifier: Path, tmp_path: Path) -> None:
    """As by the out-of-memory killer: another process decodes its images."""
    draw_images(tmp_path, 20)
    with PartDecider(settings_for(classifier), load=load_fake) as decider:
        expected = decider.decide(planned(tmp_path))
        (pid,) = decider._pool.process_ids
        os.kill(pid, signal.SIGSTOP)
        killer = threading.Timer(0.2, os.kill, (pid, signal.SIGKILL))
        killer.start()
        assert decider.decide(planned(tmp_path)).equals(expected)
        killer.join()


def test_part_that_is_decided_is_left(classifier: Path, tmp_path: Path) -> None:
    """A part has its file once, and a second try does nothing."""
    draw_images(tmp_path / "photos", 3)
    run = tmp_path / "run"
    make_plan(os.fspath(tmp_path / "photos"), run)
    (run / "decisions").mkdir()
    with PartDecider(settings_for(classifier), load=load_fake) as decider:
        result = decider.decide_part(run, 0)
        assert result is not None
        assert (result["images"], result["filed"], result["unreadable"]) == (3, 2, 0)
        before = (run / "decisions" / part_name(0)).stat()
        assert decider.decide_part(run, 0) is None
        assert (run / "decisions" / part_name(0)).stat() == before
        with pytest.raises(DataError, match="part-00001"):
            decider.decide_part(run, 1)
        (run / MANIFEST / part_name(2)).write_bytes(b"PAR1 no table")
        with pytest.raises(DataError, match="part-00002"):
            decider.decide_part(run, 2)
        pq.write_table(pa.table({"id": [1]}), run / MANIFEST / part_name(3))
        with pytest.raises(DataError, match="part-00003"):
            decider.decide_part(run, 3)


def test_decisions_that_cannot_be_written_are_an_error(classifier: Path, tmp_path: Path) -> None:
    """The message names the file, and nothing of its name is left."""
    draw_images(tmp_path / "photos", 1)
    run = tmp_path / "run"
    make_plan(os.fspath(tmp_path / "photos"), run)
    with (
        PartDecider(settings_for(classifier), load=load_fake) as decider,
        pytest.raises(DestinationError, match="part-00000"),
    ):
        decider.decide_part(run, 0)  # there is no folder
    assert not parts_of(run / "decisions")


class ZeroEncoder(FakeEncoder):
    """Returns zeros, as a device in a bad state does."""

    def encode_images(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return zeros (B, 48)."""
        return np.zeros((len(pixels), self.dimensions), np.float32)


def test_rows_that_are_no_embeddings_are_an_error(classifier: Path, tmp_path: Path) -> None:
    """Nothing is decided on them."""
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")

    def load(_: Config) -> FakeEncoder:
        return ZeroEncoder()

    with (
        PartDecider(settings_for(classifier), load=load) as decider,
        pytest.raises(ModelError, match="invalid embeddings"),
    ):
        decider.decide(planned(tmp_path))


def test_encoder_service_is_refused(classifier: Path) -> None:
    """Its batches are not those of the manifest."""
    config = load_config(None).model_copy(update={"backend": "socket:/run/encoder.sock"})
    with pytest.raises(ConfigError, match="encoder service"):
        DecideSettings.of(config, classifier, model=None, processors=1, batch_size=8)


def test_read_bytes_of_a_file_is_limited(tmp_path: Path) -> None:
    """A file that is larger than allowed is not read into memory."""
    (tmp_path / "a.png").write_bytes(bytes(11))
    with pytest.raises(OSError, match="larger"):
        read_bytes(os.fspath(tmp_path / "a.png"), limit=10)
