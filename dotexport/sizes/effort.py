"""How long narrowing takes: its operations over the rates of this machine.

Operations are counted for shrink's defaults, from the passes over the text (in the dtype of
passes), the products of tokens (float32) and the solves (float64) as narrowing/ and merging/ make
them; what a pass moves through memory besides is counted by a rule of thumb. Rates are measured in
a fraction of a second, on matrices as wide as the model is, up to 1024.

Shapes: T tokens, L tokens of a window, D width of the stream before, K after, R rows of a
sublayer's readers, N inputs of its writer before, J after.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cache

import torch

from dotexport.axes import cutting
from dotexport.axes.plan import Plan
from dotexport.healing.heal_options import HealOptions, Schedule
from dotexport.merging.gram import PANEL
from dotexport.models.family import Family, Sublayer
from dotexport.models.shapes import Sizes
from dotexport.narrowing.basis import LEARNING_STEPS
from dotexport.narrowing.depth import FITTED, LENGTH, LOOKED_AT
from dotexport.narrowing.depth import JUDGED as JUDGED_TOKENS
from dotexport.narrowing.judging import JUDGED
from dotexport.narrowing.narrow_options import LocalOptions
from dotexport.narrowing.norm_statistics import MOST_SITES
from dotexport.narrowing.prepare import rehearsed_tokens
from dotexport.narrowing.run import CLOSER, REHEARSED_LENGTH

HELD_OUT = 1 / 8  # of the windows
BACKWARD = 3  # a forward and a backward pass cost three forward ones
LOCKSTEP = 3  # a token that is sampled, in a batch of rows, over one that is read with its window
STRENGTHS = 4  # of a ridge that a fit tries, usually
# Times that activations pass through memory: norms, nonlinearities and copies.
TOUCHED = 10
MEASURED_SECONDS = 0.05  # per rate, at least
LEAST_WIDTH, MOST_WIDTH = 128, 1024  # of matrices that are timed


@dataclass(frozen=True)
class Work:
    """Operations by kind.

    Attributes:
        passes: multiplications and additions of matrix products in the dtype of passes.
        products: the same in float32.
        sums: the same in float64.
        factors: of Cholesky factors and triangular solves, in float64.
        eigen: n^3 of every symmetric eigenproblem, in float64.
        moved: bytes through memory.
    """

    passes: float = 0.0
    products: float = 0.0
    sums: float = 0.0
    factors: float = 0.0
    eigen: float = 0.0
    moved: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: float) -> Work:
        return Work(*(times * a for a in astuple(self)))

    def shared(self, processes: int) -> Work:
        """What is left for each of several processes: of all that is done for tokens its share, and
        every solve, for which the others wait."""
        return replace(
            self,
            passes=self.passes / processes,
            products=self.products / processes,
            moved=self.moved / processes,
        )

    def seconds(self, rates: Work) -> float:
        """At so many operations of each kind per second."""
        pairs = zip(astuple(self), astuple(rates), strict=True)
        return float(sum(count / rate for count, rate in pairs))


def shrink_seconds(
    decided: Plan,
    *,
    samples: int = 128,
    seqlen: int = 2048,
    passes: torch.dtype = torch.float32,
    processes: int = 1,
) -> float:
    """Estimated time of narrowing on this machine, with calibration text of so many windows.

    The choice of layers and half of the text, which the original samples, included; without
    distillation, and without reading and writing files.

    Args:
        processes: each as fast as this one, and sums travel in no time.
    """
    work = work_of(decided, samples, seqlen).shared(processes)
    work += work_of_choosing_layers(decided, seqlen)
    work += work_of_sampling(decided, samples // 2 * seqlen)
    return work.seconds(rates(_stream(decided.before), passes))


def allocation_seconds(
    rehearsed: Sequence[Plan],
    checked: Sequence[Plan] = (),
    *,
    samples: int = 128,
    seqlen: int = 2048,
    passes: torch.dtype = torch.float32,
) -> float:
    """Estimated time of measuring these plans before one is taken, those that are checked on more
    text (allocation.py); 0 for none."""
    if not rehearsed:
        return 0.0
    seqlen = min(seqlen, REHEARSED_LENGTH)
    tokens = rehearsed_tokens(_stream(rehearsed[0].before))
    few, more = (
        min(samples, math.ceil(times * tokens / seqlen) + 2 * math.ceil(JUDGED / seqlen))
        for times in (1, CLOSER)
    )
    looks = [*((p, few) for p in rehearsed), *((p, more) for p in checked)]
    work = sum((work_of(p, count, seqlen, local=False) for p, count in looks), Work())
    deepest = min((p for p, _ in looks), key=lambda p: p.after.num_layers)
    work += work_of_choosing_layers(deepest, seqlen) + work_of_context(deepest, 2 * JUDGED)
    return work.seconds(rates(_stream(deepest.before), passes))


def distillation_seconds(
    decided: Plan,
    heal: HealOptions,
    *,
    samples: int = 128,
    seqlen: int = 2048,
    processes: int = 1,
) -> float:
    """Estimated time of distilling the narrowed model from its original, behind all of that."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = heal.chosen_precision(device) == "bf16"
    schedule = heal.settled(seqlen, processes)
    work = work_of_distilling(decided, schedule, round(HELD_OUT * samples * seqlen))
    work = work.shared(processes)
    return work.seconds(rates(_stream(decided.before), torch.bfloat16 if bf16 else torch.float32))


