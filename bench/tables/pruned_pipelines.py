"""The measured tables of diffusion in docs/results/, each from one command.

    python -m dotexport.bench diffusion quality
    python -m dotexport.bench diffusion speed

`quality` prunes the two trained pipelines of tests/diffusion/digits (see digits.py) with every
method; `speed` times an untrained MMDiT of width 512 in ONNX Runtime.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from dotexport.app.turn_options import TurnOptions
from dotexport.diffusion import sampling
from dotexport.diffusion.calibration import Calibration
from dotexport.diffusion.denoiser import Stored
from dotexport.diffusion.evaluating import Samples, deviation
from dotexport.diffusion.layout import num_parameters
from dotexport.diffusion.pipeline_options import (
    LayoutOptions,
    PruneOptions,
    SampleOptions,
    ShrinkOptions,
)
from dotexport.diffusion.pipeline_shrinking import decide, shrink
from dotexport.diffusion.pruning import prune
from dotexport.diffusion.sampling import load
from dotexport.diffusion.tables import find_sites

from ..diffusion import bench_pipeline
from ..tables import digits
from .result_files import RESULTS, save

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the tables.")]
Row = dict[str, Any]
BEDS = Path("tests/diffusion/digits")
PROMPTS = 40
STEPS = 25

# Name of a row: how it prunes, and how it shares the budget between blocks.
METHODS: dict[str, tuple[PruneOptions, str]] = {
    "random": (PruneOptions(method="random"), "uniform"),
    "L1": (PruneOptions(method="l1"), "uniform"),
    "Wanda-style": (PruneOptions(method="wanda"), "uniform"),
    "L1 + least squares": (PruneOptions(method="l1-refit"), "uniform"),
    "group OBS": (PruneOptions(), "uniform"),
    "group OBS, allocation by predicted loss": (PruneOptions(), "loss"),
    "group OBS, neurons merged by transport": (PruneOptions(method="dot"), "uniform"),
    "group OBS, error feedback": (PruneOptions(feedback=True), "uniform"),
}


@app.command()
def quality(
    out: Out = RESULTS,
    beds: Annotated[Path, typer.Option(help="Folder of mmdit/ and dit/.")] = BEDS,
) -> None:
    """Held-out loss and deviation of every method, at 25 and 50 % removed from every block."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    for name in ("mmdit", "dit"):
        for row in _rows(name, beds / name):
            rows.append(row)
            typer.echo(str(row), err=True)
    save(
        out / "diffusion",
        "Diffusion: methods on two trained pipelines",
        "Heads and feed-forward neurons of "
        "the pipelines in tests/diffusion/digits (4 blocks, 4 heads of 16; MMDiT with rectified "
        "flow, DiT with DDIM), trained on 1,400 of scikit-learn's digits. `loss`: denoising loss "
        "on the 397 others, 8 noises and times each, `ratio` over the dense one. `deviation`: "
        f"squared distance of {PROMPTS} samples from the dense ones at the same noise, over their "
        f"variance. Calibrated on {PROMPTS} prompts, {STEPS} steps, guidance 1, 4 packages, seed "
        "0; `random` is the mean of three seeds.",
        rows,
    )


