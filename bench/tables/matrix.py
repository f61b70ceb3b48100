"""The table of docs/results/matrix.md: every family in every target, original against narrowed.

    python -m dotexport.bench matrix --llama-cpp PATH

Each family stands in the embedded model's sizes, with its weights wherever names and shapes agree
and the class's own beginning elsewhere: speed, bytes and parity do not ask what a text means. It is
narrowed, exported, held against torch, and decodes in turns with the original in the same target.
A run that was stopped goes on with the cells that are not noted yet.
"""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from dotexport import embedded
from dotexport.app.shrink_options import ShrinkOptions
from dotexport.app.shrinking import shrink
from dotexport.axes.plan import SizeOptions
from dotexport.errors import ParityError, RuntimeMissingError, SizeError, UnsupportedModelError
from dotexport.exports.exporting import export
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.rope import stock_config
from dotexport.models.text_options import TextOptions
from dotexport.narrowing.narrow_options import NarrowOptions

from ..measure import bench
from ..workload import Workload
from .fidelity import Notes
from .result_files import RESULTS, save

Row = dict[str, Any]
PARAMS = "0.7x"
CALIBRATION = TextOptions(source="embedded:calibration", samples=16, seqlen=256)
GGUF = "gguf"  # timed in llama.cpp alone: read back into torch, its files say nothing of it
TARGETS = (
    "hf",
    "ort-cpu:fp32",
    "ort-cpu:int4",
    "onnx",
    "openvino",
    "executorch",
    GGUF,
)

# Two rounds of fresh processes: the whole table is hundreds of them.
WORKLOAD = Workload(
    prompt_length=64,
    generation_length=48,
    min_iterations=20,
    min_seconds=1.0,
    min_warmups=3,
    max_warmup_seconds=3.0,
    rounds=2,
)

# What differs from the embedded model's config.json, by family; None leaves it to the class.
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"model_type": "mistral", "sliding_window": None},
    "Qwen2": {"model_type": "qwen2"},
    "Qwen3": {"model_type": "qwen3"},
    "Granite": {"model_type": "granite", "attention_multiplier": 32**-0.5},
    "Phi-3": {
        "model_type": "phi3",
        "sliding_window": None,
        "original_max_position_embeddings": 512,
    },
    "Gemma 2": {"model_type": "gemma2", "query_pre_attn_scalar": 32, "tie_word_embeddings": None},
    "Gemma 3": {
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": 32,
        "tie_word_embeddings": None,
        "rope_parameters": None,
    },
    "OLMo 2": {"model_type": "olmo2"},
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the table.")] = RESULTS,
    family: Annotated[list[str] | None, typer.Option(help="Only these; default: all.")] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Only these, NAME or NAME:PRECISION; default: all.")
    ] = None,
    llama_cpp: Annotated[
        Path | None, typer.Option(help="Folder of llama.cpp, to time gguf in.")
    ] = None,
) -> None:
    """Parity, bytes and decode rate of every family in every target."""
    families, targets = family or list(FAMILIES), target or list(TARGETS)
    notes = Notes(out / ".matrix.jsonl")
    for name in families:
        wanted = [spec for spec in targets if _noted(spec, llama_cpp) not in notes.read(name)]
        with tempfile.TemporaryDirectory() as scratch:
            for row in _family_rows(name, wanted, llama_cpp, Path(scratch)) if wanted else ():
                typer.echo(json.dumps(row), err=True)
                step = _noted(row["target"], llama_cpp)
                notes.add({"budget": name, "step": step, "row": row})
    known = {name: notes.read(name) for name in families}
    rows: list[Row] = [
        known[name][_noted(spec, llama_cpp)]["row"] for name in families for spec in targets
    ]
    save(
        out / "matrix",
        "Families in targets",
        "The embedded model's sizes (4 layers, hidden 256, MLP 512, 8 heads, vocabulary 4096) in "
        f"every family, narrowed to {PARAMS} of its parameters. `worst logit` and `KL`: the "
        "artifact against the narrowed torch model in float32, over prefill, cached decode, and "
        "both in a right-padded batch. `bytes`: of the artifact, narrowed over original. `decode`: "
        "tokens per second, narrowed over original, in the same target, with the 95 % interval; "
        f"one sequence, {WORKLOAD.prompt_length} tokens in and {WORKLOAD.generation_length} out, "
        f"{WORKLOAD.with_threads().threads} threads, interleaved A B B A in {WORKLOAD.rounds} "
        "rounds of fresh processes. The first table has worst logit, bytes and decode of each. "
        f"gguf is {'timed in llama.cpp' if llama_cpp else 'not timed: no llama.cpp was named'}.",
        [*_matrix(rows), *rows],
        command=_command(families, targets, llama_cpp),
    )
    notes.file.unlink()


