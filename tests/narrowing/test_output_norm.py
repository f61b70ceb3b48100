"""Norms behind sublayers: what must be exact is, and the fit in front of them helps."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dotexport.app.opening import open_source
from dotexport.app.shrink_options import ShrinkOptions
from dotexport.app.shrink_record import Shrunk
from dotexport.app.shrinking import shrink
from dotexport.axes.plan import SizeOptions, read_model
from dotexport.errors import UsageError
from dotexport.generation.second_text import NONE
from dotexport.models.family import Family
from dotexport.models.shapes import Sizes
from dotexport.models.text_options import SELF, TextOptions
from dotexport.models.text_windows import token_windows
from dotexport.narrowing.basis import Basis
from dotexport.narrowing.calibration_text import CalibrationText
from dotexport.narrowing.narrow_options import LocalOptions, NarrowOptions
from dotexport.narrowing.output_norm import Behind, FewerFeatures, merged, size
from dotexport.narrowing.prepare import prepare
from dotexport.sizes.budget import plan

TOKENS_BL = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(1))
EPSILON = 1e-2  # so large that a wrong one shows
MODELS: dict[str, dict[str, Any]] = {
    "gemma2": {"model_type": "gemma2", "sliding_window": 16, "tie_word_embeddings": True},
    "gemma3": {"model_type": "gemma3_text", "sliding_window": 16, "attention_bias": True},
    "gemma4": {"model_type": "gemma4_text", "tie_word_embeddings": True},
    "olmo2": {"model_type": "olmo2", "attention_bias": True},
}
DEAD, COPIED = range(40, 48), {40 + n: 3 * n for n in range(8)}
Tensors = dict[str, torch.Tensor]


def changed(model: Path, folder: Path, change: Callable[[Tensors], None]) -> Path:
    """The model in one file, with other weights."""
    shutil.copytree(model, folder)
    weights = {k: t for f in model.glob("*.safetensors") for k, t in load_file(f).items()}
    change(weights)
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def writers(family: Family, sizes: Sizes) -> list[tuple[str, str]]:
    """Writer and the norm behind it, of every sublayer of every layer."""
    return [
        (family.layer_name(layer, sub.writer.name), family.layer_name(layer, f"{sub.output_norm}"))
        for layer in range(sizes.num_layers)
        for sub in family.in_layer(sizes.kind(layer))
    ]


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=TOKENS_BL).logits
    return found


def letters(folder: Path, *, samples: int = 12, seqlen: int = 64) -> TextOptions:
    rng = np.random.default_rng(0)
    file = folder / "letters.txt"
    file.write_text("".join(chr(33 + n) for n in rng.integers(0, 87, size=seqlen * (samples + 1))))
    return TextOptions(source=str(file), samples=samples, seqlen=seqlen)


def narrowed(
    model: Path,
    out: Path,
    methods: NarrowOptions,
    *,
    text: TextOptions | None = None,
    other: str = SELF,
    **sizes: int,
) -> Shrunk:
    text = text or letters(out.parent)
    options = ShrinkOptions(sizes=SizeOptions(**sizes), text=text, other=other, narrow=methods)
    return shrink(model, out, options, device="cpu")


# Whole models -----------------------------------------------------------------------------------


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_axes_that_hold_nothing_leave_without_a_trace(
    name: str, refit: bool, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Then every norm over K axes is that over D: gammas and the epsilon make up for the rest."""
    model = tiny_model(**MODELS[name], rms_norm_eps=EPSILON)
    family, sizes = read_model(open_source(model).config)

    def kill(weights: Tensors) -> None:
        weights["model.embed_tokens.weight"][:, DEAD] = 0.0
        for writer, _ in writers(family, sizes):
            weights[f"{writer}.weight"][DEAD] = 0.0
            if (bias := weights.get(f"{writer}.bias")) is not None:
                bias[DEAD] = 0.0

    source = open_source(changed(model, tmp_path / "dead", kill))
    decided = plan(source.config, SizeOptions(hidden_size=40))
    (tmp_path / "hf").mkdir()
    windows_NL = token_windows(source.folder, letters(tmp_path))
    run = prepare(
        *(source, decided, tmp_path, CalibrationText(windows_NL)),
        NarrowOptions(refit=refit, local=None),
    )
    run.run(Basis(np.eye(48)[:, :40], "those alive", 1.0))
    run.writer.finish()
    before, after = logits(source.folder), logits(tmp_path / "hf")
    # float32 through three layers; the wrong epsilon in one norm alone gives 1e-2.
    assert (before - after).abs().max() < 1e-4 * max(1.0, float(before.abs().max()))


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_axes_that_are_multiples_of_others_merge_without_a_trace(
    name: str, refit: bool, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """In each sublayer the writer's rows have a ratio of their own, which gamma evens out."""
    model = tiny_model(**MODELS[name] | {"tie_word_embeddings": False})
    family, sizes = read_model(open_source(model).config)
    offset = float(family.unit_offset)

    def copy(weights: Tensors) -> None:
        table, ratio = weights["model.embed_tokens.weight"], -0.7
        for axis, original in COPIED.items():
            table[:, axis] = ratio * table[:, original]
            for number, (writer, norm) in enumerate(writers(family, sizes)):
                gamma, own = weights[f"{norm}.weight"], 0.5 + 0.2 * number
                for part in ("weight", "bias"):
                    if (rows := weights.get(f"{writer}.{part}")) is not None:
                        rows[axis] = own * rows[original]
                gamma[axis] = ratio / own * (gamma[original] + offset) - offset

    twins = changed(model, tmp_path / "twins", copy)
    methods = NarrowOptions(basis="dot", refit=refit, local=None)
    out = narrowed(twins, tmp_path / "out", methods, hidden_size=40).out
    before, after = logits(twins), logits(out / "hf")
    # The damping of singular Gram matrices, 1e-6 of their diagonal, is what is left.
    assert (before - after).abs().max() < 1e-3 * float(before.abs().max())
    alone = NarrowOptions(basis="select", refit=False)
    dropped = logits(narrowed(twins, tmp_path / "select", alone, hidden_size=40).out / "hf")
    assert (before - dropped).abs().max() > 0.05 * float(before.abs().max())


def test_a_kv_group_without_queries_and_keys_leaves_norms_over_all_of_them_as_they_were(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Half of the features were zero, so that the mean square of what stays is twice as large."""
    model = tiny_model(**MODELS["olmo2"])

    def silence(weights: Tensors) -> None:
        for layer in range(3):
            attention = f"model.layers.{layer}.self_attn"
            gone = slice((layer % 2) * 64, (layer % 2) * 64 + 64)
            key = slice((layer % 2) * 32, (layer % 2) * 32 + 32)
            for part in ("weight", "bias"):
                weights[f"{attention}.q_proj.{part}"][gone] = 0.0
                weights[f"{attention}.k_proj.{part}"][key] = 0.0
            weights[f"{attention}.o_proj.weight"][:, gone] = 0.0

    silent = changed(model, tmp_path / "silent", silence)
    methods = NarrowOptions(refit=False)
    out = narrowed(silent, tmp_path / "out", methods, num_key_value_heads=1).out
    before, after = logits(silent), logits(out / "hf")
    assert (before - after).abs().max() < 1e-3 * float(before.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_a_refit_brings_what_sublayers_give_closer(
    name: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model, sizes = tiny_model(**MODELS[name]), {"hidden_size": 40, "intermediate_size": 64}
    analytic, fitted = (
        narrowed(model, tmp_path / str(refit), NarrowOptions(refit=refit, local=None), **sizes)
        for refit in (False, True)
    )
    assert fitted.divergence < analytic.divergence
    settled = [site for site in fitted.sites if site["site"].startswith("post_")]
    sites = len(writers(*read_model(open_source(model).config)))
    assert len(settled) == sites
    assert all(site["error"] <= site["analytic_error"] for site in settled)
    assert sum(site["error"] < 0.99 * site["analytic_error"] for site in settled) >= 0.6 * sites


@pytest.mark.parametrize("name", MODELS)
def test_healing_moves_norms_too(
    name: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """On one window, which is fitted and looked at alike: random words have nothing in common."""
    alone = {"num_hidden_layers": 1, "layer_types": None, "num_kv_shared_layers": None}
    model, gammas = tiny_model(**MODELS[name], **alone), []
    window = letters(tmp_path, samples=1, seqlen=512)
    for local in (None, LocalOptions(least_steps=40, tokens=512)):
        methods = NarrowOptions(local=local)
        out = tmp_path / str(local is None)
        asked = {"hidden_size": 40, "intermediate_size": 64}
        shrunk = narrowed(model, out, methods, text=window, other=NONE, **asked)
        weights = load_file(out / "hf" / "model.safetensors")
        gammas.append(weights["model.layers.0.post_feedforward_layernorm.weight"])
    healed = next(site for site in shrunk.sites if "error_after" in site)
    assert healed["error_after"] < healed["error_before"]
    assert not torch.equal(*gammas)


@pytest.mark.parametrize("basis", ["learned", "pca"])
def test_a_basis_that_rotates_is_refused_with_those_that_do_not(
    basis: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    methods = NarrowOptions(basis=basis)
    with pytest.raises(UsageError, match="in its own axes only; expected one of dot, obs, select"):
        narrowed(tiny_model(**MODELS["olmo2"]), tmp_path / "out", methods, hidden_size=40)
    assert not (tmp_path / "out").exists()


def test_axes_are_merged_where_nothing_is_said_and_auto_measures_those_bases_only(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model(**MODELS["olmo2"])
    by_default = narrowed(model, tmp_path / "1", NarrowOptions(local=None), hidden_size=40)
    assert by_default.basis["method"] == "dot"
    measured = narrowed(
        model, tmp_path / "2", NarrowOptions(basis="auto", local=None), hidden_size=40
    )
    assert set(measured.basis["tried"]) == {"dot", "obs", "select"}


# The pieces -------------------------------------------------------------------------------------


def test_merged_rows_are_as_large_together_as_those_they_stand_for() -> None:
    rng = torch.Generator().manual_seed(0)
    rows_DI = torch.randn(4, 7, generator=rng, dtype=torch.float64)
    gamma_D = torch.tensor([2.0, -1.0, 0.5, 0.0], dtype=torch.float64)
    rows_DI[1] = 3.0 * rows_DI[0]
    E_DK = torch.zeros(4, 3, dtype=torch.float64)
    E_DK[[2, 3], [1, 2]] = 1.0
    # Axis 1 of the stream is gamma_1 x 3 / gamma_0 times axis 0.
    E_DK[:2, 0] = torch.tensor([1.0, -1.5])
    E_DK[:, 0] /= E_DK[:, 0].norm()
    new_KI, gamma_K = merged(rows_DI, gamma_D, E_DK)
    input_I = torch.randn(7, generator=rng, dtype=torch.float64)
    old_D, new_K = rows_DI @ input_I, new_KI @ input_I
    torch.testing.assert_close(new_K.square().sum(), old_D.square().sum())
    torch.testing.assert_close(gamma_K * new_K, E_DK.T @ (gamma_D * old_D))


def test_a_row_without_gamma_is_never_fitted_and_keeps_its_size() -> None:
    behind = Behind(torch.tensor([1.0, 0.0, -2.0]), 1e-6)
    weights_KI = torch.arange(6, dtype=torch.float64).reshape(3, 2)
    torch.testing.assert_close(behind.unfolded(behind.folded(weights_KI)), weights_KI)
    fitted = behind.where_it_matters(torch.ones(3, 2), torch.zeros(3, 2))
    assert fitted.tolist() == [[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]


def test_gammas_of_fewer_features_are_those_of_a_least_squares_solver() -> None:
    rng = torch.Generator().manual_seed(0)
    given_TQ = torch.randn(300, 6, generator=rng, dtype=torch.float64) * torch.arange(1, 7)
    gamma_Q, kept = torch.linspace(-1, 2, 6, dtype=torch.float64), torch.tensor([0, 3, 4])
    shorter = FewerFeatures(gamma_Q, kept, 1e-6)
    for part in given_TQ.split(70):
        shorter.add(part)
    before_TS = (gamma_Q * given_TQ / size(given_TQ, 1e-6))[:, kept]
    after_TS = given_TQ[:, kept] / size(given_TQ[:, kept], 1e-6)
    for s, gamma in enumerate(shorter.fitted()):
        expected = torch.linalg.lstsq(after_TS[:, s : s + 1], before_TS[:, s : s + 1]).solution
        torch.testing.assert_close(gamma, expected[0, 0])
