"""Compare images per second in the training of a ViT-B/16: by sortd, and by a plain loop.

    python -m benchmarks.finetuning [--images 256] [--epochs 2] [--batch 32] [--device auto] [--small] [--rounds 5]
                                    [--json]

Weights and photos (JPEG, 320 x 240) are random, since speed does not depend on them. The plain loop is a simple
script: float32, one process, no workers, every photo opened, resized and normalised again in every
epoch by Pillow and numpy, AdamW at one rate. sortd's decodes each photo once, draws views on the device, and
multiplies in bfloat16 where the hardware does. Both make as many passes over the photos and train all layers; reading
the photos is part of both.
``--small`` takes a ViT of two layers, to see that it runs.
"""

import argparse
import itertools
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from benchmarks.comparison import Piece, alternate, claim_of_ratio, conclude, summary, timed
from benchmarks.harness import argument_parser
from sortd.encoder.clip import torch_device
from sortd.encoder.finetuned import Network
from sortd.events import Fit, Preprocessing
from sortd.finetune.data import TrainDataset
from sortd.finetune.recipe import Recipe
from sortd.finetune.run import enlarged
from sortd.finetune.train import TrainSettings, make_model, train
from sortd.images.decode import DecodeLimits
from sortd.images.pool import DecodedImage, DecoderPool
from sortd.watch.scan import stamp

if TYPE_CHECKING:
    import torch

CLASSES = 10
PROCESSOR = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def draw_photos(folder: Path, count: int) -> list[Path]:
    """Write random photos, smooth enough to compress like real ones."""
    dice = np.random.default_rng(0)
    files = []
    for number in range(count):
        coarse = dice.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        files.append(folder / f"{number}.jpg")
        Image.fromarray(coarse).resize((320, 240), Image.Resampling.BICUBIC).save(files[-1], quality=90)
    return files


def vision_transformer(*, small: bool) -> Any:  # noqa: ANN401 - transformers has no types
    """Return a ViT of random weights: B/16 at 224 pixels, or a small one."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes: dict[str, int] = {}
    if small:
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    return ViTForImageClassification(ViTConfig(num_labels=CLASSES, **sizes))


def plain_loop(files: list[Path], model: Any, arguments: argparse.Namespace, device: "torch.device") -> int:  # noqa: ANN401 -- as above
    """Train with a plain loop; return how many images it saw."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    for _ in range(arguments.epochs):
        for start in range(0, len(files), arguments.batch):
            photos = [Image.open(file).convert("RGB") for file in files[start : start + arguments.batch]]
            sized = [np.asarray(photo.resize((224, 224), Image.Resampling.BILINEAR)) for photo in photos]
            scaled = (np.stack(sized).astype(np.float32) / 255 - 0.5) / 0.5
            values = torch.from_numpy(scaled).permute(0, 3, 1, 2).contiguous().to(device)
            labels = torch.arange(start, start + len(photos), device=device) % CLASSES
            loss = torch.nn.functional.cross_entropy(model(pixel_values=values).logits, labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no type for it
            optimizer.step()
    settle(device)
    return len(files) * int(arguments.epochs)


def own_training(files: list[Path], network: Network, arguments: argparse.Namespace, work: Path) -> int:
    """Train as ``sortd finetune`` does, including decoding; return how many images it saw."""
    recipe = Recipe(epochs=arguments.epochs, batch_size=arguments.batch, evaluations=1)
    seen = Preprocessing(224, 224, 224, 2, Fit.STRETCH)
    large = enlarged(seen)
    pixels = np.empty((len(files), large.crop_height, large.crop_width, 3), np.uint8)
    stamped = [(str(file), found) for file in files if (found := stamp(str(file))) is not None]
    with DecoderPool(arguments.workers, large, DecodeLimits()) as pool:
        for index, answer in enumerate(pool.decode_all(stamped)):
            assert isinstance(answer, DecodedImage)
            pixels[index] = answer.pixels
    dataset = TrainDataset(pixels, np.arange(len(files)) % CLASSES, np.ones(len(files), np.float32))
    validation = TrainDataset(pixels[:CLASSES, :224, :224], np.arange(CLASSES), np.ones(CLASSES, np.float32))
    model = make_model(network, (224, 224), dataset, recipe)
    train(model, dataset, validation, TrainSettings(recipe, work, network.device.type, extra=("save_only_model=true",)))
    settle(network.device)
    return len(files) * int(arguments.epochs)


def settle(device: "torch.device") -> None:
    """Wait until a GPU has finished its queued work."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> int:
    """Measure both, and print images per second and their ratio."""
    parser = argument_parser(__doc__, rounds=5)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    device, numbers = torch_device(arguments.device), itertools.count()
    with tempfile.TemporaryDirectory(prefix="finetuning-") as place:
        files = draw_photos(Path(place), arguments.images)

        def plain() -> Piece:
            model = vision_transformer(small=arguments.small).to(device).train()
            return timed(lambda: plain_loop(files, model, arguments, device))()

        def own() -> Piece:
            network = Network(vision_transformer(small=arguments.small), PROCESSOR, device)
            work = Path(place) / f"work {next(numbers)}"
            return timed(lambda: own_training(files, network, arguments, work))()

        pieces = alternate({"plain loop": plain, "sortd": own}, rounds=arguments.rounds)
    claims = [claim_of_ratio("sortd over the plain loop, images trained", pieces, "sortd", "plain loop")]
    more = {"device": str(device)}
    return conclude(summary(pieces), claims, as_json=arguments.json, rounds=arguments.rounds, more=more)


if __name__ == "__main__":
    sys.exit(main())
