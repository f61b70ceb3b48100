"""The tables of fidelity: what each step of narrowing buys, from scratch.

    python -m dotexport.bench fidelity                  all of them
    python -m dotexport.bench fidelity --only embedded  one

A rung of the ladder adds one step to the rung before it. What buys nothing is shown and is no
part of the rungs after it, nor of the default path.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from dotexport import embedded
from dotexport.app.shrink_options import ShrinkOptions
from dotexport.app.shrinking import shrink
from dotexport.axes.plan import SizeOptions, read_model
from dotexport.exports.quality import evaluate
from dotexport.healing.heal_options import HealOptions
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.text_options import TextOptions
from dotexport.models.text_windows import token_windows
from dotexport.narrowing.narrow_options import LocalOptions, NarrowOptions

from .result_files import CALIBRATION, EVALUATION, RESULTS, save, stories

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

CLOSED = NarrowOptions(local=None)
NOTHING = replace(CLOSED, refit=False)
WINDOWS = (8, 32, 128, 512)
DISTILLED = "+ distillation"
DECISIVE = (
    "+ error feedback",
    "+ allocation",
    "+ local healing",
    DISTILLED,
    "select + refit",
    "dot + refit",
)


@dataclass(frozen=True)
class Subject:
    """A model, its texts, and how it is healed.

    Attributes:
        floors: per budget, the ratios of perplexity to be reached without and with distillation.
        whole: the budget at which every rung is climbed; at the others, those that decide.
    """

    name: str
    model: Path
    text: TextOptions
    judged: TextOptions
    floors: dict[str, tuple[float, float]]
    healing: HealOptions
    whole: str

    def windows(self) -> torch.Tensor:
        return token_windows(self.model, self.judged)


@dataclass(frozen=True)
class Rung:
    """One step more."""

    step: str
    narrow: NarrowOptions
    sizes: dict[str, Any] = field(default_factory=dict)
    allocate: str = "rule"
    heal: HealOptions | None = None


def embedded_subject() -> Subject:
    return Subject(
        "embedded",
        embedded.MODEL_DIR,
        CALIBRATION,
        EVALUATION,
        {"0.80x": (1.06, 1.03), "0.70x": (1.15, 1.06), "0.50x": (1.6, 1.25)},
        HealOptions(steps=100, samples=646),
        "0.70x",
    )


def stories_subject() -> Subject:
    model, file = stories()
    text = TextOptions(source=file, samples=400, seqlen=256, skip=100)
    return Subject(
        "stories260k",
        model,
        text,
        replace(text, samples=100, skip=0),
        {"0.84x": (1.45, 1.20), "0.72x": (2.2, 1.5)},
        HealOptions(steps=300, batch=8, samples=2000),
        "0.72x",
    )


SUBJECTS = {"stories260k": stories_subject, "embedded": embedded_subject}


@app.command()
def fidelity(
    only: Annotated[
        str, typer.Option(help=f"One of {', '.join(SUBJECTS)} or windows; default: all.")
    ] = "",
    budget: Annotated[
        str, typer.Option(help="Climb at this one only; a run without it writes the tables.")
    ] = "",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the tables.")] = RESULTS,
) -> None:
    """What each step of narrowing buys: quality by rung, budget and amount of text."""
    if budget and (only not in SUBJECTS or budget not in SUBJECTS[only]().floors):
        raise typer.BadParameter(f"--budget {budget} is none of those that --only {only} climbs at")
    chosen = [only] if only else [*SUBJECTS, "windows"]
    for name in chosen:
        if name == "windows":
            robustness(out)
        elif name in SUBJECTS:
            ladder(SUBJECTS[name](), out, budget)
        else:
            raise typer.BadParameter(f"{name} is none of {', '.join(SUBJECTS)}, windows")


# The ladder -------------------------------------------------------------------------------------


def rungs(healing: HealOptions) -> Iterator[Rung]:
    """From choosing axes to distillation."""
    for basis in ("select", "dot", "pca", "learned"):
        mlp = "select" if basis == "select" else "obs"
        yield Rung(basis, replace(NOTHING, basis=basis, mlp=mlp))
    yield Rung("+ reader refit", replace(CLOSED, feedback=False))
    yield Rung("+ error feedback", CLOSED)
    yield Rung("(+ bias)", CLOSED, {"bias": True})
    yield Rung("(+ MLP transport)", replace(CLOSED, mlp="dot"))
    yield Rung("+ allocation", CLOSED, allocate="measured")
    yield Rung("(+ heads by transport)", replace(CLOSED, heads="dot"), allocate="measured")
    local = replace(CLOSED, local=LocalOptions())
    yield Rung("+ local healing", local, allocate="measured")
    yield Rung(DISTILLED, local, allocate="measured", heal=healing)
    for basis in ("select", "dot", "pca", "auto"):
        mlp = "select" if basis == "select" else "obs"
        yield Rung(f"{basis} + refit", replace(CLOSED, basis=basis, mlp=mlp))


def ladder(subject: Subject, out: Path, only: str = "") -> None:
    """Climb at every budget and write the tables; `only` at one leaves them to a later run."""
    notes = Notes(out / f".fidelity-{subject.name}.jsonl")
    for budget in [only] if only else subject.floors:
        climb(subject, budget, notes)
    if not only:
        _write(subject, notes, out)
        notes.file.unlink()


@dataclass(frozen=True)
class Notes:
    """Rungs that were measured, a line of JSON each: a ladder that was stopped goes on.

    Attributes:
        given: what all rows hang on. Those that were measured under something else do not count.
    """

    file: Path
    given: Mapping[str, str] = field(default_factory=dict)

    def read(self, budget: str) -> dict[str, dict[str, Any]]:
        if not self.file.is_file():
            return {}
        notes = map(json.loads, self.file.read_text(encoding="utf-8").splitlines())
        ours = (note for note in notes if note.get("given", {}) == self.given)
        return {note["step"]: note for note in ours if note["budget"] == budget}

    def add(self, note: dict[str, Any]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"given": self.given, **note}) + "\n")

    def row(self, budget: str, step: str, measure: Callable[[], Mapping[str, Any]]) -> Any:
        """What is noted of this step; where nothing is, it is measured first."""
        if step not in self.read(budget):
            row = measure()
            self.add({"budget": budget, "step": step, "row": row})
            typer.echo(json.dumps({"budget": budget, "step": step, **row}), err=True)
        return self.read(budget)[step]["row"]


def climb(subject: Subject, budget: str, notes: Notes) -> None:
    """Measure the rungs of one budget that are not noted yet."""
    judged_NL = subject.windows()
    allocated: dict[str, int] = {}
    for rung in rungs(subject.healing):
        if budget != subject.whole and rung.step not in DECISIVE:
            continue
        if rung.narrow.heads == "dot" and not _cuts_groups(subject, allocated):
            continue
        if rung.step not in (known := notes.read(budget)):
            asked = _asked(subject, budget, rung, allocated)
            row, report = _measured(subject, asked, judged_NL)
            details = _details(budget, rung, report)
            notes.add({"budget": budget, "step": rung.step, "row": row, "details": details})
            typer.echo(json.dumps({"budget": budget, "step": rung.step, **row}), err=True)
            known = notes.read(budget)
        if rung.step == "+ allocation":
            allocated = _sizes(known[rung.step]["row"])


def _write(subject: Subject, notes: Notes, out: Path) -> None:
    goals: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    details: list[dict[str, Any]] = []
    for budget, floors in subject.floors.items():
        known = notes.read(budget)
        goals.append(_goal(budget, floors, {step: n["row"]["ratio"] for step, n in known.items()}))
        steps = [rung.step for rung in rungs(subject.healing) if rung.step in known]
        rows += [{"budget": budget, "step": step, **known[step]["row"]} for step in steps]
        details += [detail for step in steps for detail in known[step]["details"]]
    save(
        out / f"fidelity-{subject.name}",
        f"Fidelity by step: {subject.name}",
        PROTOCOL.format(
            text=_text(subject.text), judged=_text(subject.judged), healing=subject.healing
        ),
        [*goals, *rows, *details],
        command=f"python -m dotexport.bench fidelity --only {subject.name}",
    )


PROTOCOL = """Calibration: {text}. Quality: {judged}; ratios are perplexity over the dense model's.

