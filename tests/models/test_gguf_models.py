"""A GGUF file as MODEL: what was written into it comes out again, or it is said why not."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dotexport.exports.nasty_texts import CONVERSATIONS, TEXTS
from dotexport.exports.target import find_target
from dotexport.exports.text_parity import read_folder, special_tokens
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.finding import find_model

gguf: Any = pytest.importorskip("gguf")
Type = gguf.GGMLQuantizationType

SMOLLM2 = "DOTEXPORT_SMOLLM2"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
OTHER_LLAMA3 = {**LLAMA3, "factor": 5.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
GRANITE = {
    "model_type": "granite",
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.1,
    "logits_scaling": 5.0,
}
ODD = {"num_attention_heads": 6, "num_key_value_heads": 2}  # 256 is no multiple of 6
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    "llama-3": {"model_type": "llama", "rope_parameters": LLAMA3},
    "llama-like-3": {"model_type": "llama", "rope_parameters": OTHER_LLAMA3},
    "llama-linear": {"model_type": "llama", "rope_parameters": LINEAR},
    "llama-biased": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": None, **ODD},
    "mistral-yarn": {"model_type": "mistral", "sliding_window": None, "rope_parameters": YARN},
    "granite": {**GRANITE, **ODD, "attention_bias": True},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **ODD},
    "qwen3-yarn": {"model_type": "qwen3", "rope_parameters": YARN},
}
PRECISIONS = {
    "fp16": Type.F16,
    "int8": Type.Q8_0,
    "int4": Type.Q4_0,
    "int6-k": Type.Q6_K,
    "int4-k": Type.Q4_K,
    "int3-k": Type.Q3_K,
    "int2-k": Type.Q2_K,
}
# Numbers that decide what is computed, under any class of Llama's kind.
NUMBERS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
    *("tie_word_embeddings", "rope_parameters", "bos_token_id", "eos_token_id"),
)


@pytest.fixture(scope="module")
def model(
    write_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Name in MODELS -> a folder of it, float16, with the tokenizer of the embedded model."""

    @cache
    def make(name: str, dtype: torch.dtype = torch.float16) -> Path:
        return write_model(tmp_path_factory.mktemp(name) / "model", dtype, **MODELS[name])

    return make


def written(folder: Path, out: Path, precision: str = "fp16") -> Path:
    """The file that the target gguf makes of a model folder."""
    out.mkdir()
    find_target("gguf").write(Checkpoint.open(folder), out, precision)
    return out / "model.gguf"


