"""One sublayer of teacher and student: what must be exact is, each fit is the least-squares answer
that its formula names, and what a method promises shows in the stream behind the sublayer.

Shapes: N windows, L tokens per window, D width before, K after, T tokens.
"""

from __future__ import annotations

import ctypes
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dotexport.app.opening import open_source
from dotexport.axes.plan import SizeOptions
from dotexport.merging.heads import Groups
from dotexport.merging.neurons import Neurons
from dotexport.models.families.llama import LLAMA
from dotexport.models.family import Sublayer
from dotexport.models.layers import Layer, Stock
from dotexport.models.shapes import Sizes
from dotexport.narrowing.basis import Basis
from dotexport.narrowing.calibration_text import CalibrationText
from dotexport.narrowing.narrow_options import NarrowOptions
from dotexport.narrowing.original import Original
from dotexport.narrowing.prepare import prepare
from dotexport.narrowing.site import Site
from dotexport.narrowing.streams import Streams
from dotexport.sizes.budget import plan

CPU = torch.device("cpu")
N, L, D = 16, 32, 24
EPSILON = 1e-2  # so large that a wrong one shows
WHOLE = Sizes(D, 20, 4, 2, 8, 1, 90, False)
ATTENTION, MLP = LLAMA.sublayers
BARE = NarrowOptions(local=None, ridge=0.0)


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthonormal(width: int) -> Tensor:
    return torch.linalg.qr(noise(D, width, seed=0).double()).Q


def weights() -> dict[str, Tensor]:
    return {
        f"{x.name}.weight": 0.3 * noise(WHOLE.rows(x)[0], WHOLE.spaces[x.in_], seed=seed)
        for seed, x in enumerate(LLAMA.linears)
    }


def layer(width: int, tensors: dict[str, Tensor]) -> Layer:
    """With norms of ones, of the epsilon that belongs to this width."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = {"architectures": [LLAMA.architecture], "model_type": "llama", **heads}
    config |= {"hidden_size": width, "intermediate_size": 20}
    norms = {f"{sublayer.norm}.weight": torch.ones(width) for sublayer in LLAMA.sublayers}
    stock = Stock.of(config | {"rms_norm_eps": EPSILON * D / width}, CPU)
    return Layer(stock, LLAMA, 0, tensors | norms)


def site(
    sublayer: Sublayer,
    E_DK: Tensor,
    options: NarrowOptions,
    *,
    tensors: dict[str, Tensor] | None = None,
    width: int | None = None,
    drift: float = 0.0,
) -> Site:
    """The analytic student beside its teacher, over noise; with drift, a student gone astray."""
    tensors, K = tensors or weights(), E_DK.shape[1]
    scale = math.sqrt(D / K)
    narrow = {}
    for linear in LLAMA.linears:
        name = f"{linear.name}.weight"
        weight = tensors[name].double()
        narrow[name] = weight @ E_DK * scale if linear.in_ == "residual" else E_DK.T @ weight
    streams = Streams.allocate(torch.zeros(N, L), D, K, device=CPU)
    streams.original_NLD[:] = noise(N, L, D, seed=50) * noise(N, L, 1, seed=51).exp()
    # Astray in a way that the stream itself tells of, as a real prefix goes.
    streams.narrowed_NLK[:] = streams.original_NLD @ (E_DK + drift * noise(D, K, seed=52)).float()
    return Site(
        sublayer,
        layer(D, tensors),
        layer(K, narrow),
        streams,
        E_DK,
        scale,
        width or WHOLE.spaces[sublayer.writer.in_],
        LLAMA.gated,
        Groups(2, 2, 8) if sublayer is ATTENTION else Neurons(WHOLE.spaces["mlp"]),
        options.heads if sublayer is ATTENTION else options.mlp,
        options,
    )


def narrowed(made: Site) -> list[dict[str, Any]]:
    with torch.no_grad():
        return list(made.narrow())


def error(made: Site) -> float:
    """Of the narrowed stream behind the sublayer, each token as large as any other."""
    goal_NLK = made.streams.original_NLD @ made.E_DK.float()
    size_NL1 = made.streams.original_NLD.square().mean(-1, keepdim=True)
    return float(((made.streams.narrowed_NLK - goal_NLK).square() / size_NL1).mean())


@pytest.mark.parametrize("options", [NarrowOptions(refit=False), BARE, NarrowOptions()])
@pytest.mark.parametrize("sublayer", LLAMA.sublayers, ids=lambda s: s.module)
def test_full_width_in_a_rotation_leaves_readers_and_writers_what_they_were(
    sublayer: Sublayer, options: NarrowOptions
) -> None:
    made = site(sublayer, orthonormal(D), options)
    before = made.teacher.tensors()  # which it lets go of
    narrowed(made)
    for linear in (*sublayer.readers, sublayer.writer):
        weight = before[f"{linear.name}.weight"].double()
        rotated = weight @ made.E_DK if linear in sublayer.readers else made.E_DK.T @ weight
        found = made.student.tensor(f"{linear.name}.weight").double()
        # Streams are in float32, whose rounding a fit of nothing but itself may follow.
        torch.testing.assert_close(found, rotated, atol=1e-4, rtol=0)
    assert error(made) < 1e-10


def held(kind: str) -> int:
    """Bytes that this process has or had in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))


