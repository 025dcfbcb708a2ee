"""Text models of random weights in the shapes that published ones have, for words in the space of a tiny CLIP."""

import json
import shutil
from pathlib import Path

from sortd.encoder.texts import SPACE_WORDS
from tests.tiny_clip import DIMENSIONS, TEXT_LENGTH, vocabulary_of_bytes

PLACES = 24
"""What the tables of positions hold; RoBERTa's kind keeps the first two for padding."""


def build_tiny_words(folder: Path, *, dimensions: int = DIMENSIONS) -> Path:
    """Write what ``clip-ViT-B-32-multilingual-v1`` is, small: a DistilBERT, the mean of its tokens, a dense layer."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import DistilBertConfig, DistilBertModel, DistilBertTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    letters = [chr(code) for code in (*range(ord("a"), ord("z") + 1), 0xE1, 0xF1, 0xFC)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    config = DistilBertConfig(
        vocab_size=len(words), dim=32, hidden_dim=64, n_layers=1, n_heads=2, max_position_embeddings=PLACES
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        bare = folder.with_name(folder.name + ".bare")
        DistilBertModel(config).save_pretrained(bare)
        DistilBertTokenizer(vocab={word: index for index, word in enumerate(words)}).save_pretrained(bare)
        transformer = Transformer(str(bare), max_seq_length=TEXT_LENGTH)
        dense = Dense(32, dimensions, bias=False, activation_function=torch.nn.Identity())
        model = SentenceTransformer(modules=[transformer, Pooling(32, "mean"), dense], device="cpu")
    model.save(str(folder), create_model_card=False)
    return folder


def build_roberta_words(folder: Path) -> Path:
    """Write a RoBERTa whose tokenizer knows no limit: of its places, two are no token's."""
    import torch
    from transformers import CLIPTokenizer, RobertaConfig, RobertaModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    vocabulary = vocabulary_of_bytes()
    config = RobertaConfig(
        vocab_size=len(vocabulary), hidden_size=DIMENSIONS, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=PLACES, pad_token_id=1, type_vocab_size=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(8)
        RobertaModel(config).save_pretrained(folder)
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    without_limit(folder)
    return folder


def distil(folder: Path, teacher: Path) -> Path:
    """Add to a text model the layer that gives the words of the check the rows of a CLIP, as a distillation does."""
    import numpy as np
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense

    student, clip = (SentenceTransformer(str(one), device="cpu") for one in (folder, teacher))
    own, wanted = (model.encode(list(SPACE_WORDS), show_progress_bar=False) for model in (student, clip))
    solved, *_ = np.linalg.lstsq(own.astype(np.float64), wanted.astype(np.float64), rcond=1e-6)
    layer = Dense(own.shape[1], wanted.shape[1], bias=False, activation_function=torch.nn.Identity())
    layer.linear.weight.data = torch.tensor(solved.T, dtype=torch.float32).contiguous()
    student.append(layer)
    written = folder.with_name(folder.name + ".distilled")
    student.save(str(written), create_model_card=False)
    shutil.rmtree(folder)
    written.rename(folder)
    return folder


def build_near_clip(folder: Path, clip: Path) -> Path:
    """Write another CLIP of the space of a first: its copy, with a text tower that was trained a little further."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    shutil.copytree(clip, folder)
    weights = load_file(folder / "model.safetensors")
    change = np.random.default_rng(0).normal(0, 1e-3, weights["text_projection.weight"].shape)
    weights["text_projection.weight"] += change.astype(np.float32)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def without_limit(folder: Path) -> Path:
    """Take from a model's tokenizer what it knows of the longest text."""
    for name in ("tokenizer_config.json", "sentence_bert_config.json"):
        file = folder / name
        if file.exists():
            said = json.loads(file.read_text("utf-8"))
            kept = {key: value for key, value in said.items() if key not in {"model_max_length", "max_seq_length"}}
            file.write_text(json.dumps(kept), "utf-8")
    return folder
