"""``sortd models prune`` removes exports whose model is gone, and nothing else."""

from pathlib import Path

from filelock import FileLock

from sortd.encoder.models import locate_pair
from sortd.encoder.onnx_encoder import export_folder
from tests.command_line import sortd, write_config
from tests.daemon_process import tree

GONE = "0123456789abcdef"


def make_export(folder: Path, *more: str) -> Path:
    """Make a folder with the files of an export, and some more."""
    folder.mkdir(parents=True)
    for name in ("manifest.json", "image.onnx", "image.int8.onnx", "text.onnx", "tokenizer.json", *more):
        (folder / name).write_bytes(b"12345")
    return folder


def test_prune_lists_first_and_removes_exports_of_models_that_are_gone(tmp_path: Path) -> None:
    """The export of a model that is there, strange names, strange files and what a link points to stay."""
    config, onnx = write_config(tmp_path), tmp_path / "cache" / "onnx"
    kept = make_export(export_folder(locate_pair("packaged", None, tmp_path / "cache")))
    gone, aside = make_export(onnx / GONE), make_export(onnx / f"{GONE[::-1]}.old")
    strange, own = make_export(onnx / "fedcba9876543211", "notes.txt"), make_export(onnx / "mine")
    elsewhere = make_export(tmp_path / "elsewhere")
    (onnx / "aaaaaaaaaaaaaaaa").symlink_to(elsewhere)
    before = tree(onnx)
    listed = sortd("models", "prune", "-c", config, "--json").facts
    assert {Path(one["path"]) for one in listed["entries"]} == {gone, aside}
    assert (listed["removed"], listed["size_bytes"]) == (False, 50)
    assert tree(onnx) == before
    assert sortd("models", "prune", "-c", config, "--apply", "--json").facts["removed"]
    assert not gone.exists()
    assert not aside.exists()
    assert all((folder / "image.onnx").exists() for folder in (kept, strange, own, elsewhere))
    assert "0 exports" in sortd("models", "prune", "-c", config).out


def test_prune_leaves_an_export_that_is_being_made(tmp_path: Path) -> None:
    """The lock of an export is respected."""
    config, folder = write_config(tmp_path), make_export(tmp_path / "cache" / "onnx" / f"{GONE}.77.part")
    with FileLock(folder.with_name(f"{GONE}.lock")):
        ran = sortd("models", "prune", "-c", config, "--apply")
    assert "is being exported now" in ran.err
    assert (folder / "image.onnx").exists()
