"""Both kinds of calibration text are cut and sown alike."""

from __future__ import annotations

import torch

from dotexport.narrowing.calibration_text import CalibrationText

ONE_NL, OTHER_NL = torch.zeros(9, 6, dtype=torch.long), torch.ones(5, 6, dtype=torch.long)


def test_all_kinds_are_counted_and_cut() -> None:
    alone, both = CalibrationText(ONE_NL), CalibrationText(ONE_NL, OTHER_NL, sinks=(7,))
    assert (len(alone), len(both), both.length) == (9, 14, 6)
    assert [kind_NL.shape for kind_NL in both.last(4).kinds] == [(9, 4), (5, 4)]
    assert both.last(4).sinks == (7,)
    assert alone.last(4).other_NL is None


def test_tokens_that_are_sown_take_turns_over_both_kinds() -> None:
    text = CalibrationText(ONE_NL, OTHER_NL).sown((7, 8), seed=0)
    assert text.sinks == (7, 8)
    counts = [[int((kind_NL == token).sum()) for token in text.sinks] for kind_NL in text.kinds]
    # Of the first kind eight windows are fitted on and one is held out: every fourth of either, and
    # the ninth number is whose turn it is in the second kind, of which four and one.
    assert counts == [[2, 1], [1, 1]]
    assert int((ONE_NL != 0).sum()) == int((OTHER_NL != 1).sum()) == 0


def test_text_without_such_tokens_stays_as_it_is() -> None:
    text = CalibrationText(ONE_NL, OTHER_NL)
    assert all(map(torch.equal, text.sown((), seed=0).kinds, text.kinds))
