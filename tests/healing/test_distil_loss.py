"""What healing minimises, and that logits of a whole batch never exist for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from torch.utils._python_dispatch import TorchDispatchMode

from dotexport.healing import distil_head
from dotexport.healing.distil_head import Head, divergence
from dotexport.healing.distil_loss import distillation_loss, read
from dotexport.healing.distil_masters import Masters, compute_in
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.loading import load_float32

CHUNKS = {"one": 1 << 30, "of three rows": 3 * 11 * 8, "of a row": 1}


def tokens(*shape: int) -> Tensor:
    return torch.randint(90, shape, generator=torch.Generator().manual_seed(0))


def loaded(folder: Path) -> Any:
    return load_float32(Checkpoint.open(folder))


def test_the_original_itself_has_no_loss(tiny_llama: Callable[[str], Path]) -> None:
    model = loaded(tiny_llama("wide-heads"))
    loss = distillation_loss(model, model, torch.eye(48), tokens(2, 16), hidden_weight=1.0)
    # Both sides are the same numbers; KL of equal logits is 0 up to float32 rounding.
    assert abs(loss.item()) < 1e-6


def test_a_layer_that_is_gone_is_answered_for_by_the_one_before_it(
    tiny_llama: Callable[[str], Path],
) -> None:
    """One that added nothing: without it every stream and every prediction is the same."""
    whole, without = (loaded(tiny_llama("wide-heads")) for _ in range(2))
    for writer in (whole.model.layers[1].self_attn.o_proj, whole.model.layers[1].mlp.down_proj):
        writer.weight.data.zero_()
    del without.model.layers[1]
    losses = [
        distillation_loss(
            without, whole, torch.eye(48), tokens(2, 16), hidden_weight=1.0, behind=behind
        ).item()
        for behind in ([1, 2], [0, 1])
    ]
    assert abs(losses[0]) < 1e-6  # as above
    assert losses[1] > 0.1


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(("scaling", "cap"), [(1.0, None), (8.0, None), (1.0, 3.0), (0.5, 2.0)])
def test_divergence_and_its_gradients_are_those_of_the_definition(
    chunk: str, scaling: float, cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against autograd of the plain formula, in float64, whatever is computed together."""
    monkeypatch.setattr(distil_head, "CHUNK_BYTES", CHUNKS[chunk])
    monkeypatch.setattr(distil_head, "BLOCK_BYTES", {"cpu": 2 * 4 * 11})
    torch.manual_seed(0)
    ours_CK, theirs_CD = torch.randn(7, 4).double(), torch.randn(7, 6).double()
    table_VK, table_VD = torch.randn(11, 4).double(), torch.randn(11, 6).double()

    def plain(hidden: Tensor, table: Tensor) -> Tensor:
        logits_CV = hidden @ table.T / scaling
        logits_CV = logits_CV if cap is None else cap * (logits_CV / cap).tanh()
        return log_softmax(logits_CV, -1)

    ours = [tensor.requires_grad_() for tensor in (ours_CK, table_VK)]
    reference = kl_div(
        plain(*ours), plain(theirs_CD, table_VD), reduction="batchmean", log_target=True
    )
    heads = Head(table_VK, scaling, cap), Head(table_VD, scaling, cap)
    found = divergence(ours_CK, theirs_CD, *heads)
    assert found.item() == pytest.approx(reference.item(), rel=1e-12)
    expected = torch.autograd.grad(2 * reference, ours)
    torch.testing.assert_close(torch.autograd.grad(2 * found, ours), expected)


class Largest(TorchDispatchMode):
    """Records how many numbers the largest tensor has that any operation gives."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        for one in given if isinstance(given, tuple | list) else (given,):
            if isinstance(one, Tensor):
                self.numel = max(self.numel, one.numel())
        return given


def test_the_logits_of_a_batch_never_exist(
    tiny_llama: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a table of 16,384 rows the largest tensor is the table, forwards and backwards."""
    student, teacher = (loaded(tiny_llama("many-tied-rows")) for _ in range(2))
    monkeypatch.setattr(distil_head, "CHUNK_BYTES", 8 * 16384 * 4)
    table, batch_BL = student.get_output_embeddings().weight.numel(), tokens(4, 64)
    assert 2 * table < 4 * 64 * 16384
    with Largest() as largest:
        logits = student(input_ids=batch_BL).logits
        assert largest.numel == logits.numel()  # the mode sees what it should
        largest.numel = 0
        distillation_loss(student, teacher, torch.eye(64), batch_BL, hidden_weight=1.0).backward()  # type: ignore[no-untyped-call]
    assert largest.numel == table


def test_a_step_in_bfloat16_is_close_to_one_in_float32(
    tiny_llama: Callable[[str], Path],
) -> None:
    gradients, losses = [], []
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = loaded(tiny_llama("tied-bf16")), loaded(tiny_llama("wide-heads"))
        masters = Masters.of(student, dtype)
        compute_in(teacher, dtype)
        E_DK = torch.eye(48, dtype=dtype)
        loss = distillation_loss(student, teacher, E_DK, tokens(4, 32), hidden_weight=1.0)
        loss.backward()  # type: ignore[no-untyped-call]
        masters.take_gradients()
        assert {w.grad.dtype for w in masters.weights.values() if w.grad is not None} == {
            torch.float32
        }
        gradients.append(torch.cat([w.grad.flatten() for w in masters.weights.values()]))
        losses.append(loss.item())
    # bfloat16 keeps 8 bits: products are off by 0.4 % each, through three layers and back.
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert losses[1] != losses[0]
    assert torch.cosine_similarity(*gradients, dim=0) > 0.995


def test_streams_are_recorded_behind_every_layer(tiny_llama: Callable[[str], Path]) -> None:
    model = loaded(tiny_llama("wide-heads"))
    tokens_BL = torch.arange(12).reshape(2, 6)
    last_CK, streams = read(model, tokens_BL, streams=True)
    expected = model(input_ids=tokens_BL, output_hidden_states=True).hidden_states
    assert [tuple(stream.shape) for stream in streams] == [(2, 6, 48)] * 3
    for stream, other in zip(streams[:-1], expected[1:-1], strict=True):  # the last is normalised
        torch.testing.assert_close(stream, other)
    torch.testing.assert_close(model.get_decoder().norm(streams[-1]), expected[-1])
    torch.testing.assert_close(last_CK, expected[-1].flatten(0, 1))
    assert read(model, tokens_BL, streams=False)[1] == []
    assert len(streams) == 3  # the later passes were none of its business
