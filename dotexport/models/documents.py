"""Where text comes from: a file of one of a few kinds, a folder, a dataset, or what ships inside.

A file is read as what its name says, whatever its case. One that is no running text is never
read as such: keys, quotes and escapes would be what the model is fitted to.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from dotexport.errors import CalibrationError, RuntimeMissingError
from dotexport.models.text_options import SELF, parts_of

EMBEDDED = "embedded:"
DOCUMENT_END = "<|endoftext|>"
FIELD = "text"
ACCEPTED = (
    "a .txt file, .jsonl, .json, .csv, .tsv or .parquet with a field text, or a folder of .txt"
)
# Files whose bytes or markup are no text to read; what they hold can be saved as .txt or .jsonl.
PACKED = (".7z", ".bz2", ".gz", ".tar", ".tgz", ".xz", ".zip", ".zst")
TABLES = (".arrow", ".avro", ".db", ".feather", ".h5", ".hdf5", ".orc", ".sqlite", ".tfrecord")
ARRAYS = (".bin", ".msgpack", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth", ".safetensors")
OFFICE = (".doc", ".docx", ".epub", ".odt", ".pdf", ".rtf", ".xls", ".xlsx")
MARKED = (".htm", ".html", ".ipynb", ".xml", ".yaml", ".yml")
UNREADABLE = {*PACKED, *TABLES, *ARRAYS, *OFFICE, *MARKED}


def documents(source: str, own: str | None = None) -> Iterator[str]:
    """Non-empty documents of a source, stripped of surrounding white space; of a mix, one of each
    part by turns.

    Args:
        own: the file that `self` stands for.

    Raises:
        CalibrationError: the source does not exist or cannot be read as text.
        RuntimeMissingError: a package that reads it is not installed.
    """
    streams = [iter(_raw_documents(part.source, own)) for part in parts_of(source)]
    while streams:
        for stream in list(streams):
            document = next(stream, None)
            if document is None:
                streams.remove(stream)
            elif stripped := document.strip():
                yield stripped


def _raw_documents(source: str, own: str | None) -> Iterable[str]:
    if source == SELF:
        return _file(_written(own))
    if source.startswith(EMBEDDED):
        return _embedded(source)
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _file(path)
    if path.suffix or source.startswith(("/", ".", "~")):
        raise CalibrationError(f"{source} does not exist; expected {ACCEPTED}")
    return _dataset(source)


def _written(own: str | None) -> Path:
    if own is None:
        raise CalibrationError(
            "self is text that the original samples for --calib of shrink; elsewhere give the file "
            "that a shrink with it left in OUT/reports/self.jsonl, or ./self for a file of that "
            "name"
        )
    return Path(own)


def _folder(path: Path) -> Iterator[str]:
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() == ".txt" and f.is_file())
    if not files:
        raise CalibrationError(f"{path} holds no .txt file; expected {ACCEPTED}")
    for file in files:
        yield from _split(_read(file))


def _file(file: Path) -> Iterable[str]:
    kind = file.suffix.lower()
    if kind in UNREADABLE:
        raise CalibrationError(
            f"{file} is no running text (its name ends in {kind}); expected {ACCEPTED}: convert it"
        )
    return READERS.get(kind, _plain)(file)


def _plain(file: Path) -> list[str]:
    return _split(_read(file))


def _split(text: str) -> list[str]:
    return text.split(DOCUMENT_END)


def _read(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{file} is not UTF-8 text ({error.reason} at byte {error.start}); convert it first"
        ) from error
    except OSError as error:
        raise CalibrationError(f"{file} cannot be read: {error.strerror}") from error
    if "\0" in text:
        raise CalibrationError(f"{file} holds zero bytes and is no text; expected {ACCEPTED}")
    return text


def _jsonl(file: Path) -> Iterator[str]:
    # Not splitlines(): a JSON string may hold the line ends that only Unicode knows.
    for number, line in enumerate(_read(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise CalibrationError(
                f'{file}, line {number} is not JSON ({error}); expected {{"text": "..."}}'
            ) from error
        yield _field(row, f"{file}, line {number}", 'expected {"text": "..."} on every line')


def _json(file: Path) -> Iterator[str]:
    """A list of objects or of strings; or lines of objects, as many data sets have them."""
    try:
        rows = json.loads(_read(file))
    except ValueError:
        yield from _jsonl(file)
        return
    if isinstance(rows, dict) and isinstance(rows.get(FIELD), str):
        rows = [rows]
    if not isinstance(rows, list):
        raise CalibrationError(
            f"{file} holds a JSON {_kind(rows)}; expected a list of objects with a field text, or "
            "of strings"
        )
    for number, row in enumerate(rows, start=1):
        expected = 'expected {"text": "..."} or a string'
        yield row if isinstance(row, str) else _field(row, f"{file}, item {number}", expected)


def _table(file: Path, *, delimiter: str = ",") -> Iterator[str]:
    rows = csv.DictReader(_lines(_read(file)), delimiter=delimiter, strict=True)
    limit = csv.field_size_limit(1 << 30)  # documents are longer than what it takes for fields
    try:
        if rows.fieldnames is not None and FIELD not in rows.fieldnames:
            raise CalibrationError(
                f"{file} has no column text (its columns: {', '.join(map(str, rows.fieldnames))}); "
                "expected one of that name in its first line"
            )
        for row in rows:
            where = f"{file}, line {rows.line_num}"
            yield _field(row, where, "expected as many columns as in the first line")
    except csv.Error as error:
        raise CalibrationError(
            f"{file}, line {rows.line_num} is no row of a table ({error}); expected columns "
            f"divided by {delimiter!r}, with quotes around text that holds one"
        ) from error
    finally:
        csv.field_size_limit(limit)


def _lines(text: str) -> Iterator[str]:
    """Not splitlines() here either."""
    return (f"{line}\n" for line in text.removesuffix("\n").split("\n")) if text else iter(())


def _tabs(file: Path) -> Iterator[str]:
    return _table(file, delimiter="\t")


def _parquet(file: Path) -> Iterator[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise RuntimeMissingError(
            f"{file} is a table of pyarrow; to read it, `pip install pyarrow`"
        ) from error
    try:
        table = parquet.ParquetFile(file)
        names = table.schema_arrow.names
        if FIELD not in names:
            raise CalibrationError(
                f"{file} has no column text (its columns: {', '.join(names)}); expected one"
            )
        number = 0
        for batch in table.iter_batches(columns=[FIELD]):
            for row in batch.to_pylist():
                number += 1
                yield _field(row, f"{file}, row {number}", "expected a string in every row")
    except (ArrowException, OSError) as error:
        raise CalibrationError(
            f"{file} cannot be read as parquet ({error}); save it anew"
        ) from error


READERS: dict[str, Callable[[Path], Iterable[str]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _table,
    ".tsv": _tabs,
    ".parquet": _parquet,
}


def _field(row: Any, where: str, expected: str) -> str:
    if isinstance(row, dict) and isinstance(row.get(FIELD), str):
        return str(row[FIELD])
    fields = ", ".join(map(str, row)) if isinstance(row, dict) else ""
    found = f" (its fields: {fields})" if fields else ""
    raise CalibrationError(f'{where} has no "text"{found}; {expected}')


def _kind(value: Any) -> str:
    return {dict: "object", str: "string", type(None): "null"}.get(type(value), "number")


def _embedded(source: str) -> list[str]:
    from dotexport import embedded

    parts = {
        f"{EMBEDDED}calibration": embedded.calibration_text,
        f"{EMBEDDED}evaluation": embedded.evaluation_text,
    }
    if source not in parts:
        raise CalibrationError(f"{source} is not known; expected one of {', '.join(parts)}")
    return list(parts[source]())


def _dataset(name: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise RuntimeMissingError(
            f"{name} is no file here; to read it as a dataset of the hub, `pip install datasets`"
        ) from error
    path, _, subset = name.partition(":")
    try:
        rows = load_dataset(path, subset or None, split="train", streaming=True)
    except (OSError, ValueError) as error:
        raise CalibrationError(
            f"{name} is no file here and cannot be read as a dataset of the hub "
            f"({type(error).__name__}: {error}); check the spelling and the network, or give a file"
        ) from error
    for row in rows:
        if not isinstance(row.get(FIELD), str):
            raise CalibrationError(f'{name} has no "text" column; columns: {", ".join(row)}')
        yield row[FIELD]
