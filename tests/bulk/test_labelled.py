"""The images of a bulk run as data of a fine-tuning: by decisions and by folders, of this disk and of a store."""

from pathlib import Path

import pytest

from sortd.bulk.labelled import training_images
from sortd.bulk.plan import make_plan
from sortd.config import Config, read_config
from sortd.errors import DataError
from sortd.finetune.data import read_plan
from sortd.finetune.recipe import LabelledImage, LabelSource, Recipe, TrainingRequest
from sortd.finetune.run import prepare_training
from sortd.layout import Layout
from tests.bulk.decided_run import BUCKET, s3_server, write_run
from tests.command_line import write_config
from tests.fake_encoder import FakeEncoder
from tests.finetune.test_run import COUNTS, FEW, make_photos
from tests.tiny_vit import build_tiny_vit


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A configuration with everything below the temporary folder."""
    return read_config(write_config(tmp_path, device="cpu", threads=1), {"HOME": str(tmp_path)})


def labelled(run: Path, labels: LabelSource, config: Config) -> dict[str, LabelledImage]:
    """Return the labelled images by their path."""
    with training_images(run, labels, config) as images:
        return {one.path: one for one in images}


def test_training_images_are_those_with_a_class_that_did_not_change(
    tmp_path: Path, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    """The classes of decisions are sortd's, those of folders a person's; how many were left out is printed."""
    files = [tmp_path / "more" / label / f"{number}.png" for label in ("red", "green") for number in range(3)]
    for number, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"image %d" % number)
    labels = {str(file): "red" for file in files} | {str(files[0]): None, str(files[5]): "../up"}
    run = write_run(tmp_path / "run", str(tmp_path / "more"), labels)
    files[1].write_bytes(b"another image")
    files[2].unlink()
    by_decision = labelled(run, LabelSource.DECISIONS, config)
    assert by_decision == {str(file): LabelledImage(str(file), "red", is_placed=False) for file in files[3:5]}
    assert "2 images" in capsys.readouterr().err
    by_folder = labelled(run, LabelSource.FOLDERS, config)
    assert {path: one.label for path, one in by_folder.items()} == {
        str(files[0]): "red",
        **{str(file): "green" for file in files[3:]},
    }
    assert all(one.is_placed for one in by_folder.values())


def test_training_images_of_a_plan_alone_have_folders_and_no_decisions(tmp_path: Path, config: Config) -> None:
    """A run need not be decided on to be trained on."""
    make_photos(tmp_path, {"red": 2})
    make_plan(str(tmp_path / "Shapes" / "Clases"), tmp_path / "run")
    assert len(labelled(tmp_path / "run", LabelSource.FOLDERS, config)) == 2
    with pytest.raises(DataError, match=r"no image of .* has a class"):
        labelled(tmp_path / "run", LabelSource.DECISIONS, config)


def test_training_images_of_a_store_are_downloaded_for_the_block(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the decided bytes; nothing is left of them afterwards."""
    long = "same." + "p" * 300  # no file of a disk can have such a suffix
    uris = [f"s3://{BUCKET}/a/{name}" for name in ("same.png", "changed.png", "gone.png", long)]
    run = write_run(tmp_path / "run", f"s3://{BUCKET}/a", dict.fromkeys(uris, "red"), dict.fromkeys(uris, b"image"))
    with s3_server() as (client, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        for name in ("same.png", long):
            client.put_object(Bucket=BUCKET, Key=f"a/{name}", Body=b"image")
        client.put_object(Bucket=BUCKET, Key="a/changed.png", Body=b"IMAGE")
        with training_images(run, LabelSource.DECISIONS, config) as images:
            assert [(Path(one.path).read_bytes(), one.label) for one in images] == [(b"image", "red")] * 2
    assert list(config.state_dir.iterdir()) == []


@pytest.mark.slow
def test_prepare_uses_decided_images_for_training_only(tmp_path: Path, config: Config) -> None:
    """The classes that sortd decided must not be what a model is measured with; those of folders may."""
    dataset = make_photos(tmp_path / "Data", COUNTS)
    more = make_photos(tmp_path / "more", FEW, seed=1) / "Clases"
    files = {str(file): file.parent.name for file in more.rglob("*.png")}
    run = write_run(tmp_path / "run", str(more), files)
    base = build_tiny_vit(tmp_path / "vit")
    recipe = Recipe(test=0.25, validation=0.25)
    held_out = {}
    for labels in LabelSource:
        with training_images(run, labels, config) as images:
            request = TrainingRequest(Layout(dataset), base=str(base), recipe=recipe, images=images)
            work = tmp_path / labels
            work.mkdir()
            prepare_training(request, config, work, created="now", load_encoder=lambda _: FakeEncoder())
        plan = read_plan(work)
        assert (plan.data["images"], plan.data["filed"]) == (78, 24 if labels is LabelSource.DECISIONS else 0)
        held_out[labels] = sum(len(plan.classes[part]) for part in ("validation", "test"))
    assert held_out[LabelSource.DECISIONS] < held_out[LabelSource.FOLDERS]
