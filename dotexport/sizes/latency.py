"""Budgets of time: what `--latency` asks, and what answers for the sizes.

A latency table (latency_table.py) was measured in the runtime that will be used. Without one, torch
is timed on the spot: layers of a kind are alike, so one of each and the head are timed with random
weights and the rest is arithmetic.

Shapes: D width of the stream.
"""

from __future__ import annotations

import logging
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dotexport.axes.plan import Plan, SizeOptions
from dotexport.errors import UsageError
from dotexport.models.family import Family
from dotexport.models.layers import Stock
from dotexport.models.shapes import Sizes, products_of
from dotexport.sizes.latency_table import LatencyTable, cached_tables

logger = logging.getLogger(__name__)

ROUNDS = 7
LEAST_SECONDS = 0.004  # of one timing: far above the clock's resolution
CLOCK_PROMPT, CLOCK_TOKENS = 16, 32  # with which torch is measured again afterwards
TIMED = 12  # plans; a sum of parts is fitted to them and answers for the others


@dataclass(frozen=True)
class Clock:
    """Time of a token as a sum of parts: sublayers and head by their parameters, and a rest.

    Attributes:
        seconds: per parameter of each part, and for the rest; in units of the original's token.
        measured: ratio of every plan that was timed.
    """

    seconds: tuple[float, ...]
    measured: Mapping[Sizes, float]

    @classmethod
    def of(cls, config: Mapping[str, Any], whole: Plan, plans: list[Plan]) -> Clock:
        """Time some of these plans, each in turns with the original, and fit the sum."""
        from scipy.optimize import nnls

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        original = _token(config, whole, device)
        by_size = sorted(plans, key=lambda p: p.parameters_after)
        chosen = {round(n) for n in np.linspace(0, len(plans) - 1, min(TIMED, len(plans)))}
        measured = {whole.after: 1.0}
        for plan in (by_size[n] for n in sorted(chosen)):
            if plan.after not in measured:
                measured[plan.after] = _ratio(_token(config, plan, device), original)
        parts = np.array([_parts(whole.family, sizes) for sizes in measured])
        scale = np.where(parts.any(0), parts.max(0), 1.0)  # no layer has some kinds of sublayers
        seconds, _ = nnls(parts / scale, np.array(list(measured.values())))
        return cls(tuple(seconds / scale), measured)

    def ratio(self, plan: Plan) -> float:
        """Time of a token at these sizes over the original's."""
        if plan.after in self.measured:
            return self.measured[plan.after]
        return float(np.dot(self.seconds, _parts(plan.family, plan.after)))


def _parts(family: Family, sizes: Sizes) -> tuple[float, ...]:
    """Weights of the matrices of each kind of sublayer, of the head, and 1 for the rest."""
    layers = [
        float(sizes.layers_with(family, sublayer) * products_of(sublayer, sizes))
        for sublayer in family.sublayers
    ]
    return *layers, float(sizes.spaces["residual"] * sizes.vocab_size), 1.0


def _ratio(ours: Callable[[], None], theirs: Callable[[], None]) -> float:
    """In turns, so that what else the machine does falls on both alike."""
    times = [(_time(ours), _time(theirs)) for _ in range(ROUNDS)]
    return statistics.median(mine / other for mine, other in times)


