"""The byte-level BPE tokenizer of the embedded model: trained, saved, exact on every byte."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SEPARATOR = "<|endoftext|>"


def train_tokenizer(
    texts: Iterable[str], *, vocabulary: int, context: int
) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    # GPT-2's way of cutting text into words: every runtime that reads tokenizer.json knows it.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        pad_token=SEPARATOR,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    # transformers 5 writes its new class name and how it was loaded; the name below is the one
    # that other readers of the folder know too.
    config = folder / "tokenizer_config.json"
    kept = {
        key: value
        for key, value in json.loads(config.read_text(encoding="utf-8")).items()
        if key not in ("backend", "is_local", "local_files_only")
    }
    kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
