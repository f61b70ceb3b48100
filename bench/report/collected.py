"""What an output holds: its manifest and the reports beside it, read once, absent parts absent."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dotexport.errors import CheckpointError, UsageError
from dotexport.storage import manifest
from dotexport.storage.reading import UnreadableError, parse_yaml, read_json
from dotexport.storage.schema import validated

from ..result import SCHEMA, BenchResult, options_in_words
from ..sweeps import SCHEMA as SWEEP
from ..sweeps import swept


@dataclass(frozen=True)
class Bench:
    """One measured workload of an output."""

    output: str
    file: str
    result: BenchResult
    swept: bool = False

    @property
    def artifact(self) -> str:
        """Target and precision."""
        return f"{self.result.target} {self.result.precision}"

    @property
    def runtime(self) -> str:
        """The artifact, and as what it was run."""
        return " ".join([self.artifact, *options_in_words(self.result.runtime)])

    @property
    def label(self) -> str:
        """Runtime and what is unusual: a batch of one goes without saying, and so on."""
        asked = self.result.workload
        told = [self.runtime]
        if asked.batch_size > 1:
            told.append(f"batch {asked.batch_size}")
        if asked.concurrency > 1:
            told.append(f"{asked.concurrency} at once")
        if self.swept:
            told.append(f"{asked.prompt_length}+{asked.generation_length} tokens")
            told.append(f"{asked.threads} threads")
        return ", ".join(told)

    @property
    def slug(self) -> str:
        return slug(f"{self.output} {Path(self.file).stem} {self.label}")


@dataclass(frozen=True)
class Output:
    """One output folder.

    Attributes:
        name: of the folder, made unique among those that are shown together.
        record: its manifest.
        shrink, verify: of reports/; empty if not there.
    """

    name: str
    folder: Path
    record: Mapping[str, Any]
    shrink: Mapping[str, Any] = field(default_factory=dict)
    verify: Mapping[str, Any] = field(default_factory=dict)
    benches: tuple[Bench, ...] = ()
    recipe: str = ""

    @property
    def model(self) -> str:
        """What was narrowed."""
        return str(self.record.get("source", {}).get("model") or self.name)

    @property
    def original(self) -> str:
        """The model as the recipe names it, or by its name alone."""
        try:
            named = parse_yaml(self.recipe)
        except UnreadableError:
            named = {}
        return str(named.get("model", self.model)) if isinstance(named, Mapping) else self.model

    @property
    def quality(self) -> Mapping[str, Any]:
        """Of an evaluation with the original beside it."""
        found = self.record.get("quality") or {}
        return found if found.get("baseline_perplexity") else {}

    @property
    def is_pipeline(self) -> bool:
        return (self.folder / "pipeline").is_dir()


def collect(folders: Sequence[Path]) -> list[Output]:
    """Read outputs.

    Raises:
        CheckpointError: a folder that is no output, or a damaged file in it.
        UsageError: the same output twice.
    """
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < len(resolved):
        raise UsageError("the same output is given twice; give each one once")
    return [_read(folder, name) for folder, name in zip(resolved, _names(resolved), strict=True)]


def slug(text: str) -> str:
    """Letters, digits and hyphens: for file names and for ids of HTML."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "plot"


def _names(folders: Sequence[Path]) -> list[str]:
    short = [folder.name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def _read(folder: Path, name: str) -> Output:
    from dotexport.storage.manifest_schema import ShrinkReport, VerifyReport

    record = manifest.read(folder)
    for artifact in record.get("artifacts", {}):
        if (folder / artifact).is_dir():  # one that was moved away says nothing wrong
            manifest.require_unchanged(folder / artifact)
    reports = folder / "reports"
    recipe = folder / "recipe.yaml"
    return Output(
        name=name,
        folder=folder,
        record=record,
        shrink=_json(reports / "shrink.json", ShrinkReport),
        verify=_json(reports / "verify.json", VerifyReport),
        benches=tuple(_benches(reports, name)),
        recipe=recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else "",
    )


def _json(file: Path, kind: Any = dict[str, Any]) -> dict[str, Any]:
    again = "run its verb again"
    stored = read_json(file, advice=again, finite=True) if file.is_file() else {}
    validated(kind, stored, str(file), error=CheckpointError, advice=again)
    return stored


def _benches(reports: Path, output: str) -> Iterator[Bench]:
    for file in sorted(reports.glob("*.json")):
        stored = _json(file)
        if stored.get("schema") == SCHEMA:
            yield Bench(output, file.name, BenchResult.from_dict(stored, str(file)))
        elif stored.get("schema") == SWEEP:
            for one in swept(stored, str(file)):
                yield Bench(output, file.name, BenchResult.from_dict(one, str(file)), swept=True)


def several(outputs: Sequence[Output]) -> bool:
    return len(outputs) > 1


def bytes_of(name: str, artifact: Any) -> int:
    """Of all files, but of weights alone in hf/, as the original's were counted."""
    if name != "hf":
        return int(artifact["bytes"])
    files = artifact["files"].items()
    return sum(entry["bytes"] for file, entry in files if file.endswith(".safetensors"))