The first table holds the best ratio without distillation and the one with it against their goals.
In the second a row adds a step to the rows above it; what stands in brackets is tried there and
left out again. From `+ allocation` on, sizes are those that measured curves choose; before, those
of the rule. The rows `select + refit` to `auto + refit` have the rule's sizes, no healing.
Then the curves of the allocation (each axis cut alone, held-out KL on calibration text), the sizes
that were measured together, and where the loss sits: error of each solve and of each healing as
a share of its target. Seconds are of the whole shrink, allocation included, beside other work.

Distillation: `{healing}`."""


def _cuts_groups(subject: Subject, sizes: dict[str, int]) -> bool:
    _, before = read_model(Checkpoint.open(subject.model).config)
    return sizes["num_key_value_heads"] < before.num_key_value_heads


def _asked(subject: Subject, budget: str, rung: Rung, allocated: dict[str, int]) -> ShrinkOptions:
    """Options of a rung; sizes that were allocated once are not searched again."""
    measured = rung.allocate == "measured"
    sizes = SizeOptions(
        **(allocated if measured and allocated else {"params": budget}), **rung.sizes
    )
    return ShrinkOptions(
        sizes=sizes,
        text=subject.text,
        narrow=rung.narrow,
        allocate=rung.allocate,
        heal=rung.heal,
    )


def _measured(
    subject: Subject, asked: ShrinkOptions, judged_NL: torch.Tensor
) -> tuple[dict[str, Any], dict[str, Any]]:
    with tempfile.TemporaryDirectory() as scratch:
        shrunk = shrink(subject.model, Path(scratch) / "out", asked)
        quality = evaluate(Path(scratch) / "out" / "hf", subject.model, judged_NL)
    after = shrunk.plan.after
    row = {
        "hidden": after.hidden_size,
        "MLP": after.intermediate_size,
        "KV heads": after.num_key_value_heads,
        "layers": after.num_layers,
        "parameters": f"{shrunk.plan.ratio:.3f}x",
        "basis": shrunk.basis["method"],
        "perplexity": quality.perplexity,
        "ratio": quality.ratio,
        "KL": quality.kl,
        "top-1": quality.top1_agreement,
        "held-out KL": shrunk.divergence,
        "seconds": shrunk.seconds,
    }
    return row, shrunk.as_dict()


def _sizes(row: dict[str, Any]) -> dict[str, int]:
    columns = {
        "hidden_size": "hidden",
        "intermediate_size": "MLP",
        "num_key_value_heads": "KV heads",
        "num_hidden_layers": "layers",
    }
    return {axis: row[column] for axis, column in columns.items()}


def _details(budget: str, rung: Rung, report: dict[str, Any]) -> list[dict[str, Any]]:
    if "allocation" in report:
        return list(_curves(budget, report["allocation"]))
    return list(_losses(budget, report)) if rung.step == "+ local healing" else []


def _goal(budget: str, floors: tuple[float, float], found: dict[str, float]) -> dict[str, Any]:
    return {
        "budget": budget,
        "closed form": found["+ allocation"],
        "with local healing": found["+ local healing"],
        "goal": floors[0],
        "distilled": found[DISTILLED],
        "goal distilled": floors[1],
        "dot + refit": found["dot + refit"],
        "select + refit": found["select + refit"],
    }


def _curves(budget: str, allocation: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for curve in allocation["curves"]:
        points = zip(curve["sizes"], curve["held_out_kl"], strict=True)
        yield {
            "budget": budget,
            "axis": curve["axis"],
            "held-out KL by size": ", ".join(f"{size}: {kl:.4f}" for size, kl in points),
        }
    for row in allocation["checked"]:
        yield {"budget": budget, "measured together": "", **row}


def _losses(budget: str, report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for site in report["sites"]:
        layer = "head" if site["layer"] is None else site["layer"]
        before = site.get("analytic_error", site.get("error_before", math.nan))
        after = site.get("error", site.get("error_after", math.nan))
        yield {
            "budget": budget,
            "layer": layer,
            "where": site["site"],
            "error before": before,
            "error after": after,
        }


# Little text ------------------------------------------------------------------------------------


def robustness(out: Path) -> None:
    """The same narrowing from 8, 32, 128 and 512 windows."""
    subject, notes = stories_subject(), Notes(out / ".fidelity-windows.jsonl")
    judged_NL = subject.windows()
    for count in WINDOWS:
        for step, narrow in _repairs():
            if step in notes.read(str(count)):
                continue
            text = replace(subject.text, samples=count)
            sizes = SizeOptions(params=subject.whole)
            asked = ShrinkOptions(sizes=sizes, text=text, narrow=narrow)
            row, _ = _measured(subject, asked, judged_NL)
            notes.add({"budget": str(count), "step": step, "row": row})
            typer.echo(json.dumps({"windows": count, "step": step, **row}), err=True)
    known = {count: notes.read(str(count)) for count in WINDOWS}
    save(
        out / "fidelity-windows",
        "Fidelity by amount of calibration text",
        f"stories260k at {subject.whole}, the rule's sizes; windows of 256 tokens. `plain least "
        "squares` has a ridge of 1e-6 at every solve; `ridge` chooses it on the held-out eighth of "
        "the windows. Quality as in the ladder.",
        [
            {"windows": count, "step": step, **note["row"]}
            for count, steps in known.items()
            for step, note in steps.items()
        ],
        command="python -m dotexport.bench fidelity --only windows",
    )
    notes.file.unlink()


def _repairs() -> Iterator[tuple[str, NarrowOptions]]:
    yield "plain least squares", replace(CLOSED, ridge=1e-6)
    yield "ridge", CLOSED
    yield "ridge, MLP transport", replace(CLOSED, mlp="dot")
    yield "ridge, local healing", replace(CLOSED, local=LocalOptions())


def _text(options: TextOptions) -> str:
    name = options.source if ":" in options.source else Path(options.source).name
    skip = f" after the first {options.skip}" if options.skip else ""
    return f"{options.samples} windows of {options.seqlen} tokens of {name}{skip}"
