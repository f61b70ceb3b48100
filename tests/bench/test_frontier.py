"""The verdict at equal bytes: what beats what, what is said of it, and runs that go on."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dotexport import embedded
from dotexport.app import cli
from dotexport.bench import frontier as measuring
from dotexport.bench.frontier_points import Frontier, OnText, Point
from dotexport.bench.report.frontier_words import plot, verdict
from dotexport.exports.quality import evaluate
from dotexport.models.checkpoint import Checkpoint, CheckpointWriter, read_config
from dotexport.models.text_options import TextOptions
from dotexport.models.text_windows import token_windows

WORDS = "The cat sat on the mat and looked at a dog that was not there. "
CODE = "def look(at):\n    return [one for one in at if one is not None]\n"


def point(model: str, precision: str, mb: float, kl: float, other: float | None = None) -> Point:
    texts = [
        OnText(source=name, num_tokens=9, kl=value, perplexity=2.0, bits_per_byte=1.0)
        for name, value in (("a.txt", kl), ("b.txt", kl if other is None else other))
    ]
    return Point(
        model=model,
        precision=precision,
        num_bytes=round(mb * 1e6),
        num_parameters=1,
        texts=tuple(texts),
    )


def found(*points: Point) -> Frontier:
    return Frontier(target="t", points=points, skipped=(), notes=(), workload=None)


WHOLE = (
    point("original", "fp16", 16, 0.0001),
    point("original", "int8", 8, 0.001),
    point("original", "int4", 4, 0.02),
)


def test_what_is_larger_and_further_is_off_the_frontier() -> None:
    narrowed = point("narrow", "int8", 6, 0.3)
    best = found(*WHOLE, narrowed).best
    assert best == WHOLE
    [said] = verdict(found(*WHOLE, narrowed))
    assert said.startswith("For bytes alone, quantise the original (fp16, int8, int4)")
    assert "narrow in int8 (6.00 MB, KL 0.3000 and 0.3000) stands original in int4" in said


def test_what_is_smaller_than_all_or_closer_at_its_bytes_is_on_it() -> None:
    smaller, closer = point("narrow", "int4", 3, 0.3), point("narrow", "int8", 6, 0.01)
    assert set(found(*WHOLE, smaller, closer).best) == {*WHOLE, smaller, closer}
    said = verdict(found(*WHOLE, smaller, closer))
    assert said == [
        "For bytes, narrowing pays: narrow in int8 (6.00 MB, KL 0.0100 and 0.0100), and nothing of "
        "the original is both as small and as close.",
        "Smaller than anything of the original: narrow in int4 (3.00 MB, KL 0.3000 and 0.3000).",
    ]
    alone = verdict(found(*WHOLE, smaller))
    assert "at equal bytes nothing narrowed is ahead." in alone[0]
    assert alone[1].startswith("Smaller than anything")


def test_both_texts_must_agree_that_one_beats_another() -> None:
    mixed = point("narrow", "int8", 6, 0.3, other=0.01)
    assert mixed in found(*WHOLE, mixed).best


def test_a_hair_on_one_text_is_no_reason_to_narrow() -> None:
    """Of 4 MB, int4 has .02 on both texts."""
    hair = point("narrow", "int8", 6, 0.3, other=0.0199)
    assert hair in found(*WHOLE, hair).best
    [said] = verdict(found(*WHOLE, hair))
    assert said.startswith("For bytes alone, quantise the original")
    assert "stands original in int4" in said


def timed(point: Point, *rates: float) -> Point:
    return replace(point, prefill_tok_s=rates, decode_tok_s=rates[:1] * len(rates))


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        ((130.0, 140.0), "For prefill, narrow: 1.35x in every round"),
        ((90.0, 140.0), "For prefill, no gain that shows in every round"),
        ((50.0, 60.0), "For prefill, narrowing loses: 0.55x"),
    ],
)
def test_a_rate_is_a_gain_only_in_every_round(ours: tuple[float, ...], words: str) -> None:
    narrowed = timed(point("narrow", "int8", 6, 0.3), *ours)
    whole = [timed(one, 95.0, 105.0) for one in WHOLE]
    assert any(said.startswith(words) for said in verdict(found(*whole, narrowed)))


def rival(precision: str, mb: float, bits: float) -> Point:
    texts = tuple(
        OnText(source=name, num_tokens=9, kl=None, perplexity=2.0, bits_per_byte=bits)
        for name in ("a.txt", "b.txt")
    )
    one = point("sibling", precision, mb, 0.0)
    return replace(one, texts=texts, rival=True)


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        ([rival("int8", 5, 0.9)], "Take sibling: each narrowed artifact is beaten by one of it"),
        ([rival("int8", 5, 1.1)], "sibling is behind: each artifact of it is beaten by one of"),
        (
            [rival("int8", 2, 1.1)],
            "Beside sibling it depends on the size: nothing of ours is as small and reads as well "
            "as sibling in int8, nothing of it as narrow in int4.",
        ),
    ],
)
def test_a_rival_is_judged_in_bits_at_equal_bytes(theirs: list[Point], words: str) -> None:
    told = found(*WHOLE, point("narrow", "int4", 5, 0.3), *theirs)
    if "Take" in words:
        told = found(*WHOLE, point("narrow", "int4", 6, 0.3), *theirs)
    assert any(said.startswith(words) for said in verdict(told)), verdict(told)
    # It has no divergence: neither on the frontier nor in the plot.
    assert not {p.model for p in told.best} & {"sibling"}
    assert "sibling" not in plot(told).alt
    assert ("sibling", "int8") in {row[:2] for row in plot(told).rows}


def test_the_plot_shows_every_point_in_words_and_numbers() -> None:
    shown = plot(found(*WHOLE, point("narrow", "int4", 3, 0.0)))
    assert shown.png.startswith(b"\x89PNG")
    assert [row[:3] for row in shown.rows][:2] == [
        ("narrow", "int4", 3.0),
        ("original", "int4", 4.0),
    ]
    assert "original in fp16 (16.00 MB, KL 0.0001" in shown.alt


# Measured ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The embedded model, and one of its size that is a little off."""
    home = tmp_path_factory.mktemp("models")
    whole, other = (Path(shutil.copytree(embedded.MODEL_DIR, home / n)) for n in ("whole", "off"))
    checkpoint = Checkpoint.open(embedded.MODEL_DIR)
    generator = torch.Generator().manual_seed(0)
    for file in other.glob("*.safetensors"):
        file.unlink()
    writer = CheckpointWriter(other, checkpoint.specs)
    for name in checkpoint.files:
        values = checkpoint.tensor(name).float()
        noise = torch.randn(values.shape, generator=generator) * values.std(correction=0)
        writer.write(name, values + 0.05 * noise)
    writer.finish()
    return whole, other


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    for name, words in (("words.txt", WORDS), ("code.txt", CODE)):
        (tmp_path / name).write_text(words * 40)
    return [tmp_path / "words.txt", tmp_path / "code.txt"]


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dotexport", "frontier", *map(str, arguments)])
        code: Any = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return run


