"""Quality figures against a slower reference, and what they must be by definition.

Shapes: N windows, L tokens, C predictions, V vocabulary.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dotexport.errors import CalibrationError, CheckpointError, DotexportError, UsageError
from dotexport.exports.quality import Quality, evaluate, predictions

V = 40


def tiny(folder: Path, *, seed: int, **config: Any) -> Path:
    """A random Llama with weights large enough to have opinions."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": V,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.4,
    }
    LlamaForCausalLM(LlamaConfig(**sizes | config)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    narrow = tiny(folder / "candidate", seed=1, hidden_size=8)
    return narrow, tiny(folder / "baseline", seed=2)


@pytest.fixture(scope="module", name="windows_NL")
def windows() -> torch.Tensor:
    return torch.randint(V, (5, 9), generator=torch.Generator().manual_seed(0))


def by_hand(candidate: Path, baseline: Path, windows_NL: torch.Tensor) -> dict[str, float]:
    """Token by token, in Python floats, from the logits of transformers' own loader."""
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (candidate, baseline)]
    rows = []
    for window_L in windows_NL:
        with torch.no_grad():
            p, q = (model(window_L[None]).logits[0].double().softmax(-1) for model in models)
        for position, token in enumerate(window_L[1:].tolist()):
            ours, theirs = p[position].tolist(), q[position].tolist()
            kl = sum(b * math.log(b / a) for a, b in zip(ours, theirs, strict=True))
            agree = ours.index(max(ours)) == theirs.index(max(theirs))
            rows.append((-math.log(ours[token]), -math.log(theirs[token]), kl, agree))
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    return {
        "perplexity": math.exp(means[0]),
        "baseline_perplexity": math.exp(means[1]),
        "kl": means[2],
        "top1_agreement": means[3],
        "log_ratio": means[0] - means[1],
    }


@pytest.mark.parametrize("batch", [1, 2, None])
def test_figures_agree_with_a_sum_by_hand(
    pair: tuple[Path, Path],
    windows_NL: torch.Tensor,
    batch: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dotexport.exports.quality.CHUNK_BYTES", 4 * V * 3)  # three predictions
    quality = evaluate(*pair, windows_NL, batch=batch)
    expected = by_hand(*pair, windows_NL)
    # float32 logits of a different batch size: about 1e-6 relative.
    assert {key: asdict(quality)[key] for key in expected} == pytest.approx(expected, rel=1e-4)
    assert (quality.num_windows, quality.num_tokens) == (5, 40)
    assert quality.ratio == pytest.approx(quality.perplexity / quality.baseline_perplexity)


def test_a_model_is_as_good_as_itself(pair: tuple[Path, Path], windows_NL: torch.Tensor) -> None:
    quality = evaluate(pair[0], pair[0], windows_NL)
    assert (quality.kl, quality.top1_agreement, quality.log_ratio) == (0, 1, 0)
    assert quality.log_ratio_error == 0


def test_the_error_of_the_ratio_is_that_of_paired_windows(
    pair: tuple[Path, Path], windows_NL: torch.Tensor
) -> None:
    whole = evaluate(*pair, windows_NL)
    alone = [evaluate(*pair, window_L[None]).log_ratio for window_L in windows_NL]
    expected = torch.tensor(alone, dtype=torch.float64).std() / math.sqrt(len(windows_NL))
    assert whole.log_ratio_error == pytest.approx(float(expected), rel=1e-4)
    assert evaluate(*pair, windows_NL[:1]).log_ratio_error is None


def test_without_a_baseline_only_perplexity_is_measured(
    pair: tuple[Path, Path], windows_NL: torch.Tensor
) -> None:
    quality = evaluate(pair[0], None, windows_NL)
    assert quality.perplexity == pytest.approx(evaluate(*pair, windows_NL).perplexity)
    assert quality.kl is quality.ratio is quality.baseline_perplexity is None


def test_kl_is_never_negative_and_not_symmetric() -> None:
    ours_CV, theirs_CV = torch.randn(2, 50, V, generator=torch.Generator().manual_seed(3))
    next_C = torch.zeros(50, dtype=torch.long)
    forth_C = predictions(ours_CV, theirs_CV, next_C)[:, 2]
    back_C = predictions(theirs_CV, ours_CV, next_C)[:, 2]
    assert bool((forth_C > 0).all())
    assert not torch.allclose(forth_C, back_C, rtol=1e-2)


def test_quality_is_json(pair: tuple[Path, Path], windows_NL: torch.Tensor) -> None:
    quality = evaluate(*pair, windows_NL)
    stored = json.loads(json.dumps(quality.as_dict(), allow_nan=False))
    assert stored.pop("ratio") == quality.ratio
    assert Quality(**stored) == quality


def test_progress_counts_windows(pair: tuple[Path, Path], windows_NL: torch.Tensor) -> None:
    seen: list[tuple[int, int]] = []
    evaluate(
        pair[0],
        None,
        windows_NL,
        batch=2,
        progress=lambda _, done, total: seen.append((done, total)),
    )
    assert seen == [(0, 5), (2, 5), (4, 5)]


def test_different_vocabularies_are_refused(
    pair: tuple[Path, Path], windows_NL: torch.Tensor, tmp_path: Path
) -> None:
    other = tiny(tmp_path / "other", seed=0, vocab_size=V + 1)
    with pytest.raises(UsageError, match=r"vocabularies differ: .*41 and .*40"):
        evaluate(other, pair[1], windows_NL)


@pytest.mark.parametrize("windows", [torch.zeros(0, 5), torch.zeros(3, 1), torch.zeros(4)])
def test_windows_without_a_prediction_are_refused(
    pair: tuple[Path, Path], windows: torch.Tensor
) -> None:
    with pytest.raises(CalibrationError, match="expected one window or more"):
        evaluate(*pair, windows.long())


@pytest.mark.parametrize("token", [-1, V])
def test_ids_outside_the_vocabulary_are_refused(pair: tuple[Path, Path], token: int) -> None:
    with pytest.raises(CalibrationError, match="tokenizer of the original"):
        evaluate(*pair, torch.tensor([[0, token]]))


def test_folders_that_are_no_models_are_refused(windows_NL: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        evaluate(tmp_path, None, windows_NL)


def test_a_model_that_overflows_is_refused(
    pair: tuple[Path, Path], windows_NL: torch.Tensor, tmp_path: Path
) -> None:
    broken = tiny(tmp_path / "broken", seed=0)
    weights = load_file(broken / "model.safetensors")
    weights["lm_head.weight"] *= 1e38
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DotexportError, match="no prediction at all"):
        evaluate(broken, pair[1], windows_NL)
