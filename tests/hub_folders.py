"""Models of tiny random weights in the file names and configurations of published ones, built offline for tests.

The settings of each builder are those of the repository in its docstring; only the sizes differ.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.tiny_clip import DIMENSIONS, SIDE, TEXT_LENGTH, vocabulary_of_bytes

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
    tokenizer.enable_truncation(TEXT_LENGTH)
    tokenizer.enable_padding(direction="right", pad_id=0, pad_token=pieces[0], length=TEXT_LENGTH)
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


def build_dinov2(folder: Path) -> Path:
    """Write facebook/dinov2-small: an encoder of images, whose processor is BiT's with a crop of the centre."""
    from transformers import Dinov2Config

    config = {
        "architectures": ["Dinov2Model"],
        "drop_path_rate": 0.0,
        "hidden_act": "gelu",
        "hidden_size": DIMENSIONS,
        "image_size": 2 * SIDE,  # of its position embeddings, which are interpolated
        "layerscale_value": 1.0,
        "mlp_ratio": 2,
        "model_type": "dinov2",
        "num_attention_heads": 2,
        "num_channels": 3,
        "num_hidden_layers": 2,
        "patch_size": 8,
        "qkv_bias": True,
        "torch_dtype": "float32",
        "transformers_version": "4.32.0.dev0",
        "use_swiglu_ffn": False,
    }
    processor = {
        "crop_size": {"height": SIDE, "width": SIDE},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_processor_type": "BitImageProcessor",
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": 36},
    }
    write_json_files(folder, config=config, preprocessor_config=processor)
    write_weights(random_model(Dinov2Config(**config), 2), folder)
    return folder


def build_vit(folder: Path) -> Path:
    """Write google/vit-base-patch16-224: a classifier, whose weights have a prefix, a head and no pooler."""
    import torch
    from safetensors.torch import save_file
    from transformers import ViTConfig

    config = {
        "architectures": ["ViTForImageClassification"],
        "hidden_size": DIMENSIONS,
        "id2label": {"0": "tench", "1": "goldfish"},
        "image_size": SIDE,
        "intermediate_size": 48,
        "model_type": "vit",
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "patch_size": 8,
    }
    half = [0.5, 0.5, 0.5]
    processor = {"do_normalize": True, "do_resize": True, "image_mean": half, "image_std": half, "size": SIDE}
    write_json_files(folder, config=config, preprocessor_config=processor)
    model = random_model(ViTConfig(**config), 3)
    weights = {f"vit.{name}": tensor.clone() for name, tensor in model.state_dict().items() if "pooler" not in name}
    head = {"classifier.weight": torch.zeros(2, DIMENSIONS), "classifier.bias": torch.zeros(2)}
    save_file(weights | head, folder / "model.safetensors", {"format": "pt"})
    return folder


def build_dinov3(folder: Path) -> Path:
    """Write facebook/dinov3-vits16-pretrain-lvd1689m: tokens beside the first that belong to no patch."""
    from transformers import DINOv3ViTConfig

    config = {
        "architectures": ["DINOv3ViTModel"],
        "hidden_size": DIMENSIONS,
        "image_size": SIDE,
        "intermediate_size": 48,
        "model_type": "dinov3_vit",
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "num_register_tokens": 4,
        "patch_size": 8,
    }
    processor = {
        "crop_size": None,
        "data_format": "channels_first",
        "do_center_crop": None,
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_processor_type": "DINOv3ViTImageProcessorFast",
        "image_std": [0.229, 0.224, 0.225],
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": SIDE, "width": SIDE},
    }
    write_json_files(folder, config=config, preprocessor_config=processor)
    write_weights(random_model(DINOv3ViTConfig(**config), 4), folder)
    return folder


def build_swin(folder: Path) -> Path:
    """Write microsoft/swin-tiny-patch4-window7-224: no first token, but a mean of its patches."""
    from transformers import SwinConfig

    config = {
        "architectures": ["SwinModel"],
        "depths": [1, 1],
        "embed_dim": DIMENSIONS // 2,
        "image_size": SIDE,
        "model_type": "swin",
        "num_heads": [2, 2],
        "window_size": 4,
    }
    processor = SIGLIP_PROCESSOR | {"image_processor_type": "ViTImageProcessor", "processor_class": None}
    write_json_files(folder, config=config, preprocessor_config=processor)
    write_weights(random_model(SwinConfig(**config), 5), folder)
    return folder


