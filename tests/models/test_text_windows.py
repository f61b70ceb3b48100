"""Text becomes windows of token ids: in order, disjoint, and never padded."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dotexport.embedded import MODEL_DIR
from dotexport.errors import CalibrationError, RuntimeMissingError, UsageError
from dotexport.models.documents import documents
from dotexport.models.text_options import Part, TextOptions, parts_of
from dotexport.models.text_windows import (
    APART,
    _encoder,
    encode_start,
    spread,
    token_windows,
    window_length,
)


@pytest.fixture
def model(tiny_llama: Callable[[str], Path]) -> Path:
    """Its token 3 + n is the word wn; context 512."""
    return tiny_llama("wide-heads")


def words(*numbers: int) -> str:
    return " ".join(f"w{number}" for number in numbers)


def windows(model: Path, file: Path, **options: int) -> list[list[int]]:
    found: list[list[int]] = token_windows(model, TextOptions(source=str(file), **options)).tolist()
    return found


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Twenty words of which number 10 to 19 stand in the second document."""
    file = tmp_path / "text.txt"
    file.write_text(f"{words(*range(10))}<|endoftext|>\n{words(*range(10, 20))}")
    return file


def test_documents_are_joined_and_cut_without_overlap(model: Path, text: Path) -> None:
    assert windows(model, text, seqlen=8) == [
        [3, 4, 5, 6, 7, 8, 9, 10],
        [11, 12, 13, 14, 15, 16, 17, 18],
    ]


def test_windows_are_int64_as_embeddings_want_them(model: Path, text: Path) -> None:
    assert token_windows(model, TextOptions(source=str(text), seqlen=5)).dtype == torch.int64


def test_skipping_and_sampling_give_disjoint_parts(model: Path, text: Path) -> None:
    everything = windows(model, text, seqlen=4)
    first = windows(model, text, seqlen=4, samples=2)
    rest = windows(model, text, seqlen=4, samples=9, skip=2)
    assert first + rest == everything
    assert len(first) == 2


def test_fewer_windows_than_asked_for_are_fine(model: Path, text: Path) -> None:
    assert len(windows(model, text, seqlen=10, samples=100)) == 2


def test_skipping_everything_is_refused(model: Path, text: Path) -> None:
    with pytest.raises(CalibrationError, match="after 2 skipped ones; give more text"):
        windows(model, text, seqlen=10, skip=2)


def test_windows_are_as_long_as_the_context_unless_asked(model: Path) -> None:
    assert window_length(model, TextOptions(source="x")) == 512
    assert window_length(model, TextOptions(source="x", seqlen=512)) == 512
    with pytest.raises(UsageError, match="context of 512 tokens; give at most that"):
        window_length(model, TextOptions(source="x", seqlen=513))


def test_each_document_keeps_its_start_token(model: Path, text: Path, tmp_path: Path) -> None:
    """A tokenizer that puts <s> (1) in front does so once per document."""
    from tokenizers import Tokenizer, processors

    beginning = tmp_path / "beginning"
    beginning.mkdir()
    for file in model.glob("*.json"):
        (beginning / file.name).write_bytes(file.read_bytes())
    tokenizer = Tokenizer.from_file(str(beginning / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(beginning / "tokenizer.json"))
    assert windows(beginning, text, seqlen=11) == [[1, *range(3, 13)], [1, *range(13, 23)]]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, mark: str) -> None:
    (tmp_path / "a.txt").write_text(f"{mark}one<|endoftext|> \n<|endoftext|>two\n", "utf-8")
    assert list(documents(str(tmp_path / "a.txt"))) == ["one", "two"]
    (tmp_path / "a.jsonl").write_text(f'{mark}{{"text": "one"}}\r\n\n{{"text": "two"}}\n', "utf-8")
    assert list(documents(str(tmp_path / "a.jsonl"))) == ["one", "two"]


def test_json_lines_may_hold_line_ends_that_only_unicode_knows(tmp_path: Path) -> None:
    rows = ["one\u2028two\x85three\x1cfour", "five"]
    lines = [json.dumps({"text": row}, ensure_ascii=False) for row in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), "utf-8")
    assert list(documents(str(tmp_path / "a.jsonl"))) == rows


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a/c.txt", "a/b.txt", "ignored.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert list(documents(str(tmp_path))) == ["a/b.txt", "a/c.txt", "b.txt"]


def test_reading_ends_with_the_last_window_asked_for(model: Path, tmp_path: Path) -> None:
    good, bad = json.dumps({"text": words(*range(8))}), "not JSON"
    (tmp_path / "a.jsonl").write_text(f"{good}\n{bad}")
    assert len(windows(model, tmp_path / "a.jsonl", seqlen=4, samples=2)) == 2
    with pytest.raises(CalibrationError, match="line 2 is not JSON"):
        windows(model, tmp_path / "a.jsonl", seqlen=4, samples=3)


