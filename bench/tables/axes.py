"""What each axis is worth at one budget: width, depth, vocabulary, and what the allocation makes
of all; beside them two published ways to drop layers."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file

from dotexport.app.shrink_options import ShrinkOptions
from dotexport.app.shrinking import shrink
from dotexport.axes.plan import SizeOptions
from dotexport.bench.measure import bench
from dotexport.bench.tables.fidelity import Notes
from dotexport.bench.tables.last_words import accuracy
from dotexport.bench.tables.layer_rivals import RIVALS, without_layers
from dotexport.bench.tables.result_files import (
    RESULTS,
    Calib,
    Only,
    Other,
    Out,
    Params,
    Test,
    options_but,
    save,
)
from dotexport.bench.workload import Workload
from dotexport.exports.quality import evaluate
from dotexport.exports.target import resolve
from dotexport.exports.two_vocabularies import evaluate_across
from dotexport.healing.distil import heal
from dotexport.healing.heal_options import HealOptions
from dotexport.healing.healing_text import healing_text
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.text_options import TextOptions, parts_of
from dotexport.models.text_windows import spread, token_windows
from dotexport.narrowing.calibration_text import CalibrationText
from dotexport.narrowing.narrow_options import LocalOptions, NarrowOptions
from dotexport.narrowing.sinks import sinks
from dotexport.sizes.budget import plan
from dotexport.vocabulary.vocabulary_options import VocabularyOptions

# Of these a row's first part knows nothing.
LATER = ("healed", "heal_text", "timed")
WIDTH = "hidden_size,intermediate_size,num_key_value_heads"
DEPTH = "num_hidden_layers"
WAYS: dict[str, Mapping[str, Any]] = {
    "width": {"axes": WIDTH},
    "width, class kept": {"axes": WIDTH, "keep_class": True},
    "MLP alone": {"axes": "intermediate_size"},
    "depth alone": {"axes": DEPTH},
    "depth alone, dropped": {"axes": DEPTH, "refit": False},
    "all, by the rule": {"allocate": "rule"},
    "all": {},
    "vocabulary alone": {"vocab": True, "alone": True},
    "MLP and vocabulary": {"axes": "intermediate_size", "vocab": True},
    "all and vocabulary": {"vocab": True},
    **{name: {"rival": name} for name in RIVALS},
}
"""Name -> what differs from the defaults."""

HEALED = """ Healed: the same after {healed} steps of
{batch} windows of forward KL alone{text}, at the default rate, the step with the least held-out
KL."""
BATCH = 4
FEW_TOKENS = 16384
TIMED = """ Prefill
and decode: how many times as fast as the original in {timed}, prompts of {prompt_length} tokens,
{generation_length} generated, {rounds} rounds of fresh processes in turns."""
TIMES = {"prompt_length": 128, "generation_length": 32, "rounds": 4}

Row = Mapping[str, Any]

app = typer.Typer()


@dataclass(frozen=True)
class Judge:
    """What a narrowed model is held against.

    Attributes:
        texts: by the words that a column starts with.
        passages: LAMBADA's, and how many of them; None: not asked.
    """

    model: Path
    texts: Mapping[str, TextOptions]
    passages: tuple[Path, int] | None

    def of(self, narrowed: Path) -> dict[str, float | None]:
        row: dict[str, float | None] = {}
        rows_before, rows_after = (
            Checkpoint.open(folder).config["vocab_size"] for folder in (self.model, narrowed)
        )
        for name, text in self.texts.items():
            if rows_before == rows_after:
                windows_NL = token_windows(self.model, text)
                quality = evaluate(narrowed, self.model, windows_NL)
            else:
                quality = evaluate_across(narrowed, self.model, text)
            row |= {
                f"{name}perplexity": quality.perplexity,
                f"{name}ratio": quality.ratio,
                f"{name}KL": quality.kl,
            }
        if self.passages is not None:
            row["LAMBADA"] = accuracy(narrowed, *self.passages)
        return row


@app.command()
def axes(
    context: typer.Context,
    model: Annotated[Path, typer.Option(help="Folder of the model.")],
    calib: Calib,
    test: Test,
    other: Other,
    second: Annotated[str, typer.Option(help="Half of what is calibrated on: a file.")],
    params: Params = None,
    only: Only = None,
    vocab: Annotated[
        int | None,
        typer.Option(help="Tokens where the vocabulary shrinks; without --vocab-for, 16384."),
    ] = None,
    vocab_for: Annotated[
        str | None,
        typer.Option(help="As shrink --vocab-for; without, tokens are counted in --calib."),
    ] = None,
    samples: int = 48,
    seqlen: int = 512,
    every: Annotated[int | None, typer.Option(help="As shrink --every.")] = None,
    windows: Annotated[int, typer.Option(help="Of each text, at its start.")] = 12,
    length: Annotated[int, typer.Option(help="Tokens of these windows.")] = 1024,
    lambada: Annotated[Path | None, typer.Option(help="LAMBADA's passages, JSON lines.")] = None,
    passages: Annotated[int, typer.Option(help="How many of them.")] = 200,
    passes: Annotated[str, typer.Option(help="As shrink --passes.")] = "auto",
    local: Annotated[bool, typer.Option("--local", help="Heal locally, as shrink does.")] = False,
    models: Annotated[
        Path | None, typer.Option(help="Keeps what was narrowed, and what was healed.")
    ] = None,
    healed: Annotated[int, typer.Option(help="Steps of distillation to judge behind, too.")] = 0,
    heal_text: Annotated[
        str | None, typer.Option(help="As shrink --heal-text; without, that of calibration.")
    ] = None,
    timed: Annotated[str, typer.Option(help="TARGET:PRECISION to time each in, too.")] = "",
    out: Out = RESULTS,
) -> None:
    """Narrow one model to the same parameters by one axis after another."""
    if strange := set(only or ()) - set(WAYS):
        raise typer.BadParameter(f"--only {sorted(strange)[0]} is none of {', '.join(WAYS)}")
    judge = Judge(
        model,
        {
            name: TextOptions(source=text, samples=windows, seqlen=length)
            for name, text in {"": test, "other ": other}.items()
        },
        (lambada, passages) if lambada else None,
    )
    asked = ShrinkOptions(
        text=TextOptions(source=calib, samples=samples, seqlen=seqlen, every=every),
        other=second,
        narrow=NarrowOptions(local=LocalOptions() if local else None, passes=passes),
        vocabulary=VocabularyOptions(
            vocab=FEW_TOKENS if vocab is None and vocab_for is None else vocab, vocab_for=vocab_for
        ),
    )
    later: dict[str, Callable[[Path], Row]] = {}
    if healed:
        later[f"healed {healed}, {heal_text}"] = partial(_healed, judge, asked, heal_text, healed)
    if timed:
        later[f"timed {timed}"] = partial(_timed, model, timed)
    notes = Notes(out / ".axes.jsonl", options_but(context, "params", "only", "models", *LATER))
    rows = [{"budget": "1x", "way": "the original", **_original(notes, judge)}]
    with tempfile.TemporaryDirectory() as scratch:
        for budget in params or ["0.79x"]:
            for way in only or WAYS:
                kept = (models or Path(scratch)) / f"{budget} {way}"
                narrow = partial(_measured, judge, asked, budget, WAYS[way], kept)
                row = dict(notes.row(budget, way, narrow))
                for word, measure in later.items():
                    if not kept.is_dir():
                        narrow()
                    row |= notes.row(budget, f"{way}, {word}", partial(measure, kept))
                rows.append({"budget": budget, "way": way, **row})
    protocol = PROTOCOL.format(
        model=model.name,
        samples=samples,
        seqlen=seqlen,
        every=f" (one in {every} of the first)" if every else "",
        windows=windows,
        length=length,
        healing="local healing" if local else "closed form alone, no healing",
        passes=passes,
        passages=f"; LAMBADA on its first {passages} passages" if lambada else "",
        later=_later_in_words(healed, heal_text, timed),
    )
    columns = dict.fromkeys(column for row in rows for column in row)
    rows = [{column: row.get(column, "") for column in columns} for row in rows]
    save(out / "axes", "What each axis is worth", protocol, rows)
    notes.file.unlink()


PROTOCOL = """{model}, calibrated on {samples} windows of {seqlen} tokens{every}, half of them
the second text, which the original sampled; {healing}; passes {passes}. Perplexity, its ratio to
the original's and KL divergence from the original (nats per token) on the first {windows} windows
of {length} tokens of two texts: of the calibration's domain, and of another one{passages}. Where
tokens left, perplexity is per token of the original, over all of the text. Seconds are of the whole
shrink, the choice of layers and of sizes included. ShortGPT and ReplaceMe drop as many layers as
depth alone, and see the same text.{later}"""


def _fitted_text(model: Path, asked: ShrinkOptions) -> CalibrationText:
    """The windows that all are calibrated on: of the text, and as many of the second one, with the
    tokens that `shrink` sows in them."""
    first = replace(asked.text, samples=asked.text.samples // 2)
    second = replace(first, source=asked.other, every=None)
    one_NL, other_NL = (
        token_windows(model, spread(model, kind, kind.samples)) for kind in (first, second)
    )
    text = CalibrationText(one_NL, other_NL)
    return text.sown(sinks(Checkpoint.open(model), text.windows_NL), asked.narrow.seed)


def _later_in_words(healed: int, heal_text: str | None, timed: str) -> str:
    words = ""
    if healed:
        text = f" on {_names(heal_text)}" if heal_text else ""
        words += HEALED.format(healed=healed, batch=BATCH, text=text)
    if timed:
        words += TIMED.format(timed=timed, **TIMES)
    return words


def _names(text: str) -> str:
    """The files of a mix, by the windows that each gives."""
    named = [f"{part.weight:g} of {Path(part.source).name}" for part in parts_of(text)]
    return " to ".join(named)


def _original(notes: Notes, judge: Judge) -> Row:
    def itself() -> Row:
        same = {"sizes": "", "class": "", "parameters": "1x"}
        return same | judge.of(judge.model) | {"seconds": ""}

    found: Row = notes.row("1x", "the original", itself)
    return found


def _options(asked: ShrinkOptions, budget: str, way: Mapping[str, Any]) -> ShrinkOptions:
    sizes = {key: value for key, value in way.items() if key in ("axes", "keep_class")}
    return replace(
        asked,
        sizes=SizeOptions() if way.get("alone") else SizeOptions(params=budget, **sizes),
        vocabulary=asked.vocabulary if way.get("vocab") else VocabularyOptions(),
        narrow=replace(asked.narrow, refit=way.get("refit", True)),
        allocate=way.get("allocate", "measured"),
    )


def _measured(
    judge: Judge, asked: ShrinkOptions, budget: str, way: Mapping[str, Any], kept: Path
) -> Row:
    """Narrow, and judge; the model goes to `kept`."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "out"
        if "rival" in way:
            row, narrowed = _rival(judge.model, asked, budget, way["rival"], folder), folder
        else:
            shrunk = shrink(judge.model, folder, _options(asked, budget, way))
            narrowed = folder / "hf"
            row = {
                "sizes": shrunk.plan.in_words(),
                "class": shrunk.plan.architectures[1].removesuffix("ForCausalLM"),
                "parameters": f"{shrunk.plan.ratio:.3f}x",
                "seconds": shrunk.seconds,
            }
        seconds = row.pop("seconds")
        shutil.copytree(narrowed, kept, dirs_exist_ok=True)
        if (reports := folder / "reports").is_dir():  # why these sizes, and what each layer cost
            shutil.copytree(reports, kept / "reports", dirs_exist_ok=True)
    return row | judge.of(kept) | {"seconds": seconds}


