"""Text of a model that lost tokens, read and predicted as its original does."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from dotexport.app.shrink_options import ShrinkOptions
from dotexport.app.shrinking import shrink
from dotexport.embedded import MODEL_DIR
from dotexport.exports.two_vocabularies import aligned_windows, evaluate_across
from dotexport.exports.verifying import verify
from dotexport.generation.second_text import NONE
from dotexport.healing.distil_head import Given, Head, divergence
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


def odds_of(p_O: torch.Tensor, *pieces: int) -> list[float]:
    """Probabilities of the next piece behind these."""
    given = TOY.beginnings[pieces] if pieces else END
    return TOY.odds(p_O[None], torch.tensor([given]))[0].exp().tolist()


def test_pieces_are_as_likely_as_all_tokens_that_go_on_so() -> None:
    """Equations (1) and (2) written out, in float64 to its rounding; many predictions together."""
    p_O = torch.rand(9, generator=torch.Generator().manual_seed(0)).double()
    p_O /= p_O.sum()
    wholes = {(row,): number for row, number in enumerate(TOY.kept)} | TOY.wholes
    asked = [(), *TOY.beginnings]
    assert len(asked) == 4  # nothing, a, ab, and c
    for so_far in asked:
        count = len(so_far)
        longer = {w: float(p_O[n]) for w, n in wholes.items() if w[:count] == so_far != w}
        summed = [sum(p for w, p in longer.items() if w[count] == row) for row in range(5)]
        expected = [part / sum(longer.values()) for part in summed]
        assert odds_of(p_O, *so_far) == pytest.approx(expected, rel=1e-12)
    given_R = torch.tensor([TOY.beginnings[pieces] if pieces else END for pieces in asked])
    together = TOY.odds(p_O.expand(4, 9), given_R).exp()
    assert together.tolist() == [pytest.approx(odds_of(p_O, *pieces)) for pieces in asked]


def test_windows_are_read_from_the_left_the_longest_first() -> None:
    #                          abc, then b, cd, a, and ab, which may be the beginning of abc
    joined = TOY.joined(torch.tensor([[0, 1, 2, 1, 2, 3, 0, 0, 1], [4, 4, 4, 4, 4, 4, 4, 4, 0]]))
    assert joined.ids_BL.tolist() == [[4, 2, 7, 0, 1, 1, 1, 1, 1], [8] * 8 + [0]]
    within = TOY.beginnings
    assert joined.given_C.tolist() == [
        *(UNKNOWN, UNKNOWN, END, END, within[2,], END, END, within[0,], UNKNOWN),
        *([END] * 8 + [UNKNOWN]),
    ]
    # Within a token the odds stand where it was predicted; behind the window's last one, at it.
    assert joined.at_C.tolist() == [0, 0, 0, 1, 1, 2, 3, 3, 4, *range(9, 18)]


def test_of_what_nothing_was_read_nothing_is_learned() -> None:
    """Of three predictions the second has no odds: it adds no loss and no gradient."""
    torch.manual_seed(0)
    states_CK = torch.randn(3, 4).requires_grad_()
    heads = Head(torch.randn(5, 4)), Head(torch.randn(9, 4))
    theirs_CD = torch.randn(3, 4)
    given = Given(TOY, torch.tensor([END, UNKNOWN, END]))
    loss = divergence(states_CK, theirs_CD, *heads, given)
    [gradient_CK] = torch.autograd.grad(loss, [states_CK])
    rest = divergence(states_CK[::2], theirs_CD[::2], *heads, given[::2])
    assert 3 * loss.item() == pytest.approx(2 * rest.item(), rel=1e-6)
    assert gradient_CK.abs().amax(-1).gt(0).tolist() == [True, False, True]


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


def test_windows_of_two_tokenizations_are_taken_one_in_several_as_well() -> None:
    reading = Reading.of(MODEL_DIR)
    text = TextOptions(source="embedded:evaluation", samples=5, seqlen=32)
    near = list(aligned_windows(reading, reading, MODEL_DIR, text))
    apart = aligned_windows(reading, reading, MODEL_DIR, replace(text, samples=3, every=2))
    assert [window.one_N.tolist() for window in apart] == [w.one_N.tolist() for w in near[::2]]


def test_it_is_the_plain_loss_where_no_token_left() -> None:
    """All rows stay: the same numbers, but for probabilities that are summed to 1 again, which
    float32 leaves 1e-7 of: the loss is 2e-3, left over of terms of about 1."""
    model, other = (load_float32(Checkpoint.open(MODEL_DIR)) for _ in range(2))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.01)
    tokens_BL = torch.randint(4096, (2, 24), generator=torch.Generator().manual_seed(0))
    everything = Spellings(tuple(range(4096)), {})
    plain, found = (
        distillation_loss(
            other, model, torch.eye(256), tokens_BL, hidden_weight=0.1, spellings=spellings
        )
        for spellings in (None, everything)
    )
    assert found.item() == pytest.approx(plain.item(), abs=5e-7)


def test_where_rows_leave_that_no_token_has_it_is_healed_like_any_other(tmp_path: Path) -> None:
    """Nothing that left is spelled, and still the original predicts more than there is."""
    model = load_float32(Checkpoint.open(MODEL_DIR))
    model.resize_token_embeddings(4224, mean_resizing=False)
    model.save_pretrained(tmp_path / "padded")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "padded" / name).write_bytes((MODEL_DIR / name).read_bytes())
    made = shrink(tmp_path / "padded", tmp_path / "out", asked("2", vocab=4096))
    assert made.healing is not None
    assert made.healing["kl"][0] < 0.1  # what the rows without a token had


def asked(heal: str, vocab: int = 1000) -> ShrinkOptions:
    """So many tokens, healed by some steps or none."""
    _, distil = parse_heal(heal, samples=None, precision="fp32", seed=0)
    return ShrinkOptions(
        text=TEXT,
        other=NONE,
        narrow=NarrowOptions(local=None),
        vocabulary=VocabularyOptions(vocab=vocab),
        heal=distil,
    )


def test_a_model_that_lost_nothing_but_tokens_learns_to_spell_them(tmp_path: Path) -> None:
    """On text that it was not trained on, per token of the original."""
    text = TextOptions(source="embedded:evaluation", samples=4, seqlen=128)
    outs = {heal: shrink(MODEL_DIR, tmp_path / heal, asked(heal)) for heal in ("none", "60")}
    found = {
        heal: evaluate_across(shrunk.out / "hf", MODEL_DIR, text) for heal, shrunk in outs.items()
    }
    assert found["60"].perplexity < 0.95 * found["none"].perplexity
    told = outs["60"].healing
    assert told is not None
    assert told["kl"][1] < 0.95 * told["kl"][0]
    # By its own tokens the original knows the text far better than by pieces.
    assert told["original_perplexity"] < 0.5 * told["perplexity"][0]
    cards = [" ".join((outs[heal].out / "README.md").read_text().split()) for heal in outs]
    assert ["every weight is the original's" in card for card in cards] == [True, False]
    assert ["No layer was narrowed" in card for card in cards] == [False, True]
    assert [parity.passed for parity in verify(outs["60"].out)] == [True]
    record = json.loads((outs["60"].out / "dotexport.json").read_text())
    assert record["sizes"]["vocab_size"] == [4096, 1024]
    assert record["held_out"]["kl"] == told["kl"][1]
