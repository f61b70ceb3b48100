"""Every id in the files of a model is found, and nothing else is taken for one."""

from __future__ import annotations

from typing import Any

import pytest

from dotexport.vocabulary.token_ids import in_config, in_tokenizer


def moved(number: int) -> int:
    return number + 1000 if number >= 0 else number


CONFIG: dict[str, Any] = {
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": None,
    "image_token_index": 4,
    "suppress_tokens": [5, 6],
    "begin_suppress_tokens": [7],
    "bad_words_ids": [[8], [9, 10]],
    "force_words_ids": [[[11], [12, 13]]],
    "forced_decoder_ids": [[1, 14], [2, None]],
    "sequence_bias": [[[15, 16], -10.0], [[17], 3]],
    "text_config": {"eos_token_id": 18},
    "hidden_size": 64,
    "pad_token_type_id": 0,
    "layer_types": ["full_attention"],
    "use_cache": True,
}


def test_ids_alone_in_lists_and_in_pairs_move_and_other_numbers_stay() -> None:
    assert in_config(CONFIG, moved) == CONFIG | {
        "bos_token_id": 1001,
        "eos_token_id": [1002, 1003],
        "image_token_index": 1004,
        "suppress_tokens": [1005, 1006],
        "begin_suppress_tokens": [1007],
        "bad_words_ids": [[1008], [1009, 1010]],
        "force_words_ids": [[[1011], [1012, 1013]]],
        "forced_decoder_ids": [[1, 1014], [2, None]],
        "sequence_bias": [[[1015, 1016], -10.0], [[1017], 3]],
        "text_config": {"eos_token_id": 1018},
    }


def test_the_walk_tells_every_id_once() -> None:
    found: list[int] = []

    def note(number: int) -> int:
        found.append(number)
        return number

    assert in_config(CONFIG, note) == CONFIG
    assert sorted(found) == list(range(1, 19))


POST_PROCESSORS = {
    "template": (
        {"type": "TemplateProcessing", "special_tokens": {"<s>": {"id": "<s>", "ids": [1, 2]}}},
        {
            "type": "TemplateProcessing",
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1001, 1002]}},
        },
    ),
    "bert": (
        {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 4]},
        {"type": "BertProcessing", "sep": ["[SEP]", 1003], "cls": ["[CLS]", 1004]},
    ),
    "sequence": (
        {"processors": [{"type": "ByteLevel"}, {"special_tokens": {"a": {"ids": [5]}}}]},
        {"processors": [{"type": "ByteLevel"}, {"special_tokens": {"a": {"ids": [1005]}}}]},
    ),
    "none": (None, None),
}


@pytest.mark.parametrize("kind", POST_PROCESSORS)
def test_ids_of_a_tokenizer_move_wherever_they_stand(kind: str) -> None:
    before, after = POST_PROCESSORS[kind]
    stored = {
        "truncation": {"max_length": 9},
        "padding": {"pad_id": 6, "length": 7},
        "added_tokens": [{"id": 8, "content": "<s>"}],
        "post_processor": before,
        "model": {"vocab": {"a": 0}},
    }
    assert in_tokenizer(stored, moved) == stored | {
        "padding": {"pad_id": 1006, "length": 7},
        "added_tokens": [{"id": 1008, "content": "<s>"}],
        "post_processor": after,
    }