def _token(config: Mapping[str, Any], plan: Plan, device: torch.device) -> Callable[[], None]:
    """One decoder layer of each kind as often as there are such layers, with the same weights, and
    the head."""
    stock = Stock.of(plan.config(config), device)
    sizes = plan.after.of_layers(plan.kept_layers)
    kinds = sizes.kinds or ("",) * sizes.num_layers
    # The last of each kind: what it makes of keys is what later kinds look at.
    numbers = {kind: number for number, kind in enumerate(kinds)}
    layers = {kind: stock.layer(n).to_empty(device=device) for kind, n in numbers.items()}
    for parameter in (p for layer in layers.values() for p in layer.parameters()):
        nn.init.normal_(parameter, std=0.02)
    width = sizes.spaces["residual"]
    head = nn.Linear(width, sizes.vocab_size, bias=False, device=device)
    x_11D = torch.randn(1, 1, width, device=device)
    positions = {kind: stock.positions(x_11D, number) for kind, number in numbers.items()}
    beside: dict[str, Any] = {}
    if given := plan.family.per_layer:
        beside["per_layer_input"] = torch.randn(1, 1, sizes.spaces[given.features], device=device)
        beside["shared_kv_states"] = {}
    first_11 = torch.zeros(1, 1, dtype=torch.long, device=device)

    @torch.no_grad()
    def token() -> None:
        for kind in kinds:
            layers[kind](
                x_11D,
                attention_mask=None,
                position_embeddings=positions[kind],
                position_ids=first_11,
                **beside,
            )
        head(x_11D)
        if device.type == "cuda":
            torch.cuda.synchronize()

    token()
    return token


def _time(step: Callable[[], None]) -> float:
    """Seconds of one call, over enough of them to be told apart from the clock."""
    started, calls = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < LEAST_SECONDS or calls < 2:
        step()
        calls += 1
    return elapsed / calls


@dataclass(frozen=True)
class Budget:
    """What `--latency` asks.

    Attributes:
        metric: decode (a token) or prefill (a prompt).
        amount: a share of the original's time, or milliseconds.
        share: which of the two it is.
        batch: sequences at once; None: the first that was measured.
    """

    metric: str
    amount: float
    share: bool
    batch: int | None


def parse_latency(text: str) -> Budget:
    """A budget such as `0.8x`, `12ms`, `prefill:0.8x` or `0.8x@4` (batches of 4).

    >>> parse_latency("prefill:40ms@4")
    Budget(metric='prefill', amount=40.0, share=False, batch=4)

    Raises:
        UsageError: none of these, or a share that is not between 0 and 1.
    """
    match = re.fullmatch(
        r"(?:(decode|prefill):)?([0-9]*\.?[0-9]+)(x|ms)(?:@([1-9][0-9]*))?", text.strip()
    )
    amount = float(match[2]) if match else 0.0
    if not match or amount <= 0 or (match[3] == "x" and amount > 1):
        raise UsageError(
            f"--latency {text!r} is no budget; expected a share of the original's time such as "
            "0.8x, or milliseconds such as 12ms, with prefill: before it for prompts and @4 "
            "after it for batches of 4"
        )
    return Budget(
        match[1] or "decode", amount, match[3] == "x", int(match[4]) if match[4] else None
    )


def meter(
    config: Mapping[str, Any], whole: Plan, plans: list[Plan], asked: SizeOptions
) -> tuple[Callable[[Plan], float], float]:
    """Time of a plan over the original's, and the most of it that the budget allows.

    Raises:
        UsageError: a budget that is none, or a table that does not hold for this model, device or
            runtime.
    """
    assert asked.latency is not None
    budget = parse_latency(asked.latency)
    table = find_table(whole, asked)
    if table is None:
        return Clock.of(config, whole, plans).ratio, _clocked(budget)
    batch = table.check_batch(budget.batch)
    limit = share_of(budget, table)
    return lambda p: table.promised(p.after, budget.metric, batch), limit


def share_of(budget: Budget, table: LatencyTable) -> float:
    """The budget as a share of the original's time.

    Raises:
        UsageError: more milliseconds than the original takes.
    """
    if budget.share:
        return budget.amount
    original = table.original_ms(budget.metric, table.check_batch(budget.batch))
    if budget.amount > original:
        raise UsageError(
            f"--latency {budget.amount:g}ms is more than the {original:.3g} ms that the original "
            f"takes by {table.file}; expected less"
        )
    return budget.amount / original


def _clocked(budget: Budget) -> float:
    if not budget.share or budget.metric != "decode" or budget.batch not in (None, 1):
        raise UsageError(
            "without a latency table, --latency takes a share of a token's time such as 0.8x; "
            "for milliseconds, prefill or batches measure one first: `dotexport latency MODEL`"
        )
    logger.warning(
        "no latency table of this model and device: sizes are timed with torch here; `dotexport "
        "latency MODEL --target NAME` measures them in the runtime that will be used"
    )
    return budget.amount


