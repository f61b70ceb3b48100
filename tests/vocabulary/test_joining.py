"""Text of a model that lost tokens, read and predicted as its original does."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from dotexport.app.shrink_options import ShrinkOptions
from dotexport.app.shrinking import Shrunk, shrink
from dotexport.embedded import MODEL_DIR
from dotexport.exports.two_vocabularies import evaluate_across
from dotexport.exports.verifying import verify
from dotexport.generation.second_text import NONE
from dotexport.healing.distil_loss import distillation_loss
from dotexport.healing.heal_options import parse_heal
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.loading import load_float32
from dotexport.models.text_options import TextOptions
from dotexport.narrowing.narrow_options import NarrowOptions
from dotexport.vocabulary.joining import END, UNKNOWN, Spellings
from dotexport.vocabulary.segmenting import Reading
from dotexport.vocabulary.trimming import trim
from dotexport.vocabulary.vocabulary_options import VocabularyOptions

# Rows are a, b, c, d, and a token that spells nothing; of the original they are 0, 2, 3, 5, 8.
# 1 was ab, 4 was abc, 6 was abd, 7 was cd.
TOY = Spellings((0, 2, 3, 5, 8), {1: (0, 1), 4: (0, 1, 2), 6: (0, 1, 3), 7: (2, 3)})
TEXT = TextOptions(source="embedded:calibration", samples=16, seqlen=64)


def odds_of(p_O: torch.Tensor, *pieces: int) -> tuple[torch.Tensor, float]:
    """Probabilities of the next piece behind these, and what they are worth."""
    given = TOY.beginnings[pieces] if pieces else END
    log_p_RV, worth_R = TOY.odds(p_O[None], torch.tensor([given]))
    return log_p_RV[0].exp(), float(worth_R[0])


def test_pieces_are_as_likely_together_as_the_tokens_that_they_spell() -> None:
    """The chain rule, with what ends after each piece: in float64, to its rounding."""
    p_O = torch.rand(9, generator=torch.Generator().manual_seed(0)).double()
    p_O /= p_O.sum()
    first, worth = odds_of(p_O)
    assert worth == 1
    assert float(first.sum()) == pytest.approx(1)
    wholes = {(row,): number for row, number in enumerate(TOY.kept)} | TOY.wholes
    for pieces, number in wholes.items():
        likely = float(first[pieces[0]])
        for count in range(1, len(pieces)):
            next_V, goes_on = odds_of(p_O, *pieces[:count])
            assert float(next_V.sum()) == pytest.approx(1)
            likely *= goes_on * float(next_V[pieces[count]])
        if pieces in TOY.beginnings:  # and then it ends
            likely *= 1 - odds_of(p_O, *pieces)[1]
        assert likely == pytest.approx(float(p_O[number]), rel=1e-12)


def test_windows_are_read_from_the_left_the_longest_first() -> None:
    #                        ab is abc, then b, cd, a, and abd begins but its end is not here
    joined = TOY.joined(torch.tensor([[0, 1, 2, 1, 2, 3, 0, 0, 1], [4, 4, 4, 4, 4, 4, 4, 4, 0]]))
    assert joined.ids_BL.tolist() == [[4, 2, 7, 0, 1, 1, 1, 1, 1], [8] * 8 + [0]]
    within = TOY.beginnings
    assert joined.given_C.tolist()[:9] == [
        *(UNKNOWN, UNKNOWN, END, END, within[2,], END, END, within[0,], END)
    ]
    # Within a token the odds stand where it was predicted; behind the window's last one, at it.
    assert joined.at_C.tolist() == [0, 0, 0, 1, 1, 2, 3, 3, 4, *range(9, 18)]


def test_what_nothing_was_read_before_is_worth_nothing() -> None:
    log_p_RV, worth_R = TOY.odds(torch.full((1, 9), 1 / 9), torch.tensor([UNKNOWN]))
    assert worth_R.tolist() == [0]
    assert bool(log_p_RV.isfinite().all())


@pytest.fixture(scope="module", params=["embedded", "stories260k"])
def trimmed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Byte level, and of characters that fall back on bytes; both with some of their tokens."""
    folder = MODEL_DIR
    if request.param != "embedded":
        folder = request.getfixturevalue("assets") / request.param
    options = VocabularyOptions(vocab=1000 if folder == MODEL_DIR else 400)
    original = Checkpoint.open(folder)
    return trim(original, options, TEXT.source, tmp_path_factory.mktemp("trimmed"))