def _noted(spec: str, llama_cpp: Path | None) -> str:
    """A cell's name among the notes: one that was not timed is another cell."""
    return f"{spec} in llama.cpp" if spec == GGUF and llama_cpp else spec


def _command(families: list[str], targets: list[str], llama_cpp: Path | None) -> str:
    asked = [
        *(f"--family {shlex.quote(name)}" for name in families if families != list(FAMILIES)),
        *(f"--target {name}" for name in targets if targets != list(TARGETS)),
        *(["--llama-cpp PATH"] if llama_cpp else []),
    ]
    return " ".join(["python -m dotexport.bench matrix", *asked])


def _matrix(rows: list[Row]) -> Iterator[Row]:
    """Family by target: worst logit, bytes and decode, narrowed over original."""
    for name in dict.fromkeys(row["family"] for row in rows):
        own = [row for row in rows if row["family"] == name]
        cells = {row["target"]: _short(row) for row in own}
        yield {"family": name, "written as": own[0]["written as"]} | cells


def _short(row: Row) -> str:
    if row["worst logit"] == "":
        return "refused"
    parts = (f"{row['worst logit']:.0e}", row["bytes"], row["decode"])
    return ", ".join(part for part in parts if part)


def _family_rows(
    name: str, targets: list[str], llama_cpp: Path | None, scratch: Path
) -> Iterator[Row]:
    original = scratch / "original"
    write_original(FAMILIES[name], original)
    options = ShrinkOptions(
        sizes=SizeOptions(params=PARAMS), text=CALIBRATION, narrow=NarrowOptions(local=None)
    )
    out = shrink(original, scratch / "out", options).out
    written = Checkpoint.open(out / "hf").config["architectures"][0]
    for spec in targets:
        yield {"family": name, "written as": written, "target": spec} | _cell(
            out, original, spec, llama_cpp
        )


def _cell(out: Path, original: Path, spec: str, llama_cpp: Path | None) -> Row:
    """One artifact: held against torch, then timed. What is not to be had says why."""
    try:
        (artifact,) = export(out, [spec])
    except (SizeError, UnsupportedModelError, ParityError, RuntimeMissingError) as error:
        return _unheld(type(error).__name__, str(error))
    assert artifact.parity is not None
    figures = {"worst logit": artifact.parity.max_abs, "KL": artifact.parity.kl}
    runtime = {}
    if artifact.target == GGUF:
        if llama_cpp is None:
            return figures | {"bytes": "", "decode": "not timed", "interval": "", "refused": ""}
        runtime["llama_cpp"] = str(llama_cpp.resolve())
    try:
        found = bench(
            out,
            original,
            artifact.target,
            precision=artifact.precision,
            workload=WORKLOAD,
            runtime=runtime,
            roofline=False,
        )
    except UnsupportedModelError as error:
        why = str(error).replace(f"baseline {original}", "the original")
        return _unheld("original refused", why) | figures
    slower = found.comparisons["tpot"]
    return figures | {
        "bytes": f"{found.candidate.artifact_bytes / found.baseline.artifact_bytes:.3f}x",
        "decode": f"{1 / slower.ratio:.2f}x",
        "interval": f"{1 / slower.high:.2f} to {1 / slower.low:.2f}",
        "refused": "",
    }


def _unheld(kind: str, why: str) -> Row:
    reasons = why.partition(":\n")[2] or why  # the folder is a temporary one
    short = " ".join(reasons.split())
    blank = {"worst logit": "", "KL": "", "bytes": "", "decode": "", "interval": ""}
    return blank | {"refused": f"{kind}: {short}"}


def write_original(changes: Mapping[str, Any], folder: Path) -> None:
    """A model of one family in the embedded model's sizes, with its tokenizer."""
    from transformers import AutoModelForCausalLM

    taken = Checkpoint.open(embedded.MODEL_DIR)
    left_out = ("architectures", "transformers_version", "dtype", "attention_bias", "mlp_bias")
    kept = {k: v for k, v in taken.config.items() if k not in left_out}
    settings = {**kept, "pad_token_id": 0, **changes}
    torch.manual_seed(0)
    config = stock_config({k: v for k, v in settings.items() if v is not None})
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if (values := _same(taken, name, parameter)) is not None:
            parameter.data.copy_(values)
    model.to(torch.bfloat16).save_pretrained(folder)
    for file in taken.companions():
        if file.name.startswith("tokenizer"):
            shutil.copyfile(file, folder / file.name)


FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


def _same(taken: Checkpoint, name: str, parameter: Tensor) -> Tensor | None:
    """The embedded model's values for a parameter; None: it has none of this name and shape."""
    whole = next((fused for fused in FUSED if fused in name), None)
    names = [name.replace(whole, part) for part in FUSED[whole]] if whole else [name]
    if not set(names) <= set(taken.specs):
        return None
    values = torch.cat([taken.tensor(part).float() for part in names])
    return values if values.shape == parameter.shape else None
