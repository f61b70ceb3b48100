"""The GGUF target: what only it has to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dotexport import embedded
from dotexport.exports.reference import compute_reference
from dotexport.exports.target import find_target
from dotexport.exports.verifying import check
from dotexport.models.checkpoint import Checkpoint
from dotexport.targets.llamacpp import LlamaCpp

gguf: Any = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "vocab_size": 4100}


def read(folder: Path) -> Any:
    return gguf.GGUFReader(folder / "model.gguf")


def field(reader: Any, name: str) -> Any:
    return reader.fields[name].contents()


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows are multiples of 32, so that every matrix can be quantised."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        **WIDE,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(embedded.MODEL_DIR / name, folder / name)
    return folder


def written(model: Path, folder: Path, precision: str) -> Path:
    folder.mkdir()
    find_target("gguf").write(Checkpoint.open(model), folder, precision)
    return folder


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_scaled_rope_and_whole_rows_are_read_back(
    precision: str, wide: Path, tmp_path: Path
) -> None:
    folder = written(wide, tmp_path / "out", precision)
    reference = compute_reference(Checkpoint.open(wide))
    parity = check(find_target("gguf"), precision, folder, reference, artifact="under test")
    assert parity.problems == ()


@pytest.mark.parametrize(("precision", "bits"), [("fp16", 16), ("int8", 8.5), ("int4", 4.5)])
def test_the_weights_take_what_their_precision_says(
    precision: str, bits: float, wide: Path, tmp_path: Path
) -> None:
    tensors = read(written(wide, tmp_path / "out", precision)).tensors
    stored = sum(t.n_bytes for t in tensors)
    checkpoint = Checkpoint.open(wide)
    table = WIDE["vocab_size"] * WIDE["hidden_size"]
    wanted = checkpoint.num_parameters * bits / 8
    if precision == "int4":
        wanted += table * 0.5  # the embedding stays in 8 bits
    assert wanted <= stored <= wanted + 4 * 6 * WIDE["hidden_size"]  # norms in float32


def test_a_tied_table_is_stored_once(exported: Any) -> None:
    names = [tensor.name for tensor in read(exported("tied-bf16", "gguf") / "gguf-fp16").tensors]
    assert "token_embd.weight" in names
    assert "output.weight" not in names


def test_sizes_say_the_width_of_a_head(exported: Any) -> None:
    reader = read(exported("wide-heads", "gguf") / "gguf-fp16")
    assert field(reader, "llama.attention.key_length") == 32
    assert field(reader, "llama.attention.value_length") == 32
    assert field(reader, "llama.embedding_length") == 48
    assert field(reader, "llama.attention.head_count_kv") == 2


def test_rows_that_fit_no_block_stay_f16_and_it_is_said(
    tiny_llama: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = written(tiny_llama("wide-heads"), tmp_path / "out", "int8")
    assert "matrices stay F16" in caplog.text
    kinds = {tensor.name: tensor.tensor_type.name for tensor in read(folder).tensors}
    assert kinds["blk.0.attn_q.weight"] == "F16"  # rows of 48
    assert kinds["blk.0.attn_output.weight"] == "Q8_0"  # rows of 128


def test_the_tokenizer_is_inside(wide: Path, tmp_path: Path) -> None:
    reader = read(written(wide, tmp_path / "out", "fp16"))
    stored = json.loads((wide / "tokenizer.json").read_text())
    tokens = field(reader, "tokenizer.ggml.tokens")
    assert len(tokens) == 4100
    assert all(tokens[number] == token for token, number in stored["model"]["vocab"].items())
    assert len(field(reader, "tokenizer.ggml.merges")) == len(stored["model"]["merges"])
    assert field(reader, "tokenizer.ggml.pre") == "gpt-2"
    kinds = field(reader, "tokenizer.ggml.token_type")
    assert (kinds[0], kinds[1], kinds[4099]) == (3, 1, 5)  # control, normal, unused


@pytest.fixture
def pieces(wide: Path, tmp_path: Path) -> Path:
    """The model with a tokenizer as SentencePiece trains it: spaces as ▁, bytes as tokens."""
    from tokenizers import Tokenizer, models, normalizers

    letters = ["\u2581", *"abcdefghij"]
    joined = ["ab", "\u2581c", "\u2581cab", "de"]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *letters, *joined]
    vocab = {word: number for number, word in enumerate(words)}
    merges = [("a", "b"), ("\u2581", "c"), ("\u2581c", "ab"), ("d", "e")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder = Path(shutil.copytree(wide, tmp_path / "pieces"))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_pieces_of_sentencepiece_are_inside_with_scores_in_the_order_of_merges(
    pieces: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reader = read(written(pieces, tmp_path / "out", "fp16"))
    assert field(reader, "tokenizer.ggml.model") == "llama"
    assert field(reader, "tokenizer.ggml.add_space_prefix") is True
    tokens, scores = (field(reader, f"tokenizer.ggml.{name}") for name in ("tokens", "scores"))
    score = dict(zip(tokens, scores, strict=True))
    joined = ["ab", "\u2581c", "\u2581cab", "de"]
    assert [score[token] for token in joined] == [0.0, -1.0, -2.0, -3.0]
    assert score["a"] < score["de"]
    kinds = field(reader, "tokenizer.ggml.token_type")
    assert kinds[:4] == [2, 3, 3, 6]  # unknown, control, control, byte
    assert "may split text otherwise" not in caplog.text


def test_merges_that_llama_cpp_would_join_otherwise_are_told(
    pieces: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stored = json.loads((pieces / "tokenizer.json").read_text())
    # "▁cab" has other halves that are tokens, "▁ca" and "b", which have no merge here.
    stored["model"]["vocab"] |= {"ca": 300, "\u2581ca": 301}
    stored["model"]["merges"] += [["c", "a"], ["\u2581", "ca"]]
    (pieces / "tokenizer.json").write_text(json.dumps(stored))
    written(pieces, tmp_path / "out", "fp16")
    assert "may split text otherwise" in caplog.text


TEXTS = [
    "Once upon a time, there was a little girl. Her name was Lily!",
    "  two spaces,\ttabs\nand\n\nlines ",
    "def f(x: int) -> str:\n    return f'{x!r}' * 3\n",
    "naïve café, 東京 42 km, \U0001f600",
    "",
    "a",
]


@pytest.mark.llamacpp
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["embedded", "stories260k"])
def test_llama_cpp_splits_text_as_the_tokenizer_does(
    name: str, text: str, asked: Callable[[str], tuple[LlamaCpp, Any]]
) -> None:
    session, tokenizer = asked(name)
    assert session.tokenize(text) == tokenizer(text)["input_ids"]


@pytest.fixture(scope="module")
def asked(
    llama_cpp: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], tuple[LlamaCpp, Any]]]:
    """Name of a model -> llama.cpp with its file, and the tokenizer of transformers."""
    from transformers import AutoTokenizer

    with ExitStack() as open_ones:

        @cache
        def make(name: str) -> tuple[LlamaCpp, Any]:
            model = embedded.MODEL_DIR
            if name != "embedded":
                model = request.getfixturevalue("assets") / name
            file = written(model, tmp_path_factory.mktemp(name) / "out", "fp16") / "model.gguf"
            session = open_ones.enter_context(LlamaCpp(llama_cpp, file, context=64))
            return session, AutoTokenizer.from_pretrained(model)

        yield make


def test_a_tokenizer_that_llama_cpp_does_not_know_is_left_out_and_it_is_said(
    tiny_llama: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reader = read(written(tiny_llama("wide-heads"), tmp_path / "out", "fp16"))
    assert field(reader, "tokenizer.ggml.model") == "none"
    assert "left out of the GGUF file" in caplog.text


def test_all_problems_are_listed_at_once(tiny_llama: Callable[[str], Path], tmp_path: Path) -> None:
    whole = Checkpoint.open(tiny_llama("wide-heads"))
    config = {
        **whole.config,
        "architectures": ["FancyForCausalLM"],
        "rope_parameters": {"rope_type": "longrope"},
        "hidden_act": "gelu",
        "num_attention_heads": 5,
        "quantization_config": {"quant_method": "gptq"},
    }
    folder = Path(shutil.copytree(whole.folder, tmp_path / "model"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(embedded.MODEL_DIR / name, folder / name)
    problems = find_target("gguf").problems(Checkpoint(folder, config, {}), "fp16")
    wanted = ["FancyForCausalLM", "longrope", "gelu", "5 query heads", "quantised", "4096 tokens"]
    assert len(problems) == len(wanted)
    for word, problem in zip(wanted, problems, strict=True):
        assert word in problem


def test_a_changed_weight_in_the_file_is_found(
    exported: Any, reference_of: Any, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(exported("wide-heads", "gguf") / "gguf-fp16", tmp_path / "copy"))
    tensor = next(t for t in read(folder).tensors if t.name == "blk.1.ffn_down.weight")
    content = bytearray((folder / "model.gguf").read_bytes())
    start = int(tensor.data_offset)
    content[start : start + 2] = np.float16(4.0).tobytes()
    (folder / "model.gguf").write_bytes(content)
    reference = reference_of("wide-heads")
    parity = check(find_target("gguf"), "fp16", folder, reference, artifact="under test")
    assert not parity.passed
    assert not any("cannot be run" in problem for problem in parity.problems)
