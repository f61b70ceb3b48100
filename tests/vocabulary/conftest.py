"""Tokenizers of every kind that can lose tokens, as model folders without weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from dotexport import embedded
from dotexport.models.checkpoint import Checkpoint, read_config
from dotexport.vocabulary import trimming
from dotexport.vocabulary.expecting import Spread

SPECIAL = ["<unk>", "<s>", "</s>", "<tool>"]
SIZE = 900
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'tool' %}{{ '<tool>' }}"
    "{% elif message.role == 'nobody' %}{{ 'whomever' }}{% endif %}{{ message.content }}\n"
    "{% endfor %}"
)
BYTES = [f"<0x{number:02X}>" for number in range(256)]


def _byte_level(*, whole: bool = False) -> tuple[Tokenizer, Any]:
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return tokenizer, trainers.BpeTrainer(
        vocab_size=SIZE, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )


def _byte_fallback() -> tuple[Tokenizer, Any]:
    """As Llama 2's: spaces are ▁, unknown characters fall back on bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)])
    return tokenizer, trainers.BpeTrainer(
        vocab_size=SIZE, special_tokens=[*SPECIAL, *BYTES], show_progress=False, max_token_length=8
    )


def _unigram() -> tuple[Tokenizer, Any]:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer, trainers.UnigramTrainer(
        vocab_size=SIZE, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )


def _word_piece() -> tuple[Tokenizer, Any]:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=SIZE, special_tokens=SPECIAL)
    return tokenizer, trainer


KINDS: dict[str, Callable[[], tuple[Tokenizer, Any]]] = {
    "byte-level": _byte_level,
    "whole words": lambda: _byte_level(whole=True),
    "byte-fallback": _byte_fallback,
    "unigram": _unigram,
    "word-piece": _word_piece,
}


def write_tokenizer(folder: Path, kind: str) -> Path:
    """A tokenizer with a start token around text, one token that only it adds, and config.json."""
    tokenizer, trainer = KINDS[kind]()
    text = [*embedded.calibration_text()][:15]
    tokenizer.train_from_iterator(text, trainer)
    # What Python sources lack.
    tokenizer.add_special_tokens(["<|added|>"])
    start = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[start]
    )
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id("</s>"), pad_token="</s>")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    config = {"vocab_size": tokenizer.get_vocab_size() + 5, "eos_token_id": [2, 300]}
    (folder / "config.json").write_text(json.dumps(config | {"bos_token_id": 1}))
    generation = {"suppress_tokens": [301], "bad_words_ids": [[302, 303]], "pad_token_id": -1}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.fixture(autouse=True)
def little_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which tokens the original expects: on 8 windows of 64, which takes seconds everywhere."""
    monkeypatch.setattr(trimming, "Spread", partial(Spread, 8))


@pytest.fixture(scope="session")
def tokenizer_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """Name in KINDS -> a model folder with such a tokenizer and no weights."""

    @cache
    def make(kind: str) -> Checkpoint:
        folder = write_tokenizer(tmp_path_factory.mktemp("tokenizer"), kind)
        return Checkpoint(folder, read_config(folder), {})

    return make


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A text that uses a part of the tokens."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    documents = (text[:2000] for text in [*embedded.calibration_text()][40:44])
    file.write_text("<|endoftext|>".join(documents))
    return str(file)
