"""The shrink verb for text encoders: a folder goes in, OUT/hf of the same stock class comes out."""

from __future__ import annotations

import hashlib
import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor

from dotexport.encoders import encoder_card
from dotexport.encoders.encoder_folder import (
    Encoder,
    artifact,
    check_apart,
    describe_source,
    layers_of,
    open_encoder,
    rows_of,
    save_encoder,
)
from dotexport.encoders.encoder_healing import Student, heal
from dotexport.encoders.encoder_options import ShrinkOptions
from dotexport.encoders.encoder_sizes import (
    Sizes,
    before_of,
    candidates,
    choose_layers,
    num_parameters,
    parameters_of,
)
from dotexport.encoders.encoder_stream import leaving
from dotexport.encoders.encoder_vocabulary import trimmed
from dotexport.encoders.encoder_walk import Progress, Walked, walk
from dotexport.encoders.kinds import STOCK
from dotexport.encoders.pooling import (
    Pooling,
    dense_parameters,
    embed,
    mean_cosine,
    pooling_of,
    pools,
    write_back,
)
from dotexport.encoders.sentences import Batch, Text, read_by_both, read_sentences
from dotexport.storage import manifest
from dotexport.storage.files import write_json
from dotexport.storage.output import check_free, new_folder

logger = logging.getLogger(__name__)

ORIGINAL_IDS = "original_ids"


@dataclass(frozen=True)
class Tried:
    """Sizes that meet the budget, and how close embeddings of held-out sentences stay."""

    sizes: Sizes
    kept_layers: list[int]
    walked: Walked
    cosine: float


@dataclass(frozen=True)
class Judges:
    """Held-out sentences, as the narrower model reads them.

    Attributes:
        wanted_ND: what the original makes of them, with all of its tokens.
    """

    batches: list[Batch]
    wanted_ND: Tensor
    pooling: Pooling

    @classmethod
    def of(cls, original: Encoder, pairs: list[tuple[Batch, Batch]]) -> Judges:
        held = [both for both in pairs if both[0].held]
        pooling = pooling_of(original)
        wanted_ND = embed(original.base, [theirs for _, theirs in held], pooling)
        return cls([ours for ours, _ in held], wanted_ND, pooling)

    def cosine(self, narrowed: Student) -> float:
        """Mean cosine of its embeddings to the original's."""
        model, back = narrowed
        base: Any = model.base_model
        return mean_cosine(embed(base, self.batches, self.pooling, back), self.wanted_ND)


@dataclass(frozen=True)
class Shrunk:
    """What shrink made.

    Attributes:
        cosine: mean cosine of embeddings of held-out sentences to the original's: of the closed
            form, and after distillation.
        tried: every size that was narrowed to choose between, with its cosine.
    """

    out: Path
    sizes: dict[str, list[int]]
    kept_layers: list[int]
    cosine: tuple[float, float]
    tried: list[dict[str, Any]]
    sites: list[dict[str, Any]]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"out": str(self.out), "seconds": round(self.seconds, 2)}


