"""A model with fewer tokens: rows of its tables, its tokenizer, and every id in its files.

What comes behind reads it as its original: logits of the tokens that stay are the original's, so a
softmax over them is the original's without the rest.

Shapes: R rows of the original's tables, K of those that stay.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from dotexport.errors import CheckpointError
from dotexport.models.checkpoint import Checkpoint, TensorSpec
from dotexport.models.documents import documents
from dotexport.models.families import ROW_KEYS, find_family
from dotexport.storage.files import write_json, write_text
from dotexport.storage.reading import read_json
from dotexport.storage.workspace import Workspace
from dotexport.vocabulary import token_ids
from dotexport.vocabulary.expecting import LENGTH, Expect, Spread
from dotexport.vocabulary.keeping import Kept, keep, listed
from dotexport.vocabulary.pieces import TOKENIZER, Bpe
from dotexport.vocabulary.proving import OTHER, check_names, prove
from dotexport.vocabulary.segmenting import Reading
from dotexport.vocabulary.using import count, fingerprint, template_texts
from dotexport.vocabulary.vocabulary_options import VocabularyOptions

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]

GENERATION, TOKENIZER_CONFIG = "generation_config.json", "tokenizer_config.json"
UNTOUCHED = ("special_tokens_map.json", "chat_template*", "LICENSE*", "NOTICE*", "USE_POLICY*")
ADVICE = "take a fresh copy"
CHOICE = "vocabulary"  # its name in a workspace


@dataclass(frozen=True)
class Trimmed(Checkpoint):
    """A checkpoint of which some rows are read; its folder holds config.json and the text side.

    Attributes:
        original: what is on disk.
        kept: what stays of it.
        report: what is said of it.
    """

    original: Checkpoint
    kept: Kept
    report: Mapping[str, Any]

    @cached_property
    def rows(self) -> torch.Tensor:
        return torch.tensor(self.kept.ids)

    @cached_property
    def tables(self) -> tuple[str, ...]:
        """Tensors with a row for each token."""
        return find_family(self.config).row_tables

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        return {
            name: TensorSpec((len(self.rows), *spec.shape[1:]), spec.dtype)
            if name in self.tables
            else spec
            for name, spec in self.original.specs.items()
        }

    def tensor(self, name: str) -> torch.Tensor:
        found = self.original.tensor(name)
        return found[self.rows] if name in self.tables else found


def choose_tokens(
    folder: Path,
    config: Mapping[str, Any],
    options: VocabularyOptions,
    calibration: str | None,
    progress: Progress = lambda stage, done, total: None,
    own: str | None = None,
    workspace: Workspace | None = None,
    expect: Expect | None = None,
) -> tuple[Reading, Kept]:
    """Which tokens of a model stay; reads its tokenizer and the text, no weights.

    Args:
        calibration: the text that counts where no other was named; None: nothing is counted.
        own: the file that `self` in a text stands for.
        workspace: keeps the choice.
        expect: asks the original which tokens it expects in the text, where some of them are to be
            chosen; None: what occurs decides alone.

    Raises:
        UnsupportedModelError, CheckpointError, CalibrationError, SizeError, UsageError.
    """
    reading = Reading.of(folder)
    source = options.vocab_for or calibration
    always = set(_always(reading, folder, config))
    if options.keep_tokens:
        always |= set(listed(options.keep_tokens, reading.ids, reading.rows))
    workspace = workspace or Workspace()
    if workspace.folder is not None:
        counted = fingerprint(documents(source, own)) if source else ""
        workspace.given({"counted": counted, "always": sorted(always)})
    if found := workspace.load(CHOICE):
        return reading, Kept(**found[0] | {"ids": tuple(found[0]["ids"])})
    text = documents(source, own) if source else ()
    spread = Spread(length=min(LENGTH, config.get("max_position_embeddings") or LENGTH))
    counts_R = count(
        reading.tokenizer,
        text,
        reading.rows,
        lambda read: progress("counting tokens", read, 0),
        None if expect is None else spread,
    )
    asked = (reading.pieces, reading.ids, counts_R, always)
    choose = partial(keep, *asked, wanted=options.vocab)
    kept = choose()  # refuses what cannot be, before the original is asked
    if expect is not None and options.vocab is not None and counts_R.any():
        kept = choose(expected_R=expect(spread.windows()))
    workspace.save(CHOICE, asdict(kept))
    return reading, kept


@dataclass(frozen=True)
class TrimmedText:
    """The text side of a model with fewer tokens: what lies beside its weights.

    Attributes:
        config: config.json, as it was written.
        report: what is said of it.
    """

    config: Mapping[str, Any]
    kept: Kept
    report: Mapping[str, Any]


def trim(
    original: Checkpoint,
    options: VocabularyOptions,
    calibration: str,
    folder: Path,
    progress: Progress = lambda stage, done, total: None,
    own: str | None = None,
    workspace: Workspace | None = None,
    expect: Expect | None = None,
) -> Trimmed:
    """The original with fewer tokens, its tokenizer held against the original's.

    Args:
        folder: an empty one, for config.json and what travels with a model.
        workspace: keeps the choice of tokens.
        expect: as `choose_tokens`.

    Raises:
        UnsupportedModelError, CheckpointError, CalibrationError, SizeError, UsageError.
    """
    made = trim_text(
        original.folder,
        original.config,
        original.companions(),
        options,
        calibration,
        folder,
        progress,
        own,
        workspace,
        expect,
    )
    return Trimmed(folder, made.config, original.files, original, made.kept, made.report)


def trim_text(
    source: Path,
    config: Mapping[str, Any],
    companions: Iterable[Path],
    options: VocabularyOptions,
    calibration: str,
    folder: Path,
    progress: Progress = lambda stage, done, total: None,
    own: str | None = None,
    workspace: Workspace | None = None,
    expect: Expect | None = None,
) -> TrimmedText:
    """The same without weights.

    Args:
        source: folder of the tokenizer.
        companions: files that travel with the model; those that would contradict it are left out.
    """
    before, kept = choose_tokens(
        source, config, options, calibration, progress, own, workspace, expect
    )
    new = kept.new_ids
    rows = (key for key in ROW_KEYS if key in config)
    config = renumbered(config, kept) | dict.fromkeys(rows, len(kept.ids))
    write_json(folder / "config.json", config)
    left_out = [file.name for file in companions if not _write(file, folder, before, new)]
    if left_out:
        logger.warning(
            "left out, as they hold the original's tokens: %s; %s says the same",
            ", ".join(left_out),
            TOKENIZER,
        )
    progress("holding the tokenizer against the original's", 0, 1)
    after = Reading.of(folder)
    check_names(before, after, kept.ids)
    sources = dict.fromkeys(filter(None, (options.vocab_for, calibration)))
    other = chain(OTHER, before.added, template_texts(before.tokenizer))
    proofs = {text: prove(before, after, kept.ids, documents(text, own)) for text in sources}
    proofs["other text"] = prove(before, after, kept.ids, filter(before.reads, other))
    report = {
        **kept.as_dict(),
        "text": options.vocab_for or calibration,
        "sha256": hashlib.sha256(json.dumps(kept.ids).encode()).hexdigest(),
        "files_left_out": left_out,
        "proof": {text: proof.as_dict() for text, proof in proofs.items()},
    }
    return TrimmedText(config, kept, report)


def check_rows(written: Checkpoint, source: Trimmed) -> None:
    """Of a model that lost tokens and nothing else: every weight is the original's, so every logit
    of a token that stayed is too.

    Raises:
        CheckpointError: a tensor differs.
    """
    for name in written.files:
        if not torch.equal(written.tensor(name), source.tensor(name)):
            raise CheckpointError(f"{name} was not written as it was read; is the disk sound?")


def renumbered(config: Mapping[str, Any], kept: Kept) -> dict[str, Any]:
    """config.json with the new ids, and the original's vocab_size."""
    new = kept.new_ids
    return token_ids.in_config(config, lambda number: new.get(number, number))