def test_calibration_and_evaluation_that_ship_inside_are_disjoint() -> None:
    calibration = set(documents("embedded:calibration"))
    evaluation = set(documents("embedded:evaluation"))
    assert calibration
    assert evaluation
    assert not calibration & evaluation


# Kinds of files ---------------------------------------------------------------------------------

ROWS = ['say "one"\n\tand more', "two, and\r\nthree", "\u2028 four \\n", "five"]


def rows_as(kind: str) -> str:
    """The rows in the way of files with this name."""
    objects = [{"id": n, "text": row} for n, row in enumerate(ROWS)]
    if kind in ("json", "indented.json"):
        return json.dumps(objects, indent=1 if kind != "json" else None)
    if kind == "strings.json":
        return json.dumps(ROWS, ensure_ascii=False)
    if kind in ("jsonl", "ndjson", "lines.json"):
        return "\n".join(map(json.dumps, objects))
    delimiter = "\t" if kind == "tsv" else ","
    quoted = ['"{}"'.format(row.replace('"', '""')) for row in ROWS]
    lines = [f"{n}{delimiter}{row}" for n, row in enumerate(quoted)]
    return "\n".join([f"id{delimiter}text", *lines]) + "\n"


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize(
    "kind",
    ["json", "indented.json", "strings.json", "lines.json", "jsonl", "ndjson", "csv", "tsv"],
)
def test_every_kind_of_file_gives_its_documents_and_nothing_around_them(
    tmp_path: Path, kind: str, upper: bool
) -> None:
    file = tmp_path / (f"a.{kind.upper()}" if upper else f"a.{kind}")
    file.write_text(rows_as(kind), "utf-8", newline="")
    stripped = [row.strip().replace("\r\n", "\n") for row in ROWS]
    assert [row.replace("\r\n", "\n") for row in documents(str(file))] == stripped


def test_a_parquet_table_gives_its_column(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"id": range(4), "text": ROWS}), tmp_path / "a.parquet")
    assert list(documents(str(tmp_path / "a.parquet"))) == [row.strip() for row in ROWS]
    parquet.write_table(pyarrow.table({"body": ROWS}), tmp_path / "b.parquet")
    with pytest.raises(CalibrationError, match=r"no column text \(its columns: body"):
        list(documents(str(tmp_path / "b.parquet")))
    (tmp_path / "c.parquet").write_text("PAR1 and no more")
    with pytest.raises(CalibrationError, match="cannot be read as parquet"):
        list(documents(str(tmp_path / "c.parquet")))


def test_a_parquet_table_asks_for_what_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_text("PAR1")
    with pytest.raises(RuntimeMissingError, match="pip install pyarrow"):
        list(documents(str(tmp_path / "a.parquet")))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"content": "x", "id": 1}', "its fields: content, id.; expected"),
        ("a.json", '[{"content": "x"}]', "item 1 has no .text. .its fields: content"),
        ("a.json", '{"data": ["x"]}', "holds a JSON object; expected a list of objects"),
        ("a.json", "[1, 2]", "item 1 has no .text.; expected"),
        ("a.json", '[{"text": "x"}, ', "is not JSON"),
        ("a.csv", "id,body\n1,x\n", "no column text .its columns: id, body"),
        ("a.csv", "id;text\n1;x\n", "no column text .its columns: id;text"),
        ("a.csv", "id,text\n1\n", "line 2 has no .text."),
        ("a.csv", 'id,text\n1,"x', "is no row of a table"),
        ("a.txt.gz", "x", "no running text .its name ends in .gz"),
        ("a.HTML", "<p>x</p>", "no running text .its name ends in .html"),
        ("a.yaml", "text: x", "no running text"),
        ("a.txt", "x\0y", "zero bytes"),
    ],
)
def test_what_holds_no_text_to_read_is_refused_and_not_read_as_it_stands(
    tmp_path: Path, name: str, content: str, words: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CalibrationError, match=words):
        list(documents(str(tmp_path / name)))


