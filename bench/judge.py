"""onnxruntime-genai's own generation loop on a folder of ort-cpu: an outside judge of our figures.

Shapes: B sequences, L prompt tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from .workload import Workload

LEAST_RUNS = 3


def measure(folder: Path, asked: Workload) -> dict[str, float]:
    """Medians over requests, in milliseconds: ttft, and tpot as the mean gap of each request."""
    import onnxruntime_genai as og

    config = og.Config(str(folder))
    threads = {"intra_op_num_threads": asked.threads}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
    model = og.Model(config)
    prompt_BL, _ = asked.tokens(
        json.loads((folder / "genai_config.json").read_text())["model"]["vocab_size"]
    )
    for _ in range(LEAST_RUNS):
        _request(og, model, prompt_BL, asked)
    found: list[tuple[float, float]] = []
    started = perf_counter()
    while len(found) < LEAST_RUNS or perf_counter() - started < asked.min_seconds:
        found.append(_request(og, model, prompt_BL, asked))
    ttft, tpot = zip(*found, strict=True)
    return {"ttft": 1e3 * median(ttft), "tpot": 1e3 * median(tpot), "requests": len(found)}


def _request(og: Any, model: Any, prompt_BL: Any, asked: Workload) -> tuple[float, float]:
    """Seconds to the first token, and mean seconds of the others."""
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
    return first - started, (perf_counter() - first) / (asked.generation_length - 1)
