"""Fine-tuning from the photos to the folder, on a made dataset: trained, interrupted, resumed, compared, refused."""

import json
import os
import resource
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sortd.commands.finetuning import observing, require_training_packages
from sortd.config import Config, read_config
from sortd.encoder.finetuned import UNFINISHED, FinetunedFacts, calibrated, load_finetuned, read_facts
from sortd.errors import AlreadyRunningError, ConfigError, DataError, DestinationError, ModelError
from sortd.finetune.data import PLAN_FILE, find_candidates, pixels_file
from sortd.finetune.recipe import Observer, Recipe, Source, TrainingProgress, TrainingRequest, TrainingStoppedError
from sortd.finetune.run import output_of, prepare_training, run_finetuning, unfinished_of
from sortd.finetune.train import newest_checkpoint
from sortd.images.decode import DecodeLimits, decode_file
from sortd.layout import Layout
from tests.command_line import sortd
from tests.fake_encoder import FakeEncoder
from tests.filed_images import file_images
from tests.tiny_clip import Layout as Placed
from tests.tiny_clip import Tower, build_tiny_clip
from tests.tiny_vit import build_tiny_vit

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
COUNTS = {"green": 24, "red": 18, "stripes": 12}
FEW = dict.fromkeys(COUNTS, 8)
QUICK = Recipe(epochs=6, batch_size=8, learning_rate=1e-3, evaluations=3, test=0.25, validation=0.25)
"""Enough steps to interrupt, few enough for seconds."""