def _always(reading: Reading, folder: Path, config: Mapping[str, Any]) -> Iterable[int]:
    """Ids that stay whatever the text says: special and added tokens, those that files name, and
    those of the chat template."""
    found: list[int] = [*reading.tokenizer.all_special_ids]
    found += [reading.ids[token] for token in reading.added]

    def note(number: int) -> int:
        found.append(number)
        return number

    token_ids.in_config(config, note)
    token_ids.in_tokenizer(reading.stored, note)
    if (folder / GENERATION).is_file():
        token_ids.in_config(read_json(folder / GENERATION, advice=ADVICE), note)
    for text in template_texts(reading.tokenizer):
        found += reading.tokenizer(text, add_special_tokens=False)["input_ids"]
    return [number for number in found if 0 <= number < reading.rows]


# Files ------------------------------------------------------------------------------------------


def _write(file: Path, folder: Path, before: Reading, new: Mapping[int, int]) -> bool:
    """Write one of the companions with new ids; False: one that would contradict them."""
    if any(file.match(glob) for glob in UNTOUCHED):
        shutil.copyfile(file, folder / file.name)
    elif file.name in JSON_FILES:
        content = read_json(file, advice=ADVICE)
        write_json(folder / file.name, JSON_FILES[file.name](content, before, new))
    elif file.name == "vocab.txt":
        write_text(folder / file.name, "".join(f"{token}\n" for token in _new_ids(before, new)))
    elif file.name == "merges.txt" and isinstance(before.pieces, Bpe):
        pairs = before.pieces.only(_new_ids(before, new))["merges"]
        lines = (pair if isinstance(pair, str) else " ".join(pair) for pair in pairs)
        write_text(folder / file.name, "\n".join(["#version: 0.2", *lines, ""]))
    else:
        return False
    return True


