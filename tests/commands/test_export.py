"""Exports of filed images, opened by the libraries that they are made for."""

import csv
import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sortd.api.dataset import open_dataset
from sortd.commands.export import export_dataset, exported_images
from sortd.commands.export_formats import COLUMNS, WRITERS, ExportFormat, ExportOptions, Link
from sortd.config import read_config
from sortd.errors import DataError
from sortd.events import Action, Move, Moved, Outcome
from sortd.files import stamp_of
from sortd.layout import JOURNAL_FILE, Layout
from sortd.moving.mover import Mover
from sortd.store.journal import Journal
from sortd.store.records import Selection
from tests.command_line import Ran, sortd, write_config
from tests.daemon_process import DaemonProcess, picture, teach, tree

FOLDERS = [ExportFormat.IMAGEFOLDER, ExportFormat.COCO, ExportFormat.FIFTYONE]
FORMATS = list(ExportFormat)


@pytest.fixture
def filed(colours: Path, tmp_path: Path) -> Path:
    """A dataset in which sortd filed twelve images, of which a person corrected one and audited none."""
    teach(colours)
    config = write_config(tmp_path, settle_seconds=0.1)
    for number in range(4):
        for colour in ("red", "green", "blue"):
            picture(colour, 9000 + number, patches=40).save(colours / "Images" / f"{colour}{number}.png")
    with DaemonProcess(config, "once") as daemon:
        assert daemon.wait() == 0
    assert sum(1 for _ in (colours / "Dataset").rglob("*.png")) == 12
    assert sortd("assign", str(colours / "Dataset/red/red0.png"), "blue", "-c", str(config)).code == 0
    return colours


def run_export(filed: Path, *arguments: str) -> Ran:
    """Run ``sortd export`` into the folder beside the dataset's root."""
    base = filed.parents[1]
    out = () if "--out" in arguments else ("--out", str(base / "out"))
    return sortd("export", "Colours", "-c", str(base / "config.yaml"), *out, *arguments)


def export(filed: Path, kind: ExportFormat, tiny_clip: Path, **options: Any) -> Path:
    """Export in this process with the model of random weights, and return the place."""
    base = filed.parents[1]
    config = read_config(base / "config.yaml", {"HOME": str(base), "SORTD_MODEL": str(tiny_clip)})
    out = base / f"out-{kind}"
    export_dataset(config, Layout(filed), ExportOptions(kind, out, **options), as_json=True)
    return out


def test_csv_has_what_the_journal_knows(filed: Path) -> None:
    """Each file has its class, what sortd decided, and whether a person checked it; pandas reads it."""
    import pandas as pd

    assert run_export(filed).code == 0
    table = pd.read_csv(filed.parents[1] / "out").set_index("file_name")
    assert tuple(table.reset_index().columns) != ()
    assert len(table) == 12
    corrected = table.loc["blue/red0.png"]
    assert (corrected["label"], corrected["checked"], corrected["checked_by"]) == ("blue", True, "assigned")
    sure = table.loc["red/red1.png"]
    assert (sure["label"], sure["predicted"], sure["outcome"], sure["checked"]) == ("red", "red", "filed", False)
    assert 0.9 < sure["probability"] <= 1.0
    assert sure["mode"] == "mixed"
    assert sure["generation"] == 1
    assert len(sure["content"]) == 64
    assert (sure["encoder_id"], sure["size"]) == ("fake-48", (filed / "Dataset/red/red1.png").stat().st_size)


def test_jsonl_and_csv_agree(filed: Path) -> None:
    """Both have the same columns and values."""
    base = filed.parents[1]
    assert run_export(filed, "--out", str(base / "a.csv")).code == 0
    assert run_export(filed, "--out", str(base / "b.jsonl"), "--format", "jsonl").code == 0
    with (base / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (base / "b.jsonl").read_text().splitlines()]
    assert [tuple(line) for line in lines] == [COLUMNS] * 12
    assert [{key: "" if value is None else str(value) for key, value in line.items()} for line in lines] == rows


def test_checked_only_exports_what_a_person_said(filed: Path) -> None:
    """Images that nobody has checked are left out; an audit checks them."""
    base, config = filed.parents[1], str(filed.parents[1] / "config.yaml")
    assert run_export(filed, "--checked-only", "--json").facts["images"] == 1
    assert sortd("audit", "Colours", "--sample", "5", "-c", config).code == 0
    assert sortd("audit", "Colours", "--all-right", "-c", config).code == 0
    done = run_export(filed, "--checked-only", "--out", str(base / "second"))
    assert done.code == 0
    with (base / "second").open(newline="") as file:
        ways = sorted(row["checked_by"] for row in csv.DictReader(file))
    assert ways == ["assigned", *["audited"] * 5]