def photo(label: str, dice: np.random.Generator) -> Image.Image:
    """Draw a noisy picture that is told apart by colour or by stripes."""
    pixels = dice.normal(120, 45, (40, 48, 3)) + dice.normal(0, 25, 3)
    if label == "stripes":
        pixels[:, :: int(dice.integers(3, 6))] += 90
    else:
        pixels[..., {"red": 0, "green": 1}.get(label, 2)] += 60
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_photos(root: Path, counts: dict[str, int], area: str = "Clases", seed: int = 0) -> Path:
    """Make a dataset of so many pictures a class below ``root``."""
    dice = np.random.default_rng(seed)
    for label, count in counts.items():
        folder = root / "Shapes" / area / label
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            photo(label, dice).save(folder / f"{seed}-{number}.png")
    return root / "Shapes"


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT of random weights, made once."""
    return build_tiny_vit(tmp_path_factory.mktemp("base") / "vit")


def configured(folder: Path) -> Config:
    """Return a configuration with everything below a folder."""
    file = folder / "config.yaml"
    places = {"root": folder / "Data", "state_dir": folder / "state", "cache_dir": folder / "cache"}
    said = "".join(f"{key}: {value}\n" for key, value in places.items())
    file.write_text(f"{said}decoding: {{workers: 1}}\ndevice: cpu\nthreads: 1\n", "utf-8")
    return read_config(file, {"HOME": str(folder)})


def request_for(config: Config, base: Path, **changes: Any) -> TrainingRequest:
    """Return a request for the made dataset."""
    recipe = replace(QUICK, **{key: changes.pop(key) for key in list(changes) if hasattr(QUICK, key)})
    return TrainingRequest(Layout(config.root / "Shapes"), base=str(base), recipe=recipe, **changes)


def trained(config: Config, request: TrainingRequest, name: str = "result", **options: Any) -> FinetunedFacts:
    """Fine-tune into the state folder."""
    output = config.state_dir / name
    facts = run_finetuning(request, config, output, now=NOW, load_encoder=lambda _: FakeEncoder(), **options)
    assert facts is not None
    return facts


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, vit: Path) -> tuple[Config, FinetunedFacts]:
    """One training of a ViT from its beginning to its end, one broken and one doubled photo among its data."""
    folder = tmp_path_factory.mktemp("whole")
    config = configured(folder)
    dataset = make_photos(config.root, COUNTS)
    (dataset / "Clases" / "red" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0" + b"no more" * 100)
    shutil.copy(dataset / "Clases" / "red" / "0-1.png", dataset / "Clases" / "green" / "same.png")
    (dataset / "Clases" / "named only").mkdir()
    make_photos(config.root, {"_none": 5}, seed=9)
    return config, trained(config, request_for(config, vit))


def test_run_writes_the_complete_result_and_leaves_nothing_else(whole: tuple[Config, FinetunedFacts]) -> None:
    """Weights, names, processor, facts, metrics, pictures and card; no work folder, no checkpoint, no lock."""
    config, facts = whole
    assert {path.name for path in facts.folder.iterdir()} == {
        "README.md", "config.json", "confusion.png", "curves.png", "metrics.json", "model.safetensors",
        "preprocessor_config.json", "sortd.json",
    }  # fmt: skip
    assert [path.name for path in config.state_dir.glob("result*")] == ["result"]
    assert json.loads((facts.folder / "config.json").read_text("utf-8"))["id2label"] == {
        "0": "green", "1": "red", "2": "stripes",
    }  # fmt: skip
    for picture in ("curves.png", "confusion.png"):
        with Image.open(facts.folder / picture) as image:
            assert min(image.size) > 200
    card = (facts.folder / "README.md").read_text("utf-8")
    assert "| green | 24 |" in card
    assert facts.metrics["comparison"]["verdict"] in card


def test_run_metrics_compare_every_mode_and_strangers(whole: tuple[Config, FinetunedFacts]) -> None:
    """Prototypes and challenger stand on the same images, with what the paired test and the strangers say."""
    metrics = whole[1].metrics
    compared = metrics["comparison"]
    assert set(compared["prototypes"]) == {"avg", "max", "mean", "text", "best", "mixed"}
    for row in (*compared["prototypes"].values(), compared["finetuned"]):
        assert row["images"] == compared["images"] > 8
        assert row["open_set"]["strangers"] == 5
    assert compared["best_mode_accuracy"] == max(row["accuracy"] for row in compared["prototypes"].values())
    assert 0 <= compared["mcnemar"]["p_value"] <= 1
    assert metrics["comparison"]["finetuned_accuracy"] > 0.5


def test_run_unreadable_and_contradictory_photos_are_left_out(whole: tuple[Config, FinetunedFacts]) -> None:
    """A broken file, and a photo that lies in two classes, teach nothing; a class without a photo is told of."""
    metrics = whole[1].metrics
    left_out = {Path(one["path"]).name: one["why"] for one in metrics["left_out"]}
    assert set(left_out) == {"broken.jpg", "same.png", "0-1.png"}
    assert left_out["same.png"] == "the same image is also in red"
    assert metrics["data"]["images"] == sum(COUNTS.values()) - 1
    assert any("named only" in note for note in metrics["data"]["notes"])


def test_run_written_model_is_as_accurate_as_its_metrics(whole: tuple[Config, FinetunedFacts]) -> None:
    """Loaded from its folder, and given photos as sortd decodes them, it is as right as its metrics say."""
    config, facts = whole
    model = load_finetuned(facts.folder, device="cpu")
    files = sorted((config.root / "Shapes" / "Clases").glob("*/0-*.png"))
    pixels = np.stack([decode_file(str(path), model.preprocessing, DecodeLimits()) for path in files])
    found = calibrated(model.encode_images(pixels), model.facts.temperature).argmax(axis=1)
    right = np.mean([facts.labels[best] == path.parent.name for best, path in zip(found, files, strict=True)])
    assert right > facts.metrics["comparison"]["finetuned_accuracy"] - 0.15
    assert len(facts.confidence) == facts.metrics["comparison"]["images"] + sum(
        row["validation"] for row in facts.metrics["classes"]
    )


def figures(facts: FinetunedFacts) -> dict[str, Any]:
    """Return the metrics but for what a clock says."""
    timed = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "eval_runtime",
             "eval_samples_per_second", "eval_steps_per_second"}  # fmt: skip
    log = [{key: value for key, value in row.items() if key not in timed} for row in facts.metrics["log"]]
    return {**facts.metrics, "seconds": None, "log": log}


def test_run_repeats_by_seed_and_resumes_to_the_same_metrics(tmp_path: Path, vit: Path) -> None:
    """Twice the same figures; asked to stop at half, it leaves a checkpoint, and resumed it is within a point."""
    config = configured(tmp_path)
    make_photos(config.root, COUNTS)
    request = request_for(config, vit)
    first = trained(config, request, "first")
    assert figures(trained(config, request, "second")) == figures(first)

    seen: list[int] = []
    half = Observer(progress=lambda now: seen.append(now.step), is_asked_to_stop=lambda: len(seen) >= 8)
    with pytest.raises(TrainingStoppedError, match="stopped at step"):
        trained(config, request, "third", observer=half)
    assert not (config.state_dir / "third").exists()
    work = config.state_dir / f"third{UNFINISHED}"
    begun = newest_checkpoint(work)
    assert begun is not None

    cut = work / "checkpoint-9999"  # as a kill in the middle of writing leaves it
    shutil.copytree(begun, cut)
    (cut / "trainer_state.json").unlink()
    shutil.rmtree(config.root)  # the plan is all that it needs
    (config.root / "Shapes" / "Clases").mkdir(parents=True)
    resumed = trained(config, request, "third", resume=True)
    assert abs(accuracy(resumed) - accuracy(first)) <= 0.01
    assert resumed.metrics["validation"] == pytest.approx(first.metrics["validation"], abs=0.02)


def accuracy(facts: FinetunedFacts) -> float:
    """Return the accuracy on the test images."""
    found: float = facts.metrics["comparison"]["finetuned_accuracy"]
    return found


@pytest.mark.parametrize(
    ("tower", "layout", "kind"),
    [(Tower.DUAL, Placed.CURRENT, "sortd-tower"), (Tower.CLIP, Placed.LEGACY, "clip")],
)
def test_run_clip_as_base_is_trained(tmp_path: Path, tower: Tower, layout: Placed, kind: str) -> None:
    """One of two joined models, for which transformers has no classifier, and one of one come back from a folder."""
    config = configured(tmp_path)
    make_photos(config.root, FEW)
    base = build_tiny_clip(tmp_path / "clip", tower=tower, layout=layout)
    facts = trained(config, request_for(config, base, epochs=1))
    model = load_finetuned(facts.folder, device="cpu")
    assert json.loads((facts.folder / "config.json").read_text("utf-8"))["model_type"] == kind
    seen = model.preprocessing
    assert model.encode_images(np.zeros((2, seen.crop_height, seen.crop_width, 3), np.uint8)).shape == (2, 3)


def test_run_packaged_tower_has_a_larger_input(tmp_path: Path) -> None:
    """``auto`` without the ViT is the packaged tower, at one and a half times its size, with its last map."""
    config = configured(tmp_path)
    make_photos(config.root, FEW)
    facts = trained(config, request_for(config, Path("auto"), epochs=1, evaluations=1))
    said = json.loads((facts.folder / "config.json").read_text("utf-8"))
    assert facts.base == "packaged"
    assert said["features"] == ["embedding", "map"]
    assert said["vision_config"]["image_size"] == facts.preprocessing.crop_height == 96
    assert load_finetuned(facts.folder, device="cpu").facts.model_id == facts.model_id


def test_run_lora_is_merged_into_the_weights(tmp_path: Path, vit: Path) -> None:
    """A model that was trained by LoRA is written whole: its folder needs no peft."""
    config = configured(tmp_path)
    make_photos(config.root, FEW)
    facts = trained(config, request_for(config, vit, epochs=1, lora_rank=2))
    assert load_finetuned(facts.folder, device="cpu").facts.labels == tuple(sorted(COUNTS))


def test_run_images_filed_by_sortd_have_half_weight_and_are_not_tested(tmp_path: Path, vit: Path) -> None:
    """The journal knows which photo in Dataset/ sortd put there; one that a person moved counts whole."""
    config = configured(tmp_path)
    dataset = make_photos(config.root, COUNTS, area="Dataset")
    filed = file_images(dataset, config.state_dir, {f"{number}.png": "green" for number in range(10)})
    os.rename(filed[0], dataset / "Dataset" / "red" / "corrected.png")
    known, _ = find_candidates(Layout(dataset), Source.DATASET, config.state_dir)
    halved = {one.path for one in known if not one.is_placed}
    assert halved == set(filed[1:])
    facts = trained(config, request_for(config, vit, epochs=1, source=Source.DATASET))
    assert facts.metrics["data"]["filed"] == 9
    green = next(row for row in facts.metrics["classes"] if row["label"] == "green")
    assert green["train"] >= 9


def test_run_full_disk_in_training_can_be_resumed(tmp_path: Path, vit: Path) -> None:
    """No result folder appears; once there is room it can be resumed."""
    config = configured(tmp_path)
    make_photos(config.root, FEW)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(_: TrainingProgress) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))  # larger files fail, as all do on a full disk

    try:
        with pytest.raises(DestinationError, match="cannot be written"):
            trained(config, request_for(config, vit), observer=Observer(progress=fill))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (config.state_dir / "result").exists()
    assert trained(config, request_for(config, vit), resume=True).labels == tuple(sorted(COUNTS))


def test_prepare_full_disk_is_an_error_without_a_plan(tmp_path: Path, vit: Path) -> None:
    """What cannot be written is named; the plan, which would make it resumable, is not there."""
    config = configured(tmp_path)
    make_photos(config.root, FEW)
    work = tmp_path / "work"
    work.mkdir()
    pixels_file(work, "train").symlink_to("/dev/full")
    with pytest.raises(DestinationError, match="No space left"):
        prepare_training(request_for(config, vit), config, work, created="", load_encoder=lambda _: FakeEncoder())
    assert not (work / PLAN_FILE).exists()


BAD_DATA: dict[str, tuple[Callable[[Path], object], str]] = {
    "no class": (lambda clases: shutil.rmtree(clases / "red"), "has no class|no image"),
    "one class": (lambda clases: make_photos(clases.parents[1], {"red": 5}), "only the class 'red'"),
    "empty folders": (lambda clases: (clases / "green").mkdir(), "there is no image"),
    "no image": (lambda clases: (clases / "red" / "x.png").write_bytes(b"\x89PNG\r\n\x1a\nno"), "readable image"),
    "too few": (lambda clases: make_photos(clases.parents[1], {"red": 2, "green": 2}), "too few different images"),
}


@pytest.mark.parametrize("bad", BAD_DATA)
def test_run_unsuitable_data_is_refused(tmp_path: Path, vit: Path, bad: str) -> None:
    """No class, one class, no image: said so, and nothing is left behind."""
    config = configured(tmp_path)
    (config.root / "Shapes" / "Clases" / "red").mkdir(parents=True)
    make, said = BAD_DATA[bad]
    make(config.root / "Shapes" / "Clases")
    with pytest.raises(DataError, match=said):
        trained(config, request_for(config, vit))
    assert not list(config.state_dir.glob("result*"))


def test_run_unsuitable_request_is_refused(tmp_path: Path, vit: Path) -> None:
    """A base that is not here, a fixed size, a taken name, nothing to resume, a second process, a wrong --set."""
    from filelock import FileLock

    config = configured(tmp_path)
    make_photos(config.root, FEW)
    request = request_for(config, vit)
    with pytest.raises(ModelError, match="sortd models fetch some/vit"):
        trained(config, replace(request, base="some/vit"))
    with pytest.raises(ModelError, match="needs images of 32 pixels"):
        trained(config, replace(request, side=64))
    with pytest.raises(DataError, match="no unfinished"):
        trained(config, request, resume=True)
    with pytest.raises(DataError, match="no unfinished"):
        unfinished_of(request, config.state_dir)
    (config.state_dir / "taken").mkdir(parents=True)
    with pytest.raises(DataError, match="exists; choose"):
        trained(config, request, "taken")
    work = config.state_dir / f"result{UNFINISHED}"
    work.mkdir()
    with FileLock(work / "lock"), pytest.raises(AlreadyRunningError):
        trained(config, request)
    for pair, said in {"nothing=1": "NAME=VALUE", "seed=1": "set by sortd", "max_steps=few": "rejected"}.items():
        with pytest.raises(ConfigError, match=f"--set {pair}.*{said}"):
            trained(config, replace(request, extra=(pair,)))


def test_command_prints_folder_and_metrics(tmp_path: Path, vit: Path, write_config: Callable[..., Path]) -> None:
    """``sortd finetune`` puts the model into the state folder, and ``--json`` says where and how good."""
    make_photos(tmp_path / "Data", COUNTS)
    config = write_config(device="cpu", threads=1)
    common = ("finetune", "Shapes", "-c", config, "--base", vit, "--epochs", 1, "--set", "max_steps=2")
    ran = sortd(*common, "--json")
    assert ran.code == 0, ran.err
    folder = Path(ran.facts["folder"])
    assert read_facts(folder).model_id == ran.facts["model_id"]
    assert folder.parent.name == "finetuned"
    assert ran.facts["comparison"]["verdict"] in {"weaker", "level", "stronger"}
    assert "sortd: reading images: done" in ran.err
    assert "sortd: training, validation " in ran.err
    assert " at step 2: 2 of 2\n" in ran.err
    assert ran.facts["recipe"]["views"] == 0
    quick = sortd(*common, "--effort", "quick", "--json")
    assert quick.facts["recipe"]["views"] == 4
    assert sortd(*common, "--effort", "enormous").code == 2
    assert sortd("finetune", "Nothing", "-c", config).code == 65
    assert sortd("finetune", "Shapes", "-c", config, "--from", "elsewhere").code == 2


def test_command_interrupted_leaves_a_checkpoint_and_says_how_to_resume(
    tmp_path: Path, vit: Path, write_config: Callable[..., Path]
) -> None:
    """A real SIGINT while it trains ends it with a sentence and leaves a whole checkpoint."""
    make_photos(tmp_path / "Data", COUNTS)
    config = write_config(device="cpu", threads=1)
    checkpoints = "*/finetuned/*.unfinished/checkpoint-*/trainer_state.json"
    over = threading.Event()

    def interrupt() -> None:
        while not list((tmp_path / "state").glob(checkpoints)):
            if over.wait(0.01):
                return
        os.kill(os.getpid(), signal.SIGINT)

    hand = threading.Thread(target=interrupt)
    hand.start()
    try:
        ran = sortd("finetune", "Shapes", "-c", config, "--base", vit, "--batch-size", 8, "--epochs", 60)
    finally:
        over.set()
        hand.join()
    assert ran.code == 130
    assert f"sortd finetune --dataset Shapes --config {config} --resume" in ran.err
    (work,) = (tmp_path / "state").glob("*/finetuned/*.unfinished")
    assert newest_checkpoint(work) is not None
    assert not list((tmp_path / "state").glob("*/finetuned/*/README.md"))


def test_observing_signal_waits_for_the_step_only_in_training() -> None:
    """While a step runs SIGTERM waits for its end; before training there is nothing to lose by ending."""
    with observing() as observer:
        observer.progress(TrainingProgress(1, 10))
        assert not observer.is_asked_to_stop()
        signal.raise_signal(signal.SIGTERM)
        assert observer.is_asked_to_stop()
    with pytest.raises(KeyboardInterrupt), observing():
        signal.raise_signal(signal.SIGINT)


def test_command_without_the_extra_says_how_to_install_it() -> None:
    """Nobody has to guess what ``No module named accelerate`` wants."""
    with pytest.raises(ModelError, match=r"accelerate and matplotlib: pip install 'sortd-images\[train\]'"):
        require_training_packages(lambda _: None)


def test_output_is_named_by_time_and_seed(tmp_path: Path) -> None:
    """Two trainings of one second with two seeds do not meet."""
    request = TrainingRequest(Layout(tmp_path / "Shapes"), recipe=Recipe(seed=7))
    assert output_of(request, tmp_path, NOW).name == "20260301T120000Z-7"