Content = Mapping[str, Any]


def _new_ids(before: Reading, new: Mapping[int, int]) -> dict[str, int]:
    """Tokens of the section `model` that stay, by their new ids."""
    ids = before.pieces.ids.items()
    found = {token: new[number] for token, number in ids if number in new}
    return dict(sorted(found.items(), key=lambda pair: pair[1]))


def _tokenizer(content: Content, before: Reading, new: Mapping[int, int]) -> Content:
    added = [entry for entry in content.get("added_tokens") or () if entry["id"] in new]
    known = {**content, "added_tokens": added}
    changed = token_ids.in_tokenizer(known, lambda number: new.get(number, number))
    return changed | {"model": before.pieces.only(_new_ids(before, new))}


def _tokenizer_config(content: Content, before: Reading, new: Mapping[int, int]) -> Content:
    if "added_tokens_decoder" not in content:
        return content
    added = content["added_tokens_decoder"].items()
    stay = {str(new[int(number)]): entry for number, entry in added if int(number) in new}
    return {**content, "added_tokens_decoder": stay}


def _generation(content: Content, before: Reading, new: Mapping[int, int]) -> Content:
    return token_ids.in_config(content, lambda number: new.get(number, number))


def _added(content: Content, before: Reading, new: Mapping[int, int]) -> Content:
    return {token: new[number] for token, number in content.items() if number in new}


def _vocabulary(content: Content, before: Reading, new: Mapping[int, int]) -> Content:
    return _new_ids(before, new)


JSON_FILES: Mapping[str, Callable[[Content, Reading, Mapping[int, int]], Content]] = {
    TOKENIZER: _tokenizer,
    TOKENIZER_CONFIG: _tokenizer_config,
    GENERATION: _generation,
    "added_tokens.json": _added,
    "vocab.json": _vocabulary,
}
