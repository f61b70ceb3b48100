"""A tokenizer that lost tokens: the others are read as before, under the ids of their rows."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dotexport.errors import CheckpointError, SizeError, UnsupportedModelError, UsageError
from dotexport.models.checkpoint import Checkpoint, read_config
from dotexport.vocabulary import proving
from dotexport.vocabulary.segmenting import Reading
from dotexport.vocabulary.trimming import Trimmed, choose_tokens, trim
from dotexport.vocabulary.vocabulary_options import MULTIPLE, VocabularyOptions

from .conftest import KINDS, write_tokenizer

TokenizerOf = Callable[[str], Checkpoint]
HALF = VocabularyOptions(vocab=448)


@pytest.fixture(scope="session")
def trimmed(
    tokenizer_of: TokenizerOf, source: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Reading, Reading, Trimmed]]:
    """Kind of a tokenizer -> it, what is left of it, and the checkpoint with that."""
    found: dict[str, tuple[Reading, Reading, Trimmed]] = {}

    def make(kind: str) -> tuple[Reading, Reading, Trimmed]:
        if kind not in found:
            original = tokenizer_of(kind)
            cut = trim(original, HALF, source, tmp_path_factory.mktemp("trimmed"))
            found[kind] = Reading.of(original.folder), Reading.of(cut.folder), cut
        return found[kind]

    return make


Cut = Callable[[str], tuple[Reading, Reading, Trimmed]]


@pytest.mark.parametrize("kind", KINDS)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 1 << 32), length=st.integers(1, 30))
def test_text_of_tokens_that_stay_is_the_same_tokens(
    trimmed: Cut, kind: str, seed: int, length: int
) -> None:
    before, after, cut = trimmed(kind)
    text = before.decode(random.Random(seed).choices(cut.kept.ids, k=length))
    new = cut.kept.new_ids
    tokens = before.encode(text)
    if all(token in new for token in tokens):  # joined, they may spell others
        assert after.encode(text) == [new[token] for token in tokens]


@pytest.mark.parametrize("kind", KINDS)
def test_such_texts_are_not_rare(trimmed: Cut, kind: str) -> None:
    """The test above would pass with texts that are all of other tokens."""
    before, _, cut = trimmed(kind)
    random_one = random.Random(0)
    texts = [before.decode(random_one.choices(cut.kept.ids, k=5)) for _ in range(100)]
    assert sum(set(before.encode(text)) <= set(cut.kept.ids) for text in texts) > 30


@pytest.mark.parametrize("kind", KINDS)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=st.text(max_size=40))
def test_any_text_comes_back_as_it_did(trimmed: Cut, kind: str, text: str) -> None:
    before, after, _ = trimmed(kind)
    assert after.decode(after.encode(text)) == before.decode(before.encode(text))


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_leave_by_use_and_rows_are_a_multiple(trimmed: Cut, kind: str) -> None:
    before, after, cut = trimmed(kind)
    assert len(cut.kept.ids) == 448 == cut.config["vocab_size"] == 7 * MULTIPLE
    assert len(after.ids) == 448 < len(before.ids)
    assert set(after.ids) < set(before.ids)
    assert after.ids.keys() >= {"<unk>", "<s>", "</s>", "<tool>", "<|added|>"}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_in_every_file_are_those_of_the_same_tokens(trimmed: Cut, kind: str) -> None:
    before, after, cut = trimmed(kind)
    named = {number: token for token, number in before.ids.items()}
    config, generation = cut.config, json.loads((cut.folder / "generation_config.json").read_text())
    assert config["eos_token_id"] == [after.ids["</s>"], after.ids[named[300]]]
    assert generation["suppress_tokens"] == [after.ids[named[301]]]
    assert generation["bad_words_ids"] == [[after.ids[named[302]], after.ids[named[303]]]]
    assert generation["pad_token_id"] == -1
    stored = json.loads((cut.folder / "tokenizer.json").read_text())
    assert stored["padding"]["pad_id"] == after.ids["</s>"]
    assert stored["post_processor"]["special_tokens"]["<s>"]["ids"] == [after.ids["<s>"]]
    assert {e["content"]: e["id"] for e in stored["added_tokens"]}.items() <= after.ids.items()
    assert after.encode("x")[0] == after.ids["<s>"]


def test_a_word_of_an_unreached_branch_of_the_template_stays(trimmed: Cut) -> None:
    before, after, _ = trimmed("byte-level")
    assert len(after.encode("whomever")) == len(before.encode("whomever"))


@pytest.mark.parametrize("kind", KINDS)
def test_all_that_a_text_uses_stays_without_a_number(
    tokenizer_of: TokenizerOf, source: str, tmp_path: Path, kind: str
) -> None:
    original = tokenizer_of(kind)
    cut = trim(original, VocabularyOptions(vocab_for=source), "embedded:evaluation", tmp_path)
    assert cut.report["covered"] == 1.0
    proof = cut.report["proof"][source]
    assert proof["mapped"] == proof["tokens"] > 1000
    assert proof["tokens_per_byte"][0] == proof["tokens_per_byte"][1]
    other = cut.report["proof"]["embedded:evaluation"]["tokens_per_byte"]
    assert other[1] > other[0]
    assert len(cut.kept.ids) % MULTIPLE == 0 or len(cut.kept.ids) == cut.kept.rows


def test_rows_without_a_token_leave_first(
    tokenizer_of: TokenizerOf, source: str, tmp_path: Path
) -> None:
    original = tokenizer_of("byte-level")
    tokens = len(Reading.of(original.folder).ids)
    _, kept = choose_tokens(original.folder, original.config, VocabularyOptions(vocab=640), source)
    assert max(kept.ids) < tokens
    # All tokens; with rows to a multiple that are the original's own, where it has so many.
    _, kept = choose_tokens(
        original.folder, original.config, VocabularyOptions(vocab=tokens), source
    )
    assert len(kept.ids) == tokens
    wider = original.config | {"vocab_size": tokens + 100}
    (tmp_path / "model").mkdir()
    folder = write_tokenizer(tmp_path / "model", "byte-level")
    (folder / "config.json").write_text(json.dumps(wider))
    _, kept = choose_tokens(folder, wider, VocabularyOptions(vocab=tokens), source)
    assert len(kept.ids) == -(-tokens // MULTIPLE) * MULTIPLE < kept.rows
    assert kept.groups["empty rows"] == len(kept.ids) - tokens > 0
    assert kept.as_dict()["tokens"] == [tokens, tokens]


def test_merges_bring_their_ancestors(tokenizer_of: TokenizerOf, tmp_path: Path) -> None:
    """A long token alone is listed; what it is merged from stays, and no text uses it."""
    original = tokenizer_of("byte-level")
    before = Reading.of(original.folder)
    longest = max(before.pieces.ids, key=len)
    listed, empty = tmp_path / "tokens.txt", tmp_path / "empty.txt"
    listed.write_text(longest + "\n")
    empty.write_text("a")
    options = VocabularyOptions(vocab_for=str(empty), keep_tokens=str(listed))
    cut = trim(original, options, str(empty), _made(tmp_path / "cut"))
    assert cut.report["kept"]["ancestors"] > 0
    assert 0 < cut.report["ancestors"] < 1
    text = longest.replace("Ġ", " ").replace("Ċ", "\n")
    assert before.encode(text)[1:] == [before.ids[longest]]
    assert Reading.of(cut.folder).encode(text)[1:] == [Reading.of(cut.folder).ids[longest]]


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize("line", ["Ġclass", "700", '"Ġclass"', "Ġclass\r"])
def test_a_listed_token_stays(
    tokenizer_of: TokenizerOf, tmp_path: Path, source: str, line: str
) -> None:
    original = tokenizer_of("byte-level")
    file = tmp_path / "tokens.txt"
    file.write_text(f"\n{line}\n")
    empty = tmp_path / "empty.txt"
    empty.write_text("a")
    options = VocabularyOptions(vocab_for=str(empty), keep_tokens=str(file))
    reading, kept = choose_tokens(original.folder, original.config, options, None)
    wanted = 700 if line == "700" else reading.ids["Ġclass"]
    assert wanted in kept.ids
    without = replace(options, keep_tokens=None)
    _, fewer = choose_tokens(original.folder, original.config, without, None)
    assert wanted not in fewer.ids


@pytest.mark.parametrize("line", ["no such token", "100000", '"no such"', "[1]"])
def test_a_line_that_is_no_token_is_refused(
    tokenizer_of: TokenizerOf, tmp_path: Path, line: str
) -> None:
    original = tokenizer_of("byte-level")
    file = tmp_path / "tokens.txt"
    file.write_text(f"Ġself\n{line}\n")
    options = VocabularyOptions(vocab=448, keep_tokens=str(file))
    with pytest.raises(UsageError, match=r"line 2: .* is no token of the model"):
        choose_tokens(original.folder, original.config, options, None)


def test_too_few_and_too_many_are_refused(tokenizer_of: TokenizerOf) -> None:
    original = tokenizer_of("byte-level")
    with pytest.raises(SizeError, match=r"--vocab 64 is too few.* are (\d+)") as refused:
        choose_tokens(original.folder, original.config, VocabularyOptions(vocab=64), None)
    least = int(str(refused.value).rpartition(" are ")[2].partition(";")[0])
    _, kept = choose_tokens(original.folder, original.config, VocabularyOptions(vocab=least), None)
    assert least <= len(kept.ids) < least + MULTIPLE
    with pytest.raises(SizeError, match="--vocab 9999 is more than the"):
        choose_tokens(original.folder, original.config, VocabularyOptions(vocab=9999), None)


def test_a_cut_that_takes_nothing_is_refused(tokenizer_of: TokenizerOf) -> None:
    original = tokenizer_of("byte-level")
    everything = VocabularyOptions(vocab=original.config["vocab_size"])
    with pytest.raises(SizeError, match="rows would stay, so that nothing leaves"):
        choose_tokens(original.folder, original.config, everything, None)


def test_files_beside_tokenizer_json_follow_or_leave(
    source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_tokenizer(_made(tmp_path / "model"), "byte-level")
    stored = json.loads((folder / "tokenizer.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(stored["model"]["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in stored["model"]["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    added = {e["content"]: e["id"] for e in stored["added_tokens"]}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    entries = {str(number): {"content": token, "special": True} for token, number in added.items()}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | {"added_tokens_decoder": entries})
    )
    (folder / "tokenizer.model").write_bytes(b"sentencepiece")
    (folder / "LICENSE").write_text("mine")
    cut = trim(Checkpoint(folder, read_config(folder), {}), HALF, source, _made(tmp_path / "cut"))
    after = Reading.of(cut.folder)
    assert json.loads((cut.folder / "vocab.json").read_text()) == dict(after.pieces.ids)
    lines = (cut.folder / "merges.txt").read_text().splitlines()[1:]
    assert [tuple(line.split(" ")) for line in lines] == after.pieces.merges  # type: ignore[attr-defined]
    told = json.loads((cut.folder / "added_tokens.json").read_text())
    assert told == {token: after.ids[token] for token in added}
    decoder = json.loads((cut.folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {entry["content"]: int(n) for n, entry in decoder.items()} == told
    assert (cut.folder / "LICENSE").read_text() == "mine"
    assert not (cut.folder / "tokenizer.model").exists()
    assert cut.report["files_left_out"] == ["tokenizer.model"]
    assert "left out, as they hold the original's tokens: tokenizer.model" in caplog.text


def test_merges_that_are_strings_stay_strings(source: str, tmp_path: Path) -> None:
    folder = write_tokenizer(_made(tmp_path / "model"), "byte-level")
    file = folder / "tokenizer.json"
    stored = json.loads(file.read_text())
    stored["model"]["merges"] = [" ".join(pair) for pair in stored["model"]["merges"]]
    file.write_text(json.dumps(stored))
    cut = trim(Checkpoint(folder, read_config(folder), {}), HALF, source, _made(tmp_path / "cut"))
    merges = json.loads((cut.folder / "tokenizer.json").read_text())["model"]["merges"]
    assert {type(pair) for pair in merges} == {str}
    assert set(merges) < set(stored["model"]["merges"])


# What is refused ----------------------------------------------------------------------------------


def _spoilt(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    write_tokenizer(_made(folder), "byte-level")
    file = folder / "tokenizer.json"
    stored = json.loads(file.read_text())
    change(stored)
    file.write_text(json.dumps(stored))
    return folder


def _word_level(stored: dict[str, Any]) -> None:
    stored["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_word_level, "kind WordLevel"),
        (lambda s: s["model"].update(continuing_subword_prefix="##"), "with continuing_subword"),
        (lambda s: s["model"].update(end_of_word_suffix="</w>"), "with end_of_word_suffix"),
    ],
)
def test_kinds_that_lose_no_tokens_exactly_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    folder = _spoilt(tmp_path / "model", change)
    with pytest.raises(UnsupportedModelError, match=message):
        choose_tokens(folder, read_config(folder), HALF, None)


def test_slow_tokenizers_are_refused_with_what_to_do(tmp_path: Path) -> None:
    folder = write_tokenizer(_made(tmp_path / "model"), "byte-level")
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(UnsupportedModelError, match=r"no tokenizer.json: a slow .*save_pretrained"):
        choose_tokens(folder, read_config(folder), HALF, None)


def test_an_added_token_without_a_row_leaves(source: str, tmp_path: Path) -> None:
    """As Gemma 3's for pictures, in a model without them."""
    folder = write_tokenizer(_made(tmp_path / "model"), "byte-level")
    before = Reading.of(folder)
    rows = before.ids["<|added|>"]
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": rows}
    (folder / "config.json").write_text(json.dumps(config))
    cut = trim(Checkpoint(folder, read_config(folder), {}), HALF, source, _made(tmp_path / "cut"))
    stored = json.loads((cut.folder / "tokenizer.json").read_text())
    assert [entry["content"] for entry in stored["added_tokens"]] == [
        "<unk>",
        "<s>",
        "</s>",
        "<tool>",
    ]
    with pytest.raises(
        CheckpointError, match=r"holds the token '<\|added\|>', for which the model has"
    ):
        Reading.of(folder).encode("x <|added|>")


