"""The table of docs/results/optimum.md: decode rate of our ONNX graph beside that of optimum-onnx.

    python -m dotexport.bench optimum --optimum-python PATH

PATH is the Python of an environment with optimum-onnx, which cannot live beside a current
transformers; it writes its graph, and runs its own `generate`. Both graphs are run by the one
onnxruntime of this environment, each in a process of its own, in turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from dotexport.axes.carrying import planned_config
from dotexport.axes.plan import SizeOptions
from dotexport.errors import DotexportError, ParityError, UsageError
from dotexport.exports.target import Session, find_target
from dotexport.sizes.budget import plan
from dotexport.storage.output import folder_bytes

from ..process import Worker
from ..stand_in import SMOLLM2_135M, TOKENIZER, write_stand_in
from ..statistics import Comparison, compare
from ..workload import Workload
from .result_files import RESULTS, save

OURS, THEIRS, GENERATE, NARROWED = "ort-cpu", "optimum-onnx", "optimum-onnx generate", "narrowed"
GOAL = 1.6
PATIENCE = 3.0  # seconds of warming up, in each process

Ask = Callable[[], list[float]]
"""One request; milliseconds of each decoded token."""

WRITE_THEIRS = """
import sys
from optimum.exporters.onnx import main_export
main_export(sys.argv[1], output=sys.argv[2], task="text-generation-with-past", dtype="fp32",
            do_validation=False)