def test_parquet_has_types_and_embeddings(filed: Path, tiny_clip: Path) -> None:
    """The table of pyarrow has the columns with their types, and unit rows of the model."""
    from pyarrow import parquet

    table = parquet.read_table(export(filed, ExportFormat.PARQUET, tiny_clip, with_embeddings=True))
    assert table.num_rows == 12
    assert [str(table.schema.field(name).type) for name in ("label", "checked", "probability", "size")] == [
        "string", "bool", "double", "int64",
    ]  # fmt: skip
    rows = np.array(table["embedding"].to_pylist())
    assert np.allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-5)


@pytest.mark.parametrize("with_split", [False, True])
def test_imagefolder_is_read_by_datasets(filed: Path, tiny_clip: Path, tmp_path: Path, *, with_split: bool) -> None:
    """``load_dataset("imagefolder")`` gives the images with their labels and facts, in the parts of the split."""
    from datasets import load_dataset

    out = export(filed, ExportFormat.IMAGEFOLDER, tiny_clip, train=0.7 if with_split else None)
    loaded = load_dataset("imagefolder", data_dir=str(out), cache_dir=str(tmp_path / "hub"))
    assert set(loaded) == ({"train", "test"} if with_split else {"train"})
    found = [row for part in loaded.values() for row in part]
    assert sorted(row["label"] for row in found) == ["blue"] * 5 + ["green"] * 4 + ["red"] * 3
    assert all(row["image"].size == (72, 64) for row in found)
    assert sum(row["checked"] for row in found) == 1


@pytest.mark.parametrize("with_split", [False, True])
def test_imagefolder_with_names_of_parts_is_read_whole(
    filed: Path, tiny_clip: Path, tmp_path: Path, *, with_split: bool
) -> None:
    """Classes and files named after parts of a dataset move no image to another part, and none is lost."""
    from datasets import load_dataset

    (filed / "Dataset/red").rename(filed / "Dataset/test")
    (filed / "Dataset/green").rename(filed / "Dataset/dev-board")
    (filed / "Dataset/blue/blue1.png").rename(filed / "Dataset/blue/train-1.png")
    out = export(filed, ExportFormat.IMAGEFOLDER, tiny_clip, train=0.7 if with_split else None)
    loaded = load_dataset(str(out), cache_dir=str(tmp_path / "hub"))
    parts = {"train": out / "train", "test": out / "test"} if with_split else {"train": out}
    assert set(loaded) == set(parts)
    for part, folder in parts.items():
        lines = (folder / "metadata.jsonl").read_text().splitlines()
        assert sorted(loaded[part]["content"]) == sorted(json.loads(line)["content"] for line in lines)
    assert sorted(row["label"] for part in loaded.values() for row in part) == (
        ["blue"] * 5 + ["dev-board"] * 4 + ["test"] * 3
    )


def test_datasets_are_read_by_datasets(filed: Path, tiny_clip: Path, tmp_path: Path) -> None:
    """``load_dataset`` of the folder gives images, class labels and embeddings with their features."""
    from datasets import load_dataset

    out = export(filed, ExportFormat.DATASETS, tiny_clip, train=0.7, with_embeddings=True)
    loaded = load_dataset(str(out), cache_dir=str(tmp_path / "hub"))
    assert set(loaded) == {"train", "test"}
    features = loaded["train"].features
    assert features["label"].names == ["blue", "green", "red"]
    row = loaded["train"][0]
    assert row["image"].size == (72, 64)
    assert len(row["embedding"]) == 24
    assert sum(part.num_rows for part in loaded.values()) == 12


def test_coco_is_read_by_pycocotools(filed: Path, tiny_clip: Path) -> None:
    """The annotations name the classes, and each image has one box of its whole size."""
    from pycocotools.coco import COCO

    out = export(filed, ExportFormat.COCO, tiny_clip)
    coco = COCO(str(out / "annotations.json"))
    assert sorted(one["name"] for one in coco.loadCats(coco.getCatIds())) == ["blue", "green", "red"]
    assert len(coco.getImgIds()) == 12
    (red,) = coco.getCatIds(catNms=["red"])
    assert len(coco.getImgIds(catIds=[red])) == 3
    first = coco.loadImgs(coco.getImgIds())[0]
    assert (first["width"], first["height"]) == (72, 64)
    assert (out / "images" / first["file_name"]).is_file()
    assert coco.loadAnns(coco.getAnnIds(imgIds=[first["id"]]))[0]["bbox"] == [0, 0, 72, 64]


