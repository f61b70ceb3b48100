"""The frontier verb: an original and what was narrowed from it, in every precision of one target,
at equal bytes.

Each artifact is exported, asked for all its logits on text, held against the original's in float32,
and timed. Quality is stored artifact by artifact, so that a run that was stopped goes on; times are
taken in rounds in which all artifacts have their turn, in fresh processes, the order another each
time: what drifts on the machine meets all of them.

Shapes: N windows, L tokens of each, P = L - 1 predictions, C of them in a chunk, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dotexport.errors import DotexportError, SizeError, UsageError
from dotexport.exports.alone import alone
from dotexport.exports.bits_per_byte import read_texts, spelled
from dotexport.exports.calibrating import Text as RoundingText
from dotexport.exports.calibrating import calibrate, grids_of
from dotexport.exports.exporting import ReadText
from dotexport.exports.quality import CHUNK_BYTES, predictions
from dotexport.exports.target import Session, Target, resolve
from dotexport.exports.verifying import require_device, require_runtime
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.loading import Loaded
from dotexport.models.origin import describe_source
from dotexport.models.text_options import TextOptions
from dotexport.models.text_windows import read_tokenizer, token_windows
from dotexport.storage.files import write_json
from dotexport.storage.output import folder_bytes, new_folder, occupied
from dotexport.storage.reading import read_json
from dotexport.vocabulary.segmenting import have_one_vocabulary

from .frontier_points import ORIGINAL, REPORT, SCHEMA, Frontier, OnText, Point
from .result import Measurement
from .runner import Progress, Runner, Setting
from .subject import STOCK, Subject
from .turns import order_of
from .workload import Workload

POINTS, ARTIFACTS = "points", "artifacts"
DIGITS = 12


@dataclass(frozen=True, kw_only=True)
class _Model:
    name: str
    checkpoint: Checkpoint
    sha256: Mapping[str, str]
    rival: bool = False


@dataclass(frozen=True, kw_only=True)
class _Text:
    """Windows of the original's tokens, and how they are spelled.

    Attributes:
        num_bytes: of all tokens but the first of each window.
    """

    source: str
    windows_NL: torch.Tensor
    spelled: tuple[str, ...]
    num_bytes: int


@dataclass
class _Made:
    """An artifact, what is known of it, and where that is stored."""

    model: _Model
    precision: str
    folder: Path
    store: Path
    point: Point | None = None
    runner: Runner | None = field(default=None, repr=False)


def frontier(
    original: Path,
    narrowed: Sequence[Path],
    specs: Sequence[str],
    texts: Sequence[TextOptions],
    *,
    rivals: Sequence[Path] = (),
    out: Path | None = None,
    workload: Workload | None = None,
    runtime: Mapping[str, Any] | None = None,
    rounded_for: ReadText | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Frontier[Point]:
    """Measure every model in every precision.

    Args:
        original: a model folder, with which all are compared.
        narrowed: outputs of dotexport, or model folders; their vocabulary must be the original's.
        rivals: model folders of any vocabulary, such as the original's smaller siblings.
        specs: NAME for all precisions of one target, or NAME:PRECISION for some of it.
        texts: one or two; the first is what is drawn.
        out: keeps artifacts and figures, and is gone on from; None: nothing is kept.
        workload: what is timed; None: nothing.
        runtime: options of the target for what is timed.
        rounded_for: text that weights are rounded to integers for, where the target lets that be
            chosen; None: to nearest.

    Raises:
        UsageError, SizeError, RuntimeMissingError, CalibrationError, CheckpointError,
        DotexportError: as for an export, an evaluation and a bench.
    """
    target, precisions = _asked(specs)
    require_runtime(target)
    require_device(target)
    models = _models(original, narrowed, rivals)
    read = [_read(models[0], text) for text in texts]
    workload, notes = _timed(target, workload, runtime, texts)
    with home_of_figures(out) as home:
        read_by = {one.name: rounded_for(one.checkpoint) for one in models} if rounded_for else {}
        made, skipped = _exported(models, target, precisions, home, read_by, progress)
        if read_by:
            source = read_by[ORIGINAL].told["text"]
            notes.append(f"weights that become integers are rounded for {source} where that can be")
        _judge(made, target, models[0], read, home, progress)
        if workload is not None:
            setting = Setting(target, "", dict(runtime or {}), roofline=False)
            _time(made, setting, workload, progress)
        points = tuple(one.point for one in made if one.point is not None)
    return Frontier(
        target=target.name,
        points=points,
        skipped=tuple(skipped),
        notes=tuple(notes),
        workload=workload,
    )


def _asked(specs: Sequence[str]) -> tuple[Target, list[str]]:
    """One target, and the precisions of it."""
    found = [(spec, *resolve(spec)) for spec in specs]
    names = {target.name for _, target, _ in found}
    if len(names) != 1:
        raise UsageError(
            f"expected one target with some of its precisions, such as --target gguf:int8 --target "
            f"gguf:int4, or --target gguf for all; not {', '.join(sorted(names)) or 'none'}"
        )
    target = found[0][1]
    named = [precision for spec, _, precision in found if ":" in spec]
    return target, list(dict.fromkeys(named)) or list(target.precisions)


def _models(original: Path, narrowed: Sequence[Path], rivals: Sequence[Path]) -> list[_Model]:
    others = [*narrowed, *rivals]
    folders = [original, *(f / STOCK if (f / STOCK).is_dir() else f for f in others)]
    found = []
    for number, (name, folder) in enumerate(zip(names_of(others), folders, strict=True)):
        checkpoint, rival = Checkpoint.open(folder), number > len(narrowed)
        if not rival and not have_one_vocabulary(folder, original):
            raise UsageError(
                f"{folder} has another vocabulary than {original}, and a divergence is taken token "
                "by token; give it with --rival, which is held against in bits per byte"
            )
        sha256 = describe_source(checkpoint)["sha256"]
        found.append(_Model(name=name, checkpoint=checkpoint, sha256=sha256, rival=rival))
    return found


def names_of(others: Sequence[Path]) -> list[str]:
    """What the original and these are called: by their folders."""
    names = [ORIGINAL, *(folder.resolve().name for folder in others)]
    if len(set(names)) < len(names):
        raise UsageError(f"models need names of their own, not {', '.join(names)}; rename folders")
    return names


def _read(original: _Model, options: TextOptions) -> _Text:
    folder = original.checkpoint.folder
    windows_NL = token_windows(folder, options)
    decode = read_tokenizer(folder).decode
    num_bytes = sum(len(decode(window_L[1:]).encode()) for window_L in windows_NL.tolist())
    return _Text(
        source=options.source,
        windows_NL=windows_NL,
        spelled=tuple(spelled(folder, windows_NL)),
        num_bytes=max(num_bytes, 1),
    )


def _timed(
    target: Target,
    workload: Workload | None,
    runtime: Mapping[str, Any] | None,
    texts: Sequence[TextOptions],
) -> tuple[Workload | None, list[str]]:
    notes = []
    if len(texts) < 2:
        notes.append(
            "one text alone: what narrowing costs depends on it more than what quantising costs; "
            "give a second kind of text with --other"
        )
    if workload is not None and target.name == "gguf" and not (runtime or {}).get("llama_cpp"):
        notes.append("nothing is timed: GGUF files run in llama.cpp; name it with --llama-cpp")
        return None, notes
    return workload and workload.with_threads(), notes


@contextmanager
def home_of_figures(out: Path | None) -> Iterator[Path]:
    """The folder that keeps artifacts and figures, for this run alone or for the next as well."""
    if out is None:
        with tempfile.TemporaryDirectory(prefix="dotexport-frontier-") as scratch:
            yield Path(scratch)
        return
    out = out.expanduser().resolve()
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / REPORT).is_file())):
        raise UsageError(
            f"{out} holds something else (no {REPORT}); give a new folder, or one of an earlier run"
        )
    with occupied(out):
        out.mkdir(parents=True, exist_ok=True)
        if not (out / REPORT).is_file():
            write_json(out / REPORT, {"schema": SCHEMA})
        yield out


def _exported(
    models: Sequence[_Model],
    target: Target,
    precisions: Sequence[str],
    home: Path,
    read_by: Mapping[str, RoundingText],
    progress: Progress,
) -> tuple[list[_Made], list[str]]:
    made, skipped, total = [], [], len(models) * len(precisions)
    asked = [(model, precision) for model in models for precision in precisions]
    for number, (model, precision) in enumerate(asked):
        label = f"{model.name}-{target.name}-{precision}"
        progress(f"exporting: {label}", number, total)
        if problems := target.problems(model.checkpoint, precision):
            skipped.append(f"{model.name} in {precision}: {'; '.join(problems)}")
            continue
        known = [SCHEMA, dict(model.sha256), target.name, precision]
        text = read_by.get(model.name)
        grids = grids_of(target, model.checkpoint, precision) if text else {}
        key = digest([*known, text.told] if text and grids else known)
        folder = home / ARTIFACTS / f"{label}-{key}"
        if not folder.is_dir():
            chosen: dict[str, Any] = {}
            if text and grids:
                [rounding] = calibrate(model.checkpoint, text, [grids], progress=progress)
                chosen["rounded"] = rounding.rounded
            with new_folder(folder) as partial, alone(model.checkpoint) as language_model:
                target.write(language_model, partial, precision, **chosen)
        made.append(_Made(model, precision, folder, home / POINTS / label))
    if not any(one.model.name == ORIGINAL for one in made):
        raise SizeError("the original cannot be exported:\n" + "\n".join(skipped))
    return made, skipped


def digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:DIGITS]


# Quality ------------------------------------------------------------------------------------------


def _judge(
    made: Sequence[_Made],
    target: Target,
    original: _Model,
    texts: Sequence[_Text],
    home: Path,
    progress: Progress,
) -> None:
    """Of each artifact, unless it is known; the original in torch is loaded where one is not."""
    read = [[t.source, digest(t.windows_NL.tolist())] for t in texts]
    reference: Any = None
    for number, one in enumerate(made):
        progress(f"predicting: {one.model.name} in {one.precision}", number, len(made))
        key = digest([one.folder.name, dict(original.sha256), read])
        one.store = one.store.with_name(f"{one.store.name}-{key}.json")
        if one.store.is_file():
            one.point = _stored(one.store)
            continue
        reference = reference or Loaded(original.checkpoint)
        session = target.open(one.folder)
        one.point = Point(
            model=one.model.name,
            precision=one.precision,
            num_bytes=folder_bytes(one.folder),
            num_parameters=one.model.checkpoint.num_parameters,
            texts=tuple(
                _rival_on_text(session, text, one)
                if one.model.rival
                else _on_text(session, reference, text, one)
                for text in texts
            ),
            rival=one.model.rival,
        )
        write_json(one.store, asdict(one.point))


def _stored(file: Path) -> Point:
    said = read_json(file, advice="remove it, and it is measured again")
    try:
        rates = {name: tuple(said[name]) for name in ("prefill_tok_s", "decode_tok_s")}
        texts = tuple(OnText(**text) for text in said["texts"])
        return Point(**said | rates | {"texts": texts})
    except (KeyError, TypeError) as error:
        raise DotexportError(
            f"{file} is damaged or of another version ({error}); remove it, and it is measured "
            "again"
        ) from error


@torch.inference_mode()
def _on_text(session: Session, reference: Any, text: _Text, one: _Made) -> OnText:
    sums_4, num_tokens = torch.zeros(4, dtype=torch.float64), 0
    for window_L in text.windows_NL:
        asked_1P, next_P = window_L[None, :-1], window_L[1:]
        theirs_PV = reference.logits(asked_1P)[0]
        ours_PV = torch.from_numpy(session.start(asked_1P.numpy()))[0]
        step = max(1, CHUNK_BYTES // (4 * theirs_PV.shape[-1]))
        pieces = zip(*(torch.split(t, step) for t in (ours_PV, theirs_PV, next_P)), strict=True)
        sums_4 += sum(predictions(*piece).sum(0) for piece in pieces)
        num_tokens += len(next_P)
    ours, _, kl, _ = (sums_4 / num_tokens).tolist()
    return _read_by(one, text, ours, num_tokens, text.num_bytes, kl)


def _rival_on_text(session: Session, text: _Text, one: _Made) -> OnText:
    """The same text in tokens of the rival's own."""
    read = read_texts(session, one.model.checkpoint.folder, text.spelled)
    return _read_by(one, text, read.nats / read.num_tokens, read.num_tokens, read.num_bytes)


