"""A CLIP of random weights in a sentence-transformers folder, built offline in seconds, for tests of the real thing."""

import shutil
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

SIDE = 32  # pixels: what the tiny models see
DIMENSIONS = 24  # of an embedding
TEXT_LENGTH = 16  # tokens


class Tower(StrEnum):
    """How the two towers are joined; both shapes are found among published models."""

    CLIP = "clip"  # CLIPModel, as clip-ViT-B-32 is
    DUAL = "dual"  # VisionTextDualEncoder: a ConvNeXtV2 and a small BERT


class Layout(StrEnum):
    """How the folder is laid out."""

    CURRENT = "current"  # modules.json names a Transformer whose files lie in the folder itself
    LEGACY = "legacy"  # modules.json names a CLIPModel in 0_CLIPModel, as the published clip-ViT-B-32 does
    PLAIN = "plain"  # no modules.json: a folder of transformers alone, as openai/clip-vit-base-patch32 is


def build_tiny_clip(
    folder: Path,
    seed: int = 0,
    tower: Tower = Tower.CLIP,
    layout: Layout = Layout.CURRENT,
    *,
    dimensions: int = DIMENSIONS,
) -> Path:
    """Write a working CLIP of random weights to ``folder`` and return it; the same seed gives the same weights."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _clip(dimensions) if tower is Tower.CLIP else _dual_encoder(dimensions)
    processor = _processor(tower)
    folder.mkdir(parents=True, exist_ok=True)
    target = {Layout.LEGACY: folder / "0_CLIPModel"}.get(layout, folder)
    model.save_pretrained(target)
    processor.save_pretrained(target)
    if layout is Layout.LEGACY:
        _write(folder / "modules.json", _modules("0_CLIPModel", "sentence_transformers.models.CLIPModel"))
    elif layout is Layout.CURRENT:
        _rewrite_as_sentence_transformers(folder)
    return folder


def _rewrite_as_sentence_transformers(folder: Path) -> None:
    """Let sentence-transformers itself write the folder, as whoever publishes a model does."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer

    model = SentenceTransformer(modules=[Transformer(str(folder))], device="cpu")
    written = folder.with_name(folder.name + ".written")
    model.save(str(written), create_model_card=False)
    shutil.rmtree(folder)
    written.rename(folder)


def _clip(dimensions: int) -> "PreTrainedModel":
    from transformers import CLIPConfig, CLIPModel

    tower: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "attention_dropout": 0.1,  # of no effect but while training
        "projection_dim": dimensions,
    }
    vocabulary = vocabulary_of_bytes()
    begin, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    text = tower | {
        "vocab_size": len(vocabulary),
        "max_position_embeddings": TEXT_LENGTH,
        "bos_token_id": begin,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    vision = tower | {"image_size": SIDE, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=dimensions))


def _dual_encoder(dimensions: int) -> "PreTrainedModel":
    from transformers import (
        BertConfig,
        ConvNextV2Config,
        VisionTextDualEncoderConfig,
        VisionTextDualEncoderModel,
    )

    text = BertConfig(
        vocab_size=len(vocabulary_of_bytes()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
    )
    # The dual encoder asks its vision configuration for hidden_size, which ConvNeXtV2 does not name by itself.
    vision = ConvNextV2Config(
        hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], patch_size=4, image_size=SIDE, hidden_size=32
    )
    config = VisionTextDualEncoderConfig(
        vision_config=vision.to_dict(), text_config=text.to_dict(), projection_dim=dimensions
    )
    return VisionTextDualEncoderModel(config)


def _processor(tower: Tower) -> "ProcessorMixin":
    from transformers import CLIPImageProcessor, CLIPProcessor, CLIPTokenizer, VisionTextDualEncoderProcessor

    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    tokenizer = CLIPTokenizer(vocab=vocabulary_of_bytes(), merges=[], model_max_length=TEXT_LENGTH)
    join = CLIPProcessor if tower is Tower.CLIP else VisionTextDualEncoderProcessor
    return join(image_processor=images, tokenizer=tokenizer)


def vocabulary_of_bytes() -> dict[str, int]:
    """Return single bytes alone and as the end of a word (the alphabet of a byte-level BPE), and CLIP's two markers."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    return {word: index for index, word in enumerate(words)}


def _modules(path: str, kind: str) -> str:
    return f'[{{"idx": 0, "name": "0", "path": "{path}", "type": "{kind}"}}]\n'


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
