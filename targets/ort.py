"""ONNX Runtime on the CPU and on CUDA, through the graphs of onnxruntime-genai's model builder.

The builder fuses attention, rotary embedding and norms into single operators and keeps the KV
cache in place; onnxruntime-genai itself loads the folder as it is. ort_session.py runs it,
rehearsal.py says what can be said of a CUDA graph without a GPU.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dotexport.errors import DotexportError, RuntimeMissingError
from dotexport.exports.target import QUANTISED_BLOCK, Rehearsal, Session

from . import cuda
from .configs import frequencies, head_dim, rope_type, states_of, window_of
from .genai_builder import builder_problems
from .ort_session import open_decoder

if TYPE_CHECKING:
    import torch

    from dotexport.exports.text_parity import TextSide
    from dotexport.merging.rounding import Grid, Rounded
    from dotexport.models.checkpoint import Checkpoint

LEAST_SCALE_ERROR = 1e-4  # relative
TABLED_ROPE = {"default", "llama3"}  # one table for the whole context
SILENTLY_WRONG_ROPE = {"linear", "dynamic", "yarn"}  # found by verify
# Classes that the builder knows, and what it makes something else of.
MISREAD = {
    "GptOssForCausalLM": "the model builder takes experts from MXFP4 files, and every second layer "
    "for one with a window, whatever config.json says",
    "SmolLM3ForCausalLM": "layers that do not rotate are not written by the model builder",
}

# Runs the builder with some of its answers changed that it has no option for.
CHANGED_BUILDER = """
import json, runpy, sys
from pathlib import Path
answers, sys.argv = json.loads(sys.argv[1]), sys.argv[2:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
from builders.base import Model
for name, answer in answers.items():
    setattr(Model, name, lambda self, answer=answer: answer)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class _Built:
    """Writes with the model builder in a process of its own; runs with onnxruntime."""

    name: str
    provider: str  # as the builder calls it
    exact_rounding = ("int4",)

    def missing(self) -> list[str]:
        wanted = {
            "onnxruntime": "pip install onnxruntime (or onnxruntime-gpu, never both)",
            "onnxruntime_genai": "pip install onnxruntime-genai (or onnxruntime-genai-cuda)",
            "onnx_ir": "pip install onnx-ir",
        }
        absent = [how for module, how in wanted.items() if importlib.util.find_spec(module) is None]
        return absent or builder_problems()

    def problems(self, checkpoint: Checkpoint, precision: str) -> list[str]:
        config = checkpoint.config
        return [*self.config_problems(config, precision), *_folder_problems(checkpoint)]

    def config_problems(self, config: Mapping[str, Any], precision: str) -> list[str]:
        return _config_problems(config)

    def write(
        self,
        checkpoint: Checkpoint,
        folder: Path,
        precision: str,
        rounded: Mapping[str, Rounded] | None = None,
    ) -> None:
        with tempfile.TemporaryDirectory(prefix="dotexport-") as cache:
            command = [
                *_builder_command(self.answers(checkpoint.config, precision)),
                *("--input", str(checkpoint.folder)),
                *("--output", str(folder), "--precision", precision),
                *("--execution_provider", self.provider, "--cache_dir", cache),
                *("--extra_options", *self.options(checkpoint.config, precision)),
            ]
            _run_quietly(command)
        if rounded:
            from .builder_weights import store

            store(checkpoint, folder / "model.onnx", rounded)

    def text(self, checkpoint: Checkpoint, folder: Path) -> TextSide | None:
        """The tokenizer of the folder, and the start and ends that onnxruntime-genai reads."""
        from dotexport.exports.text_parity import read_folder

        model = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
        ends = model.get("eos_token_id")
        stops = ends if isinstance(ends, list) else [] if ends is None else [ends]
        return read_folder(folder, start=model.get("bos_token_id"), stops=stops)

    def wrong_in_file(
        self, checkpoint: Checkpoint, folder: Path, chosen: Collection[str] = ()
    ) -> list[str]:
        """Epsilons and rotary angles that are not the checkpoint's."""
        from .onnx_numbers import wrong_epsilons, wrong_tables

        file, config = folder / "model.onnx", checkpoint.config
        problems = wrong_epsilons(file, config)
        if (kind := rope_type(config)) in TABLED_ROPE and not _differs_by_layer(config):
            frequencies_F, gain = frequencies(config, kind)
            problems += wrong_tables(file, frequencies_F, gain, config["max_position_embeddings"])
        return problems

    def answers(self, config: Mapping[str, Any], precision: str) -> dict[str, bool]:
        """What the builder asks itself, and what it is told: its own answer would not run."""
        # The attention operator refuses to rotate heads that are no multiple of 16 itself.
        return {} if head_dim(config) % 16 == 0 else {"is_fused_rope_supported": False}

    def options(self, config: Mapping[str, Any], precision: str) -> list[str]:
        # Sliding windows stay, but over a whole cache: one that evicts cannot be right-padded.
        options = ["hf_token=false", "windowed_kv_cache=false"]
        if head_dim(config) % 16:
            options.append("fuse_qkv=false")  # a separate rotary operator reads q and k separately
        if precision == "int4":
            # Blocks of 32 lose least and pad least when a width is no multiple of 128.
            options.append(f"block_size={QUANTISED_BLOCK}")
        return options


class OrtCpu(_Built):
    """bfloat16 is not offered: onnxruntime has no product of bfloat16 matrices on CPUs."""

    name = "ort-cpu"
    provider = "cpu"
    summary = "ONNX Runtime on the CPU; onnxruntime-genai loads the same folder"
    precisions = ("fp32", "fp16", "int4")
    # int4 has a float32 scale per 32 weights.
    weight_bits: ClassVar = {"fp32": (32, 32), "fp16": (16, 16), "int4": (5, 32)}
    cache_bytes: ClassVar = {"fp32": 4, "fp16": 2, "int4": 4}

    def answers(self, config: Mapping[str, Any], precision: str) -> dict[str, bool]:
        # It knows of no attention in float16 on CPUs, which onnxruntime has, and would write one
        # of hundreds of nodes instead.
        grouped = {"is_gqa_supported": True} if precision == "fp16" else {}
        return super().answers(config, precision) | grouped

    def grids(self, checkpoint: Checkpoint, precision: str) -> dict[str, Grid]:
        """The matrices of all layers and the head's, by the checkpoint's names."""
        from dotexport.merging.rounding import FOUR_BITS, Blocks

        if precision != "int4":
            return {}
        tied = checkpoint.config.get("tie_word_embeddings")
        blocks = Blocks(QUANTISED_BLOCK, (-8, 7), shares=FOUR_BITS)
        return {
            name: blocks
            for name, spec in checkpoint.specs.items()
            if len(spec.shape) == 2 and (tied or name != "model.embed_tokens.weight")
        }

    def values(self, checkpoint: Checkpoint, folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
        """What the 4-bit matrices of a graph are, by the checkpoint's names."""
        import torch

        from .builder_weights import values

        for name, value_OI in values(checkpoint, folder / "model.onnx"):
            yield name, torch.from_numpy(value_OI)

    def options(self, config: Mapping[str, Any], precision: str) -> list[str]:
        options = super().options(config, precision)
        if precision == "int4":
            # Level 4 rounds activations to int8 inside the product: several times faster than
            # level 1 on CPUs.
            options.append("accuracy_level=4")
        return options

    def open(self, folder: Path, *, threads: int | None = None) -> Session:
        return open_decoder(folder, threads=threads)


class OrtCuda(_Built):
    """Written anywhere, run where a GPU is; `rehearse` is for where there is none."""

    name = "ort-cuda"
    provider = "cuda"
    summary = "ONNX Runtime on an NVIDIA GPU; onnxruntime-genai loads the same folder"
    precisions = ("fp16", "bf16", "fp32", "int4")
    # int4 has a float16 scale per 32 weights, and computes in float16.
    weight_bits: ClassVar = {
        "fp16": (16, 16),
        "bf16": (16, 16),
        "fp32": (32, 32),
        "int4": (4.5, 16),
    }
    cache_bytes: ClassVar = {"fp16": 2, "bf16": 2, "fp32": 4, "int4": 2}

    def answers(self, config: Mapping[str, Any], precision: str) -> dict[str, bool]:
        # In float32 its choice is an operator without outputs for the cache: a broken graph.
        whole = {"is_packed_attn_supported": False} if precision == "fp32" else {}
        return super().answers(config, precision) | whole

    def options(self, config: Mapping[str, Any], precision: str) -> list[str]:
        # Norms of queries and keys stay operators of their own: inside the attention they are
        # known to CUDA alone, and a graph could not be rehearsed.
        return [*super().options(config, precision), "fuse_qk_norm_gqa=false"]

    def lacking(self) -> list[str]:
        return cuda.lacking()

    def open(self, folder: Path, *, threads: int | None = None) -> Session:
        return open_decoder(folder, provider=cuda.CUDA, threads=threads)

    def rehearse(
        self,
        checkpoint: Checkpoint,
        folder: Path,
        precision: str,
        *,
        peak: float,
        threads: int | None = None,
    ) -> Rehearsal:
        from .rehearsal import rehearse

        return rehearse(checkpoint, folder, precision, peak=peak, threads=threads)


def _builder() -> Path:
    found = importlib.util.find_spec("onnxruntime_genai")
    if found is None or found.origin is None:
        raise RuntimeMissingError("onnxruntime-genai is missing; pip install onnxruntime-genai")
    return Path(found.origin).parent / "models" / "builder.py"


def _builder_command(answers: Mapping[str, bool]) -> list[str]:
    changed = ["-c", CHANGED_BUILDER, json.dumps(answers)] if answers else []
    return [sys.executable, *changed, str(_builder())]


def _run_quietly(command: Sequence[str]) -> None:
    """Run the builder offline; its many lines matter only when it fails."""
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONNOUSERSITE": "1"}
    done = subprocess.run(
        command, env=os.environ | offline, capture_output=True, text=True, errors="replace"
    )
    if done.returncode == 0:
        return
    last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
    raise DotexportError(
        f"the model builder of onnxruntime-genai ended with code {done.returncode}; "
        f"its last lines:\n{last}\nCheck that onnxruntime-genai and transformers fit together "
        "(dotexport targets), or export with another target"
    )


def _config_problems(config: Any) -> list[str]:
    problems = []
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in _known_architectures():
        problems.append(
            f"architecture {architecture} is unknown to the installed model builder; "
            "export it with another target"
        )
    if architecture in MISREAD:
        problems.append(f"{architecture}: {MISREAD[architecture]}; export it with another target")
    if others := states_of(config):
        problems.append(
            f"layers of {', '.join(others)} keep a state that this target's session does "
            "not pass on; export it with another target"
        )
    heads = config.get("num_attention_heads") or 0
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % max(kv_heads, 1):
        problems.append(
            f"{heads} query heads do not divide into {kv_heads} KV heads; "
            "GroupQueryAttention needs whole groups"
        )
    width = head_dim(config)
    if width % 8:
        problems.append(
            f"head_dim {width} is no multiple of 8, which GroupQueryAttention needs; "
            "choose a model with other heads"
        )
    rope = rope_type(config)
    if rope in SILENTLY_WRONG_ROPE:
        problems.append(
            f"rope_type {rope!r} is written by the model builder as plain rotary embedding, "
            "without a word; export it with another target"
        )
    problems += _context_problems(config, architecture, rope)
    if _differs_by_layer(config):
        problems.append(
            "rope_parameters of their own for each kind of layer are not read by the model "
            "builder; export it with another target"
        )
    problems += _scale_problems(config)
    window, context = window_of(config), config.get("max_position_embeddings") or 0
    if window and window < context:
        problems.append(
            f"sliding_window {window} is left out by the model builder, which is exact only for "
            f"contexts up to it; lower max_position_embeddings from {context} to {window}"
        )
    return problems + _confused_widths(config, heads * width, kv_heads * width)


def _context_problems(config: Any, architecture: str, rope: str) -> list[str]:
    """The builder takes Phi-3 with two contexts for one with longrope, and fails without it."""
    context = config.get("max_position_embeddings")
    original = config.get("original_max_position_embeddings", 4096)  # the class's own
    if architecture != "Phi3ForCausalLM" or rope != "default" or original == context:
        return []
    return [
        f"original_max_position_embeddings {original} is not max_position_embeddings {context}, "
        "which the model builder takes for longrope; make them equal in config.json"
    ]


def _differs_by_layer(config: Any) -> bool:
    rope = config.get("rope_parameters") or {}
    return any(isinstance(kind, Mapping) for kind in rope.values())


def _scale_problems(config: Any) -> list[str]:
    """The builder writes the scale of Gemma's embeddings with two decimals."""
    if not str(config.get("model_type")).startswith("gemma"):
        return []
    hidden = config.get("hidden_size") or 1
    exact = math.sqrt(hidden)
    if abs(round(exact, 2) / exact - 1) < LEAST_SCALE_ERROR:
        return []
    return [
        f"the model builder rounds the scale of embeddings, the root of hidden_size {hidden}, from "
        f"{exact:.5f} to {exact:.2f}, which every logit would show; choose a width with a rounder "
        "root, or export it with another target"
    ]


def _confused_widths(config: Any, q_width: int, kv_width: int) -> list[str]:
    """The builder takes every linear layer with `vocab_size` outputs for the output head."""
    widths = {
        "hidden_size": config.get("hidden_size"),
        "intermediate_size": config.get("intermediate_size"),
        "the width of all query heads": q_width,
        "the width of all KV heads": kv_width,
    }
    vocab = config.get("vocab_size")
    return [
        f"{name} equals vocab_size ({vocab}), so the model builder would take such a layer for "
        "the output head; choose another width"
        for name, width in widths.items()
        if width == vocab
    ]


def _folder_problems(checkpoint: Checkpoint) -> list[str]:
    files = {file.name for file in checkpoint.companions()}
    if files & {"tokenizer.json", "tokenizer.model", "vocab.json"}:
        return []
    return [
        f"{checkpoint.folder} has no tokenizer (tokenizer.json or tokenizer.model), which the "
        "model builder needs; copy the tokenizer files of the base model into it"
    ]


@cache
def _known_architectures() -> set[str]:
    # The builder has no list to import, and importing it would load half of transformers.
    text = _builder().read_text(encoding="utf-8")
    return set(re.findall(r'architectures\[0\] == "(\w+)"', text))