def logits(folder: Path, tensors: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """Of a folder as transformers reads it, in float32; with other tensors in it, where given."""
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if tensors is not None:
        stock.load_state_dict(tensors, strict=not stock.config.tie_word_embeddings)
    tokens = torch.arange(3, 300, 3)[None]
    with torch.inference_mode():
        return stock(input_ids=tokens).logits


def rounded(checkpoint: Checkpoint, name: str, precision: str) -> torch.Tensor:
    """A tensor as the gguf package gives it back after what the target makes of it."""
    from dotexport.targets import kquants
    from dotexport.targets.ggml_mixes import stored_as

    values = checkpoint.tensor(name).float().numpy()
    config = checkpoint.config
    layers, tied = config["num_hidden_layers"], config["tie_word_embeddings"]
    shared = config["num_attention_heads"] // config["num_key_value_heads"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    stored = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
    kind = stored_as(stored, values.shape, precision, layers=layers, shared=shared, tied=tied)
    quantize = kquants.quantize if kind in kquants.FORMATS else gguf.quantize
    return torch.from_numpy(gguf.dequantize(quantize(values, kind), kind).copy())


@pytest.mark.parametrize("name", MODELS)
def test_what_was_written_comes_out_again(
    name: str, model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = model(name)
    found = find_model(str(written(folder, tmp_path / "out")))
    before, after = Checkpoint.open(folder), Checkpoint.open(found)
    for number in NUMBERS:
        assert after.config[number] == before.config[number]
    assert set(after.files) == set(before.files)
    for tensor in before.files:
        assert torch.equal(after.tensor(tensor), before.tensor(tensor)), tensor
        assert after.specs[tensor] == before.specs[tensor]
    assert torch.equal(logits(found), logits(folder))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_quantised_weights_are_what_the_gguf_package_dequantises(
    name: str, precision: str, model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = model(name, torch.float32)
    file = written(folder, tmp_path / "out", precision)
    kinds = {tensor.tensor_type for tensor in gguf.GGUFReader(file).tensors}
    assert PRECISIONS[precision] in kinds
    found = find_model(str(file))
    before, after = Checkpoint.open(folder), Checkpoint.open(found)
    wanted = {tensor: rounded(before, tensor, precision) for tensor in before.files}
    for tensor, values in wanted.items():
        assert torch.equal(after.tensor(tensor), values), tensor
        assert after.specs[tensor].dtype == torch.float32
    assert torch.equal(logits(found), logits(folder, wanted))


# Gemma, which the target does not write: files as llama.cpp's converter makes them ---------------


@pytest.mark.parametrize("arch", ["gemma2", "gemma3"])
def test_gemma_is_read_with_its_norms_caps_and_windows(arch: str, gemma: Any) -> None:
    folder, file = gemma(arch)
    found = find_model(str(file))
    before, after = Checkpoint.open(folder), Checkpoint.open(found)
    words = ("layer_types", "sliding_window", "query_pre_attn_scalar", "head_dim", "model_type")
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    for number in (*NUMBERS[:-2], *words, *caps):
        assert after.config.get(number) == before.config.get(number), number
    for tensor in before.files:
        assert torch.equal(after.tensor(tensor), before.tensor(tensor)), tensor
    assert torch.equal(logits(found), logits(folder))


def test_spaces_of_gemma_are_its_tokens_and_merges_follow_scores(gemma: Any) -> None:
    _, file = gemma("gemma2")
    side = read_folder(find_model(str(file)))
    tokens = gguf.GGUFReader(file).fields["tokenizer.ggml.tokens"].contents()
    spelled = [tokens[number] for number in side.encode("hello  hell")]
    # "ll" scores best, then "he": "hell" is spelled by both, and scores last.
    assert spelled == ["<s>", "hell", "o", "  ", "hell"]
    assert side.encode("") == [1]


@pytest.mark.llamacpp
@pytest.mark.parametrize("arch", ["gemma2", "gemma3"])
def test_llama_cpp_computes_what_gemma_is_read_as(arch: str, gemma: Any) -> None:
    from dotexport.targets.llamacpp import LlamaCpp, find_library

    if "DOTEXPORT_LLAMA_CPP" not in os.environ:
        pytest.skip("set DOTEXPORT_LLAMA_CPP to a folder of llama.cpp")
    _, file = gemma(arch)
    mine = logits(find_model(str(file)))
    with LlamaCpp(find_library(Path(os.environ["DOTEXPORT_LLAMA_CPP"])), file, context=128) as s:
        theirs = s.start(np.arange(3, 300, 3)[None])
    # It keeps keys and values in float16, and multiplies by float16 matrices.
    np.testing.assert_allclose(theirs, mine.numpy(), rtol=0, atol=2e-2 * float(mine.abs().max()))


# Tokenizers --------------------------------------------------------------------------------------

DIGITS = {"type": "Digits", "individual_digits": True}
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
CUTTERS = {
    "gpt-2": LEVEL,
    "smollm": {"type": "Sequence", "pretokenizers": [DIGITS, LEVEL]},
    **{
        name: {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {
                        "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
                        + digits
                        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
                    },
                    "behavior": "Isolated",
                    "invert": False,
                },
                {**LEVEL, "use_regex": False},
            ],
        }
        for name, digits in {"llama-bpe": r"\p{N}{1,3}", "qwen2": r"\p{N}"}.items()
    },
}


def same_text(found: Path, folder: Path) -> None:
    mine, theirs = read_folder(found), read_folder(folder)
    from transformers import AutoTokenizer

    named = special_tokens(AutoTokenizer.from_pretrained(folder))
    texts = [*TEXTS, *named, *(f"a{token} b" for token in named)]
    assert [t for t in texts if mine.encode(t) != theirs.encode(t)] == []
    for conversation in CONVERSATIONS:
        assert mine.render(conversation) == theirs.render(conversation)
    assert (mine.start, mine.stops) == (theirs.start, theirs.stops)


@pytest.mark.parametrize("name", CUTTERS)
def test_text_is_cut_as_the_original_cuts_it(
    name: str, write_model: Callable[..., Path], tmp_path: Path
) -> None:
    model_type = "qwen2" if name == "qwen2" else "llama"
    folder = write_model(tmp_path / "model", torch.float16, model_type=model_type)
    stored = json.loads((folder / "tokenizer.json").read_text())
    stored["pre_tokenizer"] = CUTTERS[name]
    stored["model"]["ignore_merges"] = name == "llama-bpe"
    if name == "qwen2":
        stored["normalizer"] = {"type": "NFC"}
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    file = written(folder, tmp_path / "out")
    assert gguf.GGUFReader(file).fields["tokenizer.ggml.pre"].contents() == name
    found = find_model(str(file))
    # What transformers makes of Qwen2 normalises whatever stands there; other readers do not.
    rebuilt = json.loads((found / "tokenizer.json").read_text())
    assert rebuilt["normalizer"] == stored["normalizer"]
    same_text(found, folder)


@pytest.mark.parametrize("around", [("<s>", "A"), ("A", "</s>"), ("<s>", "A", "</s>")])
def test_added_tokens_templates_and_what_is_put_around_come_back(
    around: tuple[str, ...], write_model: Callable[..., Path], tmp_path: Path
) -> None:
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    folder = write_model(tmp_path / "model", torch.float16, model_type="llama", vocab_size=4200)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.add_tokens([AddedToken("<think> \u6771", normalized=False)])
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}"
        "{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    start, end = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    stored = json.loads((folder / "tokenizer.json").read_text())
    known = {"<s>": start, "</s>": end}
    stored["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"Sequence": {"id": "A", "type_id": 0}}
            if name == "A"
            else {"SpecialToken": {"id": name, "type_id": 0}}
            for name in around
        ],
        "pair": [],
        "special_tokens": {
            name: {"id": name, "ids": [known[name]], "tokens": [name]}
            for name in around
            if name != "A"
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    for name in ("config.json", "generation_config.json"):
        said = json.loads((folder / name).read_text())
        (folder / name).write_text(
            json.dumps({**said, "bos_token_id": start, "eos_token_id": [end, 0]})
        )
    found = find_model(str(written(folder, tmp_path / "out")))
    same_text(found, folder)
    mine = AutoTokenizer.from_pretrained(found)
    bare = {"add_special_tokens": False}
    assert mine("a<think> \u6771b", **bare) == tokenizer("a<think> \u6771b", **bare)
    assert not mine.added_tokens_decoder[len(tokenizer) - 1].special


def test_a_tokenizer_of_sentencepiece_comes_back(assets: Path, tmp_path: Path) -> None:
    folder = assets / "stories260k"
    found = find_model(str(written(folder, tmp_path / "out")))
    same_text(found, folder)
    stored = [json.loads((f / "tokenizer.json").read_text()) for f in (found, folder)]
    assert stored[0]["normalizer"] == stored[1]["normalizer"]


# A file of the world --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2() -> Path:
    if SMOLLM2 not in os.environ:
        pytest.skip(f"set {SMOLLM2} to SmolLM2-135M-Instruct.Q4_1.gguf")
    return Path(os.environ[SMOLLM2])


def test_smollm2_is_what_transformers_reads_in_it(smollm2: Path, assets: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = find_model(str(smollm2))
    where = {"pretrained_model_name_or_path": smollm2.parent, "gguf_file": smollm2.name}
    stock = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    mine, config = Checkpoint.open(found), stock.config.to_dict()
    # Theirs is the decimal of a float32, 9.999999747378752e-06; in float32 both are one number.
    assert mine.config["rms_norm_eps"] == np.float32(config["rms_norm_eps"]) == np.float32(1e-5)
    for number in set(NUMBERS) - {"rms_norm_eps"}:
        assert mine.config[number] == config[number], number
    tensors = stock.state_dict()
    assert set(tensors) - {"lm_head.weight"} == set(mine.files)  # which is the table once more
    for name in mine.files:
        assert torch.equal(mine.tensor(name), tensors[name]), name
    with torch.inference_mode():
        theirs = stock(input_ids=torch.arange(3, 300, 3)[None]).logits
    assert torch.equal(logits(found), theirs)
    side, tokenizer = read_folder(found), AutoTokenizer.from_pretrained(**where)
    # Theirs cuts no digits apart before words are cut: "x =  12" is one of the texts that show it.
    texts = [text for text in TEXTS if not re.search(r"\s\s\d", text)]
    assert [t for t in texts if side.encode(t) != list(tokenizer(t)["input_ids"])] == []
    for file in ("wikitext2/test.txt", "tinystories/train-2MiB.txt"):
        text = (assets / file).read_text(encoding="utf-8")[:200_000]
        assert side.encode(text) == list(tokenizer(text)["input_ids"])
    for conversation in CONVERSATIONS:
        wanted = tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True
        )
        assert side.render(conversation) == wanted
