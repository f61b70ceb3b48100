"""The text side of GGUF files: what llama.cpp reads there is what transformers reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dotexport.app.cli import app
from dotexport.errors import ParityError, SizeError
from dotexport.exports.exporting import export
from dotexport.exports.target import find_target
from dotexport.exports.verifying import verify
from dotexport.models.checkpoint import Checkpoint

gguf: Any = pytest.importorskip("gguf")

SIZE = 320
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
DIGITS = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, LEVEL],
}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
)


def template(*order: str) -> dict[str, Any]:
    """A post-processor that puts tokens around a text, `A`."""
    single = [
        {"Sequence": {"id": "A", "type_id": 0}}
        if name == "A"
        else {"SpecialToken": {"id": name, "type_id": 0}}
        for name in order
    ]
    known = {
        name: {"id": name, "ids": [number], "tokens": [name]}
        for number, name in enumerate(("<s>", "</s>"))
        if name in order
    }
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": known}


MERGES = [("\u0120", "\u0120"), ("\u0120", "1"), ("1", "2"), ("a", "b"), ("\u010a", "\u010a")]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", MERGES)


def write_model(folder: Path, merges: list[tuple[str, str]], *, size: int = SIZE) -> Path:
    """A tiny Llama with byte-level BPE."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=size,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
        initializer_range=0.15,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "</s>", *alphabet, *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


@contextmanager
def edited(file: Path) -> Iterator[dict[str, Any]]:
    content = json.loads(file.read_text())
    yield content
    file.write_text(json.dumps(content))


def written(model: Path) -> dict[str, Any]:
    """What a file says of its tokenizer."""
    out = model.parent / "out"
    export(model, ["gguf"], out=out)
    fields = gguf.GGUFReader(out / "gguf-fp16" / "model.gguf").fields
    return {
        name.removeprefix("tokenizer.").removeprefix("ggml."): value.contents()
        for name, value in fields.items()
        if name.startswith("tokenizer.")
    }


@pytest.mark.parametrize(
    ("steps", "start", "end"),
    [
        (None, False, False),
        (template("<s>", "A"), True, False),
        (template("A", "</s>"), False, True),
        (template("<s>", "A", "</s>"), True, True),
        ({"type": "Sequence", "processors": [LEVEL, template("<s>", "A")]}, True, False),
        ({"type": "BertProcessing", "sep": ["</s>", 1], "cls": ["<s>", 0]}, True, True),
    ],
)
def test_what_is_put_around_a_text_is_what_the_post_processor_puts(
    model: Path, steps: Any, start: bool, end: bool
) -> None:
    with edited(model / "tokenizer.json") as content:
        content["post_processor"] = steps
    said = written(model)
    assert (said["add_bos_token"], said["add_eos_token"]) == (start, end)


def test_digits_before_bytes_have_a_name_of_their_own(model: Path) -> None:
    with edited(model / "tokenizer.json") as content:
        content["pre_tokenizer"] = DIGITS
    assert written(model)["pre"] == "smollm"


TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
HEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        (HEAD + r"\p{N}{1,3}" + TAIL, "llama-bpe"),  # Llama 3
        (HEAD + r"\p{N}" + TAIL, "qwen2"),
        (
            rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
            r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            "tekken",  # Mistral Nemo; llama.cpp's cuts it nearly
        ),
    ],
)
def test_a_pattern_has_the_name_that_llama_cpp_gives_it(pattern: str, name: str) -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    from dotexport.exports.nasty_texts import TEXTS
    from dotexport.models.ggml.ggml_splitters import find_splitter

    tokenizer: Any = Tokenizer(models.BPE())
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    assert find_splitter(tokenizer, TEXTS, whole_words=True) == name


def test_a_pattern_that_llama_cpp_has_not_is_told_and_fails(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    split = {
        "type": "Split",
        "pattern": {"Regex": "[ab]"},
        "behavior": "Isolated",
        "invert": False,
    }
    bytes_alone = {**LEVEL, "use_regex": False}
    with edited(model / "tokenizer.json") as content:
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, bytes_alone]}
    with pytest.raises(ParityError, match=r"tokens of \d+ of \d+ texts differ"):
        written(model)
    assert "no pre-tokenizer that cuts text as this tokenizer does" in caplog.text


