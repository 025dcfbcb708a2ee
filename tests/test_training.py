"""The recipe: views, captions and the loss are what they claim, and the smoke run writes a folder that loads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.daemon_process import PATIENCE_SECONDS
from training import checkpoint, schedule
from training.augmentation import CALM, STRONG, Augmenter, normalise
from training.concepts import BACKGROUND, key, merge
from training.data import Shuffler, read_library
from training.loss import classify, contrast
from training.made_up import write_made_up
from training.settings import Settings, preset

REPOSITORY = Path(__file__).parent.parent


class TestConcepts:
    """Labels of several data sets become concepts."""

    def test_merge_shared_names_share_a_concept(self) -> None:
        """Whatever other names a label has."""
        vocabulary = merge({"a": ["barrel"], "b": ["barrel, cask", "tub"]})
        assert vocabulary.of_label["a"][0] == vocabulary.of_label["b"][0]
        assert vocabulary.concepts[vocabulary.of_label["a"][0]].names == ("barrel", "cask")

    def test_merge_background_class_has_no_concept(self) -> None:
        """Its images are not trained on."""
        assert merge({"caltech101": [BACKGROUND, "ant"]}).of_label["caltech101"] == (-1, 0)

    def test_key_ignores_plural_and_punctuation(self) -> None:
        """Data sets differ in spelling."""
        assert key("Binoculars") == key("binocular")
        assert key("bow-tie") == key("bow tie")
        assert key("dress") == "dress"


class TestData:
    """Batches are drawn from what is not held out."""

    def test_shuffler_never_shows_held_out_images(self, tmp_path: Path) -> None:
        """Those whose index modulo ten is nine."""
        library = read_library(write_made_up(tmp_path / "data"), tmp_path / "cache")
        photo_set = library.photo_sets[0]
        photo_set.held_out()
        kept_out = {photo_set.pixels[i].tobytes() for i in np.flatnonzero(photo_set.held_out())}
        shuffler = Shuffler(library, batch=32, seed=0)
        for step in range(shuffler.steps_per_epoch):
            for pixels in shuffler.at(step).pixels.numpy():
                assert pixels.tobytes() not in kept_out

    def test_shuffler_includes_held_out_images_on_request(self, tmp_path: Path) -> None:
        """Then an epoch shows every image."""
        library = read_library(write_made_up(tmp_path / "data"), tmp_path / "cache")
        every = {image.tobytes() for photo_set in library.photo_sets for image in photo_set.pixels}
        shuffler = Shuffler(library, batch=1, seed=0, includes_held_out=True)
        shown = {shuffler.at(step).pixels.numpy()[0].tobytes() for step in range(shuffler.steps_per_epoch)}
        assert shown == every

    def test_shuffler_resumed_step_has_the_same_batch(self, tmp_path: Path) -> None:
        """The order depends only on seed and step."""
        library = read_library(write_made_up(tmp_path / "data"), tmp_path / "cache")
        straight, resumed = Shuffler(library, batch=16, seed=3), Shuffler(library, batch=16, seed=3)
        for step in range(30):
            straight.at(step)
        assert torch.equal(straight.at(30).pixels, resumed.at(30).pixels)


class TestAugmentation:
    """Views are drawn by seed."""

    @pytest.mark.parametrize("strength", [STRONG, CALM])
    def test_augmenter_views_have_their_size_and_depend_on_the_seed(self, strength: object) -> None:
        """Equal seeds give equal views."""
        pixels = torch.randint(0, 256, (12, 64, 64, 3), dtype=torch.uint8)
        augmenter = Augmenter(torch.device("cpu"))
        first, again, other = (augmenter.views(pixels, side=48, strength=strength, seed=s) for s in (1, 1, 2))  # type: ignore[arg-type]  # parametrize gives objects
        assert first.shape == (12, 3, 48, 48)
        assert bool(first.isfinite().all())
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_normalise_equals_the_exported_processor(self) -> None:
        """Training and use must see the same numbers."""
        from training.export import processor

        described = processor(64)
        grey = normalise(torch.full((1, 64, 64, 3), 128, dtype=torch.uint8))
        mean, deviation = described["image_mean"], described["image_std"]
        assert isinstance(mean, list)
        assert isinstance(deviation, list)
        expected = [(128 / 255 - m) / d for m, d in zip(mean, deviation, strict=True)]
        assert torch.allclose(grey[0, :, 5, 5], torch.tensor(expected), atol=1e-5)


class TestLoss:
    """What the loss rewards."""

    def test_contrast_images_of_one_concept_are_positives(self) -> None:
        """Two images with their shared caption have almost no loss."""
        texts = torch.eye(3)
        to_text, of_text = contrast(texts[[0, 0, 1]], texts, torch.tensor(100.0), torch.tensor([0, 0, 1]))
        assert to_text.item() < 1e-3
        # Two images share the first caption evenly, which costs log 2; the second has its only image.
        assert of_text.item() == pytest.approx(np.log(2) / 2, abs=1e-3)

    def test_classify_ignores_names_of_other_data_sets(self) -> None:
        """Only names of the image's own set compete."""
        logits = torch.tensor([[1.0, 50.0]])
        allowed = torch.tensor([[True, False]])
        assert classify(logits, torch.tensor([0]), allowed).item() == pytest.approx(0.0, abs=1e-6)


