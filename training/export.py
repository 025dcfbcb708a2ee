"""Export to the packaged folder, which `SentenceTransformer(folder)` loads without network or remote code."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from training.augmentation import DEVIATION, MEAN
from training.model import Student

BICUBIC = 3

MODULES = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]

MODALITIES = {
    "transformer_task": "feature-extraction",
    "modality_config": {
        "text": {"method": "get_text_features", "method_output_name": "pooler_output"},
        "image": {"method": "get_image_features", "method_output_name": "pooler_output"},
    },
    "module_output_name": "sentence_embedding",
}

SIMILARITY = {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"}


def export(student: Student, tokenizer: PreTrainedTokenizerFast, folder: Path, *, image_pixels: int) -> None:
    """Write configuration, float16 weights, tokenizer and image processor; they are loaded as float32."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder = student.encoder
    configuration = encoder.config.to_diff_dict()
    configuration |= {"architectures": ["VisionTextDualEncoderModel"], "dtype": "float32"}
    write_json(folder / "config.json", configuration)
    weights = {name: half(tensor) for name, tensor in shipped_weights(student).items()}
    partial = folder / "model.safetensors.partial"
    save_file(weights, partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    partial.replace(folder / "model.safetensors")
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_configuration(tokenizer))
    write_json(folder / "preprocessor_config.json", processor(image_pixels))
    write_json(folder / "modules.json", MODULES)
    write_json(folder / "sentence_bert_config.json", MODALITIES)
    write_json(folder / "config_sentence_transformers.json", SIMILARITY)


def tokenizer_configuration(tokenizer: PreTrainedTokenizerFast) -> dict[str, object]:
    """Return the tokenizer's configuration for transformers 4 and 5."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "VisionTextDualEncoderProcessor",
        "model_max_length": tokenizer.model_max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "right",
        "truncation_side": "right",
        "pad_token": tokenizer.pad_token,
        "unk_token": tokenizer.unk_token,
        "cls_token": tokenizer.cls_token,
        "sep_token": tokenizer.sep_token,
    }


def shipped_weights(student: Student) -> dict[str, torch.Tensor]:
    """Return the weights of the dual encoder with the batch norm of the neck folded into the pooler."""
    weights = dict(student.encoder.state_dict())
    dense = "vision_model.pooler.dense."
    mean, variance = student.neck.running_mean, student.neck.running_var
    assert mean is not None
    assert variance is not None
    scale = (variance + student.neck.eps).rsqrt()
    weights[dense + "bias"] = (weights[dense + "bias"] - mean) * scale
    weights[dense + "weight"] = weights[dense + "weight"] * scale.unsqueeze(1)
    return weights


def half(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor on the CPU, in float16 if it is floating-point."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.half() if tensor.is_floating_point() else tensor


def processor(image_pixels: int) -> dict[str, object]:
    """Return the configuration of CLIP's image processor: resize the shortest edge, crop the centre."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "VisionTextDualEncoderProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": image_pixels},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": image_pixels, "width": image_pixels},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(DEVIATION),
    }


def write_json(path: Path, content: object) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
