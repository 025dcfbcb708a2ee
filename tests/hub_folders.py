"""Models of tiny random weights in the file names and configurations of published ones, built offline for tests.

The settings of each builder are those of the repository in its docstring; only the sizes differ.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.tiny_clip import DIMENSIONS, SIDE, TEXT_LENGTH

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

TOWER = {"hidden_size": DIMENSIONS, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**TOWER, "image_size": SIDE, "patch_size": 8}
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]

CLIP_PROCESSOR = {
    "crop_size": SIDE,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": SIDE,
}
"""As in openai/clip-vit-base-patch32: sizes are plain numbers, and the class has its old name."""
SIGLIP_PROCESSOR = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "SiglipProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": SIDE, "width": SIDE},
}


def write_json_files(folder: Path, **files: Any) -> Path:
    """Write each value as ``NAME.json`` and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value, indent=2), "utf-8")
    return folder


def random_model(config: "PreTrainedConfig", seed: int = 0) -> "PreTrainedModel":
    """Return the model of a configuration with random weights, always the same."""
    import torch
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModel.from_config(config)
    return model.eval()


def write_weights(model: "PreTrainedModel", folder: Path, file: str = "model.safetensors") -> None:
    """Write the weights alone."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / file, {"format": "pt"})


def build_siglip(folder: Path) -> Path:
    """Write google/siglip-base-patch16-224: a Unigram tokenizer whose padding is the mark of the end."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import SiglipConfig

    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS, *(f"▁{letter}" for letter in LETTERS)]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(rank)) for rank, piece in enumerate(pieces)], unk_id=2))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[!\"#\$%&'\(\)\*\+,\-\.:;=\?@\[\\\]\^_`\{\|\}~]"), ""),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    settings = {
        "added_tokens_decoder": {
            str(number): {"content": content, "lstrip": True, "normalized": True, "rstrip": True, "single_word": False,
                          "special": True}
            for number, content in ((1, "</s>"), (2, "<unk>"))
        },
        "additional_special_tokens": [],
        "clean_up_tokenization_spaces": True,
        "do_lower_case": True,
        "eos_token": "</s>",
        "model_max_length": TEXT_LENGTH,
        "pad_token": "</s>",
        "processor_class": "SiglipProcessor",
        "sp_model_kwargs": {},
        "tokenizer_class": "SiglipTokenizer",
        "unk_token": "<unk>",
    }  # fmt: skip
    text = {
        **TOWER,
        "vocab_size": len(pieces),
        "max_position_embeddings": TEXT_LENGTH,
        "model_type": "siglip_text_model",
    }
    config = {
        "architectures": ["SiglipModel"],
        "initializer_factor": 1.0,
        "model_type": "siglip",
        "text_config": text,
        "torch_dtype": "float32",
        "transformers_version": "4.37.0.dev0",
        "vision_config": {**VISION, "model_type": "siglip_vision_model"},
    }
    write_json_files(folder, config=config, preprocessor_config=SIGLIP_PROCESSOR, tokenizer_config=settings)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_weights(random_model(SiglipConfig(**config)), folder)
    return folder


def build_siglip2(folder: Path) -> Path:
    """Write google/siglip2-base-patch16-224: the type of SigLIP, and Gemma's tokenizer, which keeps capitals."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import SiglipConfig

    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    capitals = [letter.upper() for letter in LETTERS]
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *bytes_, "▁", *LETTERS, *capitals]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], fuse_unk=True, unk_token=pieces[3], byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    settings = {
        "add_bos_token": False,
        "add_eos_token": True,
        "bos_token": "<bos>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<eos>",
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": "<pad>",
        "padding_side": "right",
        "processor_class": "SiglipProcessor",
        "tokenizer_class": "GemmaTokenizer",
        "unk_token": "<unk>",
    }
    config = {
        "architectures": ["SiglipModel"],
        "initializer_factor": 1.0,
        "model_type": "siglip",
        "text_config": {
            **TOWER, "model_type": "siglip_text_model", "vocab_size": len(pieces),
            "max_position_embeddings": TEXT_LENGTH,
        },
        "torch_dtype": "float32",
        "transformers_version": "4.49.0.dev0",
        "vision_config": {**VISION, "model_type": "siglip_vision_model"},
    }  # fmt: skip
    processor = SIGLIP_PROCESSOR | {"do_convert_rgb": None, "resample": 2}
    write_json_files(folder, config=config, preprocessor_config=processor, tokenizer_config=settings)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_weights(random_model(SiglipConfig(**config), 1), folder)
    return folder