class TestSchedule:
    """The share of the run decides."""

    def test_rate_warms_up_and_decays(self) -> None:
        """To less than a hundredth of the peak."""
        settings = Settings()
        rates = [schedule.rate(settings, share) for share in (0.0, settings.warmup_share, 0.5, 1.0)]
        assert rates[0] < rates[2] < rates[1] == pytest.approx(settings.peak_rate)
        assert rates[3] < 0.01 * settings.peak_rate

    def test_clock_ends_by_budget_or_steps(self) -> None:
        """Whichever comes first."""
        clock = schedule.Clock(steps=1000, budget_seconds=60.0)
        assert clock.share(10, 30.0) == pytest.approx(0.5)
        assert clock.share(900, 30.0) == pytest.approx(0.9)
        assert schedule.Clock(steps=1000, budget_seconds=None).share(10, 1e9) == pytest.approx(0.01)

    def test_schedule_views_grow_and_become_weaker(self) -> None:
        """Small and strong first, full size and weak at the end."""
        settings = preset("gpu")
        assert schedule.side(settings, 0.0) < schedule.side(settings, 0.99) == settings.architecture.image_pixels
        assert (schedule.strength(settings, 0.1), schedule.strength(settings, 0.99)) == (STRONG, CALM)


class TestCheckpoint:
    """A run goes on where it stood."""

    def test_checkpoint_load_returns_what_was_saved(self, tmp_path: Path) -> None:
        """Progress, weights, average and optimizer."""
        layer = torch.nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(layer.parameters())
        layer(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        progress = checkpoint.Standing(step=7, seconds=1.5, updates=2)
        checkpoint.save(
            tmp_path, progress, weights=layer.state_dict(), average=layer.state_dict(), optimizers=[optimizer]
        )
        saved = checkpoint.load(tmp_path)
        assert saved is not None
        assert saved.progress == progress
        assert torch.equal(saved.weights["weight"], layer.weight)
        assert saved.optimizers[0]["state"][0]["step"] == 1

    def test_checkpoint_interrupted_save_keeps_the_old_one(self, tmp_path: Path) -> None:
        """Only a rename replaces it."""
        layer = torch.nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(layer.parameters())
        first = checkpoint.Standing(step=1)
        checkpoint.save(tmp_path, first, weights=layer.state_dict(), average=layer.state_dict(), optimizers=[optimizer])
        (tmp_path / "checkpoint.partial").mkdir()
        (tmp_path / "checkpoint.partial" / "progress.json").write_text("{", encoding="utf-8")
        saved = checkpoint.load(tmp_path)
        assert saved is not None
        assert saved.progress == first


@pytest.mark.slow
def test_smoke_run_writes_a_folder_that_loads_offline(tmp_path: Path) -> None:
    """From synthetic data to a folder that sentence-transformers loads, with figures and curves."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run, output = tmp_path / "run", tmp_path / "model"
    command = [sys.executable, "-m", "training.train", "--smoke", "--run", str(run), "--output", str(output)]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (run / "curves.jsonl").read_text(encoding="utf-8").splitlines()]
    assert any("zero_shot_shapes" in line for line in lines)

    from PIL import Image
    from sentence_transformers import SentenceTransformer

    loaded = SentenceTransformer(str(output), device="cpu", local_files_only=True)
    images, texts = loaded.encode([Image.new("RGB", (80, 70), (200, 40, 40))]), loaded.encode(["a photo of a dog"])
    assert images.shape == texts.shape


def test_export_gives_the_rows_of_the_trained_model(tmp_path: Path) -> None:
    """Folding the neck into the pooler and rounding change almost nothing, also where a run starts from the folder."""
    from sentence_transformers import SentenceTransformer

    from training.export import export
    from training.model import Student, describe
    from training.tokens import learn_tokenizer

    torch.manual_seed(0)
    sizes = preset("smoke").architecture
    vocabulary = merge({"shapes": ["red circle", "blue square"]})
    tokenizer = learn_tokenizer(vocabulary, pieces=sizes.vocabulary, longest=sizes.text_tokens)
    student = Student(describe(sizes, vocabulary=len(tokenizer)), concepts=2)
    images = normalise(torch.randint(0, 256, (16, 64, 64, 3), dtype=torch.uint8))
    student.train()
    for _ in range(5):
        student.embed_images(images)
    student.eval()
    export(student, tokenizer, tmp_path, image_pixels=sizes.image_pixels)
    again = Student(describe(sizes, vocabulary=len(tokenizer)), concepts=2)
    again.load_state_dict(again.state_dict() | checkpoint.load_average(tmp_path))
    again.eval()
    loaded = SentenceTransformer(str(tmp_path), device="cpu", local_files_only=True)
    with torch.inference_mode():
        shipped = loaded({"pixel_values": images, "modality": "image"})["sentence_embedding"]
        trained, _ = student.embed_images(images)
        started, _ = again.embed_images(images)
    assert torch.nn.functional.cosine_similarity(shipped, trained).min().item() > 0.999
    assert torch.nn.functional.cosine_similarity(shipped, started).min().item() > 0.999