@dataclass(frozen=True)
class _Bed:
    """One trained pipeline, what it is asked, and how it is judged."""

    pipe: Any
    dense: nn.Module
    prompts: list[Any]
    options: SampleOptions
    loss: digits.Loss

    @classmethod
    def load(cls, name: str, folder: Path) -> _Bed:
        pipe, flow = load(folder), name == "mmdit"
        options = SampleOptions(
            prompts="", steps=STEPS, guidance=1.0, batch=PROMPTS, extra=digits.CALL if flow else {}
        )
        classes: list[Any] = list(digits.WORDS if flow else range(10))
        loss = (digits.flow_loss if flow else digits.noise_loss)(pipe)
        return cls(pipe, pipe.transformer, classes * (PROMPTS // 10), options, loss)

    def samples(self) -> Tensor:
        """At noises that calibration has not seen."""
        return sampling.sample(self.pipe, self.prompts, 10_000, self.options)

    def measure(
        self, removed: int, asked: PruneOptions, allocation: str, wanted: Tensor
    ) -> tuple[float, float, float]:
        """Held-out loss, deviation, and parameters over dense."""
        model = copy.deepcopy(self.dense)
        self.pipe.transformer = model
        calibration = Calibration(
            pipe=self.pipe,
            prompts=self.prompts,
            options=self.options,
            weights=asked.weights,
            teacher=self.dense if asked.feedback else None,
        )
        share = f"{1 - removed / 100}x"
        layout = LayoutOptions(heads=share, ffn=share, allocation=allocation)
        sites = find_sites(model)
        kept = decide(calibration, sites, layout, asked)
        prune(calibration, sites, kept, asked, Stored())
        apart = deviation(Samples(wanted, self.samples()))
        self.pipe.transformer = self.dense
        size = num_parameters(model) / num_parameters(self.dense)
        return digits.held_out(model, self.loss), apart, size


def _rows(name: str, folder: Path) -> Iterator[Row]:
    bed = _Bed.load(name, folder)
    wanted, before = bed.samples(), digits.held_out(bed.dense, bed.loss)
    yield _row(name, 0, "dense", before, before, 0.0, 1.0)
    for removed in (25, 50):
        for method, (asked, allocation) in METHODS.items():
            seeds = (0, 1, 2) if method == "random" else (0,)
            figures = [
                bed.measure(removed, replace(asked, seed=seed), allocation, wanted)
                for seed in seeds
            ]
            mean = [sum(column) / len(figures) for column in zip(*figures, strict=True)]
            yield _row(name, removed, method, before, mean[0], mean[1], mean[2])


def _row(
    model: str, removed: int, method: str, before: float, after: float, apart: float, size: float
) -> Row:
    return {
        "model": model,
        "removed": f"{removed} %",
        "method": method,
        "parameters": f"{size:.3f}x",
        "loss": round(after, 4),
        "ratio": round(after / before, 4),
        "deviation": round(apart, 4),
    }


@app.command()
def speed(
    out: Out = RESULTS,
    seconds: Annotated[float, typer.Option(help="Seconds for each model, at least.")] = 10.0,
) -> None:
    """One step and the whole pipeline in ONNX Runtime on one thread, an MMDiT of width 512."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "dense"
        _wide().save_pretrained(folder)
        prompts = Path(scratch) / "prompts.txt"
        prompts.write_text("one\ntwo\n", encoding="utf-8")
        asked = SampleOptions(
            prompts=str(prompts), steps=1, guidance=1.0, height=256, width=256, extra=digits.CALL
        )
        for removed in (25, 50):
            share = f"{1 - removed / 100}x"
            target = Path(scratch) / f"pruned-{removed}"
            options = ShrinkOptions(
                sampling=asked,
                layout=LayoutOptions(heads=share, ffn=share, allocation="uniform"),
                prune=PruneOptions(method="random"),
            )
            made = shrink(folder, target, options)
            found = bench_pipeline(target, folder, "onnx", TurnOptions(seconds=seconds))
            for what in ("step", "whole"):
                rows.append(
                    {
                        "removed": f"{removed} %",
                        "parameters": f"{made.parameters[1] / made.parameters[0]:.3f}x",
                        "what": "one step" if what == "step" else "4 steps, whole pipeline",
                        "dense, ms": round(found[what]["baseline_ms"], 2),
                        "pruned, ms": round(found[what]["candidate_ms"], 2),
                        "verdict": found[what]["verdict"],
                        "dense, MB": round(found["bytes"][0] / 1e6, 1),
                        "pruned, MB": round(found["bytes"][1] / 1e6, 1),
                    }
                )
                typer.echo(str(rows[-1]), err=True)
    save(
        out / "diffusion-speed",
        "Diffusion: an MMDiT of width 512 in ONNX Runtime",
        "SD3Transformer2DModel, 4 blocks, 8 "
        "heads of 64, 32x32 latents (256 picture tokens), batch 1, float32, one CPU thread, "
        "untrained, the same share of heads and neurons removed from every block; dense and pruned "
        "in turns (A B B A) with a 95 % bootstrap interval. MB are "
        "those of the denoiser's graph.",
        rows,
    )


def _wide() -> Any:
    """The pipeline of the test bed with a denoiser of width 512."""
    from diffusers import SD3Transformer2DModel

    pipe = digits.mmdit_pipeline()
    pipe.register_modules(
        transformer=SD3Transformer2DModel(
            sample_size=32,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=4,
            attention_head_dim=64,
            num_attention_heads=8,
            joint_attention_dim=64,
            caption_projection_dim=512,
            pooled_projection_dim=64,
            pos_embed_max_size=32,
        )
    )
    return pipe