def test_a_folder_without_text_says_what_it_should_hold(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    with pytest.raises(CalibrationError, match=r"holds no \.txt file; expected"):
        list(documents(str(tmp_path)))
    (tmp_path / "B.TXT").write_text("x")
    assert list(documents(str(tmp_path))) == ["x"]


def test_a_long_csv_field_is_one_document(tmp_path: Path) -> None:
    """Python's own limit is 131072 characters."""
    (tmp_path / "a.csv").write_text(f"text\n{'x' * 200_000}\n")
    assert [len(document) for document in documents(str(tmp_path / "a.csv"))] == [200_000]


@pytest.mark.parametrize("wanted", [1, 100, 3000])
def test_of_a_long_document_no_more_is_encoded_than_is_wanted(wanted: int) -> None:
    """The tokens are those of the whole; an end token of the piece is none of them."""
    tokenizer = _encoder(MODEL_DIR)
    seen: list[int] = []

    def encode(text: str) -> list[int]:
        seen.append(len(text))
        return [*tokenizer(text), 0]

    document = " ".join(f"def f_{n}(x):\n    return x**{n}\n" for n in range(6000))
    found = encode_start(document, wanted, encode)
    assert found[:wanted] == tokenizer(document)[:wanted]
    assert len(found) >= wanted
    assert sum(seen) < 40 * (wanted + 256) < len(document)


def test_what_is_wanted_of_a_short_document_is_all_of_it() -> None:
    assert encode_start("a few words", 1000, list) == list("a few words")  # type: ignore[arg-type]
    # Fewer tokens than one in eight characters: the piece grows until it is the document.
    assert encode_start("a" * 9000, 900, lambda text: [0] * (len(text) // 20)) == [0] * 450


def test_a_mix_holds_the_shares_of_its_weights_from_the_start(model: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text(words(*range(10, 50)))
    two.write_text(words(*range(50, 80)))
    mixed = TextOptions(source=f"{one}=3,{two}", seqlen=2, samples=8)
    found = token_windows(model, mixed)
    assert (found[:, 0] >= 53).tolist() == [False, False, False, True] * 2
    assert torch.equal(token_windows(model, replace(mixed, samples=5)), found[:5])
    assert torch.equal(token_windows(model, replace(mixed, skip=3, samples=5)), found[3:])


def test_one_window_in_several_is_taken_of_each_source(model: Path, tmp_path: Path) -> None:
    """Of a mix too, whose order is another than that of the windows; what the original sampled is
    taken whole."""
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text(words(*range(10, 50)))
    two.write_text(words(*range(50, 80)))
    everything = windows(model, one, seqlen=4)
    assert windows(model, one, seqlen=4, every=3) == everything[::3]
    assert windows(model, one, seqlen=4, every=3, skip=1, samples=2) == everything[3:9:3]
    mixed = TextOptions(source=f"{one},{two}", seqlen=2, samples=6, every=2)
    assert (token_windows(model, mixed)[:, 0] - 3).tolist() == [10, 50, 14, 54, 18, 58]
    own = replace(mixed, source=f"{one},self", own=str(two))
    assert (token_windows(model, own)[:, 0] - 3).tolist() == [10, 50, 14, 52, 18, 54]
    with pytest.raises(UsageError, match="every must be at least 1, not 0"):
        TextOptions(source="x", every=0)


def test_calibration_text_is_of_all_of_a_source_or_of_much_of_it(
    model: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text(words(*range(10, 50)))
    two.write_text(words(*range(50, 80)))
    options = TextOptions(source=str(one), seqlen=2, samples=6)

    def apart(count: int, **changes: object) -> int | None:
        return spread(model, replace(options, **changes), count).every

    assert [apart(count) for count in (1, 3, 6, 20, 21)] == [APART, 6, 3, 1, 1]
    assert apart(3, skip=2) == 4  # what is left out is of all of it too
    assert apart(6, every=2) == 2
    mixed = f"{one},{two}"
    assert apart(6, source=mixed) == 15 // 3  # the shorter one decides
    own = {"source": f"{one},self", "own": str(two)}
    assert apart(6, **own) == 20 // 3
    assert apart(6, source="self", own=str(two)) == 1
    found = token_windows(model, spread(model, options, 6))
    assert (found[:, 0] - 3).tolist() == [10, 16, 22, 28, 34, 40]


def test_a_part_that_is_too_short_is_told_and_the_others_go_on(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text(words(*range(10, 14)))
    two.write_text(words(*range(50, 80)))
    found = token_windows(model, TextOptions(source=f"{one},{two}", seqlen=2, samples=8))
    assert (found[:, 0] >= 53).tolist() == [False, True] * 2 + [True] * 4
    assert "part 1 of the mixed text has 2 windows, fewer than its share of 4" in caplog.text


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("", "empty name"),
        ("a.txt,", "empty name"),
        ("a.txt,a.txt=2", "names a.txt twice"),
        ("a.txt=0", "weight of a.txt must be positive, not 0"),
        ("a.txt=-1,b", "weight of a.txt must be positive, not -1"),
        ("a.txt=nan", "weight of a.txt must be positive, not nan"),
    ],
)
def test_a_mix_that_says_nothing_clear_is_refused(source: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        TextOptions(source=source)


def test_a_file_with_the_signs_of_a_mix_in_its_name_is_a_file(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "a,b=2"
    file.write_text(words(*range(10)))
    assert windows(model, file, seqlen=2)[0] == [3, 4]
    assert parts_of("lr=high,b") == (Part("lr=high"), Part("b"))