def test_fiftyone_layout_has_a_label_for_each_file(filed: Path, tiny_clip: Path) -> None:
    """``labels.json`` has an index into the classes for each file of ``data``."""
    out = export(filed, ExportFormat.FIFTYONE, tiny_clip)
    known = json.loads((out / "labels.json").read_text())
    assert known["classes"] == ["blue", "green", "red"]
    assert {path.stem for path in (out / "data").iterdir()} == known["labels"].keys()
    assert sorted(one["label"] for one in known["labels"].values()) == [0] * 5 + [1] * 4 + [2] * 3


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("link", list(Link))
def test_links_and_copies_show_the_same_bytes(filed: Path, tiny_clip: Path, kind: ExportFormat, link: Link) -> None:
    """However images get into the folder, they have the bytes of the dataset, which is left as it was."""
    before = tree(filed)
    out = export(filed, kind, tiny_clip, link=link)
    copied = list(out.rglob("*.png"))
    assert sorted(path.read_bytes() for path in copied) == sorted(
        content for name, content in before.items() if name.startswith("Dataset/")
    )
    assert all(path.is_symlink() == (link is Link.SYMBOLIC) for path in copied)
    assert all(path.stat().st_nlink == (2 if link is Link.HARD else 1) for path in copied)
    assert tree(filed) == before


def test_split_keeps_near_duplicates_together(filed: Path, tiny_clip: Path) -> None:
    """Copies of an image with a few changed pixels are in its part."""
    for number in range(4):
        image = picture("red", 9001, patches=40)
        image.putpixel((number, number), (0, 0, 0))
        image.save(filed / "Dataset" / "red" / f"again{number}.png")
    out = export(filed, ExportFormat.JSONL, tiny_clip, train=0.5)
    parts = {row["file_name"]: row["split"] for row in map(json.loads, out.read_text().splitlines())}
    assert len({parts[f"red/again{number}.png"] for number in range(4)} | {parts["red/red1.png"]}) == 1
    assert set(parts.values()) == {"train", "test"}


@pytest.mark.parametrize("kind", FORMATS)
def test_strange_names_are_exported(filed: Path, tiny_clip: Path, kind: ExportFormat) -> None:
    """Commas, quotes, newlines and bytes that are not UTF-8 in names stop no format."""
    folder = os.fsencode(filed / "Dataset" / "red")
    for name in (b'a,b".png', b"two\nlines.png", b"\xff\xfe.png", "üñ.png".encode()):
        picture("red", 1).save(filed / "new.png")
        os.rename(os.fsencode(filed / "new.png"), folder + b"/" + name)
    out = export(filed, kind, tiny_clip)
    assert out.exists()


def test_files_that_are_no_images_are_left_out(filed: Path) -> None:
    """Sidecars, films, links and broken files are not exported and stop nothing."""
    red = filed / "Dataset" / "red"
    (red / "red1.xmp").write_text("<x:xmpmeta/>")
    (red / "film.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(64))
    (red / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    (red / "link.png").symlink_to(red / "red1.png")
    done = run_export(filed, "--json")
    assert done.facts["images"] == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "{base}/config.yaml"], "exists"),
        (["--out", "{base}/none/out"], "is no folder"),
        (["--out", "{data}/Colours/Review/out"], "lies inside the dataset"),
        (["--embeddings"], "no place for embeddings"),
        (["--link", "hard"], "folders of images"),
    ],
)
def test_wrong_options_are_refused(filed: Path, arguments: list[str], message: str) -> None:
    """Each mistake has a message; nothing is written or overwritten."""
    before = tree(filed.parents[1])
    places = {"base": str(filed.parents[1]), "data": str(filed.parent)}
    done = run_export(filed, *(one.format(**places) for one in arguments))
    assert done.code in {65, 78}
    assert message in " ".join(done.err.split())
    assert tree(filed.parents[1]) == before


def test_broken_image_stops_no_split(filed: Path, tiny_clip: Path) -> None:
    """An image whose header is whole and whose pixels are not is left out where it must be decoded."""
    picture("red", 1).resize((400, 400)).save(filed / "whole.jpg")
    (filed / "Dataset/red/broken.jpg").write_bytes((filed / "whole.jpg").read_bytes()[:2000])
    lines = export(filed, ExportFormat.JSONL, tiny_clip, train=0.5).read_text().splitlines()
    assert "red/broken.jpg" not in {json.loads(line)["file_name"] for line in lines}
    assert len(lines) == 12