def shrink(
    folder: Path,
    out: Path,
    options: ShrinkOptions,
    *,
    overwrite: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> Shrunk:
    """Narrow an encoder and write OUT/hf, manifest, card and report.

    Raises:
        CheckpointError, CalibrationError, UnsupportedModelError, SizeError, UsageError.
    """
    check_free(out, overwrite=overwrite)
    check_apart(folder, out)
    with tempfile.TemporaryDirectory(prefix="dotexport-") as scratch:
        return _shrink(folder, out, options, Path(scratch), progress, overwrite=overwrite)


def _shrink(
    folder: Path,
    out: Path,
    options: ShrinkOptions,
    scratch: Path,
    progress: Progress,
    *,
    overwrite: bool,
) -> Shrunk:
    started = time.perf_counter()
    encoder = original = open_encoder(folder)
    more = options.heal * options.text.batch
    sentences = read_sentences(options.text, more=more)
    vocabulary: Mapping[str, Any] = {}
    if options.vocabulary.asked:
        encoder, vocabulary = trimmed(
            original, options.vocabulary, options.text.source, scratch, progress
        )
    wanted = candidates(encoder, options, total=parameters_of(original))
    pairs = read_by_both(encoder, original, sentences[: options.text.samples], options.text)
    some = [ours for ours, _ in pairs]
    judges = Judges.of(original, pairs)
    if options.narrows:
        best, tried = _best(encoder, some, judges, wanted, options, progress)
    else:  # as it is, but for its tokens
        everything = list(range(len(encoder.layers)))
        walked = Walked(encoder.model, [])
        cosine = judges.cosine((encoder.model, None))
        best, tried = Tried(wanted[0], everything, walked, cosine), []
    narrowed, healed = (best.walked.model, best.walked.back), best.cosine
    if options.heal:
        behind = read_by_both(encoder, original, sentences[options.text.samples :], options.text)
        narrowed = heal(
            original,
            narrowed,
            [both for both in pairs if not both[0].held] + behind,
            judges.cosine,
            judges.pooling,
            options.heal,
            seed=options.seed,
            progress=progress,
        )
        healed = judges.cosine(narrowed)
    with new_folder(out, overwrite=overwrite) as partial:
        model, back = narrowed
        save_encoder(encoder, model, partial / STOCK)
        if back is not None and pools(encoder):
            write_back(partial / STOCK, back, encoder.dtype)
            manifest.update(partial, map_back=True)
        shrunk = Shrunk(
            out,
            _sizes(original, narrowed, best.sizes),
            best.kept_layers,
            (best.cosine, healed),
            tried,
            best.walked.sites,
            time.perf_counter() - started,
        )
        _describe(partial, original, options, shrunk, sentences, judges.pooling.mode, vocabulary)
    return shrunk


def _best(
    encoder: Encoder,
    some: list[Batch],
    judges: Judges,
    wanted: list[Sizes],
    options: ShrinkOptions,
    progress: Progress,
) -> tuple[Tried, list[dict[str, Any]]]:
    """The sizes whose embeddings stay closest, of those that meet the budget: all depths in the
    widest stream, and about the best of them in narrower ones for as long as that helps."""
    least = min(sizes.depth for sizes in wanted)
    course = choose_layers(encoder, judges.batches, judges.pooling, least, progress)
    narrowest, whole = min(sizes.hidden for sizes in wanted), encoder.hidden_size
    removal = leaving(encoder, some, narrowest) if narrowest < whole else None
    best: Tried | None = None
    said = []

    def tried(sizes: Sizes) -> Tried:
        kept = course[len(encoder.layers) - sizes.depth]
        kept_K = removal.kept(whole, sizes.hidden) if removal and sizes.hidden < whole else None
        walked = walk(
            encoder,
            some,
            kept,
            sizes.width,
            options.method,
            progress,
            dimensions=kept_K,
            pooling=judges.pooling,
        )
        found = Tried(sizes, kept, walked, judges.cosine((walked.model, walked.back)))
        said.append({**asdict(sizes), "kept_layers": kept, "cosine": found.cosine})
        return found

    for _, alike in groupby(wanted, key=lambda sizes: sizes.hidden):
        group = list(alike)
        found = _downhill(group, tried) if best is None else _about(best, group, tried)
        if best is not None and found.cosine <= best.cosine:
            break
        best = found
    assert best is not None
    return best, said


def _downhill(group: Sequence[Sizes], tried: Callable[[Sizes], Tried]) -> Tried:
    """The best of all depths, the deepest first, until it gets worse with every further layer."""
    best = tried(group[0])
    for sizes in group[1:]:
        found = tried(sizes)
        if found.cosine > best.cosine:
            best = found
        elif found.cosine < best.cosine - 0.1:
            break
    return best


def _about(best: Tried, group: Sequence[Sizes], tried: Callable[[Sizes], Tried]) -> Tried:
    """The best depth of a narrower stream: from that of the wider one on, deeper for as long as
    that helps, as there is room for more, and else less deep."""
    near = min(range(len(group)), key=lambda n: abs(group[n].depth - best.sizes.depth))
    first = found = tried(group[near])
    for way in (range(near - 1, -1, -1), range(near + 1, len(group))):
        for number in way:
            further = tried(group[number])
            if further.cosine <= found.cosine:
                break
            found = further
        if found is not first:
            break
    return found


def _sizes(encoder: Encoder, narrowed: Student, sizes: Sizes) -> dict[str, list[int]]:
    model, _ = narrowed
    kind, before = encoder.kind, before_of(encoder)
    layers = layers_of(model, kind)
    after = num_parameters(model) + dense_parameters(encoder, sizes.hidden, before.hidden)
    return {
        "parameters": [parameters_of(encoder), after],
        "parameters_of_layers": [num_parameters(encoder.layers), num_parameters(layers)],
        kind.stream: [before.hidden, sizes.hidden],
        kind.width: [before.width, sizes.width],
        kind.depth: [before.depth, sizes.depth],
        "vocab_size": [encoder.num_tokens, rows_of(model)],
    }


def _describe(
    folder: Path,
    encoder: Encoder,
    options: ShrinkOptions,
    shrunk: Shrunk,
    sentences: list[Text],
    pooling: str,
    vocabulary: Mapping[str, Any],
) -> None:
    if vocabulary:
        said = {key: value for key, value in vocabulary.items() if key != ORIGINAL_IDS}
        manifest.update(folder, vocabulary=said)
        write_json(folder / "reports/vocabulary.json", {ORIGINAL_IDS: vocabulary[ORIGINAL_IDS]})
    narrower = shrunk.sizes[encoder.kind.stream][1] < encoder.hidden_size
    name = "mapped_cosine" if narrower and not pools(encoder) else "cosine"
    held = {name: shrunk.cosine[1], f"closed_form_{name}": shrunk.cosine[0]}
    manifest.update(
        folder,
        kind="encoder",
        source=describe_source(encoder),
        shrink=asdict(options),
        sizes=shrunk.sizes,
        kept_layers=shrunk.kept_layers,
        calibration={
            "source": options.text.source,
            "sentences": len(sentences),
            "pooling": pooling,
            "sha256": hashlib.sha256("\n".join(map("\t".join, sentences)).encode()).hexdigest(),
        },
        held_out=held,
        artifacts={STOCK: artifact(folder / STOCK, STOCK, "as-stored")},
        environment=manifest.environment(),
        timings={"shrink_seconds": round(shrunk.seconds, 2)},
    )
    write_json(folder / "reports" / "shrink.json", shrunk.as_dict())
    encoder_card.write(folder)
