"""What narrowing costs a classifier and a reader that are trained on the spot from a text encoder:
the figures of GLUE and SQuAD without a hub."""

from __future__ import annotations

import json
import random
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer

from dotexport.app.progress import progress
from dotexport.encoders.encoder_folder import open_encoder
from dotexport.encoders.encoder_options import SentenceOptions
from dotexport.encoders.encoder_quality import evaluate
from dotexport.encoders.encoder_shrinking import shrink
from dotexport.encoders.sentences import context_of
from dotexport.errors import SizeError
from dotexport.models.documents import documents
from dotexport.models.quiet import quiet
from dotexport.storage.files import write_text

from .encoder_ways import WAYS, Subject, in_words
from .fidelity import Notes
from .result_files import RESULTS, Only, Out, Params, options_but, save

RATE, BATCH, SEQLEN = 1e-4, 32, 128
NEUTRAL = 0.5
"""Reviews rated between minus and plus this are neither bad nor good."""
BLANKED = 0.2
"""Share of a question's other words that are left out, so that it is not its sentence once more."""
WORDS = 50
"""Of a paragraph that is asked about, with the sentence in which it reaches them."""
ANSWER = re.compile(r"(?<= )([A-Z]\w+(?: [A-Z]\w+)*|\d[\d,.]*\d|\d)(?=[ .!?])")
"""A name or a number."""

Row = dict[str, Any]
Steps = Callable[[int, int], None]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def heads(
    context: typer.Context,
    model: Annotated[Path, typer.Option(help="Folder of the encoder, a BERT.")],
    reviews: Annotated[
        Path, typer.Option(help="Lines of a number, a mean rating and a review, between tabs.")
    ],
    text: Annotated[str, typer.Option(help="Running text that questions are made of.")],
    params: Params = None,
    only: Only = None,
    questions: Annotated[int, typer.Option(help="Questions to train on.")] = 4000,
    held: Annotated[int, typer.Option(help="Rows of each that judge.")] = 1000,
    epochs: Annotated[int, typer.Option(help="Of training.")] = 3,
    samples: Annotated[int, typer.Option(help="Rows that calibrate.")] = 1024,
    heal: Annotated[int, typer.Option(help="Steps of distillation, where it is.")] = 400,
    out: Out = RESULTS,
) -> None:
    """Train a head on reviews and one on questions, narrow both, and ask them held-out rows."""
    if strange := set(only or ()) - set(WAYS):
        raise typer.BadParameter(f"--only {sorted(strange)[0]} is none of {', '.join(WAYS)}")
    tasks = {
        "reviews": (list(_reviews(reviews)), transformers.BertForSequenceClassification),
        "questions": (
            list(islice(_questions(text), questions + held)),
            transformers.BertForQuestionAnswering,
        ),
    }
    notes = Notes(out / ".heads.jsonl", options_but(context, "params", "only"))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch, progress() as report:
        for task, (said, kind) in tasks.items():
            random.Random(0).shuffle(said)
            folder = Path(scratch) / task
            files = _Files(folder, said[held:], said[:held])
            trained = folder / "model"
            _train(
                model, trained, kind, said[held:], epochs, partial(report, f"training on {task}")
            )
            asked = SentenceOptions(source=str(files.fit), samples=samples, seqlen=SEQLEN)
            subject = Subject(open_encoder(trained), asked, str(files.words), heal)
            for budget in params or ["0.7x"]:
                for way in only or ("MLP, select", "MLP and layers", "all", "all, distilled"):
                    measure = partial(_measured, subject, trained, files, budget, WAYS[way])
                    made = notes.row(budget, f"{task}, {way}", measure)
                    rows.append({"task": task, "budget": budget, "way": way, **made})
    protocol = PROTOCOL.format(
        model=model.name,
        rows=" and ".join(f"{len(said) - held:,} {task}" for task, (said, _) in tasks.items()),
        epochs=epochs,
        samples=samples,
        heal=heal,
        held=held,
    )
    save(out / "heads", "What narrowing costs a classifier and a reader", protocol, rows)
    notes.file.unlink()


PROTOCOL = """{model} with a head, trained for {epochs} epochs on {rows}, then narrowed on {samples}
of the rows it was trained on, and asked {held} that it never saw. Reviews are snippets of film
reviews, bad or good by their mean rating, those in between left out. Questions are made of running
text: one sentence of a paragraph with a number or a name replaced by `what` and a fifth of its
other words left out; the answer stands in the paragraph. `before` is the head that was narrowed.
`MLP, select` is the baseline: the largest neurons, nothing repaired; of `all`, half of the
parameters that leave are those of tokens, counted in the rows; distilled is behind {heal} steps."""