def build_openai_clip(folder: Path, *, config: Mapping[str, Any] | None = None) -> Path:
    """Write openai/clip-vit-base-patch32, whose weights are a pickle: old names, and every default written out."""
    import torch
    from transformers import CLIPConfig

    vocabulary = vocabulary_of_bytes()
    begin, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    text = {
        **TOWER, "model_type": "clip_text_model", "vocab_size": len(vocabulary),
        "max_position_embeddings": TEXT_LENGTH, "bos_token_id": begin, "eos_token_id": end, "pad_token_id": end,
        "projection_dim": DIMENSIONS, "is_decoder": False, "torch_dtype": None,
    }  # fmt: skip
    settings = {
        "_name_or_path": "openai/clip-vit-base-patch32",
        "architectures": ["CLIPModel"],
        "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592,
        "model_type": "clip",
        "projection_dim": DIMENSIONS,
        "text_config": text,
        "text_config_dict": None,
        "torch_dtype": "float32",
        "transformers_version": None,
        "vision_config": {**VISION, "model_type": "clip_vision_model", "projection_dim": DIMENSIONS},
        "vision_config_dict": None,
        **(config or {}),
    }
    tokenizer = {
        "add_prefix_space": False,
        "bos_token": "<|startoftext|>",
        "do_lower_case": True,
        "eos_token": "<|endoftext|>",
        "errors": "replace",
        "model_max_length": TEXT_LENGTH,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": "<|endoftext|>",
    }
    write_json_files(
        folder, config=settings, preprocessor_config=CLIP_PROCESSOR, tokenizer_config=tokenizer, vocab=vocabulary
    )
    (folder / "merges.txt").write_text("#version: 0.2\n", "utf-8")
    state = random_model(CLIPConfig(**settings), 6).state_dict()
    positions = {
        "text_model.embeddings.position_ids": torch.arange(TEXT_LENGTH)[None],
        "vision_model.embeddings.position_ids": torch.arange((SIDE // 8) ** 2 + 1)[None],
    }
    torch.save(state | positions, folder / "pytorch_model.bin")
    return folder


def write_as_safetensors(folder: Path, *, parts: int = 1, half: bool = False) -> Path:
    """Write the pickle of a folder as safetensors, in parts with an index, or in float16; return the folder."""
    import torch
    from safetensors.torch import save_file

    tensors = torch.load(folder / "pytorch_model.bin")
    if half:
        tensors = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
    (folder / "pytorch_model.bin").unlink()
    if parts == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    places = {name: f"model-{number % parts + 1:05}-of-{parts:05}.safetensors" for number, name in enumerate(tensors)}
    for part in set(places.values()):
        save_file({name: tensors[name] for name in places if places[name] == part}, folder / part, {"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    return folder


def build_tinyclip(folder: Path) -> Path:
    """Write wkcn/TinyCLIP-ViT-8M-16-Text-3M-YFCC15M: the tokenizer is tokenizer.json alone, without settings."""
    from transformers import CLIPTokenizer

    write_as_safetensors(build_openai_clip(folder))
    CLIPTokenizer.from_pretrained(str(folder)).backend_tokenizer.save(str(folder / "tokenizer.json"))
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (folder / name).unlink()
    return folder


def build_laion_clip(folder: Path) -> Path:
    """Write laion/CLIP-ViT-B-32-laion2B-s34B-b79K: the weights for transformers beside those for open_clip."""
    write_as_safetensors(build_openai_clip(folder, config={"torch_dtype": "float32"}))
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"embed_dim": DIMENSIONS}}), "utf-8")
    for name in ("open_clip_pytorch_model.bin", "open_clip_model.safetensors"):
        (folder / name).write_bytes(b"of the other library")
    return folder


def build_sharded_clip(folder: Path) -> Path:
    """Write a CLIP whose weights are in three files, as those of the largest models."""
    return write_as_safetensors(build_openai_clip(folder), parts=3)


def build_half_clip(folder: Path) -> Path:
    """Write a CLIP in float16, as wkcn/TinyCLIP and many others are."""
    return write_as_safetensors(build_openai_clip(folder, config={"torch_dtype": "float16"}), half=True)


def build_sentence_clip(folder: Path) -> Path:
    """Write sentence-transformers/clip-ViT-B-32: the CLIP of OpenAI in 0_CLIPModel, which modules.json names."""
    write_as_safetensors(build_openai_clip(folder / "0_CLIPModel"))
    modules = [{"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}]
    versions = {"__version__": {"sentence_transformers": "2.0.0", "transformers": "4.7.0", "pytorch": "1.9.0"}}
    return write_json_files(folder, modules=modules, config_sentence_transformers=versions)


def build_chinese_clip(folder: Path) -> Path:
    """Write OFA-Sys/chinese-clip-vit-base-patch16: its texts are read by a BERT, with a mask."""
    from transformers import BertTokenizer, ChineseCLIPConfig

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    config = {
        "architectures": ["ChineseCLIPModel"],
        "model_type": "chinese_clip",
        "projection_dim": DIMENSIONS,
        "text_config": {**TOWER, "vocab_size": len(words), "max_position_embeddings": TEXT_LENGTH},
        "vision_config": {**VISION, "projection_dim": DIMENSIONS},
    }
    write_json_files(folder, config=config, preprocessor_config=CLIP_PROCESSOR)
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)}, model_max_length=TEXT_LENGTH)
    tokenizer.save_pretrained(str(folder))
    write_weights(random_model(ChineseCLIPConfig(**config), 7), folder)
    return folder


