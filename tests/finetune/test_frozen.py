"""The frozen part of a network: its features replace the lower blocks, and are computed once."""

import os
import resource
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sortd.encoder.finetuned import UNFINISHED, Network
from sortd.errors import DestinationError
from sortd.finetune import frozen, model
from sortd.finetune.data import features_file
from sortd.finetune.frozen import BLOCK, FrozenPart, divide, write_features
from sortd.finetune.model import load_base, views_of
from sortd.finetune.recipe import Effort, Observer, Recipe, TrainingStoppedError
from tests.finetune.test_run import COUNTS, FEW, configured, make_photos, request_for, trained
from tests.tiny_vit import build_tiny_vit

PROCESSOR = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
SIDE = 64
SIZES: dict[str, dict[str, Any]] = {
    "vit": {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 8},
    "deit": {
        "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 8,
        "architectures": ["DeiTForImageClassification"],  # transformers does not choose one by the type alone
    },
    "dinov2": {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8},
    "swin": {"embed_dim": 24, "depths": [1] * 4, "num_heads": [2] * 4, "window_size": 2, "patch_size": 4},
    "convnext": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
}  # fmt: skip


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT of two blocks and random weights, made once."""
    return build_tiny_vit(tmp_path_factory.mktemp("base") / "vit")


def make_network(kind: str) -> Network:
    """A small image classifier of random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForImageClassification

    sizes = SIZES[kind] | ({} if kind in {"convnext", "resnet"} else {"image_size": SIDE})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = AutoModelForImageClassification.from_config(AutoConfig.for_model(kind, num_labels=3, **sizes))
    return Network(module.eval(), PROCESSOR, torch.device("cpu"))


@pytest.mark.parametrize("kind", SIZES)
def test_divide_network_starts_at_its_trained_blocks(kind: str) -> None:
    """With equal logits, for any number of images; only the last blocks and the head have gradients."""
    import torch

    network = make_network(kind)
    part = divide(network, (SIDE, SIDE))
    assert part is not None
    values = torch.rand((5, 3, SIDE, SIDE))
    with torch.inference_mode():
        whole = network.module(pixel_values=values).logits
        features = part.features(values).clone()
        found = part.start_at(features, (SIDE, SIDE)).logits
    assert torch.allclose(whole, found, atol=1e-5)
    part.start_at(features.clone(), (SIDE, SIDE)).logits.sum().backward()
    trained_ones = {name for name, one in network.module.named_parameters() if one.grad is not None}
    assert trained_ones == {name for name, one in network.module.named_parameters() if one.requires_grad}
    assert 0 < len(trained_ones) < len(list(network.module.parameters()))
    assert any(name.startswith("classifier") for name in trained_ones)


def test_divide_packaged_tower_keeps_its_last_stage_trained() -> None:
    """Its map comes from there."""
    import torch

    base = load_base("packaged", ["a", "b"])
    part = divide(Network(base.module, base.processor, torch.device("cpu")), (96, 96))
    assert part is not None
    trained_ones = {name for name, one in base.module.named_parameters() if one.requires_grad}
    assert any(".stages.2." in name for name in trained_ones)
    assert not any(".stages.1." in name or ".stages.0." in name for name in trained_ones)


def test_divide_network_without_blocks_is_none() -> None:
    """All of it is trained then."""
    import torch

    class Plain(torch.nn.Module):
        """One layer, and a head."""

        def __init__(self) -> None:
            super().__init__()
            self.stem = torch.nn.Linear(3, 4)
            self.classifier = torch.nn.Linear(4, 2)

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            answer: torch.Tensor = self.classifier(self.stem(pixel_values.mean(dim=(2, 3))))
            return answer

    module = Plain()
    assert divide(Network(module, PROCESSOR, torch.device("cpu")), (SIDE, SIDE)) is None
    assert all(one.requires_grad for one in module.parameters())


def test_divide_network_with_another_path_is_none() -> None:
    """Where the head reads more than the last blocks, equal logits are impossible, and all blocks are trained."""
    import torch

    class Skipping(torch.nn.Module):
        """Two blocks, with the image beside the second."""

        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(3, 3)) for _ in range(2))
            self.classifier = torch.nn.Linear(3, 2)

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            seen = pixel_values.mean(dim=(2, 3))
            answer: torch.Tensor = self.classifier(self.blocks[1](self.blocks[0](seen)) + seen)
            return answer

    module = Skipping()
    assert divide(Network(module, PROCESSOR, torch.device("cpu")), (SIDE, SIDE)) is None
    assert all(one.requires_grad for one in module.parameters())
    assert module(torch.ones((2, 3, 4, 4))).shape == (2, 2)


def test_views_are_fewer_for_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stored features have a limit, and one view of each image is always stored."""
    part = divide(make_network("vit"), (SIDE, SIDE))
    assert part is not None
    each = 2 * 65 * 16
    monkeypatch.setattr(frozen, "FEATURE_BYTES", 100 * each)
    assert [part.views_within(8, images) for images in (10, 12, 13, 40, 1000)] == [8, 8, 7, 2, 1]


def count_images(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the images that pass through the stem of a ViT, and those whose features are computed."""
    from transformers.models.vit.modeling_vit import ViTEmbeddings

    passed: Counter[str] = Counter()
    stem, features = ViTEmbeddings.forward, FrozenPart.features

    def through_stem(embeddings: Any, pixel_values: Any, *given: Any, **named: Any) -> Any:
        passed["stem"] += len(pixel_values)
        return stem(embeddings, pixel_values, *given, **named)

    def through_features(part: FrozenPart, values: Any) -> Any:
        passed["features"] += len(values)
        return features(part, values)

    monkeypatch.setattr(ViTEmbeddings, "forward", through_stem)
    monkeypatch.setattr(FrozenPart, "features", through_features)
    return passed


