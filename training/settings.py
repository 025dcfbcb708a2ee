"""The settings of a training run, with presets for a CPU, a GPU and a smoke test."""

from dataclasses import dataclass, replace

from training.augmentation import CALM, MILD, STRONG, Strength


@dataclass(frozen=True, slots=True)
class Architecture:
    """The sizes of both towers, which the exported `config.json` contains."""

    image_pixels: int = 64
    stem_channels: int = 64
    stage_channels: tuple[int, int, int] = (128, 256, 384)
    stage_depths: tuple[int, int, int] = (2, 3, 1)
    vision_width: int = 384
    vision_layers: int = 1
    vision_hidden: int = 1152
    text_width: int = 192
    text_layers: int = 2
    text_hidden: int = 768
    text_tokens: int = 16
    vocabulary: int = 3000
    embedding: int = 384


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of one training run."""

    architecture: Architecture = Architecture()
    batch: int = 256
    texts: int = 256
    epochs: float = 60.0
    budget_minutes: float | None = None
    peak_rate: float = 1.2e-3
    kernel_rate_factor: float = 6.0
    matrix_rate_factor: float = 2.0
    """Learning rates of Muon's kernels and matrices relative to AdamW's embeddings, norms and classifiers."""
    final_rate_share: float = 0.002
    warmup_share: float = 0.03
    weight_decay: float = 0.05
    gradient_norm: float = 2.0
    average_decay: float = 0.999
    average_every: int = 4
    strength: Strength = STRONG
    calm_strength: Strength = CALM
    calm_share: float = 0.15
    sides: tuple[tuple[float, int], ...] = ((0.0, 48), (0.6, 64))
    """Progress from which a side of views, in pixels, applies: small views first, which are cheap."""
    head_weight: float = 1.0
    compile_towers: bool = False
    checkpoint_minutes: float = 5.0
    evaluate_minutes: float = 10.0
    seed: int = 0
    includes_held_out: bool = False
    """Whether held-out images are trained on, too; the figures of held-out images then say nothing about new ones."""


def preset(name: str) -> Settings:
    """Return the preset `cpu`, `gpu` or `smoke`."""
    match name:
        case "cpu":
            return Settings(epochs=30.0, budget_minutes=105.0, strength=MILD, calm_strength=MILD, compile_towers=True)
        case "gpu":
            wider = Architecture(stage_depths=(2, 3, 1), vision_layers=2)
            return Settings(
                architecture=wider,
                batch=512,
                texts=640,
                epochs=200.0,
                peak_rate=2e-3,
                average_decay=0.9998,
                compile_towers=True,
            )
        case "smoke":
            tiny = Architecture(
                stem_channels=16,
                stage_channels=(16, 32, 48),
                stage_depths=(1, 1, 1),
                vision_width=64,
                vision_layers=1,
                vision_hidden=64,
                text_width=64,
                text_layers=1,
                text_hidden=64,
                vocabulary=400,
                embedding=64,
            )
            return replace(
                Settings(), architecture=tiny, batch=32, texts=12, epochs=6.0, average_decay=0.9, evaluate_minutes=60.0
            )
    raise ValueError(f"unknown preset {name!r}; use cpu, gpu or smoke")
