"""What each axis is worth at one budget: width, depth, and what the allocation makes of all."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from dotexport.app.shrink_options import ShrinkOptions
from dotexport.app.shrinking import shrink
from dotexport.axes.plan import SizeOptions
from dotexport.bench.tables.fidelity import Notes
from dotexport.bench.tables.result_files import RESULTS, Out, save
from dotexport.exports.quality import evaluate
from dotexport.models.text_options import TextOptions
from dotexport.models.text_windows import token_windows
from dotexport.narrowing.narrow_options import LocalOptions, NarrowOptions

WIDTH = "hidden_size,intermediate_size,num_key_value_heads"
WAYS: dict[str, Mapping[str, Any]] = {
    "width": {"axes": WIDTH},
    "width, class kept": {"axes": WIDTH, "keep_class": True},
    "MLP alone": {"axes": "intermediate_size"},
    "depth alone": {"axes": "num_hidden_layers"},
    "depth alone, dropped": {"axes": "num_hidden_layers", "refit": False},
    "all, by the rule": {},
    "all, measured": {"allocate": "measured"},
}
"""Name -> what differs from the defaults."""

app = typer.Typer()


@app.command()
def axes(
    model: Annotated[Path, typer.Option(help="Folder of the model.")],
    calib: Annotated[str, typer.Option(help="Calibration text.")],
    test: Annotated[str, typer.Option(help="Text of its domain.")],
    other: Annotated[str, typer.Option(help="Text of another domain.")],
    params: Annotated[list[str] | None, typer.Option(help="Budget; repeat it.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="A way; repeat it.")] = None,
    samples: int = 48,
    seqlen: int = 512,
    windows: Annotated[int, typer.Option(help="Of each text, at its start.")] = 12,
    length: Annotated[int, typer.Option(help="Tokens of these windows.")] = 1024,
    local: Annotated[bool, typer.Option("--local", help="Heal locally, as shrink does.")] = False,
    out: Out = RESULTS,
) -> None:
    """Narrow one model to the same parameters by one axis after another."""
    if strange := set(only or ()) - set(WAYS):
        raise typer.BadParameter(f"--only {sorted(strange)[0]} is none of {', '.join(WAYS)}")
    notes = Notes(out / ".axes.jsonl")
    texts = {
        name: _first(model, text, windows, length) for name, text in _domains(test, other).items()
    }
    asked = ShrinkOptions(
        text=TextOptions(source=calib, samples=samples, seqlen=seqlen),
        narrow=NarrowOptions(local=LocalOptions() if local else None),
    )
    rows = []
    for budget in params or ["0.79x"]:
        for way in only or WAYS:
            known = notes.read(budget)
            if way not in known:
                row = _measured(model, _options(asked, budget, WAYS[way]), texts)
                notes.add({"budget": budget, "step": way, "row": row})
                typer.echo(json.dumps({"budget": budget, "way": way, **row}), err=True)
                known = notes.read(budget)
            rows.append({"budget": budget, "way": way, **known[way]["row"]})
    healing = "local healing" if local else "closed form alone, no healing"
    protocol = PROTOCOL.format(
        model=model.name,
        samples=samples,
        seqlen=seqlen,
        windows=windows,
        length=length,
        healing=healing,
    )
    save(out / "axes", "What each axis is worth", protocol, rows)
    notes.file.unlink()


PROTOCOL = """{model}, calibrated on {samples} windows of {seqlen} tokens; {healing}. Perplexity,
its ratio to the original's and KL divergence from the original (nats per token) on the first
{windows} windows of {length} tokens of two texts: of the calibration's domain, and of another one.
Seconds are of the whole shrink, the choice of layers and of sizes included."""


def _domains(test: str, other: str) -> dict[str, str]:
    return {"": test, "other ": other}


def _first(model: Path, text: str, count: int, length: int) -> torch.Tensor:
    return token_windows(model, TextOptions(source=text, samples=count, seqlen=length))


def _options(asked: ShrinkOptions, budget: str, way: Mapping[str, Any]) -> ShrinkOptions:
    sizes = {key: value for key, value in way.items() if key in ("axes", "keep_class")}
    return replace(
        asked,
        sizes=SizeOptions(params=budget, **sizes),
        narrow=replace(asked.narrow, refit=way.get("refit", True)),
        allocate=way.get("allocate", "rule"),
    )


def _measured(
    model: Path, asked: ShrinkOptions, texts: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        shrunk = shrink(model, Path(scratch) / "out", asked)
        found = {
            name: evaluate(Path(scratch) / "out" / "hf", model, windows_NL)
            for name, windows_NL in texts.items()
        }
    row: dict[str, Any] = {
        "sizes": shrunk.plan.in_words(),
        "class": shrunk.plan.architectures[1].removesuffix("ForCausalLM"),
        "parameters": f"{shrunk.plan.ratio:.3f}x",
    }
    for name, quality in found.items():
        row |= {
            f"{name}perplexity": quality.perplexity,
            f"{name}ratio": quality.ratio,
            f"{name}KL": quality.kl,
        }
    return row | {"seconds": shrunk.seconds}


if __name__ == "__main__":
    app()