@pytest.mark.parametrize("kind", [*FOLDERS, ExportFormat.DATASETS])
def test_image_that_moves_meanwhile_is_named(filed: Path, tiny_clip: Path, kind: ExportFormat) -> None:
    """A file that a person or sortd moves between listing and copying ends the export with its path."""
    base = filed.parents[1]
    config = read_config(base / "config.yaml", {"HOME": str(base), "SORTD_MODEL": str(tiny_clip)})
    images = exported_images(config, Layout(filed))
    gone = filed / "Dataset/red/red2.png"
    gone.rename(filed / "Dataset/blue/red2.png")
    with pytest.raises(DataError, match=r"red/red2\.png has moved during the export"):
        WRITERS[kind](images, base / "target", ExportOptions(kind, base / "out"), None, lambda *_: None)


def test_names_that_are_equal_in_utf8_are_named(filed: Path, tiny_clip: Path) -> None:
    """Two files cannot get one name in the export; the message names the second file."""
    folder = os.fsencode(filed / "Dataset" / "red")
    for name in (b"\xff.png", b"\\xff.png"):
        picture("red", 1).save(filed / "new.png")
        os.rename(os.fsencode(filed / "new.png"), folder + b"/" + name)
    with pytest.raises(DataError, match="this name, as UTF-8, is taken in the export"):
        export(filed, ExportFormat.IMAGEFOLDER, tiny_clip)


@pytest.mark.parametrize("kind", [ExportFormat.CSV, ExportFormat.IMAGEFOLDER])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.EEXIST])
def test_name_that_is_taken_meanwhile_is_left_alone(
    filed: Path, tiny_clip: Path, kind: ExportFormat, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What appears at the place during the export stays, also where renameat2(2) knows no flags, as on NFS."""

    def rename_late(_: int, __: str, ___: int, target: str) -> None:
        Path(target).write_text("of another program")
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("sortd.commands.export.rename_new", rename_late)
    with pytest.raises(DataError, match=r"nothing is overwritten|cannot be written"):
        export(filed, kind, tiny_clip)
    assert (filed.parents[1] / f"out-{kind}").read_text() == "of another program"


def test_failed_export_leaves_nothing(filed: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in the middle leaves neither the folder nor a temporary one."""
    monkeypatch.setattr("sortd.commands.export_formats.shutil.copyfileobj", _full)
    with pytest.raises(Exception, match="No space left"):
        export(filed, ExportFormat.IMAGEFOLDER, tiny_clip)
    assert not [path.name for path in filed.parents[1].iterdir() if "out" in path.name or "export" in path.name]


def _full(*_: object) -> None:
    raise OSError(28, "No space left on device", "image.png")


def test_empty_dataset_is_refused(colours: Path, tmp_path: Path) -> None:
    """Without a filed image there is nothing to export, and the message says where it looked."""
    write_config(tmp_path)
    done = run_export(colours)
    assert (done.code, "Dataset" in done.err) == (65, True)


def test_export_has_images_that_stayed_with_links_or_keywords(colours: Path, tmp_path: Path) -> None:
    """They are exported from Images/ with the class of the journal; one that changed since, or was undone, is not."""
    actions: dict[str, Action] = {
        "a": "symlink",
        "b": "keywords",
        "changed": "keywords",
        "c": "copy",
        "undone": "symlink",
    }
    config = read_config(write_config(tmp_path), {"HOME": str(tmp_path)})
    layout = Layout(colours)
    layout.make()
    with Journal(layout.state_folder(config.state_dir) / JOURNAL_FILE) as journal:
        mover = Mover(layout.root, journal)
        for seed, (name, action) in enumerate(actions.items()):
            path = colours / "Images" / f"{name}.png"
            picture("red", 9100 + seed).save(path)
            version = stamp_of(os.stat(path))
            (answer,) = mover.move_all([Move(str(path), version, "Dataset/red", Outcome.ASSIGNED, action=action)])
            assert isinstance(answer, Moved)
        mover.undo(journal.history.moves(Selection(limit=1)))
        picture("blue", 9200).save(colours / "Images/changed.png")
    found = {image.file_name: (image.path, image.label, image.outcome) for image in exported_images(config, layout)}
    assert found == {
        "red/c.png": (str(colours / "Dataset/red/c.png"), "red", "assigned"),
        "red/a.png": (str(colours / "Images/a.png"), "red", "assigned"),
        "red/Images/b.png": (str(colours / "Images/b.png"), "red", "assigned"),
    }
    with open_dataset(colours, config=tmp_path / "config.yaml") as dataset:
        shown = {Path(str(one["from"])).stem: one["action"] for one in dataset.history(outcome="assigned")}
        assert shown == actions
        assert dataset.history(outcome="undone")[0]["action"] == "removed"