def short(texts: list[Path]) -> list[object]:
    return ["--text", texts[0], "--other", texts[1], "--samples", 2, "--seqlen", 64]


def test_divergence_is_that_of_eval_and_bytes_are_those_on_disk(
    models: tuple[Path, Path], texts: list[Path], call: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    asked = [*models, *short(texts), "--target", "hf", "--no-times", "-o", out, "--json"]
    code, said, told = call(*asked)
    assert code == 0, told
    record = json.loads(said)
    assert record == json.loads((out / "frontier.json").read_text())
    assert (out / "frontier.png").is_file()
    whole, other = record["points"]
    assert (whole["model"], other["model"]) == ("original", "off")
    assert whole["on_frontier"]
    assert not other["on_frontier"]
    for number, text in enumerate(texts):
        windows = token_windows(models[0], TextOptions(source=str(text), samples=2, seqlen=64))
        quality = evaluate(models[1], models[0], windows)
        mine = other["texts"][number]
        assert mine["kl"] == pytest.approx(quality.kl, rel=1e-4)
        assert mine["perplexity"] == pytest.approx(quality.perplexity, rel=1e-4)
        assert mine["num_tokens"] == quality.num_tokens
        assert whole["texts"][number]["kl"] < 1e-6
        # A byte-level tokenizer spells every byte: nats of all tokens over bytes of all text.
        assert 0.1 < mine["bits_per_byte"] < 8
    folders = [path for path in (out / "artifacts").iterdir() if path.is_dir()]
    sizes = {sum(f.stat().st_size for f in one.iterdir()) for one in folders}
    assert {whole["num_bytes"], other["num_bytes"]} == sizes


def test_a_rival_reads_the_same_text_in_its_own_tokens(
    models: tuple[Path, Path], texts: list[Path], tiny_llama: Callable[[str], Path], call: Any
) -> None:
    """The original as its own rival: boundaries of windows alone make a difference."""
    stranger = tiny_llama("wide-heads")
    flags = ["--target", "hf", "--no-times", "--rival", models[0], "--rival", stranger, "--json"]
    code, said, told = call(*models[:1], *short(texts), *flags)
    assert code == 0, told
    whole, same, other = json.loads(said)["points"]
    assert (same["rival"], same["texts"][0]["kl"]) == (True, None)
    for mine, theirs, strange in zip(whole["texts"], same["texts"], other["texts"], strict=True):
        assert theirs["bits_per_byte"] == pytest.approx(mine["bits_per_byte"], rel=0.05)
        # Random weights are no better than a guess among its tokens.
        assert strange["perplexity"] > 0.9 * read_config(stranger)["vocab_size"]


def test_a_run_that_was_stopped_goes_on_where_it_was(
    models: tuple[Path, Path],
    texts: list[Path],
    call: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, asked = tmp_path / "out", measuring._on_text
    judged: list[str] = []

    def stop(session: Any, reference: Any, text: Any, one: Any) -> OnText:
        judged.append(one.precision)
        if len(judged) == 4:
            raise KeyboardInterrupt
        return asked(session, reference, text, one)

    monkeypatch.setattr(measuring, "_on_text", stop)
    flags = [models[0], *short(texts), "--target", "gguf:fp16", "--target", "gguf:int8"]
    flags += ["--no-times", "-o", out]
    assert call(*flags)[0] == 130
    assert len(judged) == 4
    code, _, told = call(*flags)
    assert code == 0, told
    assert judged[4:] == ["int8", "int8"]
    record = json.loads((out / "frontier.json").read_text())
    assert [p["precision"] for p in record["points"]] == ["fp16", "int8"]
    sizes = [p["num_bytes"] for p in record["points"]]
    assert sizes[0] > 1.5 * sizes[1]
    assert record["points"][0]["texts"][0]["kl"] < record["points"][1]["texts"][0]["kl"]


def test_artifacts_are_timed_in_turns(
    models: tuple[Path, Path], texts: list[Path], call: Any
) -> None:
    fast = ["--rounds", 2, "--min-iterations", 2, "--min-seconds", 0, "--threads", 1]
    shape = ["--prompt", 8, "--generate", 4]
    code, said, told = call(*models, *short(texts), "--target", "hf", *fast, *shape, "--json")
    assert code == 0, told
    record = json.loads(said)
    for one in record["points"]:
        assert len(one["prefill_tok_s"]) == len(one["decode_tok_s"]) == 2
        assert min(one["decode_tok_s"]) > 0
        assert one["peak_rss_bytes"] > one["num_bytes"]
    assert sum("For prefill" in line for line in record["verdict"]) == 1


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--target", "hf", "--target", "gguf"], 2, "expected one target"),
        (["--target", "gguf:int3"], 2, "cannot write 'int3'"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(
    flags: list[str], code: int, words: str, models: tuple[Path, Path], texts: list[Path], call: Any
) -> None:
    ended, said, told = call(models[0], *short(texts), *flags, "--no-times")
    assert (ended, said) == (code, "")
    assert words in told


def test_what_a_target_cannot_hold_is_left_out_with_its_reason(
    models: tuple[Path, Path], texts: list[Path], call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ggml = pytest.importorskip("dotexport.targets.ggml")
    monkeypatch.setattr(
        *(ggml.Gguf, "problems"),
        lambda self, checkpoint, precision: ["too odd"] if precision == "int4-k" else [],
    )
    flags = [models[0], *short(texts), "--no-times", "--target", "gguf:int4-k"]
    code, _, told = call(*flags)
    assert code == 5
    assert "original in int4-k: too odd" in told
    code, said, told = call(*flags, "--target", "gguf:fp16", "--json")
    assert code == 0, told
    record = json.loads(said)
    assert [p["precision"] for p in record["points"]] == ["fp16"]
    assert "too odd" in record["skipped"][0]


def test_a_folder_of_something_else_is_not_written_into(
    models: tuple[Path, Path], texts: list[Path], call: Any, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear")
    flags = [*short(texts), "--target", "hf", "--no-times", "-o", tmp_path / "mine"]
    code, _, told = call(models[0], *flags)
    assert code == 2
    assert "holds something else" in told


def test_one_text_and_gguf_without_llama_cpp_are_told(
    models: tuple[Path, Path], texts: list[Path], call: Any
) -> None:
    flags = ["--text", texts[0], "--samples", 2, "--seqlen", 64, "--target", "gguf:int8", "--json"]
    code, said, told = call(models[0], *flags)
    assert code == 0, told
    notes = json.loads(said)["notes"]
    assert any("--other" in note for note in notes)
    assert any("--llama-cpp" in note for note in notes)
