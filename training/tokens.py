"""Tokens: a WordPiece tokenizer trained on the names, with single characters as a fallback."""

import json
import string
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from training.concepts import TEMPLATES, Vocabulary

PADDING, UNKNOWN, START, END = "[PAD]", "[UNK]", "[CLS]", "[SEP]"


def learn_tokenizer(vocabulary: Vocabulary, *, pieces: int, longest: int) -> PreTrainedTokenizerFast:
    """Train at most `pieces` word pieces on captions; every ASCII character is one, so that any word tokenises."""
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=pieces,
        special_tokens=[PADDING, UNKNOWN, START, END, *single_characters()],
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions(vocabulary), trainer)
    marks = [(START, tokenizer.token_to_id(START)), (END, tokenizer.token_to_id(END))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=marks)
    characters = set(single_characters())
    plain = demote_special(tokenizer, characters)
    return PreTrainedTokenizerFast(
        tokenizer_object=plain,
        model_max_length=longest,
        pad_token=PADDING,
        unk_token=UNKNOWN,
        cls_token=START,
        sep_token=END,
        model_input_names=["input_ids", "attention_mask"],
    )


def single_characters() -> list[str]:
    """Return every printable ASCII character, alone and as the continuation of a word."""
    letters = string.ascii_lowercase + string.digits
    return [*letters, *(f"##{letter}" for letter in letters), *string.punctuation]


def demote_special(tokenizer: Tokenizer, characters: set[str]) -> Tokenizer:
    """Make the characters ordinary pieces; they were special tokens only because the trainer keeps all of those."""
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in characters]
    return Tokenizer.from_str(json.dumps(state))


def captions(vocabulary: Vocabulary) -> Iterable[str]:
    """Yield the names of all concepts, and each template once."""
    for concept in vocabulary.concepts:
        yield from concept.names
    for template in TEMPLATES:
        yield template.format("thing")


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Read what `save_pretrained` wrote."""
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    return tokenizer
