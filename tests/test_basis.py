"""Bases of the residual stream: what every method must keep, and where each must be best."""

from __future__ import annotations

import numpy as np
import pytest

from dotexport.basis import METHODS, find_basis, whole
from dotexport.errors import UsageError
from dotexport.ot.coupling import TransportOptions

RNG = np.random.default_rng(0)
STREAM_TD = RNG.normal(size=(200, 12)) * np.linspace(3, 0.3, 12)
MOMENT_DD = STREAM_TD.T @ STREAM_TD


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("width", [1, 5, 12])
def test_columns_are_orthonormal(method: str, width: int) -> None:
    basis = find_basis(method, MOMENT_DD, width)
    np.testing.assert_allclose(basis.matrix_DK.T @ basis.matrix_DK, np.eye(width), atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_full_basis_keeps_everything(method: str) -> None:
    assert find_basis(method, MOMENT_DD, 12).kept_energy == pytest.approx(1.0, abs=1e-12)


def test_pca_keeps_the_most_energy_of_all_and_as_much_as_its_eigenvalues_say() -> None:
    kept = {method: find_basis(method, MOMENT_DD, 5).kept_energy for method in METHODS}
    values = np.linalg.eigvalsh(MOMENT_DD)
    assert kept["pca"] == pytest.approx(values[-5:].sum() / values.sum(), rel=1e-12)
    assert kept["pca"] == max(kept.values())


def test_select_keeps_axes() -> None:
    matrix_DK = find_basis("select", MOMENT_DD, 5).matrix_DK
    assert set(np.unique(matrix_DK)) == {0.0, 1.0}
    strongest = set(np.argsort(-np.diag(MOMENT_DD))[:5])
    assert set(matrix_DK.argmax(0)) == strongest


def test_transport_merges_axes_that_say_the_same_where_selection_drops_them() -> None:
    """Each of four signals stands on three axes, once upside down: four columns can hold all."""
    signals_TS = RNG.normal(size=(500, 4)) * [1.3, 1.2, 1.1, 1.0]
    stream_TD = np.concatenate([signals_TS, -0.5 * signals_TS, 0.5 * signals_TS], axis=1)
    moment_DD = stream_TD.T @ stream_TD
    dot, select = (
        find_basis(method, moment_DD, 4, TransportOptions(epsilon=0.0))
        for method in ("dot", "select")
    )
    # Selection keeps one of every three axes: 1 / (1 + 1/4 + 1/4) of the energy.
    assert select.kept_energy == pytest.approx(2 / 3)
    assert dot.kept_energy == pytest.approx(1.0)
    assert dot.coupling is not None


def test_the_identity_is_whole() -> None:
    assert (whole(4).matrix_DK == np.eye(4)).all()


def test_an_unknown_method_is_refused_with_those_known() -> None:
    with pytest.raises(UsageError, match="dot, pca, select"):
        find_basis("random", MOMENT_DD, 4)
