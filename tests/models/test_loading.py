"""Models that are read part by part: the bits of the whole one, in a fraction of its memory.

Shapes: B sequences, L tokens, V vocabulary.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dotexport.errors import CheckpointError, UsageError
from dotexport.exports import reference
from dotexport.exports.parity import measure
from dotexport.exports.quality import evaluate
from dotexport.exports.reference import compute_reference
from dotexport.exports.target import find_target
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.loading import Loaded
from dotexport.models.memory import LIMIT

KINDS = ["sliding_attention", "full_attention"]
SCALED = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0}
SCALED |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
WINDOW = {"sliding_window": 8}
TIED = {"tie_word_embeddings": True}
CAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
SQUARE = {"head_dim": None, "hidden_size": 64}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": SCALED,
    },
    "mistral": {"model_type": "mistral", **WINDOW},
    "phi3": {"model_type": "phi3", **SQUARE, **WINDOW},
    "qwen2": {"model_type": "qwen2", **SQUARE, **TIED},
    "qwen3": {"model_type": "qwen3"},
    "granite": {"model_type": "granite", "logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "gemma2": {"model_type": "gemma2", **TIED, **WINDOW, **CAPS},
    "gemma3": {"model_type": "gemma3_text", "layer_types": KINDS, **TIED, **WINDOW},
    "olmo2": {"model_type": "olmo2"},
    "qwen3.5": {
        "model_type": "qwen3_5_text",
        "layer_types": ["linear_attention", "full_attention"],
    },
    "qwen3-moe": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
    "gpt-oss": {
        "model_type": "gpt_oss",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        **WINDOW,
    },
    "gemma4": {"model_type": "gemma4_text", "num_hidden_layers": 5},
    "smollm3": {"model_type": "smollm3"},
    "lfm2": {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
}
TOKENS_BL = torch.randint(90, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_the_same_bits_part_by_part(
    name: str, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model(**{"num_hidden_layers": 2} | FAMILIES[name])
    checkpoint = Checkpoint.open(folder)
    whole, streamed = Loaded(checkpoint, whole=True), Loaded(checkpoint, whole=False)
    expected_BLV = whole.logits(TOKENS_BL)
    assert torch.equal(streamed.logits(TOKENS_BL), expected_BLV)
    # The head alone, over a few positions: fewer rows may be summed in another order.
    for model in (whole, streamed):
        hidden_BLD = model.hidden(TOKENS_BL)
        assert torch.equal(model.head(hidden_BLD), expected_BLV)
        some_BCV = model.head(hidden_BLD[:, 3:10])
        torch.testing.assert_close(some_BCV, expected_BLV[:, 3:10], rtol=1e-5, atol=1e-5)
    # And transformers' own offloading, with its cache.
    said = []
    for limit in ("1", "0"):
        monkeypatch.setenv(LIMIT, limit)
        session = find_target("hf").open(folder)
        said.append([session.start(TOKENS_BL.numpy()), session.step(np.array([5, 6]))])
    assert "on disk" in session.providers[0]  # type: ignore[attr-defined]
    for one, other in zip(*said, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["gemma2", "llama"])
def test_a_reference_that_is_streamed_is_the_whole_models(
    name: str, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(tiny_model(num_hidden_layers=2, **FAMILIES[name]))
    # Asked as much as a model that is streamed, which is less.
    monkeypatch.setattr(reference, "TEXT_LENGTHS", reference.STREAMED_TEXT_LENGTHS)
    monkeypatch.setattr(reference, "NUM_STEPS", reference.STREAMED_STEPS)
    whole = compute_reference(checkpoint)
    monkeypatch.setenv(LIMIT, "0")
    streamed = compute_reference(checkpoint)
    assert whole.long is not None
    assert streamed.long is not None
    for one, other in zip(whole.sequences, streamed.sequences, strict=True):
        np.testing.assert_array_equal(one, other)
    # Its sequences share a pass, whose products may be summed in another order: of logits around 1,
    # a few units in the last place. Rounding turns such a unit into a level now and then.
    for what, limit in (("logits", 1e-5), ("rounded", 1e-5), ("rounded_twice", 3e-2)):
        for one, other in zip(getattr(whole, what), getattr(streamed, what), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=limit)
        far = getattr(whole.long, what), getattr(streamed.long, what)
        np.testing.assert_allclose(*far, rtol=0, atol=limit)
    # What fills a pass up is looked at, too.
    assert whole.peak <= streamed.peak * (1 + 1e-4)


def test_a_model_on_disk_is_verified_in_few_passes(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every pass reads all of its files: 34, where asking for everything took 125."""
    folder = tiny_model(num_hidden_layers=2, **FAMILIES["llama"])
    monkeypatch.setenv(LIMIT, "0")
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    handle = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: count() if type(module).__name__ == "LlamaModel" else None
    )
    try:
        known = compute_reference(Checkpoint.open(folder), rounded=False, precisions=["as-stored"])
        session = find_target("hf").open(folder)
        verdict = measure(session, known, artifact="hf", target="hf", precision="as-stored")
    finally:
        handle.remove()
    assert verdict.passed, verdict.problems
    assert set(verdict.phases) == {"prefill", "decode", "padded_prefill", "padded_decode", "far"}
    assert passes <= 34
    # A fault that shows only beside others is found all the same.
    start = session.start
    monkeypatch.setattr(session, "start", lambda tokens, lengths=None: start(tokens))
    again = measure(session, known, artifact="hf", target="hf", precision="as-stored")
    assert not again.passed


