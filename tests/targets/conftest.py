"""Every built-in target in every precision, exported once per model.

DOTEXPORT_TARGETS=onnx,gguf runs the suite for some of them alone.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from dotexport import ShrinkOptions, SizeOptions, shrink
from dotexport.bench import Workload
from dotexport.bench.process import Worker
from dotexport.embedded import MODEL_DIR
from dotexport.errors import RuntimeMissingError
from dotexport.exports.exporting import export
from dotexport.exports.reference import Reference, compute_reference
from dotexport.exports.target import Target, find_target, lacking, target_names
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.text_options import TextOptions
from dotexport.narrowing.narrow_options import NarrowOptions

from ..conftest import LLAMAS, write_llama, write_tokenizer

LLAMA_CPP = "DOTEXPORT_LLAMA_CPP"

Exported = Callable[[str, str], Path]


def specs() -> list[str]:
    """NAME:PRECISION of all targets that can be run here."""
    return [f"{t.name}:{p}" for t in usable_targets() if not lacking(t) for p in fitting(t)]


def marked_specs() -> Iterator[Any]:
    """Those and, to be skipped with the reason, those whose device is not here."""
    for target in usable_targets():
        absent = "; ".join(lacking(target))
        marks = [pytest.mark.skip(reason=f"{target.name} needs {absent}")] if absent else []
        for precision in fitting(target):
            yield pytest.param(f"{target.name}:{precision}", marks=marks)


def fitting(target: Target) -> list[str]:
    """Superblocks do not fit the rows of tiny models; test_kquants.py has wider ones for them.

    Of the precisions of mlx, two stand for those that differ in a number alone; test_mlx.py has
    these.
    """
    fit = [precision for precision in target.precisions if not precision.endswith("-k")]
    return [p for p in fit if p in ("fp32", "int4")] if target.name == "mlx" else fit


def usable_targets() -> Iterator[Target]:
    chosen = os.environ.get("DOTEXPORT_TARGETS", ",".join(target_names())).split(",")
    for name in filter(chosen.__contains__, target_names()):
        with suppress(RuntimeMissingError):
            target = find_target(name)
            if not target.missing():
                yield target


@pytest.fixture(params=marked_specs())
def spec(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def assert_measured_without_torch(**loaded: Any) -> None:
    """A measuring process of this artifact maps none of torch's libraries."""
    workload = Workload(prompt_length=2, generation_length=2, threads=1, max_warmup_seconds=0)
    with Worker("model", threads=1) as worker:
        found = worker.ask("load", workload=workload.as_dict(), **loaded)
        worker.ask("warm_up", vocabulary=found["vocabulary"] or 80)
        worker.ask("measure", iterations=1)
        worker.ask("memory")
        mapped = psutil.Process(worker._process.pid).memory_maps()
    names = {Path(part.path).name for part in mapped}
    assert [name for name in names if "numpy" in name or "multiarray" in name]
    assert not [name for name in names if "torch" in name]


@pytest.fixture(scope="session")
def translated_once() -> Iterator[None]:
    """Tracing and translating take most of an export, and are the same for every precision.

    The trace is the same for every target that begins with one, too.
    """
    from dotexport.targets import traced

    with pytest.MonkeyPatch.context() as patch:
        programs = by_folder(traced.trace)
        patch.setattr(traced, "trace", lambda c, **how: programs(c.folder, **how))
        with suppress(ImportError):
            from dotexport.targets import portable

            written = by_folder(portable._translate)
            from_proto, to_proto = portable.ir.serde.from_proto, portable.ir.serde.to_proto
            patch.setattr(
                portable,
                "_translate",
                lambda c, **how: from_proto(to_proto(written(c.folder, **how))),
            )
        with suppress(ImportError):
            from dotexport.targets import intel

            converted = by_folder(intel._translate)
            patch.setattr(intel, "_translate", lambda c: converted(c.folder).clone())
        yield


def by_folder(translate: Callable[..., Any]) -> Callable[..., Any]:
    return cache(lambda folder, **how: translate(Checkpoint.open(folder), **how))


@pytest.fixture(scope="session")
def exported(
    tmp_path_factory: pytest.TempPathFactory,
    translated_once: None,
) -> Exported:
    """Names of a tiny model and of a target -> an output with, not verified, what of that can run.

    All targets of a model share the output; each is written when it is first asked for. Tracing and
    lowering take as long as there are layers: two, of which none is the only one.
    """
    outs: dict[str, Path] = {}

    @cache
    def make(name: str, target: str) -> Path:
        if name not in outs:
            folder = tmp_path_factory.mktemp(f"out-{name}")
            write_llama(folder / "model", **LLAMAS[name], num_hidden_layers=2)
            write_tokenizer(folder / "model")
            out = folder / "out"
            export(folder / "model", ["hf"], out=out, verify=False)
            outs[name] = out
        wanted = [spec for spec in specs() if spec.startswith(f"{target}:")]
        if wanted and target != "hf":
            export(outs[name], wanted, verify=False)
        return outs[name]

    return make


@pytest.fixture(scope="session")
def reference_of(exported: Exported) -> Callable[[str], Reference]:
    """Name of a tiny model -> what torch says."""
    references: dict[str, Reference] = {}

    def make(name: str) -> Reference:
        if name not in references:
            references[name] = compute_reference(Checkpoint.open(exported(name, "hf") / "hf"))
        return references[name]

    return make