@pytest.mark.assets
def test_joined_it_is_the_text_and_nearly_always_the_originals_tokens(trimmed: Any) -> None:
    """Nearly: where two spell a third across their ends (" ri" is " " and "ri", or " r" and "i"),
    what came first in the original may come second here. Pairs, since one such word is in it."""
    spellings = Spellings.of(trimmed)
    ours, theirs = Reading.of(trimmed.folder), Reading.of(trimmed.original.folder)
    text = "The old house by the river had been empty for many years, said the children. " * 8
    row, wanted = ours.encode(text), theirs.encode(text)
    joined = spellings.joined(torch.tensor([row]))
    length = 1 + int(joined.at_C[-1])
    ids = joined.ids_BL[0, :length].tolist()
    assert theirs.decode(ids) == ours.decode(row)
    assert len(set(ids) - set(trimmed.kept.ids)) > 2  # some are tokens that left
    same = sum(one == other for one, other in zip(pairwise(ids), pairwise(wanted), strict=False))
    assert same > 0.8 * len(wanted)
    # Wherever both have read whole tokens, they have read as much text.
    for place in (joined.given_C == END).nonzero().flatten().tolist():
        read = int(joined.at_C[place])
        assert theirs.widths[ids[: read + 1]].sum() == ours.widths[row[: place + 1]].sum()


def test_it_is_the_plain_loss_where_no_token_left() -> None:
    """All rows stay, and no text is spelled otherwise: the same numbers, but for the order in which
    probabilities are summed to 1 again."""
    model, other = (load_float32(Checkpoint.open(MODEL_DIR)) for _ in range(2))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.01)
    tokens_BL = torch.randint(4096, (2, 24), generator=torch.Generator().manual_seed(0))
    everything = replace(TOY, kept=tuple(range(4096)), spelled={4096: (0, 1)})
    everything.__dict__["tables"] = (torch.arange(4096), *torch.empty(2, 0, dtype=torch.int64))
    E_DD = torch.eye(256)
    plain, found = (
        distillation_loss(other, model, E_DD, tokens_BL, hidden_weight=1.0, spellings=spellings)
        for spellings in (None, everything)
    )
    assert found.item() == pytest.approx(plain.item(), rel=1e-5)


@pytest.fixture(scope="module")
def healed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Shrunk]:
    """The embedded model with a quarter of its tokens, healed by some steps or none."""

    def make(heal: str) -> Shrunk:
        _, distil = parse_heal(heal, samples=None, precision="fp32", seed=0)
        options = ShrinkOptions(
            text=TEXT,
            other=NONE,
            narrow=NarrowOptions(local=None),
            vocabulary=VocabularyOptions(vocab=1000),
            heal=distil,
        )
        return shrink(MODEL_DIR, tmp_path_factory.mktemp("healed") / "out", options)

    return make


def test_a_model_that_lost_nothing_but_tokens_learns_to_spell_them(
    healed: Callable[[str], Shrunk],
) -> None:
    """On text that it was not trained on, per token of the original."""
    text = TextOptions(source="embedded:evaluation", samples=4, seqlen=128)
    outs = {heal: healed(heal) for heal in ("none", "60")}
    found = {
        heal: evaluate_across(shrunk.out / "hf", MODEL_DIR, text) for heal, shrunk in outs.items()
    }
    assert found["60"].perplexity < 0.95 * found["none"].perplexity
    told = outs["60"].healing
    assert told is not None
    assert told["kl"][1] < 0.95 * told["kl"][0]
    # The original says of each piece what it says of its own tokens: it is no worse at pieces.
    assert told["original_perplexity"] < 0.5 * told["perplexity"][0]
    cards = [" ".join((outs[heal].out / "README.md").read_text().split()) for heal in outs]
    assert ["every weight is the original's" in card for card in cards] == [True, False]
    assert ["No layer was narrowed" in card for card in cards] == [False, True]
    assert [parity.passed for parity in verify(outs["60"].out)] == [True]
    record = json.loads((outs["60"].out / "dotexport.json").read_text())
    assert record["sizes"]["vocab_size"] == [4096, 1024]
