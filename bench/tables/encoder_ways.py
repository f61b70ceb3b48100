"""What each way is worth to a text encoder at one size: fewer tokens, neurons or layers, a narrower
stream, what the budget makes of all, and what distillation adds."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from dotexport.encoders.encoder_folder import Encoder, open_encoder
from dotexport.encoders.encoder_options import AXES, SentenceOptions, ShrinkOptions
from dotexport.encoders.encoder_quality import evaluate
from dotexport.encoders.encoder_shrinking import shrink
from dotexport.encoders.encoder_sizes import (
    before_of,
    candidates,
    num_parameters,
    parameters_of,
)
from dotexport.encoders.encoder_stream import why_it_stays
from dotexport.errors import SizeError
from dotexport.sizes.budget import parse_budget
from dotexport.vocabulary.vocabulary_options import MULTIPLE, VocabularyOptions

from .fidelity import Notes
from .result_files import RESULTS, Calib, Only, Other, Out, Params, Test, options_but, save

WAYS: dict[str, Mapping[str, Any]] = {
    "tokens": {"tokens": 1.0},
    "MLP, select": {"alone": "width", "method": "select"},
    "MLP, obs": {"alone": "width", "method": "obs"},
    "MLP": {"alone": "width"},
    "layers": {"alone": "depth"},
    "stream": {"alone": "hidden"},
    "MLP and layers": {},
    "MLP, layers and stream": {"axes": AXES},
    "all but the stream": {"tokens": 0.5},
    "all": {"tokens": 0.5, "axes": AXES},
    "all, distilled": {"tokens": 0.5, "axes": AXES, "heal": True},
}
"""Name -> what differs: `tokens` is their share of what leaves, `alone` the one size that does,
`axes` the sizes that the budget may change where it may not change all by itself."""

Row = dict[str, Any]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def encoders(
    context: typer.Context,
    model: Annotated[Path, typer.Option(help="Folder of the encoder.")],
    calib: Calib,
    test: Test,
    other: Other,
    params: Params = None,
    only: Only = None,
    count: Annotated[str, typer.Option(help="Text that tokens are counted in: as --calib.")] = "",
    samples: Annotated[int, typer.Option(help="Sentences of calibration.")] = 1024,
    judged: Annotated[int, typer.Option(help="Sentences of each text that judge.")] = 512,
    heal: Annotated[int, typer.Option(help="Steps of distillation, where it is.")] = 200,
    out: Out = RESULTS,
) -> None:
    """Narrow one text encoder to the same parameters in one way after another."""
    if strange := set(only or ()) - set(WAYS):
        raise typer.BadParameter(f"--only {sorted(strange)[0]} is none of {', '.join(WAYS)}")
    text = SentenceOptions(source=calib, samples=samples)
    judges = {
        words: replace(text, source=source, samples=judged)
        for words, source in {"": test, "other ": other}.items()
    }
    subject = Subject(open_encoder(model), text, count or calib, heal)
    notes = Notes(out / ".encoders.jsonl", options_but(context, "params", "only"))
    rows = []
    for budget in params or ["0.8x"]:
        for way in only or WAYS:
            measure = partial(_measured, subject, model, judges, budget, WAYS[way])
            rows.append({"budget": budget, "way": way, **notes.row(budget, way, measure)})
    protocol = PROTOCOL.format(
        model=model.name,
        parameters=parameters_of(subject.encoder),
        tokens=subject.encoder.num_tokens,
        **vars(before_of(subject.encoder)),
        samples=samples,
        judged=judged,
        heal=heal,
    )
    save(out / "encoders", "What each way is worth to a text encoder", protocol, rows)
    notes.file.unlink()


PROTOCOL = """{model} ({parameters:,} parameters, {tokens:,} tokens, {width:,} neurons, {depth}
layers, a stream of {hidden}), calibrated on {samples} sentences; embeddings beside the original's
on {judged} sentences of two texts, of the calibration's domain and of another one: mean cosine, and
recall@10 of the original's nearest sentences. `MLP, select` is the baseline: the largest neurons,
nothing repaired; `obs` merges none. Of `all`, half of the parameters that leave are those of
tokens; distilled is behind {heal} steps. A way that cannot meet a budget says why. Seconds are of
the whole shrink."""


@dataclass(frozen=True)
class Subject:
    """The original, and how it is narrowed.

    Attributes:
        counted: text that tokens are counted in.
        heal: steps of distillation.
    """

    encoder: Encoder
    text: SentenceOptions
    counted: str
    heal: int

    def options(self, budget: str, way: Mapping[str, Any]) -> ShrinkOptions:
        """What is asked of shrink.

        Raises:
            SizeError: this way alone does not meet the budget.
        """
        share, axes = way.get("tokens", 0.0), way.get("axes", ())
        if why := why_it_stays(self.encoder):
            axes = axes[1:]
            if way.get("alone") == "hidden":
                raise SizeError(f"it stays: {why}")
        asked = ShrinkOptions(
            text=self.text,
            params=budget,
            method=way.get("method", "dot"),
            heal=self.heal if way.get("heal") else 0,
            vocabulary=self._vocabulary(budget, share),
            axes=",".join(axes) or None,
        )
        if word := way.get("alone"):
            alone: Row = {word: self._alone(asked, word)}
            return replace(asked, params=None, **alone)
        return replace(asked, params=None) if share == 1 else asked

    def _vocabulary(self, budget: str, share: float) -> VocabularyOptions:
        """As many tokens as leave this share of what leaves to the rest."""
        if not share:
            return VocabularyOptions()
        rows, model = self.encoder.num_tokens, self.encoder.model
        total = num_parameters(model)
        per_row = sum(p.numel() // rows for p in model.parameters() if len(p) == rows)
        leave = share * (total - parse_budget(budget, total)) / per_row
        stay = int(rows - leave) // MULTIPLE * MULTIPLE
        if stay < MULTIPLE:
            raise SizeError(f"{leave:,.0f} tokens cannot leave of {rows:,}")
        return VocabularyOptions(vocab=stay, vocab_for=self.counted)

    def _alone(self, asked: ShrinkOptions, word: str) -> int:
        axis = AXES[("hidden", "width", "depth").index(word)]
        total = parameters_of(self.encoder)
        found = candidates(self.encoder, replace(asked, axes=axis), total=total)
        size: int = getattr(found[0], word)
        return size


def _measured(
    subject: Subject,
    model: Path,
    judges: Mapping[str, SentenceOptions],
    budget: str,
    way: Mapping[str, Any],
) -> Row:
    """Narrow, and judge; every row has the same columns."""
    figures = [f"{text}{figure}" for text in judges for figure in ("cosine", "recall@10")]
    row: Row = dict.fromkeys(["sizes", "parameters", *figures, "seconds"], "")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        try:
            shrunk = shrink(model, out, subject.options(budget, way))
        except SizeError as error:
            return row | {"sizes": str(error).partition(";")[0]}
        (whole, narrow) = shrunk.sizes["parameters"]
        row |= {"sizes": in_words(shrunk.sizes), "parameters": f"{narrow / whole:.3f}x"}
        for text, options in judges.items():
            quality = evaluate(out, model, options)
            row |= {
                f"{text}cosine": quality["cosine"],
                f"{text}recall@10": quality["recall_at_10"],
            }
    return row | {"seconds": round(shrunk.seconds, 1)}


def in_words(sizes: Mapping[str, list[int]]) -> str:
    cut = {word: after for word, (before, after) in sizes.items() if after != before}
    return ", ".join(f"{word} {cut[word]:,}" for word in cut if not word.startswith("parameters"))
