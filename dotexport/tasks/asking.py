"""Tasks of lm-evaluation-harness, asked of a session: how likely is each answer to a question.

Needs the package lm_eval; everything else of dotexport does without.

Shapes: B requests of a batch, L tokens of the longest, V vocabulary, C tokens of an answer.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dotexport.errors import CalibrationError, DotexportError, RuntimeMissingError, UsageError
from dotexport.exports.target import Session
from dotexport.storage.reading import read_yaml
from dotexport.tasks.task_options import TaskOptions

try:
    import datasets
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager, get_task_dict
except ImportError as error:
    raise RuntimeMissingError(
        f"--tasks needs lm-evaluation-harness, which is not here ({error}); "
        "pip install 'dotexport[tasks]'"
    ) from error

LOGITS_BYTES = 128 << 20  # of a batch
RESAMPLED = 1000  # times, for standard errors that no formula gives

Told = Callable[[int, int], None]
Request = tuple[Any, list[int], list[int]]


class SessionModel(TemplateLM):  # type: ignore[misc]  # whose type is not known
    """What the harness asks, answered by a session.

    Args:
        tokenizer: of the model, as transformers has it.
        context: tokens that fit; of longer questions the start is left out.
        told: hears how many requests of how many are done.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Any,
        *,
        context: int,
        vocabulary: int,
        told: Told = lambda done, total: None,
    ) -> None:
        super().__init__()
        self.session, self.tokenizer = session, tokenizer
        self.context, self.vocabulary, self.told = context, vocabulary, told

    @property
    def eot_token_id(self) -> int:
        ends = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, 0)
        return next(int(end) for end in ends if end is not None)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        asked = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer(string, **asked)["input_ids"])

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        return super().loglikelihood(requests, disable_tqdm=True)  # `told` hears how far it is

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        done = 0
        for places in self._batches(requests):
            answers = self._answered([requests[place] for place in places])
            for place, answer in zip(places, answers, strict=True):
                found[place] = answer
            done += len(places)
            self.told(done, len(requests))
        return found

    def _batches(self, requests: Sequence[Request]) -> Iterator[list[int]]:
        """Places of requests of about one length, the longest first."""
        lengths = [min(len(ask) + len(say), self.context + 1) for _, ask, say in requests]
        order = sorted(range(len(requests)), key=lambda place: -lengths[place])
        while order:
            each = 4 * self.vocabulary * lengths[order[0]]
            count = max(1, LOGITS_BYTES // each)
            yield order[:count]
            order = order[count:]

    def _answered(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        # The last token of an answer predicts nothing that is asked.
        whole = [(ask + say)[-self.context - 1 :] for _, ask, say in requests]
        lengths = [len(ids) - 1 for ids in whole]
        tokens_BL = np.zeros((len(whole), max(lengths)), dtype=np.int64)
        for row, ids in zip(tokens_BL, whole, strict=True):
            row[: len(ids) - 1] = ids[:-1]
        logits_BLV = self.session.start(tokens_BL, lengths)
        return [
            likelihood(logits_LV[max(0, length - len(say)) : length], say[-length:])
            for logits_LV, length, (_, _, say) in zip(logits_BLV, lengths, requests, strict=True)
        ]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise UsageError(
            "a task asks for the likelihood of whole documents; dotexport eval --text measures that"
        )

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        raise UsageError(
            "a task asks the models to write its answers; expected tasks that choose between "
            "answers, or complete a text, such as lambada_openai, piqa, arc_easy and copa"
        )


def likelihood(logits_CV: NDArray[np.float32], answer_C: Sequence[int]) -> tuple[float, bool]:
    """log p of an answer, and whether every token of it is the likeliest one."""
    logits = logits_CV.astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    log_CV = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked_C = log_CV[np.arange(len(answer_C)), answer_C]
    return float(picked_C.sum()), bool((logits.argmax(-1) == np.asarray(answer_C)).all())


def ask(model: SessionModel, options: TaskOptions) -> dict[str, Any]:
    """What lm_eval makes of the answers, its sections `results` and `samples`.

    Raises:
        UsageError: a task that nobody knows, or that asks for more than likelihoods.
        CalibrationError: questions that cannot be read.
        DotexportError: questions of the hub that are not to be had.
    """
    harness = logging.getLogger("lm_eval")
    before = harness.level
    harness.setLevel(logging.ERROR)
    try:
        tasks = {name: task for asked in options.names for name, task in _tasks(asked, options)}
        found = evaluate(model, tasks, limit=options.limit, bootstrap_iters=RESAMPLED)
    finally:
        harness.setLevel(before)
    return {"results": found["results"], "samples": found["samples"]}


def _tasks(name: str, options: TaskOptions) -> Iterator[tuple[str, Any]]:
    definition = options.definition(name)
    if definition is not None:
        ours, rows = definition
        config = read_yaml(ours, what=str(ours))
        del config["dataset_kwargs"], config["dataset_path"]
        yield name, ConfigurableTask(config=config | {"custom_dataset": partial(_split, rows)})
        return
    manager = TaskManager()
    if name not in manager.all_tasks:
        raise UsageError(
            f"--tasks {name} is unknown to lm-evaluation-harness; `lm-eval ls tasks` lists all"
        )
    try:
        found = get_task_dict([name], manager)
    except (OSError, ValueError) as error:
        raise DotexportError(
            f"the questions of {name} are not to be had ({type(error).__name__}: {error}); check "
            "the network, or give a folder that holds them to --tasks-data"
        ) from error
    for key, task in found.items():
        if hasattr(task, "set_config"):
            task.set_config(key="num_fewshot", value=0)
        yield key, task


def _split(rows: Path, **unused: Any) -> dict[str, Any]:
    return {"test": datasets.Dataset.from_list(list(_rows(rows)))}


def _rows(file: Path) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise CalibrationError(
                f"{file}, line {number} is not JSON ({error}); expected a question on every line"
            ) from error
        if not isinstance(row, dict):
            raise CalibrationError(f"{file}, line {number} is no JSON object; expected a question")
        yield row


# Figures ----------------------------------------------------------------------------------------


def table(answers: Mapping[str, Mapping[str, Any]], original: str) -> list[dict[str, Any]]:
    """One row for each task and metric: every model's value with its standard error, and the gap
    to the original with the standard error of paired questions.

    Args:
        answers: model -> what `ask` gave.
    """
    rows = []
    for task, metrics in answers[original]["results"].items():
        for key, value in metrics.items():
            metric, _, chain = key.partition(",")
            if not chain or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            sides = {
                model: _side(found, answers[original], task, metric, chain)
                for model, found in answers.items()
            }
            count = len(answers[original]["samples"].get(task, ()))
            rows.append({"task": task, "metric": metric, "questions": count, "models": sides})
    return rows


def _side(
    found: Mapping[str, Any], original: Mapping[str, Any], task: str, metric: str, chain: str
) -> dict[str, Any]:
    error = found["results"][task].get(f"{metric}_stderr,{chain}")
    side: dict[str, Any] = {
        "value": float(found["results"][task][f"{metric},{chain}"]),
        "error": float(error) if isinstance(error, int | float) else None,
    }
    if found is original:
        return side
    side["gap"] = side["value"] - float(original["results"][task][f"{metric},{chain}"])
    side["gap_error"] = _paired_error(found, original, task, metric, side["value"])
    return side


def _paired_error(
    found: Mapping[str, Any], original: Mapping[str, Any], task: str, metric: str, value: float
) -> float | None:
    """Standard error of the gap, from question to question: what is hard is hard for both. None:
    the metric is no mean over questions."""
    ours, theirs = (_by_question(side, task, metric) for side in (found, original))
    if len(ours) < 2 or ours.keys() != theirs.keys():
        return None
    if not math.isclose(np.mean(list(ours.values())), value, abs_tol=1e-9):
        return None
    gaps = [ours[n] - theirs[n] for n in ours]
    return float(np.std(gaps, ddof=1) / math.sqrt(len(gaps)))


def _by_question(found: Mapping[str, Any], task: str, metric: str) -> dict[int, float]:
    samples = found["samples"].get(task, ())
    values = {s["doc_id"]: s.get(metric) for s in samples}
    return {n: float(v) for n, v in values.items() if isinstance(v, int | float)}