@dataclass(frozen=True)
class _Files:
    """Rows to fit on and rows that judge, as files; and the words of the former."""

    folder: Path
    train: list[Row]
    test: list[Row]

    def __post_init__(self) -> None:
        for file, rows in ((self.fit, self.train), (self.judge, self.test)):
            write_text(file, "".join(f"{json.dumps(row)}\n" for row in rows))
        said = (str(row.get(name, "")) for row in self.train for name in ("text", "context"))
        write_text(self.words, "\n".join(said))

    @property
    def fit(self) -> Path:
        return self.folder / "train.jsonl"

    @property
    def judge(self) -> Path:
        return self.folder / "test.jsonl"

    @property
    def words(self) -> Path:
        return self.folder / "words.txt"


def _reviews(file: Path) -> Iterator[Row]:
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            _, rated, text = line.split("\t", 2)
            rating = float(rated)
        except ValueError as error:
            raise typer.BadParameter(
                f"line {number} of {file} is not a number, a mean rating and a review between tabs"
            ) from error
        if abs(rating) > NEUTRAL:
            yield {"text": text, "label": int(rating > 0)}


def _questions(source: str) -> Iterator[Row]:
    """One of each part of a paragraph: SQuAD's kind of rows without SQuAD."""
    dice = random.Random(0)
    for document in documents(source):
        for line in document.splitlines():
            part = ""
            for sentence in re.findall(r"[^.!?]+[.!?]", line):
                part += sentence
                if len(part.split()) >= WORDS:
                    if row := _cloze(part, dice):
                        yield row
                    part = ""


def _cloze(paragraph: str, dice: random.Random) -> Row | None:
    found = []
    for sentence in re.finditer(r"[^.!?]+[.!?]", paragraph):
        start = sentence.start() + 1  # a capital that starts a sentence names nobody
        said = paragraph[start : sentence.end()]
        found += [(said, start, *answer.span()) for answer in ANSWER.finditer(said)]
    if not found:
        return None
    said, start, first, last = dice.choice(found)
    left, right = (
        [word for word in side.split() if dice.random() > BLANKED]
        for side in (said[:first], said[last:])
    )
    return {
        "question": " ".join([*left, "what", *right]),
        "context": paragraph,
        "answers": {"text": [said[first:last]], "answer_start": [start + first]},
    }


def _train(model: Path, out: Path, kind: Any, rows: list[Row], epochs: int, report: Steps) -> None:
    """A head and all below it, with AdamW at a rate that falls to nothing."""
    original = open_encoder(model)
    torch.manual_seed(0)
    with quiet():
        network = kind.from_pretrained(original.home)
    tokenizer = transformers.AutoTokenizer.from_pretrained(original.home)
    most = min(SEQLEN, context_of(original))
    steps = max(1, epochs * len(rows) // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    dice = random.Random(0)
    network.train()
    for step in range(steps):
        report(step, steps)
        loss = network(**_asked(tokenizer, dice.sample(rows, min(BATCH, len(rows))), most)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    report(steps, steps)
    network.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)


def _asked(tokenizer: Any, rows: list[Row], most: int) -> dict[str, Any]:
    """What a model is trained on: tokens and what is right of them."""
    names = ("question", "context") if "question" in rows[0] else ("text",)
    texts = [[row[name] for row in rows] for name in names]
    read = tokenizer(
        *texts, padding=True, truncation=True, max_length=most, return_tensors="pt",
        return_offsets_mapping=True,
    )  # fmt: skip
    offsets = read.pop("offset_mapping").tolist()
    if names == ("text",):
        return {**read, "labels": torch.tensor([row["label"] for row in rows])}
    starts, ends = [], []
    for number, row in enumerate(rows):
        [first], [answer] = row["answers"]["answer_start"], row["answers"]["text"]
        inside = [
            place
            for place, part in enumerate(read.sequence_ids(number))
            if part == 1
            and offsets[number][place][0] < first + len(answer)
            and offsets[number][place][1] > first
        ]
        starts.append(inside[0] if inside else 0)
        ends.append(inside[-1] if inside else 0)
    return {**read, "start_positions": torch.tensor(starts), "end_positions": torch.tensor(ends)}


def _measured(
    subject: Subject, trained: Path, files: _Files, budget: str, way: Mapping[str, Any]
) -> Row:
    """Narrow, and ask; why not, where this way cannot meet the budget."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        try:
            shrunk = shrink(trained, out, subject.options(budget, way))
        except SizeError as error:
            return {"sizes": str(error).partition(";")[0]}
        judges = replace(subject.text, source=str(files.judge), samples=512)
        found = evaluate(out, trained, judges, labelled=files.judge)
    whole, narrow = shrunk.sizes["parameters"]
    row: Row = {"sizes": in_words(shrunk.sizes), "parameters": f"{narrow / whole:.3f}x"}
    for name, after in found["labelled"]["narrowed"].items():
        row |= {f"{name}, before": found["labelled"]["original"][name], name: after}
    return row | {"agreement": found["agreement"], "seconds": round(shrunk.seconds, 1)}