def work_of_distilling(decided: Plan, schedule: Schedule, held: int) -> Work:
    """What distillation computes: of each token of a step the original's pass and three of the
    narrowed model's; of each look at `held` tokens the narrowed model's pass and both heads, in
    float32, to which the original passes them once.

    The optimiser moves four numbers of each weight, and casts two.
    """
    before, after = decided.before, decided.after
    sites, V = _sites(decided, 1, schedule.length), before.vocab_size
    said = Work(moved=4 * TOUCHED * V)
    bodies = (
        sum((s.passed * s.count for s in sites), Work()),
        sum((s.passed_after * s.count_after for s in sites), Work()),
    )
    heads = tuple(Work(passes=2 * _stream(of) * of.vocab_size) for of in (before, after))
    step = bodies[0] + heads[0] + (bodies[1] + heads[1]) * BACKWARD + said
    look = _in_float32(bodies[1] + heads[0] + heads[1]) + said
    return (
        step * (schedule.steps * schedule.tokens_per_step)
        + look * (len(schedule.evaluations) * held)
        + _in_float32(bodies[0]) * held
        + Work(moved=4 * 2 * 6 * decided.parameters_after * schedule.steps)
    )


def _in_float32(passed: Work) -> Work:
    return replace(passed, passes=0.0, products=passed.products + passed.passes)


def work_of(decided: Plan, samples: int, seqlen: int, *, local: bool = True) -> Work:
    """What narrowing with shrink's defaults computes, the layers that stay being known.

    Args:
        local: with local healing.
    """
    before, after = decided.before, decided.after
    sites = _sites(decided, samples, seqlen)
    kept = sum(((s.work + (s.healing if local else Work())) * s.count_after for s in sites), Work())
    left = sum((s.passed * (s.count - s.count_after) for s in sites), Work())
    return kept + left * (samples * seqlen) + _ends(before, after, samples * seqlen)


def work_of_sampling(decided: Plan, tokens: int) -> Work:
    """What the original computes to say so many tokens (generation/own_text.py)."""
    before = decided.before
    layers = sum((site.passed * site.count for site in _sites(decided, 1, LENGTH)), Work())
    head = Work(passes=2 * _stream(before) * before.vocab_size)
    return (layers + head) * (LOCKSTEP * tokens)


def work_of_choosing_layers(decided: Plan, seqlen: int) -> Work:
    """What the search for layers that leave computes (narrowing/depth.py): every round walks
    through all of the layers once, and with every candidate through those behind it."""
    before = decided.before
    depth, count = before.num_layers, before.num_layers - decided.after.num_layers
    if count == 0:
        return Work()
    judged = 2 * JUDGED_TOKENS  # of either text
    D, V, tokens = _stream(before), before.vocab_size, FITTED + judged
    *_, last = sites = _sites(decided, 1, min(seqlen, LENGTH))
    layer = sum((site.passed * site.count for site in sites), Work()) * (1 / depth)
    trials = depth - 1 + sum(min(LOOKED_AT, depth - n - 1) for n in range(1, count))
    heads = Work(passes=2 * D * V * judged) * (trials + count)
    N = last.inside if last.sublayer.router is None else 0  # experts are not fitted there
    fit = _moments(FITTED, N, D) + Work(factors=N**3 / 3 + 2 * D * N**2, sums=2 * D * N**2)
    fits = trials + count * (count - 1) // 2  # layers that left are fitted over in each round
    walks = (count + 1) * depth * tokens + trials * depth / 2 * judged
    return layer * walks + heads + fit * fits + work_of_context(decided, judged)


