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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from dotexport.generation.own_text import texts_without_end
from dotexport.healing.compiling import compile_layers
from dotexport.healing.distil_head import Head
from dotexport.healing.distil_judge import HeldOut, judge
from dotexport.healing.distil_loss import distillation_loss
from dotexport.healing.distil_masters import Masters, compute_in
from dotexport.healing.distil_memory import needs_recomputing, recompute_layers, windows_at_once
from dotexport.healing.heal_options import HealOptions, Schedule
from dotexport.healing.healing_text import HealingText
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.fused import in_memory
from dotexport.models.loading import load_float32, load_model
from dotexport.processes.processes import ALONE, Processes, Several
from dotexport.storage.workspace import Workspace
from dotexport.vocabulary.joining import Spellings
from dotexport.vocabulary.trimming import Trimmed

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
Tensors = dict[str, Tensor]
Save = Callable[[Tensors, dict[str, Any]], None]
Saved = tuple[dict[str, Any], Tensors]

NOWHERE = Workspace()
FIRST_ROW = 1 << 20  # of text that the original says: others than those of calibration


@dataclass
class Course:
    """How far a run is: all that it must remember besides tensors.

    Attributes:
        curve: one entry per evaluation: step, held-out figures, mean loss of the steps before it.
        best: index of the evaluation with the least held-out KL.
        seconds: spent on steps and evaluations, over all runs that it took; of them on steps
            alone.
    """

    step: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    best: int = 0
    seconds: float = 0.0
    training_seconds: float = 0.0

    def spent(self, since: float, *, training: bool = False) -> None:
        """Time goes to a step, or to an evaluation."""
        passed = time.perf_counter() - since
        self.seconds += passed
        self.training_seconds += passed if training else 0.0


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
    workspace: Workspace = NOWHERE,
    save: Save = lambda tensors, course: None,
    saved: Saved | None = None,
    processes: Processes = ALONE,
) -> Healed:
    """Distil a narrowed checkpoint from its original.

    Of a model that lost tokens the original is the one that still has them (vocabulary/joining.py).
    Both models are in memory whole, in bfloat16 where steps compute so; of the narrowed one also
    weights, gradients and two moments in float32. Of several processes each has its piece of all
    that, and its windows of every step.

    Args:
        E_DK: the basis that narrowed the residual stream.
        behind: the original's layer that each of the narrowed model's answers for; None: its own
            number.
        workspace: keeps text that the original says.
        save: takes the whole state after every evaluation.
        saved: such a course and its state; the run goes on from there and ends with the same bits.
        processes: that share the work. The first one's files, text and saved state count; the
            others' `save` gets no tensors.
    """
    with processes.computing():
        healing = Healing.begin(
            *(student, source, E_DK, text, options, device, behind, workspace, processes)
        )
        healing.run(saved, save, progress)
        return Healed(healing.whole(healing.best), healing.report())


def take_part(
    processes: Several,
    student: Checkpoint,
    source: Checkpoint,
    E_DK: Tensor,
    text: HealingText,
    options: HealOptions,
    behind: Sequence[int],
) -> None:
    """What other processes do while the first one heals."""
    device = processes.device
    heal(student, source, E_DK, text, options, behind=behind, device=device, processes=processes)


