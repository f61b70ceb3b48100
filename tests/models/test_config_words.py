"""Whatever words config.json has, what is read is what transformers reads, or nothing is.

The fuzzer draws configs of each family with words beside, against and in place of each other. A
tiny random model under each is read by AutoModelForCausalLM and, twice, by dotexport: as the
checkpoint that is written at full width, and layer by layer as it is narrowed. Logits agree, or
dotexport refuses; what transformers refuses, dotexport refuses. In a test run the drawing is fixed
and short. For a long one:

    DOTEXPORT_FUZZ=500 python -m pytest tests/models/test_config_words.py -k fuzz
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from dotexport.app.opening import check_tensors, open_source
from dotexport.axes.carrying import carry
from dotexport.axes.plan import SizeOptions, read_model
from dotexport.errors import CheckpointError, DotexportError, UnsupportedModelError
from dotexport.exports.target import find_target
from dotexport.models.beside import Beside
from dotexport.models.checkpoint import Checkpoint, CheckpointWriter, read_config
from dotexport.models.config_words import say_once
from dotexport.models.families import SUPPORTED, is_buffer
from dotexport.models.fused import as_read
from dotexport.models.layers import Stock
from dotexport.models.loading import capped_attention
from dotexport.models.shapes import read_sizes
from dotexport.models.weight_files import INDEX
from dotexport.narrowing.original import Original
from dotexport.sizes.budget import plan

NEW = not transformers.__version__.startswith("4.")
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
# What has no default that fits these sizes.
OF_CLASS: dict[str, dict[str, Any]] = {
    "gemma4_text": {
        "vocab_size_per_layer_input": 50,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 16,
    },
    "granitemoehybrid": {
        "num_local_experts": 0,
        "shared_intermediate_size": 40,
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 4,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
    "qwen3_5_text": {"full_attention_interval": 2},
    "qwen3_5_moe_text": {"full_attention_interval": 2},
}
WINDOW = 6  # shorter than the text
TOKENS_BL = torch.randint(3, 50, (2, 24), generator=torch.Generator().manual_seed(1))
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "factor": 3.0}
DEFAULT = {"rope_type": "default", "rope_theta": 500.0}


def made(folder: Path, kind: str, *, head: str = "none", **words: Any) -> Path:
    """A random model of this config.json, which stays as it is given.

    Args:
        head: what the file holds where the class has the head tied: none, the table once more
            (equal), or another one (own).
        words: `...` takes a word away.
    """
    architecture = next(a for a, f in SUPPORTED.items() if f.model_type == kind)
    said = {"architectures": [architecture], "model_type": kind, **SIZES}
    said |= EXPERTS if SUPPORTED[architecture].experts_key else OF_CLASS.get(kind, {})
    said |= words
    config = {key: value for key, value in said.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    read = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_config(read)
    tensors = {}
    for name, parameter in model.named_parameters():
        centre = 1.0 if "norm" in name else 0.0
        spread = 0.1 if parameter.ndim == 1 else 0.3
        tensors[name] = torch.randn(parameter.shape) * spread + centre
    tensors |= {name: buffer for name, buffer in model.named_buffers() if is_buffer(name)}
    if "lm_head.weight" not in tensors and head != "none":
        table = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = table.clone() if head == "equal" else table.flip(0).clone()
    stored, family = tensors, SUPPORTED[architecture]
    if family.experts_key and not family.stacks:
        stored = dict(as_read(Checkpoint(folder, read_config(folder), {}), tensors))
    parts = {name: tensor.contiguous() for name, tensor in stored.items()}
    save_file(parts, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def logits(folder: Path) -> torch.Tensor:
    """As transformers reads the folder."""
    caps = capped_attention(read_config(folder))
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False, **caps
    )
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=TOKENS_BL, use_cache=False).logits
    return found


def read_twice(folder: Path, out: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """As dotexport reads the folder: written again under its carrier, and layer by layer."""
    source = open_source(folder)
    check_tensors(source, *read_model(source.config))
    Stock.of(source.config, torch.device("cpu"))
    wanted = SizeOptions(num_hidden_layers=source.config["num_hidden_layers"])
    carried, decided = carry(source, plan(source.config, wanted))
    out.mkdir()
    writer = CheckpointWriter(out, carried.specs)
    for name in carried.specs:
        writer.write(name, carried.tensor(name))
    writer.finish()
    (out / "config.json").write_text(json.dumps(decided.config(carried.config)))
    with torch.inference_mode():
        return logits(out), _layer_by_layer(carried)


def _layer_by_layer(source: Checkpoint) -> torch.Tensor:
    family, sizes = read_model(source.config)
    stock = Stock.of(source.config, torch.device("cpu"))
    original = Original(source, family, sizes, stock, torch.device("cpu"))
    stream_BLD = original.embedding()[TOKENS_BL]
    beside = Beside(TOKENS_BL, original.inputs(original.embedding(), TOKENS_BL))
    every, device = slice(None), stream_BLD.device
    for number in range(sizes.num_layers):
        through = original.layer(number).through
        stream_BLD = beside.passed(through, stream_BLD, every, device)
    logits_BLV = stock.norm(stream_BLD.device)(stream_BLD) @ original.folded_head().T
    cap = getattr(stock.config, "final_logit_softcapping", None)
    return logits_BLV if cap is None else torch.tanh(logits_BLV / cap) * cap


def assert_read_alike(folder: Path, out: Path) -> None:
    """1e-4 of the largest logit: float32 in another order of sums."""
    meant = logits(folder)
    for found in read_twice(folder, out):
        torch.testing.assert_close(
            found, meant, rtol=0, atol=1e-4 * max(1.0, float(meant.abs().max()))
        )


# Rotary embeddings ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "granite", "gemma2"])
@pytest.mark.parametrize(
    "words",
    [
        {"rope_parameters": DEFAULT, "rope_scaling": YARN},
        {"rope_parameters": DEFAULT, "rope_scaling": YARN, "rope_theta": 70.0},
        {"rope_parameters": DEFAULT | YARN, "rope_scaling": LINEAR},
        {"rope_scaling": {"type": "linear", "factor": 3.0}, "rope_theta": 70.0},
        {"rope_scaling": LINEAR | {"type": "linear"}},
    ],
    ids=["yarn-added", "theta-beside", "two-scalings", "old-name", "both-names"],
)
def test_what_a_model_card_adds_to_the_rotary_words_counts_as_in_transformers(
    tmp_path: Path, kind: str, words: dict[str, Any]
) -> None:
    if kind == "granite" and not NEW and "type" in words["rope_scaling"]:
        pytest.skip("4.57's class refuses the old name")
    folder = made(tmp_path, kind, **words)
    plain = made(_folder(tmp_path, "plain"), kind)
    assert (logits(folder) - logits(plain)).abs().max() > 1e-3  # the words do matter
    assert_read_alike(folder, tmp_path / "out")


@pytest.mark.skipif(not NEW, reason="4.57 does not read rope_parameters")
def test_a_base_at_the_top_that_disagrees_yields_to_the_one_among_the_parameters(
    tmp_path: Path,
) -> None:
    folder = made(tmp_path, "llama", rope_parameters=DEFAULT, rope_theta=70.0)
    assert read_config(folder)["rope_theta"] == 500.0
    assert_read_alike(folder, tmp_path / "out")


@pytest.mark.skipif(not NEW, reason="4.57 does not read rope_parameters")
def test_a_scaling_of_gemma_3_is_added_to_what_is_said_of_full_attention(tmp_path: Path) -> None:
    kinds = {"full_attention": DEFAULT, "sliding_attention": DEFAULT | {"rope_theta": 50.0}}
    layers = ["full_attention", "sliding_attention"]
    folder = made(
        tmp_path,
        "gemma3_text",
        rope_parameters=kinds,
        rope_scaling=LINEAR,
        layer_types=layers,
        sliding_window=WINDOW,
    )
    assert read_config(folder)["rope_scaling"] == LINEAR
    assert_read_alike(folder, tmp_path / "out")


@pytest.mark.skipif(not NEW, reason="release 4.57 reads the other of the two")
@pytest.mark.parametrize("kind", ["llama", "qwen2"])  # as itself, and under another class
@pytest.mark.parametrize("inside", [YARN, {k: v for k, v in YARN.items() if "original" not in k}])
def test_a_context_before_stretching_that_stands_at_the_top_wins(
    kind: str, inside: dict[str, Any], tmp_path: Path
) -> None:
    words = {"rope_parameters": DEFAULT | inside, "original_max_position_embeddings": 32}
    assert_read_alike(made(tmp_path, kind, **words), tmp_path / "out")


def test_two_names_of_a_type_that_disagree_are_refused(tmp_path: Path) -> None:
    words = {"rope_scaling": LINEAR | {"type": "dynamic"}}
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES, **words})
    )
    with pytest.raises(CheckpointError, match="rope_type = 'linear' and type = 'dynamic'"):
        read_config(tmp_path)


def test_a_type_that_no_release_knows_is_refused(tmp_path: Path) -> None:
    folder = made(tmp_path, "llama")
    edit(folder, rope_scaling={"type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4})
    with pytest.raises(CheckpointError, match=r"transformers (builds no model|refuses)"):
        read_twice(folder, tmp_path / "out")


# Heads ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite", "qwen2", "phi3"])
@pytest.mark.parametrize("head", ["none", "equal", "own"])
def test_a_head_is_the_table_only_where_the_file_says_so_too(
    tmp_path: Path, kind: str, head: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = made(tmp_path, kind, head=head, tie_word_embeddings=True)
    assert read_config(folder)["tie_word_embeddings"] is (head != "own")
    assert ("of other values: it is kept" in caplog.text) is (head == "own")
    if NEW:
        assert_read_alike(folder, tmp_path / "out")
    else:  # 4.57 ties it; what is written says what is meant
        written, layers = read_twice(folder, tmp_path / "out")
        torch.testing.assert_close(written, layers, rtol=1e-4, atol=1e-3)


def test_the_checkpoint_that_is_copied_keeps_a_head_of_its_own(tmp_path: Path) -> None:
    folder = made(tmp_path, "llama", head="own", tie_word_embeddings=True)
    copy = _folder(tmp_path, "copy")
    find_target("hf").write(Checkpoint.open(folder), copy, "as-stored")
    assert json.loads((copy / "config.json").read_text())["tie_word_embeddings"] is False
    assert find_target("hf").open(copy) is not None


# Words that are null, missing, or of another class ----------------------------------------------


@pytest.mark.parametrize("kind", [family.model_type for family in SUPPORTED.values()])
@pytest.mark.parametrize("given", [..., None], ids=["missing", "null"])
@pytest.mark.parametrize("heads", [4, 32])
def test_kv_heads_that_are_not_said_are_those_of_the_class(
    tmp_path: Path, kind: str, given: Any, heads: int
) -> None:
    words = {"num_attention_heads": heads, "num_key_value_heads": given}
    config = {"model_type": kind, **SIZES, **EXPERTS, "num_local_experts": 4}
    config |= OF_CLASS.get(kind, {}) | words
    family = next(f for f in SUPPORTED.values() if f.model_type == kind)
    config = {key: value for key, value in config.items() if value is not ...}
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"architectures": [family.architecture]})
    )
    try:
        meant = AutoConfig.from_pretrained(tmp_path).num_key_value_heads
    except Exception:
        said = r"refuses config\.json|is unknown to this release of transformers"
        with pytest.raises(DotexportError, match=said):
            read_model(read_config(tmp_path))
        return
    if meant is None:  # 4.57 builds no model of it
        with pytest.raises(CheckpointError, match="builds no model"):
            Stock.of(read_config(tmp_path), torch.device("cpu"))
        return
    assert read_config(tmp_path)["num_key_value_heads"] == meant
    if heads % meant:
        with pytest.raises(CheckpointError, match="which do not divide them"):
            read_sizes(family, config)
        return
    assert read_sizes(family, config).num_key_value_heads == meant


@pytest.mark.parametrize(
    "words",
    [
        {"attn_implementation": "eager"},
        {"attn_implementation": None, "_attn_implementation": "sdpa"},
        {"_attn_implementation_internal": "flash_attention_2"},
        {"attn_implementation": "flash_attention_2"},  # which is not here
        {"quantization_config": None},  # 4.57 fails on it by itself
    ],
)
def test_words_that_change_nothing_change_nothing(tmp_path: Path, words: dict[str, Any]) -> None:
    folder = made(tmp_path, "llama")
    meant = logits(folder)
    edit(folder, **words)
    assert not set(words) & set(read_config(folder))
    for found in read_twice(folder, tmp_path / "out"):
        torch.testing.assert_close(found, meant, rtol=0, atol=1e-4 * float(meant.abs().max()))
    if words.get("attn_implementation"):
        assert find_target("hf").open(folder) is not None


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("llama", {"sliding_window": WINDOW, "layer_types": ["sliding_attention"] * 2}),
        ("llama", {"logits_scaling": 4.0, "final_logit_softcapping": 2.0}),
        ("mistral", {"sliding_window": WINDOW, "layer_types": None}),
        ("phi3", {"sliding_window": WINDOW, "layer_types": ["full_attention"] * 2}),
        ("qwen2", {"attention_bias": False, "embedding_multiplier": 3.0}),
        ("granite", {"sliding_window": WINDOW}),
        ("olmo2", {"sliding_window": WINDOW}),
        ("llama", {"no_rope_layers": [1, 0], "use_bias": True}),
    ],
)
def test_words_of_other_classes_mean_nothing_and_are_not_handed_on(
    tmp_path: Path, kind: str, words: dict[str, Any]
) -> None:
    folder = made(tmp_path, kind, **words)
    assert_read_alike(folder, tmp_path / "out")
    for runtime in (tmp_path, tmp_path / "out"):
        said = read_config(runtime)
        assert said.get("layer_types") is None
        assert said.get("logits_scaling", 1.0) == said.get("embedding_multiplier", 1.0) == 1.0


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("llama", {"is_causal": False}),
        ("llama", {"per_layer_config": {"0": {}}}),
        ("mistral", {"layer_types": ["full_attention"] * 2}),  # Ministral for AutoConfig
        ("qwen3_moe", {"mlp_only_layers": [1]}),
        ("qwen3_moe", {"decoder_sparse_step": 2}),
        ("qwen3_moe", {"decoder_sparse_step": 0}),
    ],
)
def test_words_that_make_another_kind_of_model_are_refused(
    tmp_path: Path, kind: str, words: dict[str, Any]
) -> None:
    folder = made(tmp_path, kind)
    edit(folder, **words)
    with pytest.raises(UnsupportedModelError, match=next(iter(words))):
        read_model(read_config(folder))


def test_words_of_another_class_are_nothing_to_refuse(tmp_path: Path) -> None:
    folder = made(tmp_path, "mixtral", decoder_sparse_step=2, mlp_only_layers=[1])
    assert read_model(read_config(folder))[1].num_experts == 4


@pytest.mark.parametrize("word", ["num_experts", "num_local_experts"])
def test_either_word_for_the_number_of_experts_is_written_as_both(
    tmp_path: Path, word: str
) -> None:
    folder = made(tmp_path, "qwen3_moe", **{"num_experts": ..., word: 3})
    config = read_config(folder)
    assert config["num_experts"] == config["num_local_experts"] == 3
    edit(folder, num_experts=3, num_local_experts=4)
    with pytest.raises(CheckpointError, match="num_experts = 3 and num_local_experts = 4"):
        read_config(folder)


@pytest.mark.skipif(not NEW, reason="4.57 does not know the class")
def test_a_ministral_3_without_what_its_queries_grow_by_is_refused(tmp_path: Path) -> None:
    folder = made(tmp_path, "ministral3", rope_parameters=YARN)
    with pytest.raises(CheckpointError, match="rope_parameters without llama_4_scaling_beta, by"):
        open_source(folder)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "qwen3"])
def test_layers_with_a_window_that_has_no_width_are_refused(tmp_path: Path, kind: str) -> None:
    folder = made(tmp_path, kind)
    edit(folder, sliding_window=None, layer_types=["sliding_attention"] * 2)
    with pytest.raises(CheckpointError, match="no sliding_window that is in use"):
        read_model(read_config(folder))


def test_remote_code_beside_a_stock_class_is_dropped_with_a_sentence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = {"AutoConfig": "configuration_a.A", "AutoModelForCausalLM": "modeling_a.A"}
    folder = made(tmp_path, "llama", auto_map=names)
    with caplog.at_level(logging.WARNING):
        found = Checkpoint.open(folder)
    assert "auto_map in config.json is left out, LlamaForCausalLM is a class of" in caplog.text
    assert find_target("hf").problems(found, "as-stored") == []
    assert_read_alike(folder, tmp_path / "out")
    assert "auto_map" not in json.loads((tmp_path / "out/config.json").read_text())


# Weight files -----------------------------------------------------------------------------------


def sharded(folder: Path, *, change: bool = False, twice: bool = False) -> None:
    """Two shards and their index beside model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    if change:
        tensors["model.norm.weight"] += 1
    names = sorted(tensors)
    parts = [names[:5], names[4:] if twice else names[5:]]
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for file, part in zip(files, parts, strict=True):
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    where = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_a_whole_file_beside_equal_shards_is_what_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = made(tmp_path, "llama")
    sharded(folder)
    found = Checkpoint.open(folder)
    assert {file.name for file in found.files.values()} == {"model.safetensors"}
    assert "model.safetensors is read, as transformers does" in caplog.text
    copy = _folder(tmp_path, "copy")
    find_target("hf").write(found, copy, "as-stored")
    assert sorted(file.name for file in copy.iterdir()) == ["config.json", "model.safetensors"]


