"""The campaign of damaged inputs: each is read by the verb that meets it first."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dotexport import embedded
from dotexport.bench.result import BenchResult, Measurement, Sample
from dotexport.bench.workload import Workload
from dotexport.storage import manifest
from dotexport.storage.files import write_json, write_text

from .damage import damage_file
from .forked import Ending, dotexport, forked

SHORT = ("--samples", 2, "--seqlen", 32)
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}


@dataclass(frozen=True)
class Case:
    """One damaged input and what became of it."""

    what: str
    ending: Ending
    wrong: str = ""
    """Why the outcome is not acceptable; empty: it is."""


def small_model(folder: Path, *, shards: int = 1, seed: int = 0) -> Path:
    """A random Llama with the tokenizer of the model that ships inside."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    vocabulary = json.loads((embedded.MODEL_DIR / "config.json").read_text("utf-8"))["vocab_size"]
    model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=vocabulary))
    size = "5GB" if shards == 1 else f"{4 * model.num_parameters() // shards // 1000}KB"
    model.save_pretrained(folder, max_shard_size=size)
    for file in embedded.MODEL_DIR.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    write_text(folder / "README.md", "---\nlicense: mit\ndate: 2024-01-01\n---\n# A model\n")
    return folder


def a_bench() -> BenchResult:
    """Two models around 20 ms, in twelve groups."""
    rng = np.random.default_rng(0)

    def measured(name: str, pace: float) -> Measurement:
        times = pace * (5 + 0.1 * rng.standard_normal((12, 2, 4)))
        samples = tuple(
            Sample(group, 4 * float(one[0]), tuple(map(float, one[1:])))
            for group, pair in enumerate(times)
            for one in pair
        )
        return Measurement(
            name=name,
            source=name,
            artifact=f"{name}/ort-cpu-fp32",
            artifact_bytes=1000,
            num_parameters=1000,
            vocabulary=50,
            import_s=0.1,
            load_s=0.1,
            first_run_ms=9.0,
            warmups=2,
            warmed_up=True,
            harness_overhead_us=0.3,
            rss_before_load_bytes=1000,
            peak_rss_bytes=2000,
            providers=("CPUExecutionProvider",),
            samples=samples,
        )

    return BenchResult(
        target="ort-cpu",
        precision="fp32",
        workload=Workload(prompt_length=8, generation_length=4, threads=1, rounds=1),
        environment=manifest.environment() | {"threads": 1, "load_average": [0.1, 0.1, 0.1]},
        candidate=measured("candidate", 0.8),
        baseline=measured("baseline", 1.0),
    )


@dataclass(frozen=True)
class Subject:
    """What is damaged, and the verb that reads it.

    Attributes:
        files: below the folder of the subject, of which one is damaged each time.
        share: of all cases.
        words: of the command; {} is the folder.
        right: what is wrong with an outcome of exit code 0, or "".
    """

    name: str
    folder: Path
    files: Sequence[str]
    share: float
    words: Sequence[object]
    right: Callable[[Path], str] = lambda folder: ""


