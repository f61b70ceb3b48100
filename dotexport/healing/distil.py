"""Global healing: the whole narrowed model is distilled from its original on calibration text.

Every weight moves, embeddings, norms and head too; the loss is that of distil_loss.py. What
comes back is the step with the least KL divergence on held-out windows. Step 0, the closed form, is
one of the candidates, so on these windows healing never makes a model worse.

Shapes: N windows, L tokens per window, B windows of a step, D width before, K width after.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dotexport.healing.distil_judge import Judgement, assign, judge, rounded_as_stored
from dotexport.healing.distil_loss import distillation_loss
from dotexport.healing.distil_memory import needs_recomputing, recompute_layers, windows_at_once
from dotexport.healing.heal_options import HealOptions
from dotexport.healing.healing_text import HealingText
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.loading import load_float32

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
Tensors = dict[str, Tensor]
Save = Callable[[Tensors, dict[str, Any]], None]


@dataclass
class Course:
    """How far a run is: all that it must remember besides tensors.

    Attributes:
        curve: one entry per evaluation: step, held-out figures, mean loss of the steps before it.
        best: index of the evaluation with the least held-out KL.
        seconds: spent on steps and evaluations, over all runs that it took.
    """

    step: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    best: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Healed:
    """The best step's weights as they will be stored, and the report."""

    tensors: Tensors
    report: dict[str, Any]


def heal(
    student: Checkpoint,
    source: Checkpoint,
    E_DK: Tensor,
    text: HealingText,
    options: HealOptions,
    *,
    behind: Sequence[int] | None = None,
    device: torch.device,
    progress: Progress = lambda stage, done, total: None,
    save: Save = lambda tensors, course: None,
    saved: tuple[dict[str, Any], Tensors] | None = None,
) -> Healed:
    """Distil a narrowed checkpoint from its original.

    Both models are in memory whole, in float32; the narrowed one with gradients and two moments.

    Args:
        E_DK: the basis that narrowed the residual stream.
        behind: the original's layer that each of the narrowed model's answers for; None: its own
            number.
        save: takes the whole state after every evaluation.
        saved: such a course and its state; the run goes on from there and ends with the same bits.
    """
    healing = Healing.begin(student, source, E_DK, text, options, device, behind)
    if saved is None:
        healing.judge()
    else:
        healing.restore(*saved)
        logger.warning("healing goes on after step %d", healing.course.step)
    while healing.course.step < options.steps:
        if not healing.advance():
            logger.warning("healing diverged after step %d and stops there", healing.course.step)
            break
        progress(healing.stage, healing.course.step, options.steps)
        if healing.course.step in options.evaluations:
            healing.judge()
            save(healing.state(), asdict(healing.course))
    return Healed(healing.best, healing.report())