def _healed(
    judge: Judge, asked: ShrinkOptions, heal_text: str | None, steps: int, narrowed: Path
) -> Row:
    """Behind a short distillation, predictions alone: the same for all. Steps are chosen on the
    windows that were held out of the closed form as well."""
    student, source = Checkpoint.open(narrowed), Checkpoint.open(judge.model)
    if student.config["vocab_size"] != source.config["vocab_size"]:
        return {}
    options = HealOptions(steps=steps, batch=BATCH, text=heal_text, hidden_weight=0.0, every=steps)
    split = healing_text(_fitted_text(judge.model, asked), judge.model, asked.text, options)
    device = torch.device("cpu")
    started = time.perf_counter()
    found = heal(student, source, torch.eye(1), split, options, device=device)
    seconds = time.perf_counter() - started
    folder = narrowed.with_name(f"{narrowed.name}, healed {steps}")
    others = shutil.ignore_patterns("*.safetensors*")
    shutil.copytree(narrowed, folder, ignore=others, dirs_exist_ok=True)
    save_file(found.tensors, folder / "model.safetensors", {"format": "pt"})
    row = judge.of(folder)
    words = {f"{name}, healed": row[name] for name in row if not name.endswith("ratio")}
    return words | {"healing seconds": seconds}


def _timed(original: Path, spec: str, narrowed: Path) -> Row:
    """How much faster than the original, taking turns with it."""
    target, precision = resolve(spec)
    found = bench(
        narrowed,
        original,
        target.name,
        precision=precision,
        workload=Workload(**TIMES),
        roofline=False,
    ).comparisons
    return {"prefill": 1 / found["ttft"].ratio, "decode": 1 / found["tpot"].ratio}


def _rival(
    model: Path, asked: ShrinkOptions, budget: str, name: str, folder: Path
) -> dict[str, Any]:
    decided = plan(Checkpoint.open(model).config, SizeOptions(params=budget, axes=DEPTH))
    count = decided.before.num_layers - decided.after.num_layers
    started = time.perf_counter()
    kinds = _fitted_text(model, asked).kinds
    turns = [window_L for both in zip(*kinds, strict=False) for window_L in both]
    words = without_layers(name, model, folder, count, torch.stack(turns))
    return {
        "sizes": words,
        "class": decided.architectures[0].removesuffix("ForCausalLM"),
        "parameters": f"{decided.ratio:.3f}x",
        "seconds": time.perf_counter() - started,
    }


if __name__ == "__main__":
    app()
