"""Decided images moved to their classes: files by the mover, objects within their store; repeated, refused, undone."""

import math
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sortd.api.dataset import open_dataset
from sortd.bulk.engines import decide_shard
from sortd.bulk.plan import make_plan
from sortd.bulk.transfers import TransferJournal
from sortd.core.guard import GuardState
from sortd.daemon.dataset_lock import lock_dataset
from sortd.layout import Layout
from sortd.store.records import MoveProgress
from tests.bulk.bulk_run import decisions_of, draw_images, load_fake, save_classifier, settings_for
from tests.bulk.decided_run import BUCKET, delete_all, objects, s3_server, write_run
from tests.command_line import Ran, sortd, write_config
from tests.daemon_process import make_dataset, picture, running, tree

LABELS = {"a.png": "red", "b.png": "green", "c.png": None, "d.png": "red"}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A dataset with four images, one with a sidecar, and a run ``run`` beside it that has decided about them."""
    write_config(tmp_path)
    dataset = make_dataset(tmp_path / "Data")
    Layout(dataset).make()
    for number, name in enumerate(LABELS):
        picture("red", 700 + number).save(dataset / "Images" / name)
    (dataset / "Images" / "a.xmp").write_text("<x:xmpmeta/>")
    images = dataset / "Images"
    write_run(tmp_path / "run", str(images), {str(images / name): label for name, label in LABELS.items()})
    return dataset


def bulk(site: Path, command: str, *arguments: object) -> Ran:
    """Run a command of ``sortd bulk`` on the run of a site."""
    folder = site.parents[1]
    return sortd("bulk", command, folder / "run", "--config", folder / "config.yaml", "--json", *arguments)


def places(site: Path) -> dict[str, str]:
    """Return the folder of each image outside of Clases/, by its name."""
    areas = ("Images", "Dataset", "Review", "Rejected")
    return {
        path.name: str(path.parent.relative_to(site))
        for area in areas
        for path in (site / area).rglob("*")
        if path.is_file()
    }


FILED = {
    "a.png": "Dataset/red",
    "a.xmp": "Dataset/red",
    "b.png": "Dataset/green",
    "c.png": "Images",
    "d.png": "Dataset/red",
}


class TestFiles:
    """Images in ``Images/`` of a dataset on this disk."""

    def test_apply_files_assigned_images_and_leaves_the_others(self, site: Path) -> None:
        """The dry run says what the run does; the journal has each decision; a repetition moves nothing."""
        before = tree(site)
        planned = bulk(site, "apply", "--dry-run")
        assert (planned.code, tree(site)) == (0, before)
        ran = bulk(site, "apply")
        assert ran.code == 0
        assert ran.facts["moved"] == planned.facts["moved"] == {"green": 1, "red": 2}
        assert ran.facts["abstained"] == {"margin": 1}
        assert places(site) == FILED
        with open_dataset(site, config=site.parents[1] / "config.yaml") as dataset:
            moves = dataset.history(label="green")
        assert [(one["outcome"], one["score"], one["mode"], one["encoder_id"]) for one in moves] == [
            ("filed", 0.9, "best", "fake-48")
        ]
        again = bulk(site, "apply")
        assert (again.code, again.facts["moved"], again.facts["before"]) == (0, {}, 3)
        assert places(site) == FILED

    def test_apply_refuses_what_is_not_the_decided_version(self, site: Path, tmp_path: Path) -> None:
        """Changed and missing files, links, unknown classes and files outside of a dataset; the others are moved."""
        images = site / "Images"
        outside = tmp_path / "other.png"
        outside.write_bytes(b"other")
        (images / "e.png").write_bytes((images / "d.png").read_bytes() + b"e")
        (images / "f.png").write_bytes(b"f")
        labels = dict.fromkeys(("a.png", "b.png", "d.png", "e.png"), "red") | {"f.png": "../../etc"}
        decided = {str(images / name): label for name, label in labels.items()} | {str(outside): "red"}
        (tmp_path / "run").rename(tmp_path / "former")
        write_run(tmp_path / "run", str(images), decided)
        content = (images / "a.png").read_bytes()
        (images / "a.png").write_bytes(content[:-1] + b"?")  # of equal size
        (images / "b.png").unlink()
        (images / "d.png").unlink()
        (images / "d.png").symlink_to(outside)
        expected = {
            "the file changed since it was decided": 1,
            "the file is gone": 2,
            "there is no class '../../etc'": 1,
            "it does not lie in Images/ of a dataset": 1,
        }
        assert bulk(site, "apply", "--dry-run").facts["refused"] == expected
        ran = bulk(site, "apply")
        assert (ran.code, ran.facts["refused"], ran.facts["moved"]) == (65, expected, {"red": 1})
        assert places(site)["e.png"] == "Dataset/red"
        assert outside.read_bytes() == b"other"

    @pytest.mark.parametrize(
        ("column", "values"),
        [
            ("uri", pa.array([1])),
            ("label", pa.array([["red"]])),
            ("sha256", pa.array([b"\xff"]).view(pa.string())),
            ("mode", None),
        ],
    )
    def test_apply_of_damaged_decisions_names_the_part(self, site: Path, column: str, values: Any) -> None:
        """A column of another type, text that is not UTF-8, and a column that is not there."""
        (part, *_) = sorted((site.parents[1] / "run" / "decisions").iterdir())
        table = pq.read_table(part)
        table = table.drop_columns([column])
        pq.write_table(table if values is None else table.append_column(column, values), part)
        ran = bulk(site, "apply")
        assert (ran.code, str(part) in ran.err, "decide again" in ran.err) == (65, True, True)
        assert places(site).keys() == FILED.keys()

    @pytest.mark.parametrize("number", [math.nan, math.inf, -1.0])
    def test_apply_leaves_images_whose_probability_is_none(self, site: Path, number: float) -> None:
        """The journal has probabilities only."""
        for part in (site.parents[1] / "run" / "decisions").iterdir():
            table = pq.read_table(part)
            at = table.schema.get_field_index("probability")
            pq.write_table(table.set_column(at, "probability", pa.array([number] * len(table))), part)
        ran = bulk(site, "apply")
        assert (ran.code, ran.facts["moved"], ran.facts["abstained"]) == (0, {}, {"incomplete row": 3, "margin": 1})

    def test_undo_returns_the_images_which_apply_then_leaves(self, site: Path) -> None:
        """``sortd bulk undo`` takes back the run only; what was taken back is held."""
        before = tree(site / "Images")
        assert bulk(site, "apply").code == 0
        ran = bulk(site, "undo")
        assert (ran.code, ran.facts["moved"]) == (0, {"Colours": 3})
        assert tree(site / "Images") == before
        assert not places(site).keys() - FILED.keys()
        again = bulk(site, "apply")
        assert again.code == 65
        assert again.facts["refused"] == {"its last move was undone; `sortd release` lets it be filed again": 3}
        assert bulk(site, "undo").facts["moved"] == {}

    def test_apply_in_a_dataset_that_the_guard_holds_moves_nothing(self, site: Path) -> None:
        """It says so in the dry run already."""
        with lock_dataset(Layout(site), site.parents[1] / "state") as opened:
            opened.journal.note_guard(GuardState(reason="9 of 10 images would be filed as red"))
        expected = {"the dataset is held; see `sortd status` and `sortd release`": 3}
        assert bulk(site, "apply", "--dry-run").facts["refused"] == expected
        ran = bulk(site, "apply")
        assert (ran.code, ran.facts["refused"], ran.facts["moved"]) == (65, expected, {})

    @pytest.mark.parametrize("action", ["copy", "keywords"])
    def test_apply_in_a_dataset_whose_images_stay_moves_nothing(self, site: Path, action: str) -> None:
        """The images that a person put into Images/ are not moved there (docs/actions.md)."""
        write_config(site.parents[1], action=action)
        for arguments in (("--dry-run",), ()):
            ran = bulk(site, "apply", *arguments)
            (reason,) = ran.facts["refused"]
            assert (ran.facts["moved"], f"`action: {action}`" in reason) == ({}, True)
        assert places(site) == dict.fromkeys(FILED, "Images")

    def test_apply_by_another_process_with_the_lock_is_refused(self, site: Path) -> None:
        """No image is moved by two."""
        with lock_dataset(Layout(site), site.parents[1] / "state"):
            ran = bulk(site, "apply")
        assert (ran.code, ran.facts["moved"]) == (65, {})
        assert "another sortd works on" in next(iter(ran.facts["refused"]))
        assert places(site).keys() == FILED.keys()

    def test_apply_asks_the_running_daemon(self, site: Path, tmp_path: Path) -> None:
        """It moves the images, and knows of them afterwards; ``sortd undo`` takes one back."""
        config = write_config(tmp_path, settle_seconds=3600)  # it decides about nothing itself
        with running(config) as daemon:
            ran = bulk(site, "apply")
            assert (ran.code, ran.facts["moved"]) == (0, {"green": 1, "red": 2})
            daemon.wait_for("image.filed", count=3)
            assert places(site) == FILED
            assert sortd("undo", site / "Images" / "b.png", "--config", config).code == 0
            assert places(site)["b.png"] == "Images"


def test_apply_after_plan_and_decide_files_what_was_assigned(tmp_path: Path) -> None:
    """The three commands fit together, and the journal names the mode and the encoder that decided."""
    write_config(tmp_path)
    classifier = save_classifier(tmp_path)
    dataset = tmp_path / "Data" / "Colours"
    Layout(dataset).make()
    draw_images(dataset / "Images", 12)
    make_plan(str(dataset / "Images"), tmp_path / "run")
    decide_shard(tmp_path / "run", settings_for(classifier), (1, 1), load=load_fake)
    labels = {Path(row["uri"]).name: row["label"] for row in decisions_of(tmp_path / "run").to_pylist()}
    ran = bulk(dataset, "apply")
    assert ran.code == 0, ran.facts
    assert len(set(labels.values())) > 2
    assert places(dataset) == {name: f"Dataset/{label}" if label else "Images" for name, label in labels.items()}
    with open_dataset(dataset, config=tmp_path / "config.yaml") as opened:
        assert {(one["mode"], one["encoder_id"]) for one in opened.history()} == {("mixed", "fake-48")}


def test_apply_of_a_run_without_decisions_says_what_to_do(tmp_path: Path) -> None:
    """Neither a folder without a plan nor a plan without decisions can be applied."""
    config = write_config(tmp_path)
    assert sortd("bulk", "apply", tmp_path, "--config", config).code == 65
    ran = sortd("bulk", "apply", write_run(tmp_path / "run", "/none", {}), "--config", config)
    assert (ran.code, "sortd bulk decide" in ran.err) == (65, True)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Any, dict[str, str]]]:
    """An S3 server."""
    with s3_server() as found:
        yield found


CONTENTS = {"a b.jpg": b"image a", "b.jpg": b"image b", "c.jpg": b"image c", "sub/b.jpg": b"another b"}
DECIDED = {"a b.jpg": "red", "b.jpg": "green", "c.jpg": None, "sub/b.jpg": "green"}


class TestObjects:
    """Images in an object store."""

    @pytest.fixture
    def client(
        self, server: tuple[Any, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[Any]:
        """A bucket with four images, and a run ``run`` that has decided about them."""
        client, environment = server
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        write_config(tmp_path)
        for name, content in CONTENTS.items():
            client.put_object(Bucket=BUCKET, Key=f"set/Images/{name}", Body=content)
        uris = {name: f"s3://{BUCKET}/set/Images/{name}" for name in CONTENTS}
        write_run(
            tmp_path / "run",
            f"s3://{BUCKET}/set/Images",
            {uris[name]: label for name, label in DECIDED.items()},
            {uris[name]: content for name, content in CONTENTS.items()},
        )
        yield client
        delete_all(client)

    @staticmethod
    def bulk(folder: Path, command: str, *arguments: object) -> Ran:
        """Run a command of ``sortd bulk`` on the run."""
        return sortd("bulk", command, folder / "run", "--config", folder / "config.yaml", "--json", *arguments)

    def test_apply_moves_objects_under_free_names(self, client: Any, tmp_path: Path) -> None:
        """What stands there is kept; a repetition moves nothing, and undo returns everything to its name."""
        client.put_object(Bucket=BUCKET, Key="set/Dataset/red/a b.jpg", Body=b"of the user")
        before = objects(client)
        assert self.bulk(tmp_path, "apply", "--dry-run").facts["moved"] == {"green": 2, "red": 1}
        assert objects(client) == before
        ran = self.bulk(tmp_path, "apply")
        assert (ran.code, ran.facts["moved"], ran.facts["abstained"]) == (0, {"green": 2, "red": 1}, {"margin": 1})
        after = objects(client)
        assert sorted(after.values()) == sorted(before.values())
        assert after["set/Dataset/red/a b.jpg"] == b"of the user"
        assert {key.rpartition("/")[0] for key in after} == {"set/Images", "set/Dataset/red", "set/Dataset/green"}
        for arguments in ((), ("--dry-run",)):
            again = self.bulk(tmp_path, "apply", *arguments)
            assert (again.code, again.facts["moved"], again.facts["before"]) == (0, {}, 3)
            assert again.facts["refused"] == {}
        undone = self.bulk(tmp_path, "undo")
        assert (undone.code, undone.facts["moved"]) == (0, {"green": 2, "red": 1})
        assert objects(client) == before
        assert self.bulk(tmp_path, "apply").facts["before"] == 3

    def test_undo_after_a_crash_takes_back_copies(self, client: Any, tmp_path: Path) -> None:
        """One was copied and not deleted at its source yet."""
        before = objects(client)
        assert self.bulk(tmp_path, "apply").code == 0
        with closing(TransferJournal(tmp_path / "run")) as journal:
            (group,) = journal.applied(done=True)
            one = next(one for one in group if one.label == "red")
            journal.write([replace(one, progress=MoveProgress.PUBLISHED)])
        client.put_object(Bucket=BUCKET, Key="set/Images/a b.jpg", Body=CONTENTS["a b.jpg"])
        undone = self.bulk(tmp_path, "undo")
        assert (undone.code, undone.facts["moved"]) == (0, {"green": 2, "red": 1})
        assert objects(client) == before

    def test_apply_refuses_objects_that_are_not_the_decided_version(self, client: Any, tmp_path: Path) -> None:
        """A changed and a missing object stay as they are; the other one is moved below the named prefix."""
        client.put_object(Bucket=BUCKET, Key="set/Images/a b.jpg", Body=b"IMAGE a")
        client.delete_object(Bucket=BUCKET, Key="set/Images/b.jpg")
        ran = self.bulk(tmp_path, "apply", "--to", f"s3://{BUCKET}/elsewhere/")
        assert (ran.code, ran.facts["moved"]) == (65, {"green": 1})
        assert ran.facts["refused"] == {"the object changed": 1, "the object is gone": 1}
        assert objects(client) == {
            "elsewhere/Dataset/green/b.jpg": b"another b",
            "set/Images/a b.jpg": b"IMAGE a",
            "set/Images/c.jpg": b"image c",
        }

    def test_apply_hostile_classes_and_stores_are_refused(self, client: Any, tmp_path: Path) -> None:
        """A class that is a path, and an object of another store."""
        (tmp_path / "run").rename(tmp_path / "former")
        labels: dict[str, str | None] = {
            f"s3://{BUCKET}/set/Images/b.jpg": "../../up",
            "gs://elsewhere/x.jpg": "red",
            f"s3://{BUCKET}/set/Images/": "red",
        }
        write_run(tmp_path / "run", f"s3://{BUCKET}/set/Images", labels, dict.fromkeys(labels, b"image b"))
        before = objects(client)
        ran = self.bulk(tmp_path, "apply")
        assert (ran.code, sum(ran.facts["refused"].values()), ran.facts["moved"]) == (65, 3, {})
        assert objects(client) == before

    def test_apply_without_a_known_prefix_asks_for_it(self, client: Any, tmp_path: Path) -> None:
        """The folder of the run is no place for objects, and neither is a guess."""
        assert client is not None
        (tmp_path / "run").rename(tmp_path / "former")
        uri = f"s3://{BUCKET}/set/Images/b.jpg"
        write_run(tmp_path / "run", f"s3://{BUCKET}/set", {uri: "red"}, {uri: b"image b"})
        ran = self.bulk(tmp_path, "apply")
        assert (ran.code, "--to" in ran.err) == (65, True)
        assert not os.path.exists(tmp_path / "run" / "applied.sqlite")
