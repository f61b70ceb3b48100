"""The frontier verb for text encoders: an original and what was narrowed from it, in every
precision of one target, at equal bytes.

Each artifact is exported, held against torch, and asked for the embeddings of sentences, or for
what its head answers. Figures are stored artifact by artifact, so that a run that was stopped goes
on; times are taken in rounds in which all artifacts have their turn, the order another each time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dotexport.app.turn_options import RoundOptions
from dotexport.encoders.encoder_exporting import write_artifact
from dotexport.encoders.encoder_folder import Encoder, describe_source, open_encoder
from dotexport.encoders.encoder_options import SentenceOptions
from dotexport.encoders.encoder_quality import compare, said_by
from dotexport.encoders.encoder_sizes import parameters_of
from dotexport.encoders.sentences import read_sentences
from dotexport.errors import DotexportError, UsageError
from dotexport.exports.encoder_target import EncoderTarget, resolve_encoder
from dotexport.storage import manifest
from dotexport.storage.files import write_json
from dotexport.storage.output import folder_bytes, new_folder
from dotexport.storage.reading import read_json

from .encoder import check_length, full_rows
from .frontier import ARTIFACTS, POINTS, digest, home_of_figures, names_of
from .frontier_points import ORIGINAL, SCHEMA, EncoderPoint, Frontier, OnAnswers, OnSentences
from .turns import WARMUPS, Progress, order_of, torch_threads


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """What was timed: full rows of this many tokens in batches of this size."""

    batch: int
    seqlen: int
    threads: int
    rounds: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Made:
    name: str
    encoder: Encoder
    precision: str
    folder: Path

    @property
    def home(self) -> Path:
        """Where its config.json lies."""
        return self.folder / self.encoder.home.relative_to(self.encoder.root)


def frontier_encoder(
    original: Path,
    narrowed: Sequence[Path],
    specs: Sequence[str],
    texts: Sequence[SentenceOptions],
    *,
    rounds: RoundOptions | None = None,
    out: Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Frontier[EncoderPoint]:
    """Measure every model in every precision.

    Args:
        narrowed: outputs of dotexport, or folders of the original's class.
        specs: NAME for all precisions of one target, or NAME:PRECISION for some of it.
        texts: one or two; the first is what is drawn.
        rounds: None: nothing is timed.
        out: keeps artifacts and figures, and is gone on from; None: nothing is kept.

    Raises:
        UsageError, CheckpointError, CalibrationError, RuntimeMissingError, ParityError.
    """
    target, precisions = _asked(specs)
    models = dict(zip(names_of(narrowed), map(open_encoder, [original, *narrowed]), strict=True))
    whole = models[ORIGINAL]
    for name, encoder in models.items():
        manifest.require_unchanged(encoder.root)
        if type(encoder.model) is not type(whole.model):
            raise UsageError(
                f"{name} is a {type(encoder.model).__name__} and the original a "
                f"{type(whole.model).__name__}; give outputs of this original"
            )
        if rounds is not None:
            check_length(encoder, texts[0].seqlen)
    with home_of_figures(out) as home:
        made = _exported(models, target, precisions, home, progress)
        points = _judged(made, target, whole, texts, home, progress)
        timed = None
        if rounds is not None:
            timed = Rounds(
                batch=texts[0].batch,
                seqlen=texts[0].seqlen,
                threads=rounds.threads,
                rounds=rounds.rounds,
                seconds=rounds.seconds,
            )
            points = _timed(made, points, target, timed, progress)
    notes = []
    if len(texts) < 2:
        notes.append(
            "one text alone: narrowing costs more on text unlike that of calibration; give a "
            "second kind of text with --other"
        )
    return Frontier(
        target=target.name, points=tuple(points), skipped=(), notes=tuple(notes), workload=timed
    )


def _asked(specs: Sequence[str]) -> tuple[EncoderTarget, list[str]]:
    """One target, and the precisions of it."""
    found = [resolve_encoder(spec) for spec in specs]
    if len({target.name for target, _ in found}) != 1:
        raise UsageError(
            "expected one target with some of its precisions, such as --target onnx:int8 --target "
            f"onnx:fp16, or --target onnx for all; not {', '.join(specs) or 'none'}"
        )
    pairs = zip(specs, found, strict=True)
    named = [precision for spec, (_, precision) in pairs if ":" in spec]
    target = found[0][0]
    return target, list(dict.fromkeys(named)) or list(target.encoder_precisions)


def _exported(
    models: Mapping[str, Encoder],
    target: EncoderTarget,
    precisions: Sequence[str],
    home: Path,
    progress: Progress,
) -> list[_Made]:
    made = []
    asked = [(name, precision) for name in models for precision in precisions]
    for number, (name, precision) in enumerate(asked):
        label = f"{name}-{target.name}-{precision}"
        progress(f"exporting: {label}", number, len(asked))
        encoder = models[name]
        key = digest([SCHEMA, describe_source(encoder)["sha256"], target.name, precision])
        folder = home / ARTIFACTS / f"{label}-{key}"
        if not folder.is_dir():
            with new_folder(folder) as partial:
                write_artifact(target, encoder, partial, label, precision)
        made.append(_Made(name, encoder, precision, folder))
    return made


def _judged(
    made: Sequence[_Made],
    target: EncoderTarget,
    original: Encoder,
    texts: Sequence[SentenceOptions],
    home: Path,
    progress: Progress,
) -> list[EncoderPoint]:
    points = []
    read = [[asdict(text), digest(read_sentences(text))] for text in texts]
    source = describe_source(original)["sha256"]
    for number, one in enumerate(made):
        label = f"{one.name} in {one.precision}"
        progress(f"embedding: {label}", number, len(made))
        key = digest([one.folder.name, source, read])
        store = home / POINTS / f"{one.name}-{target.name}-{one.precision}-{key}.json"
        if not store.is_file():
            said = said_by(one.encoder, target, one.home)
            found = [compare(one.encoder, original, said, text) for text in texts]
            write_json(store, {"texts": found})
        points.append(
            EncoderPoint(
                model=one.name,
                precision=one.precision,
                num_bytes=folder_bytes(one.folder),
                num_parameters=parameters_of(one.encoder),
                texts=_stored(store),
            )
        )
    return points


def _stored(file: Path) -> tuple[OnSentences | OnAnswers, ...]:
    said = read_json(file, advice="remove it, and it is measured again")
    try:
        return tuple(map(_on_text, said["texts"]))
    except (KeyError, TypeError) as error:
        raise DotexportError(
            f"{file} is damaged or of another version ({error}); remove it, and it is measured "
            "again"
        ) from error


def _on_text(told: Mapping[str, Any]) -> OnSentences | OnAnswers:
    place = {"source": told["text"], "num_sentences": told["sentences"]}
    if "cosine" in told:
        return OnSentences(cosine=told["cosine"], recall_at_10=told["recall_at_10"], **place)
    return OnAnswers(agreement=told["agreement"], kl=told["kl"], **place)


def _timed(
    made: Sequence[_Made],
    points: Sequence[EncoderPoint],
    target: EncoderTarget,
    asked: Rounds,
    progress: Progress,
) -> list[EncoderPoint]:
    rates: list[list[float]] = [[] for _ in made]
    with torch_threads(asked.threads):
        for number in range(asked.rounds):
            for place, which in enumerate(order_of(len(made), number, asked.rounds)):
                one = made[which]
                step = number * len(made) + place
                progress(f"timing: {one.name} in {one.precision}", step, asked.rounds * len(made))
                session = target.open_encoder(one.home, threads=asked.threads)
                rows = full_rows(one.encoder, asked.batch, asked.seqlen)
                arrays = {name: value.numpy() for name, value in rows.items()}

                def call(session: Any = session, arrays: Any = arrays) -> object:
                    return session(arrays)

                taken = _seconds(call, asked.seconds / asked.rounds)
                rates[which].append(asked.batch / taken)
    return [
        EncoderPoint(**{**vars(point), "sentences_s": tuple(rate)})
        for point, rate in zip(points, rates, strict=True)
    ]


def _seconds(call: Callable[[], object], least: float) -> float:
    """Of one call, the median of calls for `least` seconds, three of them at least."""
    for _ in range(WARMUPS):
        call()
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < least:
        begun = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begun)
    return float(np.median(taken))