def find_table(whole: Plan, asked: SizeOptions) -> LatencyTable | None:
    """The table that was named, by file or by runtime, or the only one in the cache.

    Raises:
        UsageError: it does not hold here, is not there, or several could be meant.
    """
    model = (whole.family.architecture, whole.before)
    named = asked.latency_table
    if asked.vocab_size not in (None, whole.before.vocab_size):
        if named is None:
            return None
        raise UsageError(
            f"--latency-table {named} was measured with the whole vocabulary and says nothing of a "
            "smaller one; leave it away, and torch is timed here, or cut the vocabulary first and "
            "measure a table of what comes out"
        )
    if named is not None and not _is_runtime(named):
        table = LatencyTable.load(Path(named).expanduser())
        table.require_model(*model)
        table.require_here(force=asked.force_latency_table)
        return table
    found = [t for t in cached_tables(*model) if named is None or _means(named, t)]
    if len(found) > 1:
        runtimes = ", ".join(f"{t.runtime} ({t.file})" for t in found)
        raise UsageError(f"several latency tables fit: {runtimes}; say which with --latency-table")
    if named is not None and not found:
        raise UsageError(
            f"no latency table of this model and device for {named} in the cache; measure one: "
            f"`dotexport latency MODEL --target {named}`"
        )
    if found:
        logger.info("times by %s, measured with %s", found[0].file, found[0].runtime)
    return found[0] if found else None


def _is_runtime(named: str) -> bool:
    from dotexport.exports.target import target_names

    return named.partition(":")[0] in target_names()


def _means(named: str, table: LatencyTable) -> bool:
    return named in (table.runtime, table.content["target"])


@dataclass(frozen=True)
class Promise:
    """What a budget of time promises of the sizes that were chosen; shrink measures it again.

    Attributes:
        limit: the budget as a share of the original's time.
        predicted: share of the original's time that the table says; None: torch was timed.
        target, precision, threads, prompt, generate: as the table was measured.
        table: its file and SHA-256; None: torch was timed.
    """

    budget: str
    metric: str
    batch: int
    limit: float
    predicted: float | None
    target: str
    precision: str
    threads: int | None
    prompt: int
    generate: int
    table: dict[str, str] | None


def promise(decided: Plan, asked: SizeOptions) -> Promise | None:
    """What `--latency` promises of these sizes; None where it was not asked for.

    Raises:
        UsageError: as `meter`.
    """
    if asked.latency is None:
        return None
    budget = parse_latency(asked.latency)
    table = find_table(decided, asked)
    if table is None:
        stock = ("hf", "as-stored", None, CLOCK_PROMPT, CLOCK_TOKENS, None)
        return Promise(asked.latency, "decode", 1, _clocked(budget), None, *stock)
    held, batch = table.content, table.check_batch(budget.batch)
    return Promise(
        asked.latency,
        budget.metric,
        batch,
        share_of(budget, table),
        table.promised(decided.after, budget.metric, batch),
        held["target"],
        held["precision"],
        held["threads"],
        held["workload"]["prompt"],
        held["workload"]["generate"],
        {"file": str(table.file), "sha256": table.sha256},
    )


def check_runtime(decided: Plan, asked: SizeOptions, targets: Sequence[str]) -> None:
    """Refuse a table of a runtime that is none of those the model is planned for.

    Raises:
        UsageError.
    """
    if asked.latency is None or not targets or asked.force_latency_table:
        return
    table = find_table(decided, asked)
    if table is not None and not any(_means(target, table) for target in targets):
        raise UsageError(
            f"{table.file} was measured with {table.runtime}, which is none of the targets "
            f"{', '.join(targets)}; measure one of them with `dotexport latency MODEL --target "
            f"{targets[0]}`, or insist with --force-latency-table"
        )
