"""Models for tests: tiny ones made here, and the real small one where it is at hand."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING
from transformers import __version__ as release

from dotexport.models.rope import stock_config

# A shell starts background jobs with SIGINT ignored, and children inherit that: a test that
# interrupts a process would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tiny models gain nothing from threads, and waiting for a busy core makes them slow: here, and in
# processes that tests start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Of these, files share artifacts that take long to write: `--dist loadfile` takes each as one.
SHARING = ("tests/targets", "tests/diffusion")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One process for all files of a folder that shares artifacts, so that none is made twice."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class BySharing(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = Path(super()._split_scope(nodeid))
            return next((name for name in SHARING if file.is_relative_to(name)), str(file))

    return BySharing(config, log)


BASE = {
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 90,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Those that 4.57 has, and that are refused there.
OF_RELEASE_5, BEFORE_5 = (
    {"gemma4_text", "granitemoe", "granitemoehybrid", "lfm2"},
    release.startswith("4."),
)
DELTA_NETS: dict[str, Any] = {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
}
# Of classes that have more sizes: fewer key heads than value heads, heads of two widths.
OF_CLASS: dict[str, dict[str, Any]] = {
    "gemma4_text": {
        "num_hidden_layers": 5,
        "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"],
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "global_head_dim": 48,
        "vocab_size_per_layer_input": 90,
        "hidden_size_per_layer_input": 16,
        "sliding_window": 16,
    },
    "granitemoehybrid": {
        "num_local_experts": 0,
        "shared_intermediate_size": 88,
        "layer_types": ["mamba", "attention", "mamba"],
        "mamba_n_heads": 6,
        "mamba_n_groups": 2,
        "mamba_d_state": 8,
        "mamba_chunk_size": 16,
    },
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 8},
    "qwen3_5_text": DELTA_NETS,
    "qwen3_5_moe_text": {
        **DELTA_NETS,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 40,
    },
}

MANY = {"vocab_size": 16384, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
# What each is there for: heads x head_dim unlike hidden; one KV head, tied, stored in bfloat16;
# biases everywhere, and heads of 8; heads x head_dim equal to hidden, which some take for granted;
# a table that is most of the model.
LLAMAS: dict[str, dict[str, Any]] = {
    "wide-heads": {},
    "tied-bf16": {"num_key_value_heads": 1, "tie_word_embeddings": True, "dtype": torch.bfloat16},
    "biased": {"head_dim": 8, "attention_bias": True, "mlp_bias": True},
    "square": {"head_dim": 12},
    "many-rows": MANY,
    "many-tied-rows": {**MANY, "tie_word_embeddings": True},
}


@pytest.fixture(scope="session", autouse=True)
def no_tables_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Latency tables in the cache of whoever runs the tests would answer in their place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name in LLAMAS -> its folder, written once."""
    folders: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name) / "model"
            write_llama(folders[name], **LLAMAS[name])
            write_tokenizer(folders[name])
        return folders[name]

    return make


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """What differs from BASE, model_type among it -> the folder of such a model, sharded; skips
    where this transformers does not know the class."""
    folders: dict[str, Path] = {}

    def make(**changes: Any) -> Path:
        kind = changes["model_type"]
        if kind not in CONFIG_MAPPING or (kind in OF_RELEASE_5 and BEFORE_5):
            pytest.skip(f"{kind} is a class of a later transformers")
        key = repr(changes)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp(changes["model_type"]) / "model"
            write_sharded(folders[key], **changes)
            write_letters(folders[key])
        return folders[key]

    return make


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real models and texts; the test is skipped where there is none."""
    beside = Path(__file__).resolve().parents[1] / "../shared/assets"
    folder = Path(os.environ.get("DOTEXPORT_ASSETS", beside))
    if not folder.is_dir():
        pytest.skip("set DOTEXPORT_ASSETS to a folder with real models and texts")
    return folder.resolve()


@pytest.fixture(scope="session")
def in_node() -> Callable[[str, Path, list[str]], Any]:
    """Script for transformers.js, folder of an artifact, texts -> what the script says of them.

    The script may use `load(task)` and `texts`, and says one thing with `say`. No hub is asked.
    """
    if "DOTEXPORT_TRANSFORMERS_JS" not in os.environ:
        pytest.skip("set DOTEXPORT_TRANSFORMERS_JS to a folder with @huggingface/transformers")

    def run(script: str, folder: Path, texts: list[str]) -> Any:
        dtype = {"int8": "q8", "int4": "q4", "int4-fp16": "q4f16"}.get(
            precision := folder.name.partition("-")[2], precision
        )
        asked = [os.environ["DOTEXPORT_TRANSFORMERS_JS"], f"{folder.parent}/", folder.name, dtype]
        command = ["node", "--input-type=module", "-e", NODE + script, "--", *asked]
        done = subprocess.run([*command, json.dumps(texts)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


NODE = """
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
const [where, models, folder, dtype, asked] = process.argv.slice(1);
const found = createRequire(where + "/").resolve("@huggingface/transformers");
const { env, pipeline } = await import(pathToFileURL(found));
env.allowRemoteModels = false;
env.localModelPath = models;
const load = (task) => pipeline(task, folder, { dtype, device: "cpu" });
const texts = JSON.parse(asked);
const say = (it) => console.log(JSON.stringify(it));
"""


def write_llama(folder: Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{"tie_word_embeddings": False, **BASE, **changes}))
    randomise(model).to(dtype).save_pretrained(folder)


def write_sharded(folder: Path, **changes: Any) -> None:
    """A change to None leaves a setting to the class."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    more = OF_CLASS.get(changes["model_type"], {})
    settings = {"tie_word_embeddings": False, "pad_token_id": 0, **BASE, **more, **changes}
    config = stock_config({k: v for k, v in settings.items() if v is not None})
    model = randomise(AutoModelForCausalLM.from_config(config))
    model.save_pretrained(folder, max_shard_size="80KB")


def randomise(model: Any) -> Any:
    """Weights large enough that every layer matters: with the usual 0.02 two swapped ones hardly
    show."""
    for name, parameter in model.named_parameters():
        centre = 1.0 if "norm" in name else 0.0
        torch.nn.init.normal_(parameter, centre, 0.1 if parameter.ndim == 1 else 0.15)
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            torch.nn.init.normal_(buffer, 1.0, 0.1)
    return model


def write_tokenizer(folder: Path, *, size: int = 90) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"w{n}" for n in range(size - 3))]
    vocab = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def write_letters(folder: Path, *, size: int = 90) -> None:
    """Byte-level BPE of single letters, the one kind that every class of tokenizer here reads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<unk>", "<s>", "</s>", *(chr(33 + n) for n in range(size - 3))]
    vocab = {letter: number for number, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