def test_a_whole_file_beside_an_index_of_files_that_are_not_here_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = made(tmp_path, "llama")
    sharded(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert_read_alike(folder, tmp_path / "out")
    assert "names files not here" in caplog.text


def test_a_whole_file_beside_other_shards_is_refused(tmp_path: Path) -> None:
    folder = made(tmp_path, "llama")
    sharded(folder, change=True)
    with pytest.raises(CheckpointError, match=r"holds two models.*1 tensors, first model\.norm"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("differ", [False, True])
def test_a_tensor_in_two_shards_is_read_where_both_are_one(tmp_path: Path, differ: bool) -> None:
    folder = made(tmp_path, "llama")
    sharded(folder, twice=True)
    (folder / "model.safetensors").unlink()
    name = sorted(Checkpoint.open(folder).files)[4]
    if not differ:
        assert_read_alike(folder, tmp_path / "out")
        return
    file = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(file)
    save_file(tensors | {name: tensors[name] + 1}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name} is in .* with other values, in model-00002"):
        Checkpoint.open(folder)


# Whatever the words -----------------------------------------------------------------------------


def edit(folder: Path, **words: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | words))


def _folder(parent: Path, name: str) -> Path:
    (parent / name).mkdir()
    return parent / name


def _words(kind: str) -> Any:
    """Values of every word that is drawn; `...`: the word is not there."""
    from hypothesis import strategies as st

    word = st.sampled_from

    types = st.sampled_from(
        [
            *(DEFAULT, YARN, YARN | {"rope_theta": 70.0}, LLAMA3, LINEAR),
            *({"type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0}),
            {"type": "su", "short_factor": [1.5] * 4, "long_factor": [3.0] * 4},
            {"rope_type": "longrope", "short_factor": [1.5] * 4, "long_factor": [3.0] * 4},
            *({}, None, LINEAR | {"type": "yarn"}, {"rope_theta": 70.0}),
        ]
    )
    kinds = st.fixed_dictionaries(
        {},
        optional={"full_attention": types, "sliding_attention": st.sampled_from([DEFAULT, None])},
    )
    layers = st.lists(
        st.sampled_from(["full_attention", "sliding_attention"]), min_size=2, max_size=2
    )
    words = {
        "rope_parameters": st.one_of(types, kinds) if kind == "gemma3_text" else types,
        "rope_scaling": types,
        "rope_theta": word([70.0, 10000]),
        "rope_local_base_freq": word([70.0]),
        "partial_rotary_factor": word([1.0, 0.5]),
        "original_max_position_embeddings": word([32]),
        "num_key_value_heads": word([1, 4, 3, None, ...]),
        "head_dim": word([16, None, ...]),
        "tie_word_embeddings": word([True, False, None]),
        "rms_norm_eps": word([1e-3, None]),
        "hidden_act": word(["gelu", None]),
        "hidden_activation": word(["gelu"]),
        "sliding_window": word([None, WINDOW, 100]),
        "use_sliding_window": word([True, False, None]),
        "max_window_layers": word([0, 1, None]),
        "layer_types": st.one_of(st.just(None), layers),
        "attention_bias": word([True, False, None]),
        "mlp_bias": word([True, False, None]),
        "embedding_multiplier": word([3.0, None]),
        "residual_multiplier": word([0.5]),
        "attention_multiplier": word([0.2]),
        "logits_scaling": word([4, 0.5]),
        "attn_logit_softcapping": word([None, 5.0]),
        "final_logit_softcapping": word([None, 3.0]),
        "query_pre_attn_scalar": word([20, None]),
        "attn_implementation": word(["eager", "sdpa", None]),
        "quantization_config": word([None]),
        "auto_map": word([{"AutoConfig": "configuration_a.A"}]),
        "is_causal": word([True, False]),
        "num_experts": word([4, 3, ...]),
        "num_local_experts": word([4, 3]),
        "num_experts_per_tok": word([1, 5]),
        "swiglu_alpha": word([1.0]),
        "swiglu_limit": word([0.5]),
        "norm_topk_prob": word([True, False, None]),
        "mlp_only_layers": word([[], None, [1]]),
        "decoder_sparse_step": word([1, 2]),
        "pretraining_tp": word([2]),
        "use_cache": word([False]),
        "dtype": word(["float32", "bfloat16"]),
        "head": word(["equal", "own"]),
    }
    # A few at a time: of many, one is always refused.
    some = st.lists(st.sampled_from(sorted(words)), max_size=7, unique=True)
    return some.flatmap(lambda names: st.fixed_dictionaries({name: words[name] for name in names}))


def _examples() -> int:
    return int(os.environ.get("DOTEXPORT_FUZZ", "12"))


# Read by the code of their relatives: Mistral, Llama, Qwen3 and Qwen3-MoE.
RELATIVES = ("ministral", "seed_oss", "hunyuan_v1_dense", "mixtral")
# A model takes seconds: drawn where a number of examples is asked for.
HYBRIDS = ("granitemoehybrid", "qwen3_5_text", "qwen3_5_moe_text")
SLOW = () if "DOTEXPORT_FUZZ" in os.environ else HYBRIDS
FUZZED = [f.model_type for f in SUPPORTED.values() if f.model_type not in RELATIVES + SLOW]


@pytest.mark.parametrize("kind", FUZZED)
def test_fuzzed_words_are_read_as_transformers_reads_them_or_refused(kind: str) -> None:
    hypothesis = pytest.importorskip("hypothesis")

    @hypothesis.settings(
        max_examples=_examples(),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(words=_words(kind))
    def read(words: dict[str, Any]) -> None:
        folder = Path(tempfile.mkdtemp())
        try:
            _read_or_refused(folder, kind, words)
        finally:
            shutil.rmtree(folder)

    read()


def _read_or_refused(folder: Path, kind: str, words: dict[str, Any]) -> None:
    say_once.cache_clear()
    try:
        made(folder, kind, **words)
        meant = logits(folder)
    except Exception:  # transformers or dotexport refuses it: then dotexport does
        with pytest.raises(DotexportError):
            read_twice(folder, folder / "out")
        return
    try:
        found = read_twice(folder, folder / "out")
    except DotexportError:
        return
    for one in found:
        torch.testing.assert_close(
            one, meant, rtol=0, atol=1e-4 * max(1.0, float(meant.abs().max()))
        )