def subjects(scratch: Path) -> list[Subject]:
    """Every kind of input, made once and whole."""
    model = small_model(scratch / "model" / "m")
    shards = small_model(scratch / "shards" / "m", shards=3)
    home = scratch / "output"
    text = home / "text.txt"
    write_text(text, "\n<|endoftext|>\n".join(embedded.calibration_text()[:40]))
    made = dotexport("shrink", model, "-o", home / "out", "--calib", text, *SHORT, *_sizes())
    assert made.code == 0, made.said
    assert dotexport("verify", home / "out").code == 0
    write_json(home / "out/reports/bench-ort-cpu-fp32.json", a_bench().as_dict())
    write_text(home / "gate.yaml", 'decode_tok_s: ">=1.01x"\nttft_p90: ["<=1.0x", "<=50ms"]\n')
    plan = home / "plan.json"
    planned = dotexport("plan", model, "--params", "0.9x", "--json")
    write_text(plan, planned.sentence)
    steps = {"calib": str(text), "samples": 2, "seqlen": 32, "intermediate": 64, "heal": "none"}
    write_text(home / "recipe.yaml", yaml.safe_dump({"model": str(model), "shrink": steps}))
    texts = scratch / "texts"
    rows = [{"text": one} for one in embedded.calibration_text()[:20]]
    write_text(texts / "t.jsonl", "\n".join(map(json.dumps, rows)))
    write_json(texts / "t.json", rows)
    write_text(texts / "t.txt", "\n".join(row["text"] for row in rows))
    write_text(texts / "t.csv", "text\n" + "\n".join(json.dumps(r["text"]) for r in rows[:3]))
    export = ("export", "{}/m", "--target", "hf", "-o", "{}/new")
    tokens = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md")
    names = tuple(f"m/{name}" for name in ("config.json", "model.safetensors", *tokens))
    parts = ("m/model.safetensors.index.json", "m/model-00001-of-00003.safetensors")
    reports = tuple(f"out/reports/{n}.json" for n in ("verify", "shrink", "bench-ort-cpu-fp32"))
    bench = "{}/out/reports/bench-ort-cpu-fp32.json"
    calibrated = ("shrink", model, "-o", "{}/new", *SHORT, *_sizes())
    return [
        Subject("model", model.parent, names, 0.34, export, as_transformers_reads),
        Subject("shards", shards.parent, parts, 0.08, export, as_transformers_reads),
        Subject("manifest, verify", home, ("out/dotexport.json",), 0.08, ("verify", "{}/out")),
        Subject("manifest, report", home, ("out/dotexport.json",), 0.08, ("report", "{}/out")),
        Subject("reports", home, reports, 0.08, ("report", "{}/out")),
        Subject("bench", home, (bench[3:],), 0.08, ("compare", bench)),
        Subject("gate", home, ("gate.yaml",), 0.06, ("compare", bench, "--gate", "{}/gate.yaml")),
        Subject("recipe", home, ("recipe.yaml",), 0.06, ("run", "{}/recipe.yaml", "-o", "{}/new")),
        Subject(
            *("plan", home, ("plan.json",), 0.04),
            (*calibrated[:4], "--calib", text, "--plan", "{}/plan.json", "--print-recipe"),
        ),
        *(
            Subject(f"text .{kind}", texts, (f"t.{kind}",), 0.025, (*calibrated, "--calib", file))
            for kind, file in ((k, f"{{}}/t.{k}") for k in ("jsonl", "json", "txt", "csv"))
        ),
    ]


def _sizes() -> tuple[object, ...]:
    return ("--intermediate", 64, "--heal", "none")


def campaign(number: int, seed: int, scratch: Path) -> Iterator[Case]:
    """So many damaged inputs."""
    known = subjects(scratch)
    rng = random.Random(seed)
    for index in range(number):
        # Every kind has its share, whatever the number.
        subject = known[_turn(index, [one.share for one in known])]
        folder = scratch / "case"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(subject.folder, folder)
        how = damage_file(folder / rng.choice(subject.files), rng)
        words = [str(word).replace("{}", str(folder)) for word in subject.words]
        ending = dotexport(*words)
        wrong = "" if ending.clear else f"ended with {ending.code}: {ending.sentence}"
        if ending.code == 0 and not wrong:
            wrong = subject.right(folder)
        elif not wrong and (folder / "new").exists():
            wrong = "an output is there though the command failed"
        yield Case(f"{subject.name}: {how}", ending, wrong)


def _turn(index: int, shares: Sequence[float]) -> int:
    """The kind of a case: the one that is furthest behind its share."""
    counts = [0] * len(shares)
    chosen = 0
    for done in range(index + 1):
        lacks = [share * (done + 1) - count for share, count in zip(shares, counts, strict=True)]
        chosen = lacks.index(max(lacks))
        counts[chosen] += 1
    return chosen


def as_transformers_reads(folder: Path) -> str:
    """What is wrong with a copy of a damaged model that was made without complaint."""
    found = forked(lambda: _compared(folder))
    return "" if found.code == 0 else f"not what transformers reads: {found.sentence}"


def _compared(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(1, 90)[None]
    load: Any = AutoModelForCausalLM.from_pretrained
    ours = load(folder / "new" / "hf", dtype=torch.float32)
    try:
        theirs = load(folder / "m", dtype=torch.float32)
    except Exception as error:
        raise ValueError(f"which refuses it ({type(error).__name__}: {error})"[:200]) from error
    with torch.inference_mode():
        gap = (ours(tokens).logits - theirs(tokens).logits).abs().max().item()
    if not gap <= 1e-4:
        raise ValueError(f"logits differ by {gap:.3g}")
