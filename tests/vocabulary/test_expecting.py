"""Which tokens the original expects, and what its word does to the choice of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dotexport.app.cli import app
from dotexport.embedded import MODEL_DIR
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.documents import documents
from dotexport.models.loading import load_float32
from dotexport.models.memory import LIMIT
from dotexport.models.text_options import TextOptions
from dotexport.models.text_windows import read_tokenizer, token_windows
from dotexport.storage import manifest
from dotexport.vocabulary.expecting import Spread, expected
from dotexport.vocabulary.trimming import choose_tokens
from dotexport.vocabulary.using import count
from dotexport.vocabulary.vocabulary_options import VocabularyOptions

CPU = torch.device("cpu")


def _windows(samples: int = 6, seqlen: int = 96) -> torch.Tensor:
    text = TextOptions(source="embedded:calibration", samples=samples, seqlen=seqlen)
    return token_windows(MODEL_DIR, text)


def _expected(windows_NL: torch.Tensor) -> Any:
    return expected(Checkpoint.open(MODEL_DIR), windows_NL, dtype=torch.float32, device=CPU)


def test_it_is_the_mean_of_the_models_odds() -> None:
    windows_NL = _windows()
    with torch.inference_mode():
        logits_NLV = load_float32(Checkpoint.open(MODEL_DIR))(input_ids=windows_NL).logits
    odds_V = logits_NLV.double().softmax(-1).mean((0, 1)).numpy()
    found_V = _expected(windows_NL)
    # Odds in float32: 6e-8 relative each, and products of other shapes.
    np.testing.assert_allclose(found_V, odds_V, rtol=1e-4, atol=1e-9)
    assert found_V.sum() == pytest.approx(1.0, abs=1e-5)


def test_a_model_that_is_read_part_by_part_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole_V = _expected(_windows())
    monkeypatch.setenv(LIMIT, "0.001")
    np.testing.assert_array_equal(_expected(_windows()), whole_V)


@pytest.mark.parametrize("pieces", [1, 7, 100])
def test_windows_are_of_the_text_whatever_pieces_it_is_read_in(pieces: int) -> None:
    ids, spread = list(range(1000)), Spread(count=10, length=16)
    for part in np.array_split(np.arange(1000), pieces):
        spread.read(part.tolist())
    windows_NL = spread.windows()
    assert windows_NL.shape == (10, 16)
    starts = windows_NL[:, 0].tolist()
    assert starts == sorted(set(starts))
    assert all(start % 16 == 0 for start in starts)
    assert all(ids[s : s + 16] == row for s, row in zip(starts, windows_NL.tolist(), strict=True))
    once = Spread(count=10, length=16)
    once.read(ids)
    torch.testing.assert_close(once.windows(), windows_NL)


def test_every_window_is_as_likely() -> None:
    """Of 2,000 draws of 10 of 50 each is in 400, with a standard deviation of 18."""
    times_W = np.zeros(50)
    for seed in range(2000):
        spread = Spread(count=10, length=1)
        spread._random = np.random.default_rng(seed)
        spread.read(range(50))
        times_W[spread.windows()[:, 0].numpy()] += 1
    assert abs(times_W - 400).max() < 5 * 18


@pytest.mark.parametrize(("tokens", "shape"), [(5, (1, 5)), (16, (1, 16)), (47, (2, 16))])
def test_a_short_text_is_all_there_is(tokens: int, shape: tuple[int, int]) -> None:
    spread = Spread(count=10, length=16)
    spread.read(range(tokens))
    assert spread.windows().shape == shape


def test_fewer_tokens_are_missing_in_text_that_was_not_counted(tmp_path: Path) -> None:
    """A tenth of the text uses few of the rare tokens that other text of its kind does."""
    some = tmp_path / "some.txt"
    text = "\n\n".join(documents("embedded:calibration"))
    some.write_text(text[: len(text) // 10], encoding="utf-8")
    original, options = Checkpoint.open(MODEL_DIR), VocabularyOptions(vocab=3072)
    others = documents("embedded:evaluation")
    counts_R = count(read_tokenizer(MODEL_DIR), others, original.config["vocab_size"], print)
    missing = []
    for expect in (None, _expected):
        _, kept = choose_tokens(*(MODEL_DIR, original.config, options, str(some)), expect=expect)
        missing.append(1 - counts_R[list(kept.ids)].sum() / counts_R.sum())
        assert (kept.expected is None) == (expect is None)
        assert ("expected" in kept.groups) == (expect is not None)

    assert missing[1] < 0.8 * missing[0]


def test_where_all_that_occurs_stays_the_original_is_not_asked() -> None:
    def refuse(windows_NL: torch.Tensor) -> Any:
        raise AssertionError("asked")

    original, source = Checkpoint.open(MODEL_DIR), "embedded:evaluation"
    options = VocabularyOptions(vocab_for=source)
    _, kept = choose_tokens(MODEL_DIR, original.config, options, None, expect=refuse)
    assert kept.covered == 1.0
    assert kept.expected is None


def test_shrink_asks_it(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    asked = ["--vocab", "2048", "--calib", "embedded:calibration", "--samples", "4"]
    out = tmp_path / "out"
    done = CliRunner().invoke(
        app, ["shrink", str(MODEL_DIR), "-o", str(out), *asked, "--seqlen", "64"]
    )
    assert done.exit_code == 0, done.output
    said = manifest.read(out)["vocabulary"]
    assert 0.9 < said["expected"] < 1.0
    assert said["kept"]["expected"] > 0
