"""Measure the size and the speed of the published models in docs/models.md, with random weights of their shapes.

    python -m benchmarks.published [--rounds 5] [--json]

Sizes are those of all weights in float32 (packaged: of its file). Speeds are images a second of the image tower,
relative to CLIP ViT-B/32: processor time of one thread for batches of two, all models in turns, median of the rounds.
"""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.harness import argument_parser, print_json
from sortd.encoder.models import PACKAGED, WEIGHTS

BATCH = 2
REFERENCE = "clip-ViT-B-32"


def tower(width: int, layers: int, *, patch: int = 16, **others: int) -> dict[str, int]:
    """Return the sizes of a transformer for images, whose heads have 64 dimensions."""
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "patch_size": patch}
    return sizes | {"num_attention_heads": width // 64} | others


def configurations() -> dict[str, Any]:
    """Return the configuration of each model, as its config.json on the hub gives it."""
    from transformers import AutoConfig, CLIPConfig, Dinov2Config, SiglipConfig

    def clip(vision: dict[str, int], text: dict[str, int], dimensions: int) -> CLIPConfig:
        return CLIPConfig(vision_config=vision, text_config=text, projection_dim=dimensions)

    def words(width: int, layers: int) -> dict[str, int]:
        return tower(width, layers) | {"max_position_embeddings": 77}

    return {
        "packaged": AutoConfig.from_pretrained(str(PACKAGED)),
        "facebook/dinov2-small": Dinov2Config(
            hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14
        ),
        "wkcn/TinyCLIP-ViT-8M-16-Text-3M-YFCC15M": clip(tower(256, 10), words(256, 3), 512),
        REFERENCE: clip(tower(768, 12, patch=32), words(512, 12), 512),
        "google/siglip2-base-patch16-224": SiglipConfig(
            text_config=tower(768, 12) | {"vocab_size": 256_000}, vision_config=tower(768, 12)
        ),
        "clip-ViT-L-14": clip(tower(1024, 24, patch=14), words(768, 12), 768),
    }


def megabytes(name: str, configuration: Any) -> float:  # noqa: ANN401 - transformers publishes no types.
    """Return the size of a model's weights."""
    import torch
    from transformers import AutoModel

    if name == "packaged":
        return (PACKAGED / WEIGHTS).stat().st_size / 1e6
    with torch.device("meta"):
        model = AutoModel.from_config(configuration)
    return float(sum(4 * weight.numel() for weight in model.parameters()) / 1e6)


def image_tower(configuration: Any) -> Callable[[], float]:  # noqa: ANN401 - transformers publishes no types.
    """Return a function that embeds a batch and returns the processor time of an image."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_config(configuration).eval()
    side = getattr(getattr(configuration, "vision_config", None), "image_size", 224)
    pixels = torch.rand(BATCH, 3, side, side)
    run = getattr(model, "get_image_features", model)

    def seconds() -> float:
        began = time.process_time()
        with torch.inference_mode():
            run(pixel_values=pixels)
        return (time.process_time() - began) / BATCH

    return seconds


def main() -> None:
    """Print the figures of each model."""
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    found = configurations()
    sizes = {name: round(megabytes(name, configuration)) for name, configuration in found.items()}
    towers = {name: image_tower(configuration) for name, configuration in found.items()}
    for run in towers.values():
        run()
    rounds = [{name: run() for name, run in towers.items()} for _ in range(options.rounds)]
    speeds = {name: [one[REFERENCE] / one[name] for one in rounds] for name in towers}
    figures = {
        name: {
            "megabytes": sizes[name],
            "speed": round(statistics.median(speeds[name]), 2),
            "least": round(min(speeds[name]), 2),
            "most": round(max(speeds[name]), 2),
        }
        for name in found
    }
    if options.json:
        print_json(figures, n=options.rounds)
        return
    for name, row in figures.items():
        print(f"{name:42s} {json.dumps(row)}")


if __name__ == "__main__":
    main()
