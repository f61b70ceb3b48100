"""The table of planted faults, and what the command makes of a fault that nothing notices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dotexport.bench.tables.mutations import (
    CHECKOUT,
    MUTATIONS,
    Mutation,
    MutationError,
    caught_by,
    check_whole,
    copied_checkout,
    judged,
)

CORE = CHECKOUT / "dotexport"
GAIN = next(m for m in MUTATIONS if m.before == "math.sqrt(before / after)")
SOURCE = (CORE / GAIN.file).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def copy() -> Iterator[Path]:
    with copied_checkout() as folder:
        yield folder


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.what)
def test_a_mutation_can_be_planted_and_its_tests_exist(mutation: Mutation) -> None:
    source = (CORE / mutation.file).read_text(encoding="utf-8")
    assert mutation.planted(source) != source  # found once, and what comes out is Python
    named = source.splitlines()[mutation.line(source) - 1]
    assert mutation.before.strip().splitlines()[0] in named
    assert mutation.tests
    for name in mutation.tests:
        assert (CHECKOUT / name).is_file()


def test_every_room_of_the_core_has_mutations() -> None:
    rooms = {m.file.partition("/")[0] for m in MUTATIONS}
    assert rooms >= {
        "axes",
        "diffusion",
        "exports",
        "healing",
        "merging",
        "models",
        "narrowing",
        "sizes",
        "storage",
    }
    assert len(MUTATIONS) >= 24
    assert len({(m.file, m.before, m.after) for m in MUTATIONS}) == len(MUTATIONS)


def test_a_change_that_breaks_nothing_lives(copy: Path) -> None:
    line = SOURCE.splitlines()[GAIN.line(SOURCE) - 1]
    comment = replace(GAIN, before=line, after=f"{line}  # of axes")
    assert caught_by(copy, comment) is None
    assert (copy / "dotexport" / GAIN.file).read_text(encoding="utf-8") == SOURCE


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (GAIN.before, "math.sqrt(before /"),
        pytest.param("import math", "import mathematics as math", marks=pytest.mark.heavy),
        pytest.param("import math\n", "\n", marks=pytest.mark.heavy),
        ("def exact_norm(", "def inexact_norm("),
    ],
    ids=["syntax error", "module that is not there", "name that is not there", "import error"],
)
def test_what_cannot_be_run_is_not_caught(copy: Path, before: str, after: str) -> None:
    with pytest.raises(MutationError):
        caught_by(copy, replace(GAIN, before=before, after=after))
    assert (copy / "dotexport" / GAIN.file).read_text(encoding="utf-8") == SOURCE


def test_a_text_that_does_not_stand_there_once_is_refused() -> None:
    for before in ("what nobody wrote", "before"):
        with pytest.raises(MutationError, match=r"expected once"):
            replace(GAIN, before=before).planted(SOURCE)


def test_nothing_is_planted_where_tests_fail_already(copy: Path) -> None:
    failing = copy / "tests/test_failing.py"
    failing.write_text("def test_it() -> None:\n    assert False\n", encoding="utf-8")
    with pytest.raises(MutationError, match="without any mutation"):
        check_whole(copy, ["tests/test_failing.py"])


def test_a_planted_fault_is_caught_and_a_row_says_where_and_by_whom() -> None:
    (row,) = judged([GAIN])
    assert (CORE / GAIN.file).read_text(encoding="utf-8") == SOURCE
    assert row["what is wrong"] == GAIN.what
    assert row["where"] == f"{GAIN.file}:{GAIN.line(SOURCE)}"
    assert row["caught by"].startswith("test_")
