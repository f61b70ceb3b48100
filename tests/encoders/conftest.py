"""Small encoders of every kind that are made on the spot, and text in sixty of their words."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

WORDS = [f"w{n}" for n in range(60)]
MORE = [f"w{n}" for n in range(60, 200)]  # words that the text does not use
PIECES = ["w", *(f"##{digit}" for digit in range(10))]  # what spells any of them
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
SIZES = {"vocab_size": 224, "max_position_embeddings": 40, "pad_token_id": 0}
BERT = {"hidden_size": 24, "intermediate_size": 64, "num_hidden_layers": 3}
BERT |= {"num_attention_heads": 4, **SIZES}
MODERN = BERT | {"num_hidden_layers": 4, "local_attention": 8, "mlp_bias": False}
MODERN |= {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
DEBERTA = BERT | {"relative_attention": True, "position_buckets": 8, "share_att_key": True}
DEBERTA |= {"pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
DEBERTA |= {"norm_rel_ebd": "layer_norm", "type_vocab_size": 0}
DISTIL = {"dim": 24, "hidden_dim": 64, "n_layers": 3, "n_heads": 4, **SIZES}
KINDS = {
    "bert": (transformers.BertModel, transformers.BertConfig(**BERT)),
    "roberta": (
        transformers.RobertaForSequenceClassification,
        transformers.RobertaConfig(**BERT, num_labels=3),
    ),
    "xlm-roberta": (
        transformers.XLMRobertaForTokenClassification,
        transformers.XLMRobertaConfig(**BERT, num_labels=3),
    ),
    "distilbert": (
        transformers.DistilBertForQuestionAnswering,
        transformers.DistilBertConfig(**DISTIL),
    ),
    "masked": (transformers.BertForMaskedLM, transformers.BertConfig(**BERT)),
    "modernbert": (transformers.ModernBertModel, transformers.ModernBertConfig(**MODERN)),
    "modernbert-deep": (
        transformers.ModernBertModel,
        transformers.ModernBertConfig(**MODERN | {"num_hidden_layers": 6}),
    ),
    **{
        f"modernbert-{head}": (
            getattr(transformers, f"ModernBertFor{head}"),
            transformers.ModernBertConfig(**MODERN, num_labels=labels),
        )
        for head, labels in (
            ("SequenceClassification", 3),
            ("TokenClassification", 3),
            ("QuestionAnswering", 2),
            ("MaskedLM", 2),
        )
    },
    "deberta-v2": (
        transformers.DebertaV2ForSequenceClassification,
        transformers.DebertaV2Config(**DEBERTA, num_labels=3),
    ),
    "deberta-masked": (transformers.DebertaV2ForMaskedLM, transformers.DebertaV2Config(**DEBERTA)),
}


def word_piece() -> Tokenizer:
    vocab = {word: n for n, word in enumerate([*SPECIAL, *MORE, *WORDS, *PIECES])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def unigram() -> Tokenizer:
    """The same words as SentencePiece writes them, the longer the likelier."""
    said = [f"\u2581{word}" for word in (*MORE, *WORDS, "w")] + [*"0123456789"]
    scores = [(piece, 0.0) for piece in SPECIAL] + [(piece, len(piece) - 9.0) for piece in said]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=SPECIAL.index("[UNK]")))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return tokenizer


def make(folder: Path, name: str) -> Path:
    """An encoder with weights large enough to say something, and a tokenizer of 200 words."""
    kind, config = KINDS[name]
    torch.manual_seed(0)
    model = kind(config)
    for name_of, parameter in model.named_parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(8)
        elif name_of.endswith("bias"):  # zeros, which could be left out
            parameter.data.normal_(std=0.1)
    model.save_pretrained(folder)
    tokenizer = unigram() if name.startswith("deberta") else word_piece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def made() -> Callable[[Path, str], Path]:
    """Makes one in a folder, by its model_type."""
    return make


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    dice = random.Random(0)
    lines = [" ".join(dice.choices(WORDS, k=dice.randint(5, 14))) for _ in range(160)]
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(lines), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="session")
def sentence_transformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make(tmp_path_factory.mktemp("st") / "model", "bert")
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {
            "idx": 1,
            "name": "1",
            "path": "1_Pooling",
            "type": "sentence_transformers.models.Pooling",
        },
    ]
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    (folder / "1_Pooling").mkdir()
    said = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling/config.json").write_text(json.dumps(said, indent=1), encoding="utf-8")
    return folder
