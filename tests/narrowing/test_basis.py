"""Bases of the residual stream: what every method must keep, and where each must be best."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dotexport.errors import UsageError
from dotexport.merging.transport_options import TransportOptions
from dotexport.narrowing.basis import METHODS, find_basis, reader_loss, whole
from dotexport.narrowing.norm_statistics import Sight

RNG = np.random.default_rng(0)
STREAM_TD = RNG.normal(size=(200, 12)) * np.linspace(3, 0.3, 12)
MOMENT_DD = STREAM_TD.T @ STREAM_TD


def sight(moment_DD: np.ndarray = MOMENT_DD, massive: tuple[int, ...] = ()) -> Sight:
    """One site whose readers look at all axes alike."""
    moment = torch.from_numpy(moment_DD)
    return Sight([moment], [torch.eye(len(moment)).double()], [1], massive)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("width", [1, 5, 12])
def test_columns_are_orthonormal(method: str, width: int) -> None:
    basis = find_basis(method, sight(), width)
    np.testing.assert_allclose(basis.matrix_DK.T @ basis.matrix_DK, np.eye(width), atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_full_basis_keeps_everything(method: str) -> None:
    assert find_basis(method, sight(), 12).kept_energy == pytest.approx(1.0, abs=1e-12)


def test_pca_keeps_the_most_energy_of_all_and_as_much_as_its_eigenvalues_say() -> None:
    kept = {method: find_basis(method, sight(), 5).kept_energy for method in METHODS}
    values = np.linalg.eigvalsh(MOMENT_DD)
    assert kept["pca"] == pytest.approx(values[-5:].sum() / values.sum(), rel=1e-12)
    # The learned basis starts there; sums of other order differ by rounding.
    assert kept["pca"] == pytest.approx(max(kept.values()), rel=1e-12)


def test_select_keeps_axes() -> None:
    matrix_DK = find_basis("select", sight(), 5).matrix_DK
    assert set(np.unique(matrix_DK)) == {0.0, 1.0}
    strongest = set(np.argsort(-np.diag(MOMENT_DD))[:5])
    assert set(matrix_DK.argmax(0)) == strongest


def test_transport_merges_axes_that_say_the_same_where_selection_drops_them() -> None:
    """Each of four signals stands on three axes, once upside down: four columns can hold all."""
    signals_TS = RNG.normal(size=(500, 4)) * [1.3, 1.2, 1.1, 1.0]
    stream_TD = np.concatenate([signals_TS, -0.5 * signals_TS, 0.5 * signals_TS], axis=1)
    moment_DD = stream_TD.T @ stream_TD
    dot, select = (
        find_basis(method, sight(moment_DD), 4, TransportOptions(epsilon=0.0))
        for method in ("dot", "select")
    )
    # Selection keeps one of every three axes: 1 / (1 + 1/4 + 1/4) of the energy.
    assert select.kept_energy == pytest.approx(2 / 3)
    assert dot.kept_energy == pytest.approx(1.0)
    assert "transport_cost" in dot.as_dict()


def test_the_identity_is_whole() -> None:
    assert (whole(4).matrix_DK == np.eye(4)).all()


def test_an_unknown_method_is_refused_with_those_known() -> None:
    with pytest.raises(UsageError, match="dot, learned, pca, select"):
        find_basis("random", sight(), 4)


def test_the_learned_basis_loses_less_of_what_readers_see_than_any_other() -> None:
    """Three sites with readers of their own: no eigenvector of the mean moment knows of them."""
    rng = np.random.default_rng(1)
    moments, metrics = [], []
    for _ in range(3):
        stream_TD, reader_OD = (
            rng.normal(size=(300, 12)) @ rng.normal(size=(12, 12)),
            rng.normal(size=(3, 12)),
        )
        moment_DD = torch.from_numpy(stream_TD.T @ stream_TD)
        moments.append(moment_DD / moment_DD.trace())
        metrics.append(torch.from_numpy(reader_OD.T @ reader_OD))
    seen = Sight(moments, metrics, [1, 1, 1])
    lost = {
        method: float(reader_loss(seen, torch.from_numpy(find_basis(method, seen, 6).matrix_DK)))
        for method in METHODS
    }
    assert lost["learned"] < 0.9 * min(lost[other] for other in ("dot", "pca", "select"))
    learned_DK = find_basis(
        "learned", seen, 6
    ).matrix_DK  # after steps, which lead off the manifold
    np.testing.assert_allclose(learned_DK.T @ learned_DK, np.eye(6), atol=1e-12)


def test_what_readers_lose_is_the_error_of_their_least_squares_refit() -> None:
    rng = np.random.default_rng(2)
    stream_TD, reader_OD = rng.normal(size=(400, 7)), rng.normal(size=(5, 7))
    basis_DK = np.linalg.qr(rng.normal(size=(7, 4)))[0]
    wanted_TO, narrow_TK = stream_TD @ reader_OD.T, stream_TD @ basis_DK
    refitted_TO = narrow_TK @ np.linalg.lstsq(narrow_TK, wanted_TO, rcond=None)[0]
    share = np.square(wanted_TO - refitted_TO).sum() / np.square(wanted_TO).sum()
    seen = Sight(
        [torch.from_numpy(stream_TD.T @ stream_TD)], [torch.from_numpy(reader_OD.T @ reader_OD)]
    )
    # The damping of 1e-9 is all that differs.
    assert float(reader_loss(seen, torch.from_numpy(basis_DK))) == pytest.approx(share, rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_axes_of_massive_activations_stay_whatever_their_second_moment(method: str) -> None:
    basis = find_basis(method, sight(massive=(11, 3)), 5)
    np.testing.assert_allclose(np.square(basis.matrix_DK[[3, 11]]).sum(1), 1.0)
    np.testing.assert_allclose(basis.matrix_DK.T @ basis.matrix_DK, np.eye(5), atol=1e-12)