def work_of_context(decided: Plan, judged: int) -> Work:
    """What it takes to know how much each of these tokens owes to context (narrowing/context.py):
    the original reads them in whole windows, and twice in blocks."""
    before = decided.before
    sites = _sites(decided, 1, LENGTH)
    body = sum((site.passed * site.count for site in sites), Work())
    head = Work(passes=2 * _stream(before) * before.vocab_size)
    return body * (3 * judged) + head * (2 * judged)


def _stream(sizes: Sizes) -> int:
    """Width of the residual stream."""
    return sizes.spaces["residual"]


def _sites(decided: Plan, samples: int, seqlen: int) -> list[_Site]:
    family, sizes = decided.family, (decided.before, decided.after)
    return [_Site(family, s, *sizes, samples, seqlen) for s in family.sublayers]


@dataclass(frozen=True)
class _Site:
    """A sublayer of the original and of what becomes of it."""

    family: Family
    sublayer: Sublayer
    before: Sizes
    after: Sizes
    samples: int
    seqlen: int

    @property
    def count(self) -> float:
        """How many layers of the original have it."""
        return self.before.layers_with(self.family, self.sublayer)

    @property
    def count_after(self) -> float:
        return self.after.layers_with(self.family, self.sublayer)

    @property
    def passed(self) -> Work:
        """A token through the original's sublayer."""
        return self._pass(_stream(self.before), self._rows(self.before), self.inside)

    @property
    def passed_after(self) -> Work:
        """A token through what becomes of it."""
        return self._pass(_stream(self.after), self._rows(self.after), self._inside(self.after))

    @property
    def inside(self) -> int:
        return self._inside(self.before)

    @property
    def healing(self) -> Work:
        return self._healing(self._inside(self.after) < self.inside)

    @property
    def work(self) -> Work:
        D, K = _stream(self.before), _stream(self.after)
        rows, N, J = self._rows(self.before), self._inside(self.before), self._inside(self.after)
        T = self.samples * self.seqlen
        seen = self._pass(D, rows, N) * T + Work(products=T * _gram(D), sums=2 * rows * D**2)
        readers = _moments(T, K, D, metric=True) + _fit(K, D, metric=True)
        readers += Work(sums=2 * rows * D**2 + 4 * rows * D * K)
        # The readers of the student run at full width for the choice, its writer not at all.
        writer = self._writers(T) + Work(passes=T * (2 * K * rows + self._mixing(N)))
        writer += Work(products=2 * T * D * K if K < D else 0, sums=2 * N * D * K)
        walks = self._pass(D, rows, N) + self._pass(K, self._rows(self.after), J)
        total = readers + writer + walks * T
        return total + seen if K < D else total

    def _writers(self, T: int) -> Work:
        """Sums, choices and fits of the writer, or of each expert's on its share of the tokens."""
        K, total = _stream(self.after), Work()
        for writer in self.sublayer.writers:
            N, J = (sizes.spaces[writer.in_] for sizes in (self.before, self.after))
            count = self.after.copies(writer)
            each = _moments(T * self.after.used(writer) // count, N, K) + _fit(J, K)
            total += (each + (_choice(N, J, K) if J < N else Work())) * count
        return total

    def _rows(self, sizes: Sizes) -> int:
        """That a token is multiplied with."""
        return sum(sizes.used(r) * sum(sizes.rows(r)) for r in self.sublayer.all_readers)

    def _inside(self, sizes: Sizes) -> int:
        """Neurons that a token has."""
        return sum(sizes.used(w) * sizes.spaces[w.in_] for w in self.sublayer.writers)

    @property
    def _attends(self) -> bool:
        return self.sublayer.module == "self_attn"

    def _mixing(self, inside: int) -> int:
        """Scores and sums over half of a window, the past, per token."""
        return 2 * inside * self.seqlen if self._attends else 0

    def _pass(self, width: int, rows: int, inside: int) -> Work:
        """One token through the sublayer."""
        products = 2 * width * rows + 2 * inside * width + self._mixing(inside)
        return Work(passes=products, moved=4 * TOUCHED * (width + rows))

    def _healing(self, narrower: bool) -> Work:
        fixed = cutting(self.before, self.sublayer.writer.in_) is None
        if (self._attends or fixed) and not narrower:
            return Work()
        options, T = LocalOptions(), self.samples * self.seqlen
        steps = options.num_steps(round(T * (1 - HELD_OUT)))
        each = max(options.tokens, self.seqlen) if self._attends else options.tokens
        looks = (options.checks + 1) * T * HELD_OUT
        return self.passed_after * (BACKWARD * steps * each + looks)


def _gram(width: int) -> int:
    """Operations per token of a Gram matrix, of which a little more than half is computed."""
    return width**2 + width * min(width, PANEL)


def _moments(T: int, inputs: int, outputs: int, *, metric: bool = False) -> Work:
    products = _gram(inputs) + 2 * inputs * outputs + (2 * outputs**2 if metric else 0)
    return Work(products=T * products, moved=T * 4 * TOUCHED * (inputs + outputs) / 2)


def _fit(inputs: int, outputs: int, *, metric: bool = False) -> Work:
    """A solve for every ridge that is tried and a last one; what is tried is judged, as is the
    prior."""
    solve = Work(factors=inputs**3 / 3 + 2 * outputs * inputs**2, sums=2 * outputs * inputs**2)
    weigh = 2 * outputs**2 * inputs if metric else 0
    judge = Work(sums=2 * outputs * inputs**2 + weigh)
    return solve * (STRENGTHS + 1) + judge * (STRENGTHS + 1)


def _choice(N: int, J: int, K: int) -> Work:
    """An inverse, downdated for every input that leaves, and the others' compensation."""
    solve = Work(factors=J**3 / 3 + 2 * K * J**2, sums=2 * K * (N**2 + J**2))
    return Work(factors=2 * N**3, sums=(N - J) * (2 * N**2 + 4 * K * N)) + solve


def _ends(before: Sizes, after: Sizes, T: int) -> Work:
    """Tables, the basis, and the divergence at the end."""
    D, K, V = _stream(before), _stream(after), before.vocab_size
    table = Work(sums=4 * V * D * K + 4 * V * D**2, moved=16 * V * (D + K))
    head = _moments(T, K, D, metric=True) + _fit(K, D, metric=True)
    judged = Work(passes=2 * min(JUDGED, T * HELD_OUT) * V * (D + K))
    return table + head + judged + (_basis(before, after) if K < D else Work())


def _basis(before: Sizes, after: Sizes) -> Work:
    D, K = _stream(before), _stream(after)
    start = Work(eigen=D**3)
    if after.tied:
        return start + Work(eigen=K**3, sums=6 * D**2 * K)
    sites = min(MOST_SITES, 2 * before.num_layers + 1)
    loss = Work(sums=4 * D**2 * K + 2 * D * K**2, factors=2 * K**3 / 3 + 2 * D * K**2)
    turn = Work(factors=4 * D * K**2)  # QR
    return start + (loss * sites + turn) * (BACKWARD * LEARNING_STEPS)


# Rates ------------------------------------------------------------------------------------------


def rates(width: int, passes: torch.dtype = torch.float32) -> Work:
    """Operations of each kind per second here, on matrices about so wide."""
    return _measured(min(max(width, LEAST_WIDTH), MOST_WIDTH), passes)


@cache
def _measured(n: int, passes: torch.dtype) -> Work:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    random = torch.Generator().manual_seed(0)
    x_TN = torch.randn(2048, n, generator=random).to(device)
    w_NN = torch.randn(n, n, generator=random).to(device)
    x64_TN, gram_NN = x_TN.double(), w_NN.double() @ w_NN.double().T
    gram_NN.diagonal().add_(n)
    product = 2 * 2048 * n**2
    passing_TN, passed_NN = x_TN.to(passes), w_NN.to(passes)
    here, there = torch.zeros(2, 1 << 22, device=device)
    return Work(
        passes=product / _time(lambda: passing_TN @ passed_NN),
        products=product / _time(lambda: x_TN.T @ x_TN),
        sums=product / _time(lambda: x64_TN.T @ x64_TN),
        factors=n**3 / 3 / _time(lambda: torch.linalg.cholesky(gram_NN)),
        eigen=LEAST_WIDTH**3
        / _time(lambda: torch.linalg.eigh(gram_NN[:LEAST_WIDTH, :LEAST_WIDTH])),
        moved=2 * 4 * len(here) / _time(lambda: there.copy_(here)),
    )


def _time(step: Callable[[], object]) -> float:
    """Seconds of one call on an idle machine: on a CPU, what it is at work for, over the threads
    that share it, because waiting for other processes says nothing of the machine."""
    on_gpu = torch.cuda.is_available()
    clock, threads = (
        (time.perf_counter, 1) if on_gpu else (time.process_time, torch.get_num_threads())
    )
    step()
    started, calls = clock(), 0
    while (elapsed := clock() - started) < MEASURED_SECONDS * threads:
        step()
        if on_gpu:
            torch.cuda.synchronize()
        calls += 1
    return elapsed / threads / calls
