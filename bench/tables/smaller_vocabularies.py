"""The table of docs/results/vocabulary.md: fewer tokens, and nothing else changed.

    python -m dotexport.bench vocabulary --model FOLDER

DOTEXPORT_ASSETS names the folder of wikitext2, tinystories and tasks.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from dotexport.app.shrink_options import ShrinkOptions
from dotexport.app.shrink_record import Shrunk
from dotexport.app.shrinking import shrink
from dotexport.exports.two_vocabularies import evaluate_across
from dotexport.models.documents import DOCUMENT_END, documents
from dotexport.models.text_options import TextOptions
from dotexport.vocabulary.proving import prove
from dotexport.vocabulary.segmenting import Reading
from dotexport.vocabulary.vocabulary_options import VocabularyOptions

from .result_files import RESULTS, Out, Table, save

# Which text counts, and how many tokens stay; None: all that occur.
CUTS = (
    *(("valid", 16384), ("valid", 32768)),
    *(("English", 16384), ("English", 24576), ("English", 32768), ("English", None)),
)

WHY = ("always", "used", "expected", "ancestors", "filled")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[Path, typer.Option(help="Folder of the original.")],
    out: Out = RESULTS,
    samples: Annotated[int, typer.Option(help="Windows that perplexity is taken on.")] = 12,
    seqlen: Annotated[int, typer.Option(help="Tokens of the original in each.")] = 1024,
    name: Annotated[str, typer.Option(help="What the table calls it.")] = "SmolLM2-135M-Instruct",
) -> None:
    """Parameters, fertility and perplexity of a model with fewer tokens."""
    if "DOTEXPORT_ASSETS" not in os.environ:
        raise SystemExit("set DOTEXPORT_ASSETS to the folder of wikitext2, tinystories and tasks")
    assets = Path(os.environ["DOTEXPORT_ASSETS"]).resolve()
    rows: Table = []
    with tempfile.TemporaryDirectory() as scratch:
        texts = {"valid": assets / "wikitext2/valid.txt", "English": Path(scratch) / "english.txt"}
        texts["English"].write_text(DOCUMENT_END.join(_english(assets)))
        judged = TextOptions(
            source=str(assets / "wikitext2/test.raw.txt"), samples=samples, seqlen=seqlen
        )
        held = {
            "wikitext2 test": judged.source,
            "tinystories": assets / "tinystories/train-2MiB.txt",
        }
        parts: list[Table] = [[], [], []]
        for number, (counting, wanted) in enumerate(CUTS):
            made = Path(scratch) / str(number)
            options = VocabularyOptions(vocab=wanted, vocab_for=str(texts[counting]))
            shrunk = shrink(model, made, _alone(options, judged))
            cut = {"counted in": counting, "asked": wanted or "all that occur"}
            parts[0].append(cut | _sizes(shrunk))
            for text, source in held.items():
                parts[1].append(cut | {"text": text} | _read(model, made / "hf", shrunk, source))
            parts[2].append(cut | _judged(model, made / "hf", judged))
            typer.echo(json.dumps([part[-1] for part in parts]), err=True)
        rows = [row for part in parts for row in part]
        counted = {text: file.stat().st_size / 1e6 for text, file in texts.items()}
    save(
        out / "vocabulary",
        "Fewer tokens",
        PROTOCOL.format(name=name, samples=samples, seqlen=seqlen, **counted),
        rows,
        command="python -m dotexport.bench vocabulary --model FOLDER "
        f"--samples {samples} --seqlen {seqlen} --name {name}",
    )


PROTOCOL = """{name} in float32, `shrink --vocab N --vocab-for TEXT`; every weight
that stays is the original's. `valid`: wikitext2/valid.txt ({valid:.1f} MB, word level). `English`:
that and the contexts and questions of LAMBADA, PIQA, ARC-easy and COPA ({English:.1f} MB). Neither
holds what is judged. `ancestors`: share of the tokens that stay only because others are merged
from them; `expected`: share of what the original expects in that text that stays. `seconds` are of
the whole shrink: tokens counted, weights written and the tokenizer held against the original's,
beside other work.

Then tokens per byte of held-out texts (the first MiB), and the share of the original's tokens that
are the same ones under new ids. Then the first {samples} windows of {seqlen} tokens of
wikitext2/test.raw.txt: perplexity per token of the original, both models on the same text; KL over
the tokens that stayed, where both have read the same; and how much probability the original gives
to these tokens."""


def _english(assets: Path) -> Iterator[str]:
    """Documents: a text of an encyclopedia, and what tasks ask."""
    yield from documents(str(assets / "wikitext2/valid.txt"))
    for file in sorted((assets / "tasks").glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            yield row.get("context") or row.get("query") or row.get("premise", "")


def _alone(options: VocabularyOptions, text: TextOptions) -> ShrinkOptions:
    return ShrinkOptions(vocabulary=options, text=text)


def _sizes(shrunk: Shrunk) -> dict[str, Any]:
    assert shrunk.vocabulary is not None
    before, after = shrunk.plan.parameters_before, shrunk.plan.parameters_after
    return {
        "rows": shrunk.vocabulary["rows"][1],
        **{why: shrunk.vocabulary["kept"].get(why, 0) for why in WHY},
        "ancestors, %": 100 * shrunk.vocabulary["ancestors"],
        "expected, %": 100 * expected if (expected := shrunk.vocabulary["expected"]) else "",
        "parameters, M": f"{before / 1e6:.1f} -> {after / 1e6:.1f}",
        "over": f"{shrunk.plan.ratio:.3f}x",
        "seconds": shrunk.seconds,
    }


def _read(model: Path, made: Path, shrunk: Shrunk, source: object) -> dict[str, Any]:
    kept = json.loads((shrunk.out / "reports/vocabulary.json").read_text())["original_ids"]
    proof = prove(Reading.of(model), Reading.of(made), kept, documents(str(source)))
    before, after = proof.tokens_per_byte
    return {
        "tokens/byte": before,
        "after": after,
        "over": f"{after / before:.3f}x",
        "the same, %": 100 * proof.mapped / proof.tokens,
    }


def _judged(model: Path, made: Path, text: TextOptions) -> dict[str, Any]:
    quality = evaluate_across(made, model, text)
    assert quality.across is not None
    bits = quality.across["bits_per_byte"]
    return {
        "original": quality.baseline_perplexity,
        "perplexity": quality.perplexity,
        "ratio": f"{quality.ratio:.3f}x",
        "bits/byte": f"{bits[0]:.4f} -> {bits[1]:.4f}",
        "KL": quality.kl,
        "top-1": quality.top1_agreement,
        "probability, %": 100 * quality.across["mass_of_shared"],
    }