def test_eval_says_the_same_part_by_part(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = [tiny_model(model_type="llama", num_hidden_layers=n) for n in (1, 2)]
    found = []
    for limit in ("1", "0"):
        monkeypatch.setenv(LIMIT, limit)
        found.append(evaluate(*pair, TOKENS_BL))
    assert found[0] == found[1]
    halves = evaluate(*pair, TOKENS_BL, dtype=torch.bfloat16)
    # Eight bits of mantissa move a divergence by a few parts in a hundred, and do move it.
    assert halves.kl is not None
    assert halves.kl != found[0].kl
    assert halves.kl == pytest.approx(found[0].kl, rel=0.1)


class Alive(TorchDispatchMode):
    """Most bytes that were held at once by what operations made; files that are mapped are not."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[StorageWeakRef, int] = {}
        self.most = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                self.held[StorageWeakRef(storage)] = storage.nbytes()
        self.held = {ref: size for ref, size in self.held.items() if not ref.expired()}
        self.most = max(self.most, sum(self.held.values()))
        return result


def test_reference_and_eval_hold_a_fraction_of_what_they_judge(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 16}
    folder = tiny_model(model_type="llama", max_position_embeddings=48, **sizes)
    checkpoint = Checkpoint.open(folder)
    monkeypatch.setenv(LIMIT, "0")
    with Alive() as alive:
        compute_reference(checkpoint, rounded=False, precisions=())
        gc.collect()  # a model's modules know each other
        find_target("hf").open(folder).start(TOKENS_BL.numpy())
        gc.collect()
        evaluate(folder, folder, TOKENS_BL)
    # A matrix of each shape of both models, and what goes through a layer.
    assert alive.most < checkpoint.num_bytes / 3
    monkeypatch.setenv(LIMIT, "1")
    with Alive() as alive:
        evaluate(folder, folder, TOKENS_BL)
    assert alive.most > 2 * checkpoint.num_bytes


def test_a_limit_that_is_no_number_is_refused(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LIMIT, "4 GB")
    with pytest.raises(UsageError, match="expected a number of GB"):
        Loaded(Checkpoint.open(tiny_model(model_type="llama", num_hidden_layers=1)))


def test_a_value_that_is_not_finite_is_refused_when_it_is_read(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model(model_type="llama", num_hidden_layers=1)
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    file = next(iter(damaged.glob("*.safetensors")))
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name].view(-1)[-1] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    loaded = Loaded(Checkpoint.open(damaged), whole=False)
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        loaded.logits(TOKENS_BL)