@pytest.fixture(scope="session")
def llama_cpp() -> Path:
    """The library of llama.cpp; the test is skipped where none is named."""
    from dotexport.targets.llamacpp import find_library

    if LLAMA_CPP not in os.environ:
        pytest.skip(f"set {LLAMA_CPP} to a folder of llama.cpp")
    return find_library(Path(os.environ[LLAMA_CPP]))


# The embedded model as other classes: real text behaviour for every class that is written. --------

TEXT = TextOptions(source="embedded:calibration", samples=16, seqlen=256)
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "granite": "GraniteForCausalLM",
}
Tensors = dict[str, torch.Tensor]

# Name -> the class of the original, what it is narrowed to, and the class that comes out.
NARROWED: dict[str, tuple[str, dict[str, int], str]] = {
    "llama": ("llama", {"hidden_size": 192, "intermediate_size": 384}, "LlamaForCausalLM"),
    "biased": ("qwen2", {"hidden_size": 192, "intermediate_size": 384}, "LlamaForCausalLM"),
    # Six heads, which 200 does not divide by.
    "odd": ("qwen2", {"hidden_size": 200, "num_key_value_heads": 3}, "GraniteForCausalLM"),
    "mistral": ("mistral", {"hidden_size": 200, "num_key_value_heads": 3}, "MistralForCausalLM"),
    "phi3": ("phi3", {"hidden_size": 192, "intermediate_size": 384}, "MistralForCausalLM"),
    "granite": ("granite", {"hidden_size": 192, "intermediate_size": 384}, "GraniteForCausalLM"),
    "qwen3": ("qwen3", {"hidden_size": 192, "intermediate_size": 384}, "Qwen3ForCausalLM"),
}


@pytest.fixture(scope="session")
def narrowed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name in NARROWED -> an output of shrink."""
    return cache(lambda name: write_narrowed(tmp_path_factory.mktemp(name) / "out", name))


def write_badged(folder: Path, kind: str) -> Path:
    """The embedded Llama as a model of another class: exactly, but for Qwen3's norms of heads."""
    folder.mkdir()
    for file in MODEL_DIR.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    tensors = {name: t.float() for name, t in load_file(MODEL_DIR / "model.safetensors").items()}
    config = json.loads((MODEL_DIR / "config.json").read_text())
    config |= {"model_type": kind, "architectures": [CLASSES[kind]], "dtype": "float32"}
    badged, changes = BADGES[kind](tensors, config)
    save_file(badged, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def write_narrowed(folder: Path, name: str) -> Path:
    """An output of shrink, of a class in NARROWED."""
    kind, sizes, expected = NARROWED[name]
    model = write_badged(folder.with_name(f"{folder.name}-original"), kind)
    options = ShrinkOptions(
        sizes=SizeOptions(**sizes), text=TEXT, narrow=NarrowOptions(local=None, basis="pca")
    )
    out = shrink(model, folder, options, device="cpu").out
    assert json.loads((out / "hf" / "config.json").read_text())["architectures"] == [expected]
    return out


def _same(tensors: Tensors, config: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    return tensors, {"sliding_window": None}


def _biased(tensors: Tensors, config: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """Qwen2 has biases, of which zero adds nothing; narrowing then fits them."""
    zeros = {
        name.replace(".weight", ".bias"): torch.zeros(len(tensor))
        for name, tensor in tensors.items()
        if any(part in name for part in (".q_proj.", ".k_proj.", ".v_proj."))
    }
    return tensors | zeros, {"use_sliding_window": False}


def _fused(tensors: Tensors, config: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    kept = dict(tensors)
    for name in tensors:
        module, _, part = name.removesuffix(".weight").rpartition(".")
        if part in FUSED:
            fused, parts = FUSED[part]
            rows = [kept.pop(f"{module}.{one}.weight") for one in parts]
            kept[f"{module}.{fused}.weight"] = torch.cat(rows)
    return kept, {"sliding_window": None, "pad_token_id": 0}


def _neutral(tensors: Tensors, config: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """Granite with multipliers that its weights undo."""
    scaled = dict(tensors)
    scaled["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"] / 12
    scaled["lm_head.weight"] = tensors["lm_head.weight"] * 8
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            scaled[name] = tensor / 0.25
        if name.endswith("q_proj.weight"):
            scaled[name] = tensor * config["head_dim"] ** -0.5 / 0.125
    return scaled, {
        "embedding_multiplier": 12.0,
        "logits_scaling": 8.0,
        "residual_multiplier": 0.25,
        "attention_multiplier": 0.125,
    }


def _normed(tensors: Tensors, config: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """Qwen3 gives every head one length, which is Llama's usual one here: attention stays near."""
    norms = {}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        scale = tensors[f"{prefix}input_layernorm.weight"]
        for part in "qk":
            rows = tensors[f"{prefix}self_attn.{part}_proj.weight"] * scale
            usual = float(rows.square().sum(1).mean().sqrt())
            norms[f"{prefix}self_attn.{part}_norm.weight"] = torch.full(
                (config["head_dim"],), usual
            )
    return tensors | norms, {"use_sliding_window": False}


FUSED = {
    "q_proj": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "gate_proj": ("gate_up_proj", ("gate_proj", "up_proj")),
}
BADGES = {
    "llama": _same,
    "mistral": _same,
    "phi3": _fused,
    "qwen2": _biased,
    "qwen3": _normed,
    "granite": _neutral,
}