def write_sentencepiece_tokenizer(folder: Path, **settings: Any) -> int:
    """Write the tokenizer of XLM-RoBERTa, and return the number of its pieces."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁", *LETTERS, *(f"▁{letter}" for letter in LETTERS), "<mask>"]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(rank)) for rank, piece in enumerate(pieces)], unk_id=3))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    ends = [("<s>", 0), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    given = {
        "bos_token": "<s>",
        "cls_token": "<s>",
        "eos_token": "</s>",
        "mask_token": "<mask>",
        "pad_token": "<pad>",
        "sep_token": "</s>",
        "tokenizer_class": "XLMRobertaTokenizer",
        "unk_token": "<unk>",
    }
    write_json_files(folder, tokenizer_config=given | settings)
    tokenizer.save(str(folder / "tokenizer.json"))
    return len(pieces)


def build_metaclip2(folder: Path) -> Path:
    """Write facebook/metaclip-2-worldwide-huge-quickgelu: a CLIP that reads XLM-V's tokens in many languages."""
    from transformers import MetaClip2Config

    size = write_sentencepiece_tokenizer(folder, model_max_length=TEXT_LENGTH, processor_class="CLIPProcessor")
    config = {
        "architectures": ["MetaClip2Model"],
        "model_type": "metaclip_2",
        "projection_dim": DIMENSIONS,
        "text_config": {
            **TOWER, "model_type": "metaclip_2_text_model", "vocab_size": size, "projection_dim": DIMENSIONS,
            "max_position_embeddings": TEXT_LENGTH, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
        },
        "vision_config": {**VISION, "model_type": "metaclip_2_vision_model", "projection_dim": DIMENSIONS},
    }  # fmt: skip
    write_json_files(folder, config=config, preprocessor_config=CLIP_PROCESSOR)
    write_weights(random_model(MetaClip2Config(**config), 8), folder)
    return folder


def build_altclip(folder: Path) -> Path:
    """Write BAAI/AltCLIP: its texts are read by an XLM-RoBERTa, whose first two positions hold no token."""
    from transformers import AltCLIPConfig

    size = write_sentencepiece_tokenizer(folder, model_max_length=512, processor_class="AltCLIPProcessor")
    config = {
        "architectures": ["AltCLIPModel"],
        "model_type": "altclip",
        "projection_dim": DIMENSIONS,
        "text_config": {
            **TOWER, "model_type": "altclip_text_model", "vocab_size": size, "project_dim": DIMENSIONS,
            "max_position_embeddings": TEXT_LENGTH + 2, "type_vocab_size": 1, "initializer_range": 0.5,
        },
        "vision_config": {**VISION, "model_type": "altclip_vision_model", "projection_dim": DIMENSIONS},
    }  # fmt: skip
    write_json_files(folder, config=config, preprocessor_config=CLIP_PROCESSOR)
    write_weights(random_model(AltCLIPConfig(**config), 9), folder)
    return folder


def build_align(folder: Path) -> Path:
    """Write kakaobrain/align-base: an EfficientNet, whose processor stretches, crops and subtracts 1."""
    from transformers import AlignConfig, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    vision = {
        "model_type": "align_vision_model", "image_size": SIDE, "depth_coefficient": 0.1, "width_coefficient": 0.25,
        "hidden_dim": DIMENSIONS,
    }  # fmt: skip
    config = {
        "architectures": ["AlignModel"],
        "model_type": "align",
        "projection_dim": DIMENSIONS,
        "text_config": {**TOWER, "model_type": "align_text_model", "vocab_size": len(words)},
        "vision_config": vision,
    }
    processor = {
        "crop_size": {"height": SIDE, "width": SIDE},
        "do_center_crop": True,
        "do_normalize": False,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "EfficientNetImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "include_top": False,
        "processor_class": "AlignProcessor",
        "resample": 2,
        "rescale_factor": 0.00784313725490196,
        "rescale_offset": True,
        "size": {"height": 38, "width": 38},
    }
    write_json_files(folder, config=config, preprocessor_config=processor)
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)}, model_max_length=TEXT_LENGTH)
    tokenizer.save_pretrained(str(folder))
    write_weights(random_model(AlignConfig(**config), 10), folder)
    return folder


def build_blip(folder: Path) -> Path:
    """Write Salesforce/blip-itm-base-coco: the weights of a network that compares an image and a text together."""
    from transformers import BertTokenizer, BlipConfig, BlipForImageTextRetrieval

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    config = {
        "architectures": ["BlipForImageTextRetrieval"],
        "image_text_hidden_size": DIMENSIONS,
        "model_type": "blip",
        "projection_dim": DIMENSIONS,
        "text_config": {
            **TOWER, "model_type": "blip_text_model", "vocab_size": len(words), "encoder_hidden_size": DIMENSIONS,
        },
        "vision_config": {**VISION, "model_type": "blip_vision_model"},
    }  # fmt: skip
    processor = SIGLIP_PROCESSOR | {"image_processor_type": "BlipImageProcessor", "processor_class": "BlipProcessor"}
    write_json_files(folder, config=config, preprocessor_config=processor)
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)}, model_max_length=TEXT_LENGTH)
    tokenizer.save_pretrained(str(folder))
    write_weights(BlipForImageTextRetrieval(BlipConfig(**config)), folder)
    return folder