DIVIDING = 1 + 2 + 2
"""Images that divide a network: one for the outputs, two for the logits, two for their features."""


def test_run_frozen_blocks_see_each_view_once(tmp_path: Path, vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many epochs are trained; a resumed run computes no features again."""
    config = configured(tmp_path)
    make_photos(config.root, COUNTS)
    passed = count_images(monkeypatch)
    seen: list[int] = []
    stop = Observer(progress=lambda now: seen.append(now.step), is_asked_to_stop=lambda: len(seen) >= 5)
    request = request_for(config, vit, views=4)
    with pytest.raises(TrainingStoppedError):
        trained(config, request, observer=stop)
    counts = Counter[str]()
    work = config.state_dir / f"result{UNFINISHED}"
    stored = features_file(work, "train").stat().st_mtime_ns
    views = passed["features"] - 2
    assert passed["stem"] == DIVIDING + views
    passed.clear()
    facts = trained(config, request, resume=True)
    for row in facts.metrics["classes"]:
        counts.update({part: row[part] for part in ("train", "validation", "test")})
    assert views == 4 * counts["train"] + counts["validation"]
    assert stored > 0
    assert passed["features"] == 2
    assert passed["stem"] == DIVIDING + counts["validation"] + counts["test"]


@pytest.mark.parametrize("size", [0, 1000])
@pytest.mark.parametrize("name", ["train", "validation"])
def test_run_incomplete_features_are_computed_again(tmp_path: Path, vit: Path, name: str, size: int) -> None:
    """A power cut may leave a file that has its name but not its content."""
    config = configured(tmp_path)
    make_photos(config.root, FEW)
    seen: list[int] = []
    stop = Observer(progress=lambda now: seen.append(now.step), is_asked_to_stop=lambda: len(seen) >= 5)
    request = request_for(config, vit, views=2, epochs=10)
    with pytest.raises(TrainingStoppedError):
        trained(config, request, observer=stop)
    file = features_file(config.state_dir / f"result{UNFINISHED}", name)
    whole = file.stat().st_size
    assert whole > size
    os.truncate(file, size)
    facts = trained(config, request, resume=True)
    assert facts.metrics["best_step"] > 0


def test_divide_features_beyond_half_precision_is_none() -> None:
    """They are stored as float16, so all blocks are trained where that loses values."""
    import torch

    network = make_network("vit")
    with torch.no_grad():
        network.module.get_parameter("vit.embeddings.position_embeddings").mul_(1e8)
    assert divide(network, (SIDE, SIDE)) is None


def test_write_features_on_a_full_disk_leaves_no_file(tmp_path: Path) -> None:
    """Nothing that takes the room of others."""
    network = make_network("vit")
    part = divide(network, (SIDE, SIDE))
    assert part is not None
    pixels = np.zeros((200, SIDE, SIDE, 3), np.uint8)
    views = views_of(Recipe(), (SIDE, SIDE), random=0)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limit[1]))
        with pytest.raises(DestinationError, match="File too large"):
            write_features(part, network, pixels, views, tmp_path / "train.features")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert list(tmp_path.iterdir()) == []


def test_run_trains_the_last_block_only(tmp_path: Path, vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By ``quick`` and ``standard``; ``thorough`` trains all."""
    import torch
    from safetensors.torch import load_file

    monkeypatch.setattr(model, "SHARES", (1.0,))
    config = configured(tmp_path)
    make_photos(config.root, FEW)
    before = load_base(str(vit), sorted(FEW)).module.state_dict()
    blocks = sorted({found.group(1) for name in before if (found := BLOCK.match(name))})
    changed: dict[str, set[str]] = {}
    for name, views in (("last", 2), ("all", 0)):
        facts = trained(config, request_for(config, vit, epochs=2, views=views), name)
        after = load_file(facts.folder / "model.safetensors")
        differ = {key for key, value in before.items() if not torch.equal(value, after[key])}
        changed[name] = {block for block in blocks if any(key.startswith(f"{block}.") for key in differ)}
    assert changed == {"last": {blocks[1]}, "all": set(blocks)}


def test_run_without_improvement_stops_early(tmp_path: Path, vit: Path) -> None:
    """After as many evaluations as the recipe allows, of held-out images."""
    config = configured(tmp_path)
    make_photos(config.root, FEW)
    steps: list[tuple[int, int]] = []
    watch = Observer(progress=lambda now: steps.append((now.step, now.steps)))
    request = request_for(config, vit, epochs=20, evaluations=10, patience=2, learning_rate=1e-12)
    facts = trained(config, request, observer=watch)
    last, planned = steps[-1]
    assert last == 3 * planned / 10
    evaluations = [row for row in facts.metrics["log"] if "eval_score" in row]
    assert len(evaluations) == 3
    assert facts.metrics["best_step"] == planned / 10


def test_effort_has_three_recipes() -> None:
    """Each takes more steps or blocks than the one before."""
    quick, standard, thorough = (effort.recipe for effort in Effort)
    assert standard == Recipe()
    assert quick.epochs_for(28, images_per_step=32) < standard.epochs_for(28, images_per_step=32)
    assert quick.views < standard.views
    assert thorough.views == 0
    assert thorough.patience > standard.patience