"""

# One line of JSON per request: nanoseconds of `generate` for one token, and for N + 1.
RUN_THEIRS = """
import json, sys, time
import onnxruntime, torch
from optimum.onnxruntime import ORTModelForCausalLM
folder, prompt = sys.argv[1], json.loads(sys.argv[3])
threads, steps = int(sys.argv[2]), int(sys.argv[4])
torch.set_num_threads(threads)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = threads
model = ORTModelForCausalLM.from_pretrained(folder, session_options=options, use_io_binding=True)
ids = torch.tensor([prompt])
def seconds(tokens):
    start = time.perf_counter_ns()
    model.generate(ids, attention_mask=torch.ones_like(ids), min_new_tokens=tokens,
                   max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return time.perf_counter_ns() - start
seconds(steps + 1)
print(json.dumps(onnxruntime.__version__), flush=True)
for line in sys.stdin:
    print(json.dumps([seconds(1), seconds(steps + 1)]), flush=True)
"""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    optimum_python: Annotated[Path, typer.Option(help="Python of an environment with Optimum.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the table.")] = RESULTS,
    params: Annotated[str, typer.Option(help="Budget of the narrowed model.")] = "0.7x",
    threads: Annotated[int, typer.Option(help="CPU threads of every runtime.")] = 2,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 32,
    generate: Annotated[int, typer.Option(help="Tokens after it.")] = 64,
    groups: Annotated[int, typer.Option(help="Turns, there and back, of each process.")] = 2,
    rounds: Annotated[int, typer.Option(help="Times that all processes are started.")] = 6,
    layers: Annotated[int, typer.Option(help="Fewer, to try the command.")] = 30,
    vocab: Annotated[int, typer.Option(help="Smaller, to try the command.")] = 49152,
) -> None:
    """Decode rates at the sizes of SmolLM2-135M in float32, random weights."""
    if not optimum_python.is_file():
        raise UsageError(f"{optimum_python} is no file; expected the Python with optimum-onnx")
    config = {**SMOLLM2_135M, "num_hidden_layers": layers, "vocab_size": vocab}
    workload = Workload(prompt_length=prompt, generation_length=generate, threads=threads)
    with tempfile.TemporaryDirectory() as scratch:
        folders = _write_all(Path(scratch), config, params, optimum_python)
        difference = _difference(folders[OURS], folders[THEIRS], workload, vocab)
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        timed = {name: _Timed() for name in folders}
        for _ in range(rounds):
            with _asked(folders, workload, vocab, optimum_python) as asked:
                _take_turns(timed, asked, groups)
        rows = list(_rows(timed, folders, rounds))
    save(
        out / "optimum",
        "Decode rate beside optimum-onnx",
        _protocol(config, params, workload, groups, rounds, difference, load),
        rows,
        command=_command(params, threads, prompt, generate, groups, rounds, layers, vocab),
    )


def _command(*options: object) -> str:
    names = ("params", "threads", "prompt", "generate", "groups", "rounds", "layers", "vocab")
    pairs = " ".join(f"--{name} {value}" for name, value in zip(names, options, strict=True))
    return f"python -m dotexport.bench optimum --optimum-python PATH {pairs}"


def _protocol(
    config: Mapping[str, Any],
    params: str,
    workload: Workload,
    groups: int,
    rounds: int,
    difference: float,
    load: float,
) -> str:
    return (
        f"A Llama of SmolLM2-135M's sizes ({config['num_hidden_layers']} layers, vocabulary "
        f"{config['vocab_size']}), tied, random weights, float32, {workload.threads} threads; one "
        f"sequence, {workload.prompt_length} tokens in, {workload.generation_length} out. "
        f"`{OURS}`: our graph. `{THEIRS}`: main_export's graph in the same onnxruntime, its cache "
        "handed over without a copy. Their logits differ by at most "
        f"{difference:.1e}. `{GENERATE}`: ORTModelForCausalLM.generate with IO binding, in its own "
        "environment; its rate is of the tokens after the first. "
        f"`{NARROWED}`: our graph at {params} of the parameters. Each in a process of its own, "
        f"started afresh in each of {rounds} rounds; {groups} turns in a round, each there and "
        "back, so that all share every moment of the machine. "
        "`over` compares decode rates with a 95 % bootstrap interval. Load average before: "
        f"{load:.1f}. Goal: {GOAL}x over the dense model's export of optimum-onnx."
    )


# Models and graphs ------------------------------------------------------------------------------


def _write_all(
    scratch: Path, config: Mapping[str, Any], params: str, optimum_python: Path
) -> dict[str, Path]:
    """What is run -> its folder."""
    dense, narrow = scratch / "dense", scratch / "narrow"
    decided = plan(config, SizeOptions(params=params))
    models = (
        write_stand_in(dense, config, TOKENIZER),
        write_stand_in(narrow, planned_config(config, decided), TOKENIZER),
    )
    folders = {OURS: scratch / OURS, NARROWED: scratch / NARROWED}
    for model, folder in zip(models, folders.values(), strict=True):
        folder.mkdir()
        find_target(OURS).write(model, folder, "fp32")
    theirs = scratch / THEIRS
    _elsewhere(optimum_python, WRITE_THEIRS, str(dense), str(theirs))
    return folders | {THEIRS: theirs, GENERATE: theirs}


def _elsewhere(python: Path, program: str, *arguments: str) -> None:
    done = subprocess.run(
        [str(python), "-c", program, *arguments],
        env=_their_environment(),
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-10:])
        raise DotexportError(f"optimum-onnx ended with code {done.returncode}:\n{last}")


def _their_environment() -> dict[str, str]:
    ours = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return ours | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def _difference(ours: Path, theirs: Path, workload: Workload, vocab: int) -> float:
    """Largest difference of logits over prefill and decode: both are the same model.

    Raises:
        ParityError: they are not.
    """
    prompt_BL, continuation_NB = workload.tokens(vocab)

    def said(session: Session) -> list[Any]:
        return [session.start(prompt_BL)[:, -1], *map(session.step, continuation_NB)]

    one = said(find_target(OURS).open(ours, threads=workload.threads))
    other = said(find_target("onnx").open(theirs, threads=workload.threads))
    found = max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))
    # Both sum in float32 in their own order: 1e-5 is usual for logits of this size.
    if not found <= 1e-3:
        raise ParityError(f"our graph and Optimum's differ by {found:.2g}; expected 1e-3 at most")
    return found


# Timing -----------------------------------------------------------------------------------------


@dataclass
class _Timed:
    """Decode times of requests, in milliseconds per token."""

    blocks: list[list[float]] = field(default_factory=list)

    @property
    def groups(self) -> list[list[float]]:
        """A block from the way there and one from the way back make a group."""
        pairs = zip(self.blocks[::2], self.blocks[1::2], strict=True)
        return [[*there, *back] for there, back in pairs]

    @property
    def rate(self) -> float:
        return 1e3 / float(np.median(self.groups))


@contextmanager
def _asked(
    folders: Mapping[str, Path], workload: Workload, vocab: int, optimum_python: Path
) -> Iterator[dict[str, Ask]]:
    """A process of each; leaving the `with` block ends them."""
    with ExitStack() as stack:
        made = {}
        for name, target in ((OURS, OURS), (THEIRS, "onnx"), (NARROWED, OURS)):
            worker = stack.enter_context(Worker(name, threads=workload.threads))
            worker.ask(
                "load", target=target, folder=str(folders[name]), workload=workload.as_dict()
            )
            worker.ask("warm_up", vocabulary=vocab, patience=PATIENCE)
            made[name] = _asking(worker)
        theirs = _Generating(folders[GENERATE], workload, vocab, optimum_python)
        made[GENERATE] = stack.enter_context(theirs).ask
        yield made


def _asking(worker: Worker) -> Ask:
    def ask() -> list[float]:
        [[_, *gaps]] = worker.ask("measure", iterations=1)["samples_ns"]
        return [gap / 1e6 for gap in gaps]

    return ask


class _Generating:
    """ORTModelForCausalLM in a process of its own; leaving the `with` block ends it."""

    def __init__(self, folder: Path, workload: Workload, vocab: int, python: Path) -> None:
        self.steps = workload.generation_length - 1
        prompt_BL, _ = workload.tokens(vocab)
        arguments = [str(folder), str(workload.threads), json.dumps(prompt_BL[0].tolist())]
        self.process = subprocess.Popen(
            [str(python), "-c", RUN_THEIRS, *arguments, str(self.steps)],
            env=_their_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> _Generating:
        self._read()  # it has loaded and run once
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def ask(self) -> list[float]:
        """Its gaps are not seen one by one: their mean stands for each of them."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        first, whole = self._read()
        return [(whole - first) / 1e6 / self.steps] * self.steps

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise DotexportError(
                f"Optimum's generate ended with code {self.process.wait()}; its words are above"
            )
        return json.loads(line)


def _take_turns(timed: Mapping[str, _Timed], asked: Mapping[str, Ask], groups: int) -> None:
    there = list(asked)
    for _ in range(groups):
        for name in (*there, *reversed(there)):
            timed[name].blocks.append(asked[name]())


# Rows -------------------------------------------------------------------------------------------


def _rows(
    timed: Mapping[str, _Timed], folders: Mapping[str, Path], rounds: int
) -> Iterator[dict[str, Any]]:
    sizes = {name: folder_bytes(folders[name]) for name in timed}
    for name, found in timed.items():
        yield {"graph": name, "decode tok/s": found.rate, "MB": sizes[name] / 1e6}
    for name, base in ((OURS, THEIRS), (OURS, GENERATE), (NARROWED, OURS), (NARROWED, THEIRS)):
        times: Comparison = compare(timed[name].groups, timed[base].groups, rounds=rounds)
        yield {
            "decode rate": name,
            "over": base,
            "ratio": 1 / times.ratio,
            "from": 1 / times.high,
            "to": 1 / times.low,
            "bytes, inverse ratio": sizes[base] / sizes[name],
        }
