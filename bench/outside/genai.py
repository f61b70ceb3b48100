"""onnxruntime-genai's own generation loop on a folder of ort-cpu: an outside judge of our figures.

    python -m dotexport.bench.outside.genai FOLDER WORKLOAD REQUESTS

times so many requests and prints their times as JSON.

Shapes: B sequences, L prompt tokens, R rounds, S requests of one side in a round.
"""

from __future__ import annotations

import json
import subprocess
import sys
from math import ceil
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

import numpy as np

from ..process import Worker
from ..statistics import Comparison, compare
from ..workload import Workload

METRICS = ("ttft", "tpot")
WARM_UPS = 3
PATIENCE = 2.0  # seconds of warming up, in each of our processes

Times = dict[str, list[float]]
"""Milliseconds of each request: ttft, and tpot as the mean gap between its tokens."""


def disagreement(folder: Path, asked: Workload) -> dict[str, tuple[float, float, Comparison]]:
    """Our median and the judge's, in milliseconds, and our times over its own, for each metric.

    Each round starts four fresh processes: judge, ours, ours, judge. One process of each would
    compare where their memory happens to lie.
    """
    requests = ceil(asked.min_iterations / (2 * asked.rounds))
    rounds = [
        [ask(folder, asked, requests) for ask in (_judge, _bench, _bench, _judge)]
        for _ in range(asked.rounds)
    ]
    found = {}
    for metric in METRICS:
        theirs_RS = [[*first[metric], *last[metric]] for first, _, _, last in rounds]
        ours_RS = [[*one[metric], *other[metric]] for _, one, other, _ in rounds]
        medians = float(np.median(ours_RS)), float(np.median(theirs_RS))
        found[metric] = (*medians, compare(ours_RS, theirs_RS, rounds=asked.rounds))
    return found


def _bench(folder: Path, asked: Workload, requests: int) -> Times:
    with Worker("bench", threads=asked.threads) as worker:
        loaded = worker.ask("load", target="ort-cpu", folder=str(folder), workload=asked.as_dict())
        worker.ask("warm_up", vocabulary=loaded["vocabulary"], patience=PATIENCE)
        samples = worker.ask("measure", iterations=requests)["samples_ns"]
    times = [(first / 1e6, fmean(gaps) / 1e6) for first, *gaps in samples]
    return dict(zip(METRICS, map(list, zip(*times, strict=True)), strict=True))


def _judge(folder: Path, asked: Workload, requests: int) -> Times:
    command = [sys.executable, "-P", "-m", __spec__.name]
    arguments = [str(folder), json.dumps(asked.as_dict()), str(requests)]
    done = subprocess.run([*command, *arguments], stdout=subprocess.PIPE, check=True)
    times: Times = json.loads(done.stdout.splitlines()[-1])
    return times


def measure(folder: Path, asked: Workload, requests: int) -> Times:
    """Times of requests in this process."""
    import onnxruntime_genai as og

    config = og.Config(str(folder))
    threads = {"intra_op_num_threads": asked.threads}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
    model = og.Model(config)
    prompt_BL, _ = asked.tokens(
        json.loads((folder / "genai_config.json").read_text())["model"]["vocab_size"]
    )
    times = [_request(og, model, prompt_BL, asked) for _ in range(WARM_UPS + requests)]
    kept = zip(*times[WARM_UPS:], strict=True)
    return dict(zip(METRICS, map(list, kept), strict=True))


def _request(og: Any, model: Any, prompt_BL: Any, asked: Workload) -> tuple[float, float]:
    """Milliseconds to the first token, and from each of the others to the next in the mean."""
    length = asked.prompt_length + asked.generation_length
    params = og.GeneratorParams(model)
    # min_length keeps an end-of-text token from ending it early.
    params.set_search_options(
        max_length=length, min_length=length, do_sample=False, batch_size=asked.batch_size
    )
    generator = og.Generator(model, params)
    started = perf_counter()
    generator.append_tokens(prompt_BL.astype("int32"))
    generator.generate_next_token()
    first = perf_counter()
    for _ in range(asked.generation_length - 1):
        generator.generate_next_token()
    others = (perf_counter() - first) / (asked.generation_length - 1)
    return 1e3 * (first - started), 1e3 * others


if __name__ == "__main__":
    folder, workload, requests = sys.argv[1:]
    print(json.dumps(measure(Path(folder), Workload(**json.loads(workload)), int(requests))))
