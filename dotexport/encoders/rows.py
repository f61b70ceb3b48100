"""Rows of one text or two, a line of JSON each, by the names of GLUE's and SQuAD's columns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dotexport.errors import CalibrationError

Row = Mapping[str, Any]

COLUMNS = (
    *(("text", "text_pair"), ("sentence1", "sentence2"), ("premise", "hypothesis")),
    *(("question1", "question2"), ("question", "context"), ("question", "sentence")),
    *(("sentence",), ("text",)),
)
"""What is read of a row, in this order; the first that it has all of."""


def read_rows(file: Path) -> list[Row]:
    """Rows of a file of JSON lines.

    Raises:
        CalibrationError: there is no such file, none in it, or a line that is no row.
    """
    try:
        lines = file.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(
            f"{file} cannot be read ({error}); give a file of JSON lines"
        ) from error
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise CalibrationError(f"{file}, line {number} is no JSON ({error})") from error
        if not isinstance(row, dict):
            raise CalibrationError(f"{file}, line {number} is no object; expected columns by name")
        rows.append(row)
    if not rows:
        raise CalibrationError(f"{file} holds no rows")
    return rows


def columns_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """Names of one text or two that all rows have.

    Raises:
        CalibrationError: the first row has none that is known, or another one lacks them.
    """
    for names in COLUMNS:
        if _has(rows[0], names):
            for number, row in enumerate(rows, 1):
                if not _has(row, names):
                    raise CalibrationError(
                        f"row {number} has no {' and '.join(names)}, which row 1 has"
                    )
            return names
    known = ", or ".join(" and ".join(names) for names in COLUMNS)
    raise CalibrationError(f"row 1 has no text; expected {known}")


def _has(row: Row, names: Sequence[str]) -> bool:
    return all(isinstance(row.get(name), str) for name in names)