@dataclass
class Healing:
    """One run: both models, the optimiser, and what is best so far."""

    student: Any
    teacher: Any
    E_DK: Tensor
    behind: Sequence[int] | None
    text: HealingText
    options: HealOptions
    dtypes: Mapping[str, torch.dtype]
    accelerator: Any
    optimizer: Any
    recomputed: bool
    course: Course = field(default_factory=Course)
    best: Tensors = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)

    @classmethod
    def begin(
        cls,
        student: Checkpoint,
        source: Checkpoint,
        E_DK: Tensor,
        text: HealingText,
        options: HealOptions,
        device: torch.device,
        behind: Sequence[int] | None,
    ) -> Healing:
        accelerator = new_accelerator(options.chosen_precision(device), device)
        teacher = load_float32(source).requires_grad_(False).to(device)
        model = load_float32(student).to(device)
        length = options.seqlen or text.train_NL.shape[1]
        recomputed = needs_recomputing(model, options.batch, length)
        if recomputed:
            logger.info("activations are computed twice, for want of memory")
            recompute_layers(model)
        dtypes = {name: spec.dtype for name, spec in student.specs.items()}
        optimizer = accelerator.prepare(new_optimizer(model, options))
        return cls(
            model,
            teacher,
            E_DK.to(device).float(),
            behind,
            text,
            options,
            dtypes,
            accelerator,
            optimizer,
            recomputed,
        )

    # Steps ------------------------------------------------------------------------------------

    def advance(self) -> bool:
        """One optimiser step; a batch whose logits are too large runs in pieces.

        False, and nothing has moved: the loss or its gradient is not finite.
        """
        began = time.perf_counter()
        tokens_BL = batch(self.text.train_NL, self.course.step, self.options).to(self.E_DK.device)
        at_once = windows_at_once(tokens_BL.shape[1], self.student.config.vocab_size)
        total = 0.0
        for piece_BL in torch.split(tokens_BL, at_once):
            with self.accelerator.autocast():
                loss = distillation_loss(
                    self.student,
                    self.teacher,
                    self.E_DK,
                    piece_BL,
                    hidden_weight=self.options.hidden_weight,
                    behind=self.behind,
                )
            loss = loss * (len(piece_BL) / len(tokens_BL))
            self.accelerator.backward(loss)
            total += loss.item()
        norm = self.accelerator.clip_grad_norm_(self.student.parameters(), self.options.clip)
        if not math.isfinite(total) or not math.isfinite(norm):
            return False
        factor = self.options.factor(self.course.step)
        for group in self.optimizer.param_groups:
            group["lr"] = factor * group["peak"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(total)
        self.course.step += 1
        self.course.seconds += time.perf_counter() - began
        return True

    def judge(self) -> None:
        """Evaluate the weights as they would be stored, and keep them if none were better."""
        began = time.perf_counter()
        rounded = rounded_as_stored(self.student, self.dtypes)
        judgement = self._judgement(rounded)
        course = self.course
        loss = {"loss": sum(self.losses) / len(self.losses)} if self.losses else {}
        self.losses.clear()
        course.curve.append({"step": course.step, **asdict(judgement), **loss})
        if len(course.curve) == 1 or judgement.kl < course.curve[course.best]["kl"]:
            course.best = len(course.curve) - 1
            self.best = {name: tensor.cpu() for name, tensor in rounded.items()}
        logger.info("step %d: %s", course.step, course.curve[-1])
        course.seconds += time.perf_counter() - began

    def _judgement(self, rounded: Tensors) -> Judgement:
        own = {name: parameter.data for name, parameter in self.student.named_parameters()}
        assign(self.student, {name: tensor.float() for name, tensor in rounded.items()})
        try:
            return judge(self.student, self.teacher, self.text.held_NL)
        finally:
            assign(self.student, own)

    @property
    def stage(self) -> str:
        curve = self.course.curve
        best = curve[self.course.best]["kl"]
        return f"healing: held-out KL {curve[0]['kl']:.4f} -> {best:.4f}"

    # State ------------------------------------------------------------------------------------

    def state(self) -> Tensors:
        """Every tensor that a run needs to go on as if it had not been stopped."""
        kept = {f"student.{name}": p.data for name, p in self.student.named_parameters()}
        kept |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            kept |= {f"optimizer.{index}.{key}": value for key, value in moments.items()}
        return kept

    def restore(self, course: Mapping[str, Any], tensors: Tensors) -> None:
        self.course = Course(**course)
        self.best = _below("best.", tensors)
        assign(self.student, _below("student.", tensors))
        moments: dict[int, Tensors] = {}
        for name, tensor in _below("optimizer.", tensors).items():
            index, _, key = name.partition(".")
            moments.setdefault(int(index), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})

    def report(self) -> dict[str, Any]:
        """What the reports say: before and after on the held-out windows, and the way there."""
        curve, options = self.course.curve, self.options
        before, after = curve[0], curve[self.course.best]
        length = options.seqlen or self.text.train_NL.shape[1]
        return {
            "steps": options.steps,
            "best_step": after["step"],
            "kl": [before["kl"], after["kl"]],
            "perplexity": [before["perplexity"], after["perplexity"]],
            "original_perplexity": before["original_perplexity"],
            "windows": len(self.text.train_NL),
            "held_out_windows": len(self.text.held_NL),
            "tokens_per_step": options.batch * length,
            "precision": options.chosen_precision(self.E_DK.device),
            "gradient_checkpointing": self.recomputed,
            "seconds": round(self.course.seconds, 2),
            "curve": curve,
        }


def batch(windows_NL: Tensor, step: int, options: HealOptions) -> Tensor:
    """The windows of one step: a new order in every epoch, a function of seed and step alone."""
    length = options.seqlen or windows_NL.shape[1]
    pieces_NL = windows_NL[:, : windows_NL.shape[1] // length * length].reshape(-1, length)
    drawn = [divmod(step * options.batch + n, len(pieces_NL)) for n in range(options.batch)]
    orders = {
        epoch: np.random.default_rng([options.seed, epoch]).permutation(len(pieces_NL))
        for epoch in {epoch for epoch, _ in drawn}
    }
    return pieces_NL[[int(orders[epoch][place]) for epoch, place in drawn]]


def new_accelerator(precision: str, device: torch.device) -> Any:
    """accelerate's loop on one device, with or without bf16 autocast."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # It keeps one precision per process, and would refuse a second run with another.
    AcceleratorState._reset_state(reset_partial_state=True)
    mixed = "bf16" if precision == "bf16" else "no"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return Accelerator(mixed_precision=mixed, cpu=device.type == "cpu")


def new_optimizer(model: Any, options: HealOptions) -> torch.optim.Optimizer:
    """AdamW over everything; vectors (norms, biases) are never decayed."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rate = options.peak_rate(model.config.hidden_size)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)
    for group in optimizer.param_groups:
        group["peak"] = rate
    return optimizer


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