@dataclass
class Healing:
    """One run: both models, the optimiser, and what is best so far.

    Attributes:
        teacher: computes in the dtype of passes.
        spellings: of its tokens that the student lost.
        masters: the student's weights in float32.
        batches: number of a step -> its windows; the first process has them.
        passes: dtype of the products of a step.
    """

    student: Any
    teacher: Any
    spellings: Spellings | None
    masters: Masters
    E_DK: Tensor
    behind: Sequence[int] | None
    text: HealingText
    batches: Callable[[int], Tensor] | None
    held: HeldOut
    options: HealOptions
    schedule: Schedule
    dtypes: dict[str, torch.dtype]
    passes: torch.dtype
    optimizer: torch.optim.Optimizer
    at_once: int
    recomputed: bool
    processes: Processes
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
        workspace: Workspace,
        processes: Processes = ALONE,
    ) -> Healing:
        bf16 = options.chosen_precision(device) == "bf16"
        passes = torch.bfloat16 if bf16 else torch.float32
        schedule = options.settled(text.train_NL.shape[1], processes.size)
        spellings = None
        if isinstance(lost := source, Trimmed):
            spellings, source = processes.agreed(lambda: Spellings.of(lost)), lost.original
        if isinstance(processes, Several):
            loaded = _in_shards(student, source, spellings, text, passes, processes)
        else:
            loaded = _whole(student, source, spellings, text, passes, device)
        masters, teacher, held, speaker = loaded
        model = masters.model
        most = windows_at_once(model.config, schedule.length, passes, device)
        at_once = min(schedule.batch // processes.size, most)
        recomputed = processes.agreed(
            lambda: needs_recomputing(model, at_once, schedule.length, passes, processes.size)
        )
        if recomputed:
            logger.info("activations are computed twice, for want of memory")
            recompute_layers(model)
        if options.compiled:
            compile_layers(model)
            compile_layers(teacher)

        def own() -> Iterable[str]:
            return texts_without_end(
                speaker(), source.folder, seed=options.seed, first=FIRST_ROW, workspace=workspace
            )

        return cls(
            model,
            teacher,
            spellings,
            masters,
            E_DK.to(device, passes),
            behind,
            text,
            text.batches(schedule, options.seed, own) if processes.leads else None,
            held,
            options,
            schedule,
            {name: spec.dtype for name, spec in in_memory(student, masters.weights).specs.items()},
            passes,
            new_optimizer(masters, options, schedule),
            at_once,
            recomputed,
            processes,
        )

    def run(self, saved: Saved | None, save: Save, progress: Progress) -> None:
        """From a saved state, or from the beginning, to the last step."""
        course = self.processes.agreed(lambda: None if saved is None else saved[0])
        if course is None:
            self.judge()
        else:
            self.restore(course, self.processes.handed_on((saved[1] if saved else {}).items()))
            logger.warning("healing goes on after step %d", self.course.step)
        schedule = self.schedule
        progress(self.stage, self.course.step, schedule.steps)
        while self.course.step < schedule.steps:
            if not self.advance():
                logger.warning("healing diverged after step %d and stops there", self.course.step)
                break
            progress(self.stage, self.course.step, schedule.steps)
            if self.course.step in schedule.evaluations:
                self.judge()
                save(self.state(), asdict(self.course))

    # Steps ------------------------------------------------------------------------------------

    def advance(self) -> bool:
        """One optimiser step; a batch whose activations are too large runs in pieces.

        False, and nothing has moved: the loss or its gradient is not finite.
        """
        began = time.perf_counter()
        share_BL = self._share(self.course.step)
        self.course.spent(began)
        began = time.perf_counter()
        total = torch.zeros((), dtype=torch.float64)
        for piece_BL in torch.split(share_BL.to(self.E_DK.device), self.at_once):
            loss = distillation_loss(
                self.student,
                self.teacher,
                self.E_DK,
                piece_BL,
                hidden_weight=self.options.hidden_weight,
                behind=self.behind,
                reads=self.masters.read,
                spellings=self.spellings,
            )
            loss = loss * (len(piece_BL) / len(share_BL))
            torch.autograd.backward(loss)
            self.masters.take_gradients()
            total += loss.item()
        self.processes.sum(total)
        mean = total.item() / self.processes.size
        weights = self.masters.weights.values()
        norm = torch.nn.utils.clip_grad_norm_(weights, self.options.clip)
        if not math.isfinite(mean) or not math.isfinite(self.masters.whole(norm).item()):
            return False
        factor = self.schedule.factor(self.course.step)
        for group in self.optimizer.param_groups:
            group["lr"] = factor * group["peak"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.masters.hand_back()
        self.losses.append(mean)
        self.course.step += 1
        self.course.spent(began, training=True)
        return True

    def _share(self, step: int) -> Tensor:
        """This process's windows of a step, of which all have as many."""
        batches = self.batches
        tokens_BL = self.processes.agreed(lambda: batches(step) if batches else torch.empty(0))
        return tokens_BL[self.processes.rank :: self.processes.size]

    def judge(self) -> None:
        """Evaluate the weights as they would be stored, and keep them if none were better."""
        began = time.perf_counter()
        rounded = self.masters.rounded(self.dtypes)
        # Judged in float32, which is another graph, and rarely.
        eager = torch.compiler.set_stance("force_eager")
        with eager, self.masters.computing_with(rounded) as model:
            judgement = judge(model, self.held)
        course = self.course
        loss = {"loss": sum(self.losses) / len(self.losses)} if self.losses else {}
        self.losses.clear()
        course.curve.append({"step": course.step, **asdict(judgement), **loss})
        if len(course.curve) == 1 or judgement.kl < course.curve[course.best]["kl"]:
            course.best = len(course.curve) - 1
            self.best = {name: tensor.cpu() for name, tensor in rounded.items()}
        logger.info("step %d: %s", course.step, course.curve[-1])
        course.spent(began)

    @property
    def stage(self) -> str:
        curve = self.course.curve
        best = curve[self.course.best]["kl"]
        rate = f", {self.tokens_per_second:,.0f} tokens/s" if self.course.step else ""
        return f"healing: held-out KL {curve[0]['kl']:.4f} -> {best:.4f}{rate}"

    @property
    def tokens_per_second(self) -> float:
        """Of steps, evaluations aside."""
        tokens = self.course.step * self.schedule.tokens_per_step
        return tokens / self.course.training_seconds if tokens else 0.0

    # State ------------------------------------------------------------------------------------

    def state(self) -> Tensors:
        """Every tensor that a run needs to go on as if it had not been stopped."""
        kept = {f"student.{name}": own.data for name, own in self.masters.weights.items()}
        kept |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            kept |= {f"optimizer.{index}.{key}": value for key, value in moments.items()}
        return self.whole(kept)

    def whole(self, kept: Tensors) -> Tensors:
        """The same in one piece, for the first process alone."""
        brought = ((name, self.masters.whole(tensor)) for name, tensor in kept.items())
        return {name: tensor for name, tensor in brought if self.processes.leads}

    def restore(self, course: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> None:
        self.course = Course(**course)
        kept = {name: self.masters.cut(tensor) for name, tensor in tensors}
        self.best = _below("best.", kept)
        for name, tensor in _below("student.", kept).items():
            self.masters.weights[name].data.copy_(tensor)
        self.masters.hand_back()
        moments: dict[int, Tensors] = {}
        for name, tensor in _below("optimizer.", kept).items():
            index, _, key = name.partition(".")
            moments.setdefault(int(index), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})

    def report(self) -> dict[str, Any]:
        """What the reports say: before and after on the held-out windows, and the way there."""
        curve, schedule = self.course.curve, self.schedule
        before, after = curve[0], curve[self.course.best]
        return {
            "steps": schedule.steps,
            "best_step": after["step"],
            "kl": [before["kl"], after["kl"]],
            "perplexity": [before["perplexity"], after["perplexity"]],
            "original_perplexity": before["original_perplexity"],
            "windows": len(self.text.train_NL)
            if self.text.source is None
            else self.course.step * schedule.batch,
            **({"text": self.text.source} if self.text.source is not None else {}),
            "held_out_windows": len(self.text.held_NL),
            "tokens": self.course.step * schedule.tokens_per_step,
            "tokens_per_step": schedule.tokens_per_step,
            "tokens_per_second": round(self.tokens_per_second, 1),
            "precision": self.options.chosen_precision(self.E_DK.device),
            "gradient_checkpointing": self.recomputed,
            "compiled": self.options.compiled,
            "seconds": round(self.course.seconds, 2),
            "curve": curve,
        }


Loaded = tuple[Masters, Any, HeldOut, Callable[[], Any]]
"""The student's weights, a teacher in the dtype of passes, what it made of held-out windows before
that, and a model that says text."""


def _whole(
    student: Checkpoint,
    source: Checkpoint,
    spellings: Spellings | None,
    text: HealingText,
    passes: torch.dtype,
    device: torch.device,
) -> Loaded:
    teacher = load_float32(source).requires_grad_(False).to(device)
    held = HeldOut.of(text.held_NL, teacher, partial(_head, teacher, source), spellings=spellings)
    compute_in(teacher, passes)
    masters = Masters.of(load_float32(student).to(device), passes)
    return masters, teacher, held, lambda: teacher


def _in_shards(
    student: Checkpoint,
    source: Checkpoint,
    spellings: Spellings | None,
    text: HealingText,
    passes: torch.dtype,
    processes: Several,
) -> Loaded:
    from dotexport.healing.distil_shards import Shards, in_shards, read_shards

    exact = in_shards(source, torch.float32, processes).requires_grad_(False)
    head = partial(_head, exact, source)
    held = HeldOut.of(text.held_NL, exact, head, read_shards, processes, spellings)
    teacher = in_shards(source, passes, processes).requires_grad_(False)
    # Text is said by the first process alone, and by a model that is not in pieces.
    speaker = cache(lambda: load_model(source, passes).to(processes.device))
    return Shards.begin(student, passes, processes), teacher, held, speaker


def _head(teacher: Any, source: Checkpoint) -> Head:
    """The original's, in float32 whatever the teacher computes in."""
    head = Head.of(teacher)
    name = next(n for n, p in teacher.named_parameters() if p is head.table_VK)
    return replace(head, table_VK=source.tensor(name).to(head.table_VK.device).float())


def new_optimizer(
    masters: Masters, options: HealOptions, schedule: Schedule
) -> torch.optim.Optimizer:
    """AdamW over everything; vectors (norms, biases) are never decayed."""
    weights = list(masters.weights.values())
    rate = options.peak_rate(masters.model.config.hidden_size, schedule.tokens_per_step)
    groups = [
        {"params": [w for w in weights if w.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [w for w in weights if w.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)
    for group in optimizer.param_groups:
        group["peak"] = rate
    return optimizer


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