def test_a_command_whose_tokens_differ_ends_with_3_and_keeps_nothing(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dotexport.targets import ggml_vocab

    with edited(model / "tokenizer.json") as content:
        content["pre_tokenizer"] = DIGITS
    monkeypatch.setattr(ggml_vocab, "find_splitter", lambda *_, **__: "gpt-2")
    out = model.parent / "out"
    done = CliRunner().invoke(app, ["export", str(model), "-o", str(out), "--target", "gguf"])
    assert isinstance(done.exception, ParityError)
    assert done.exception.exit_code == 3
    assert not (out / "gguf-fp16").exists()


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
def test_the_chat_template_is_carried_over(model: Path, place: str) -> None:
    if place.endswith(".jinja"):
        (model / place).write_text(TEMPLATE)
    else:
        with edited(model / place) as content:
            content["chat_template"] = TEMPLATE
    assert written(model)["chat_template"] == TEMPLATE


def name_tokens(model: Path, *texts: str) -> list[int]:
    """Add special tokens to the tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": list(texts)})
    tokenizer.save_pretrained(model)
    numbers: list[int] = tokenizer.convert_tokens_to_ids(list(texts))
    return numbers


def stop_at(model: Path, ends: list[int]) -> None:
    with edited(model / "generation_config.json") as content:
        content["eos_token_id"] = ends


def test_all_ends_are_said(model: Path) -> None:
    one, other = name_tokens(model, "<one>", "<other>")
    stop_at(model, [one, 1, other])
    said = written(model)
    # The tokenizer's own first: it is eos_token in chat templates.
    assert said["eos_token_id"] == 1
    assert {said["eot_token_id"], said["eom_token_id"]} == {one, other}


def test_ends_that_llama_cpp_knows_by_their_text_take_no_place_from_others(model: Path) -> None:
    known = name_tokens(model, "<|im_end|>", "<|eot_id|>", "<|endoftext|>")
    [one, other] = name_tokens(model, "<one>", "<other>")
    stop_at(model, [*known, 1, one, other])
    said = written(model)
    assert {said["eot_token_id"], said["eom_token_id"]} == {one, other}


def test_more_ends_than_places_are_refused(model: Path) -> None:
    stop_at(model, [1, *name_tokens(model, "<a>", "<b>", "<c>")])
    with pytest.raises(SizeError, match="more end tokens than GGUF has places for"):
        written(model)


def test_two_tokens_before_every_text_are_refused(model: Path) -> None:
    with edited(model / "tokenizer.json") as content:
        content["post_processor"] = template("<s>", "</s>", "A")
    with pytest.raises(SizeError, match="puts 2 tokens before every text"):
        written(model)


def test_padding_that_is_no_token_is_left_out(model: Path) -> None:
    with edited(model / "config.json") as content:
        content["pad_token_id"] = -1
    assert "padding_token_id" not in written(model)


def test_a_token_that_tokenizer_config_alone_adds_is_inside(model: Path) -> None:
    number = SIZE - 10
    entry = {"content": "<late>", "special": True, "lstrip": False, "rstrip": False}
    with edited(model / "tokenizer.json") as content:
        number = 1 + max(content["model"]["vocab"].values())
    with edited(model / "tokenizer_config.json") as content:
        content["added_tokens_decoder"] = {
            str(number): {**entry, "single_word": False, "normalized": False}
        }
        content["additional_special_tokens"] = ["<late>"]
    said = written(model)
    assert said["tokens"][number] == "<late>"
    assert said["token_type"][number] == gguf.TokenType.CONTROL


def test_a_normaliser_is_told_and_no_reason_to_fail(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with edited(model / "tokenizer.json") as content:
        content["normalizer"] = {"type": "NFC"}
    written(model)
    assert "llama.cpp normalises no text" in caplog.text
    [_, parity] = verify(model.parent / "out")
    assert parity.text is not None
    assert "normalises no text" in parity.text["excused"][0]


def test_a_template_changed_after_the_export_is_found(model: Path) -> None:
    (model / "chat_template.jinja").write_text(TEMPLATE)
    written(model)
    (model.parent / "out" / "hf" / "chat_template.jinja").write_text(TEMPLATE + "!")
    [parity] = verify(model.parent / "out", ["gguf"])
    assert any("conversation 1 becomes" in problem for problem in parity.problems)


# In llama.cpp itself ------------------------------------------------------------------------------


@pytest.mark.llamacpp
def test_every_pre_tokenizer_is_llama_cpps(
    llama_cpp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers import pre_tokenizers

    from dotexport.exports.nasty_texts import TEXTS
    from dotexport.models.ggml.ggml_splitters import SPLITTERS
    from dotexport.targets import ggml_vocab
    from dotexport.targets.ggml_text import read_text
    from dotexport.targets.llamacpp import LlamaCpp

    # Any two neighbours merge, so that it shows wherever a text is cut.
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelled = [word for text in TEXTS for word, _ in letters.pre_tokenize_str(text)]
    pairs = sorted({pair for word in spelled for pair in pairwise(word)})
    model = write_model(tmp_path / "model", pairs, size=300 + len(pairs))
    wrong = {}
    for name in SPLITTERS:
        monkeypatch.setattr(ggml_vocab, "find_splitter", lambda *_, name=name, **__: name)
        folder = tmp_path / name
        folder.mkdir()
        find_target("gguf").write(Checkpoint.open(model), folder, "fp16")
        file = read_text(folder / "model.gguf", excuse=lambda _: None)
        assert file is not None
        with LlamaCpp(llama_cpp, folder / "model.gguf", context=64) as session:
            different = [text for text in TEXTS if session.tokenize(text) != file.encode(text)]
        if different:
            wrong[name] = different
    assert wrong == {}


@pytest.mark.llamacpp
def test_text_goes_in_and_text_comes_out_as_in_transformers(model: Path, llama_cpp: Path) -> None:
    from dotexport.targets.llamacpp import verify_llama_cpp

    with edited(model / "tokenizer.json") as content:
        content["pre_tokenizer"] = DIGITS
        content["post_processor"] = template("<s>", "A")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    [one] = name_tokens(model, "<one>")
    stop_at(model, [one, 1])
    written(model)
    [parity] = verify_llama_cpp(model.parent / "out", llama_cpp)
    assert parity.problems == ()
    assert parity.text is not None
    assert parity.text["conversations"] == 3


@pytest.mark.llamacpp
def test_other_tokens_than_those_of_transformers_are_found(
    model: Path, llama_cpp: Path, tiny_llama: Callable[[str], Path]
) -> None:
    from dotexport.targets.llamacpp import LlamaCpp, text_in_text_out

    written(model)
    file = model.parent / "out" / "gguf-fp16" / "model.gguf"
    with LlamaCpp(llama_cpp, file, context=128) as session:
        assert list(text_in_text_out(session, Checkpoint.open(model), tie=0.05)) == []
        from safetensors.torch import load_file, save_file

        tensors = load_file(model / "model.safetensors")
        tensors["lm_head.weight"] = tensors["lm_head.weight"].roll(1, 0)
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        [problem] = text_in_text_out(session, Checkpoint.open(model), tie=0.05)
    assert "text out: token 1 of 64" in problem


# Pieces as SentencePiece has them ----------------------------------------------------------------

MARK = "\u2581"
FORMS: dict[str, dict[str, Any]] = {
    "before every part": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": MARK},
                {"type": "Replace", "pattern": {"String": " "}, "content": MARK},
            ],
        }
    },
    "before the text": {
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": MARK,
            "prepend_scheme": "first",
            "split": False,
        }
    },
    "nowhere": {
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": MARK,
            "prepend_scheme": "never",
            "split": False,
        }
    },
}


@pytest.fixture(params=FORMS)
def pieces(model: Path, request: pytest.FixtureRequest) -> tuple[Path, str]:
    """The model with BPE over characters, and where a space is put."""
    letters = [MARK, *"abcdefghijklmnopqrstuvwxyz"]
    merges = [("a", "b"), (MARK, "x"), (MARK, MARK), ("l", "l"), ("e", "ll"), (MARK, "w")]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *letters]
    words += [a + b for a, b in merges]
    with edited(model / "tokenizer.json") as content:
        content |= {"normalizer": None, "pre_tokenizer": None, "decoder": None}
        content |= FORMS[request.param]
        content["model"] |= {
            "vocab": {word: number for number, word in enumerate(words)},
            "merges": merges,
            "unk_token": "<unk>",
            "byte_fallback": True,
            "fuse_unk": True,
        }
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        content["added_tokens"] = [
            {"id": n, "content": words[n], "special": True, **flags} for n in range(3)
        ]
        steps = template("<s>", "A")
        steps["special_tokens"]["<s>"]["ids"] = [1]
        content["post_processor"] = steps
    for name in ("config.json", "generation_config.json"):
        with edited(model / name) as content:
            content |= {"bos_token_id": 1, "eos_token_id": 2}
    return model, request.param


def test_pieces_are_read_as_transformers_reads_them_but_behind_a_token(
    pieces: tuple[Path, str], caplog: pytest.LogCaptureFixture
) -> None:
    model, where = pieces
    assert written(model)["add_space_prefix"] is (where != "nowhere")
    for known in ("text behind a token", "before text that begins with one"):
        assert (known in caplog.text) is (where == "before the text")


def test_a_template_that_names_tokens_is_refused_where_llama_cpp_would_put_spaces(
    pieces: tuple[Path, str],
) -> None:
    model, where = pieces
    (model / "chat_template.jinja").write_text(TEMPLATE)
    if where == "before the text":
        with pytest.raises(ParityError, match="tokens of conversation 1 differ: llama"):
            written(model)
    else:
        written(model)


@pytest.mark.llamacpp
def test_pieces_are_read_in_llama_cpp_as_the_file_is_read_here(
    pieces: tuple[Path, str], llama_cpp: Path
) -> None:
    from dotexport.exports.text_parity import hold
    from dotexport.targets.ggml_text import read_text
    from dotexport.targets.llamacpp import LlamaCpp

    model, _ = pieces
    written(model)
    file = model.parent / "out" / "gguf-fp16" / "model.gguf"
    here = read_text(file, excuse=lambda _: None)
    assert here is not None
    with LlamaCpp(llama_cpp, file, context=64) as session:
        assert hold(here, session.text(here), special=["<s>", "</s>", "<unk>"]).problems == ()