def test_tokens_without_a_row_are_refused(tmp_path: Path) -> None:
    folder = write_tokenizer(_made(tmp_path / "model"), "byte-level")
    (folder / "config.json").write_text(json.dumps({"vocab_size": 500}))
    with pytest.raises(CheckpointError, match="expected a row for each"):
        choose_tokens(folder, read_config(folder), HALF, None)


def test_a_config_without_rows_is_refused(tmp_path: Path) -> None:
    folder = write_tokenizer(_made(tmp_path / "model"), "byte-level")
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="gives vocab_size = None"):
        Reading.of(folder)


def test_a_tokenizer_that_splits_otherwise_is_noticed(trimmed: Cut) -> None:
    """The proof sees a lost merge, a swapped pair of ids, and text that does not come back."""
    before, after, cut = trimmed("byte-level")
    ids = list(cut.kept.ids)
    swapped = [*ids[:300], ids[301], ids[300], *ids[302:]]
    with pytest.raises(CheckpointError, match="gives tokens other ids"):
        proving.check_names(before, after, swapped)
    text = [before.decode([ids[300], ids[301]])]
    assert proving.prove(before, after, ids, text).mapped > 0
    with pytest.raises(CheckpointError, match="tokens that stayed are split otherwise"):
        proving.prove(before, after, swapped, text)
    with pytest.raises(CheckpointError, match="no longer comes back"):
        proving.prove(
            before, _Deaf(after.tokenizer, after.stored, after.pieces, after.rows), ids, text
        )


class _Deaf(Reading):
    def decode(self, ids: Any) -> str:
        return super().decode(ids)[1:]


def test_nothing_counted_says_so(tokenizer_of: TokenizerOf) -> None:
    original = tokenizer_of("byte-level")
    _, kept = choose_tokens(original.folder, original.config, HALF, None)
    assert kept.covered is None
    assert "used" not in kept.groups