def _read_by(
    one: _Made, text: _Text, nats: float, num_tokens: int, num_bytes: int, kl: float | None = None
) -> OnText:
    """Args: nats: of a token."""
    if not math.isfinite(nats + (kl or 0.0)):
        raise DotexportError(
            f"{one.model.name} in {one.precision} predicts NaN; does it pass `dotexport verify`?"
        )
    return OnText(
        source=text.source,
        num_tokens=num_tokens,
        kl=None if kl is None else max(kl, 0.0),
        perplexity=math.exp(min(nats, 700.0)),
        bits_per_byte=nats * num_tokens / math.log(2) / max(num_bytes, 1),
    )


# Times --------------------------------------------------------------------------------------------


def _time(made: Sequence[_Made], setting: Setting, workload: Workload, progress: Progress) -> None:
    for one in made:
        assert one.point is not None
        config = one.model.checkpoint.config
        subject = Subject(
            name=one.point.name,
            source=one.model.checkpoint.folder,
            artifact=one.folder,
            num_bytes=one.point.num_bytes,
            num_parameters=one.point.num_parameters,
            context=config.get("max_position_embeddings"),
            config=config,
        )
        subject.check_fits(workload.prompt_length + workload.generation_length)
        one.runner = Runner(subject, replace(setting, precision=one.precision), workload)
    total = workload.rounds * len(made)
    vocabulary = int(made[0].model.checkpoint.config["vocab_size"])
    for number in range(workload.rounds):
        for place, which in enumerate(order_of(len(made), number, workload.rounds)):
            one = made[which]
            assert one.runner is not None
            progress(f"timing: {one.runner.subject.name}", number * len(made) + place, total)
            _ask(one.runner, number, vocabulary)
    for one in made:
        assert one.runner is not None
        assert one.point is not None
        one.point = _with_times(one.point, one.runner.measurement(), workload)


def _ask(runner: Runner, number: int, vocabulary: int) -> None:
    """One round of one artifact, in a fresh process."""
    workload = runner.workload
    with ExitStack() as alive:
        runner.load(alive)
        runner.warm_up(min(vocabulary, runner.loaded["vocabulary"]))
        wanted = max(workload.min_iterations, workload.min_seconds / max(runner.iteration_s, 1e-9))
        groups = workload.groups_each_round
        iterations = max(1, math.ceil(wanted / (workload.rounds * groups)))
        for group in range(number * groups, (number + 1) * groups):
            runner.run(number, group, iterations)
        runner.remember_memory()


def _with_times(point: Point, found: Measurement, workload: Workload) -> Point:
    rounds = sorted({sample.round for sample in found.samples})
    rates = [
        replace(found, samples=tuple(s for s in found.samples if s.round == number)).throughput(
            workload
        )
        for number in rounds
    ]
    return replace(
        point,
        prefill_tok_s=tuple(rate["prefill_tok_s"] for rate in rates),
        decode_tok_s=tuple(rate["decode_tok_s"] for rate in rates),
        peak_rss_bytes=found.peak_rss_bytes,
    )