WIDE = 2048


def wide() -> Site:
    tensors = weights() | {
        "mlp.gate_proj.weight": 0.3 * noise(WIDE, D, seed=1),
        "mlp.up_proj.weight": 0.3 * noise(WIDE, D, seed=2),
        "mlp.down_proj.weight": 0.3 * noise(D, WIDE, seed=3),
    }
    made = site(MLP, torch.eye(D).double(), BARE, tensors=tensors, width=1792)
    made.units = Neurons(WIDE)
    return made


def room() -> float:
    """What narrowing a wide MLP takes, in matrices of its width in float64."""
    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: what is freed is given back
    narrowed(wide())  # what libraries load and keep for themselves
    made = wide()
    before = held("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    assert narrowed(made)[-1]["kept"] == 1792
    return (held("VmHWM") - before) / (8 * WIDE**2)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux says the peak")
def test_a_wide_mlp_is_narrowed_in_the_room_of_two_matrices_of_its_width() -> None:
    """Of float64: a half for what is fitted on, one for what judges, and one that is factored. What
    grows with the width alone, activations of a batch above all, is less than one here (0.7). In a
    process of its own: one that has freed memory before would find room there."""
    alone = f"import runpy; print(runpy.run_path({__file__!r})['room']())"
    said = subprocess.run([sys.executable, "-c", alone], check=True, stdout=subprocess.PIPE)
    assert 1.5 < float(said.stdout) < 3.1


@pytest.mark.parametrize("refit", [True, False])
def test_copies_of_neurons_leave_without_a_trace(refit: bool) -> None:
    """Neurons 12 to 19 are 0 to 7 with up and down upside down in part; one of each pair stays."""
    tensors = weights()
    gate, up = (tensors[f"mlp.{name}_proj.weight"] for name in ("gate", "up"))
    gate[12:], up[12:] = gate[:8], up[:8] * torch.tensor([1.0, -1.0] * 4)[:, None]
    options = NarrowOptions(local=None, refit=refit)
    made = site(MLP, orthonormal(D), options, tensors=tensors, width=12)
    narrowed(made)
    # The ridges' smallest, 1e-6, and float32: squared, as an error is.
    assert error(made) < 1e-9


def pairs(said: float, mlp: str, *, drift: float = 0.0) -> tuple[Site, dict[str, Any]]:
    """Ten neurons left of twenty: ups of a pair differ a little, half of them in sign too, and the
    second's column is `said` times the first's."""
    tensors, sign_P = weights(), torch.tensor([1.0, -1.0] * 5)
    gate, up, down = (tensors[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    gate[10:] = gate[:10]
    up[10:] = sign_P[:, None] * (up[:10] + 0.02 * noise(10, D, seed=60))
    down[:, 10:] = said * sign_P * down[:, :10]
    options = NarrowOptions(local=None, mlp=mlp)
    made = site(MLP, orthonormal(D), options, tensors=tensors, width=10, drift=drift)
    return made, narrowed(made)[-1]


def test_near_copies_merge_into_their_mean_where_the_choice_alone_loses_what_differs() -> None:
    (alone, _), (merged, report) = pairs(1.0, "obs"), pairs(1.0, "dot")
    assert report["moved_mass"] > 0.9
    # Shares go by importance, which for a pair is equal but for a few per cent.
    assert error(merged) < 0.05 * error(alone)


@pytest.mark.parametrize("drift", [0.0, 0.1])
def test_a_merge_that_would_not_help_is_not_made(drift: float) -> None:
    """Of a - b / 2 the mean says less than a does, however much b resembles it. With drift, the
    refit helps so much that a merge may spoil something and still beat the analytic weights."""
    (alone, left), (tried, report) = (pairs(-0.5, mlp, drift=drift) for mlp in ("obs", "dot"))
    assert report["moved_mass"] == 0
    assert report["error"] == left["error"]
    for name, wanted in alone.student.tensors().items():
        assert torch.equal(tried.student.tensor(name), wanted)


@pytest.mark.parametrize("sublayer", LLAMA.sublayers, ids=lambda s: s.module)
def test_error_feedback_repairs_a_prefix_that_has_drifted(sublayer: Sublayer) -> None:
    with_it, without = (
        site(sublayer, orthonormal(D), replace(BARE, feedback=feedback), drift=0.05)
        for feedback in (True, False)
    )
    before = error(with_it)
    narrowed(with_it)
    narrowed(without)
    assert error(with_it) < 0.95 * error(without)
    assert error(with_it) < before


@pytest.mark.parametrize(("sublayer", "width"), [(ATTENTION, 32), (ATTENTION, 16), (MLP, 12)])
def test_refits_are_least_squares_over_the_tokens_themselves(
    sublayer: Sublayer, width: int
) -> None:
    """Readers through a map from what they see to what they saw; a writer onto what is missing,
    each token in units of the original's stream behind it. Held-out windows are not among them."""
    made = site(sublayer, orthonormal(16), BARE, drift=0.1, width=width)
    x_NLD, r_NLK = made.streams.original_NLD.clone(), made.streams.narrowed_NLK.clone()
    before = made.teacher.tensors()  # which it lets go of
    narrowed(made)
    fitted = [n for n in range(len(x_NLD)) if n not in made.streams.held_out]
    assert len(fitted) < len(x_NLD)
    x_NLD, r_NLK = x_NLD[fitted], r_NLK[fitted]
    seen_TK = made.student.normalise(sublayer, r_NLK).flatten(0, 1).double()
    saw_TD = made.teacher.normalise(sublayer, x_NLD).flatten(0, 1).double()
    map_KD = torch.linalg.lstsq(seen_TK, saw_TD).solution
    for linear in sublayer.readers:
        name = f"{linear.name}.weight"
        wanted_RK = before[name].double() @ map_KD.T
        gap_JRK = made.student.tensor(name)[:, None] - wanted_RK
        # Rows that stay are each one of the wanted ones. Weights are kept in float32.
        assert gap_JRK.abs().amax(2).amin(1).max() < 1e-5
    with torch.no_grad():
        inside_TI = made.student.inside(sublayer, r_NLK).flatten(0, 1).double()
    behind_TD = made.streams.original_NLD[fitted].flatten(0, 1).double()
    missing_TK = behind_TD @ made.E_DK - r_NLK.flatten(0, 1)
    weight_T1 = behind_TD.square().mean(-1, keepdim=True).rsqrt()
    wanted_IK = torch.linalg.lstsq(inside_TI * weight_T1, missing_TK * weight_T1).solution
    found_KI = made.student.tensor(f"{sublayer.writer.name}.weight").double()
    torch.testing.assert_close(found_KI, wanted_IK.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sublayer", LLAMA.sublayers, ids=lambda s: s.module)
def test_under_a_ridge_without_end_weights_stay_the_analytic_ones(sublayer: Sublayer) -> None:
    """W E sqrt(D / K) and E^T W, whatever the streams say."""
    made = site(sublayer, orthonormal(12), replace(BARE, ridge=1e12), drift=0.1)
    analytic = made.student.tensors()
    narrowed(made)
    for name, wanted in analytic.items():
        torch.testing.assert_close(made.student.tensor(name), wanted)


@pytest.mark.parametrize("sublayer", LLAMA.sublayers, ids=lambda s: s.module)
def test_a_student_computes_with_weights_rounded_as_they_will_be_stored(sublayer: Sublayer) -> None:
    """So that what is fitted behind a rounded weight sees the rounding too."""
    made = site(sublayer, orthonormal(16), NarrowOptions())
    tensors = made.student.tensors()
    stored = dict.fromkeys(tensors, torch.bfloat16)
    made.student = Layer(made.student.stock, LLAMA, 0, tensors, stored)
    before_NLK = made.streams.narrowed_NLK.clone()
    narrowed(made)
    rounded = {name: t.bfloat16().float() for name, t in made.student.tensors().items()}
    as_stored = Layer(made.student.stock, LLAMA, 0, rounded)
    with torch.no_grad():
        wanted_NLK = as_stored.after(sublayer, before_NLK)
    # Batches of other sizes may add up in another order; rounding to 8 bits is 1e-3.
    torch.testing.assert_close(made.streams.narrowed_NLK, wanted_NLK, atol=1e-5, rtol=1e-5)


class InHalf(Original):
    """What writes into the stream writes into K = D / 2 dimensions of it, along no axis."""

    E_DK = torch.from_numpy(np.linalg.qr(np.random.default_rng(0).normal(size=(48, 24)))[0]).float()

    def read(self, name: str) -> Tensor:
        tensor = super().read(name)
        if "embed_tokens" in name:
            return tensor @ self.E_DK @ self.E_DK.T
        writes = "o_proj" in name or "down_proj" in name
        return self.E_DK @ self.E_DK.T @ tensor if writes else tensor


def test_a_model_that_lives_in_half_of_its_width_narrows_to_it_exactly_without_a_refit(
    tiny_llama: Callable[[str], Path], tmp_path: Path
) -> None:
    """What a narrower norm divides by is made good by sqrt(D / K) in readers, D / K in epsilon."""
    found = open_source(tiny_llama("wide-heads"))
    source = replace(found, config={**found.config, "rms_norm_eps": EPSILON})
    (tmp_path / "hf").mkdir()
    windows_NL = torch.randint(0, 90, (8, 24), generator=torch.Generator().manual_seed(1))
    chosen = plan(source.config, SizeOptions(hidden_size=24))
    run = prepare(source, chosen, tmp_path, CalibrationText(windows_NL), NarrowOptions(refit=False))
    run.original = InHalf(**vars(run.original))
    run.run(Basis(InHalf.E_DK.double().numpy(), "its own", 1.0))
    goal_NLK = run.streams.original_NLD @ InHalf.E_DK
    # float32 through three layers in other coordinates; a divergence is of the second order.
    assert (run.streams.narrowed_NLK - goal_NLK).abs().max() < 1e-4 * float(goal_NLK.abs().max())
    assert abs(run.divergence) < 1e-6
