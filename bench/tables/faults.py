"""What becomes of kills, damaged inputs, planted faults, and too little memory or disk.

python -m dotexport.bench faults
python -m dotexport.bench faults --only inputs --inputs 100
"""

from __future__ import annotations

import random
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from dotexport import embedded
from dotexport.errors import UsageError
from dotexport.storage import manifest
from dotexport.storage.files import write_text

from . import fault_inputs, fault_plants
from .fault_inputs import SHORT, small_model
from .forked import Ending, dotexport, memory_now
from .result_files import RESULTS, Out, Table, save

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

PROTOCOL = (
    "Every case is drawn from the seed and runs in a fork of its own. `clear`: it did what was "
    "asked, or refused it in a sentence with a documented exit code, and left what was there as "
    "it was; after a kill, the same command made the same bytes and nothing else stayed. `wrong`: "
    "a traceback, an exception that nobody foresaw, a hang, a file that was lost or left, an "
    "output that is not what transformers reads, a planted fault that verification passed."
)


@app.command()
def faults(
    out: Out = RESULTS,
    seed: Annotated[int, typer.Option(help="Same seed, same cases.")] = 0,
    inputs: Annotated[int, typer.Option(min=1, help="Damaged inputs.")] = 600,
    kills: Annotated[int, typer.Option(min=1, help="Kills of each verb.")] = 20,
    limits: Annotated[int, typer.Option(min=1, help="Runs under each limit.")] = 20,
    only: Annotated[str, typer.Option(help="One campaign; writes no table.")] = "",
) -> None:
    """Kills, damaged inputs, planted faults and limits: tried, clear, wrong."""
    campaigns: dict[str, Callable[[Path], Iterator[tuple[str, str]]]] = {
        "kills": lambda scratch: _kills(kills, seed, scratch),
        "inputs": lambda scratch: _inputs(inputs, seed, scratch),
        "plants": lambda scratch: _plants(seed, scratch),
        "limits": lambda scratch: _limits(limits, seed, scratch),
    }
    if only and only not in campaigns:
        raise UsageError(f"--only {only}: expected one of {', '.join(campaigns)}")
    _prepare()
    rows: Table = []
    failed: Table = []
    for name, campaign in campaigns.items():
        if only in ("", name):
            counts, wrong = _counted(campaign)
            rows += counts
            failed += wrong
    if only:
        for row in (*rows, *failed):
            typer.echo(" | ".join(map(str, row.values())))
        return
    save(out / "faults", "Faults: what became of them", PROTOCOL, [*rows, *failed])


def _prepare() -> None:
    """Import what every case needs, once, for the forks to have."""
    import torch
    import transformers  # noqa: F401

    from dotexport.app import pipeline  # noqa: F401

    torch.set_num_threads(1)  # threads do not survive a fork


def _counted(campaign: Callable[[Path], Iterator[tuple[str, str]]]) -> tuple[Table, Table]:
    """A row for each kind of case, and one for each that went wrong."""
    counts: dict[str, list[int]] = {}
    failed: Table = []
    with tempfile.TemporaryDirectory() as scratch:
        for what, wrong in campaign(Path(scratch).resolve()):
            tried = counts.setdefault(what.partition(": ")[0], [0, 0])
            tried[0] += 1
            tried[1] += bool(wrong)
            if wrong:
                failed.append({"case": what, "what went wrong": wrong.replace("|", "/")[:200]})
    rows: Table = [
        {"campaign": name, "tried": n, "clear": n - wrong, "wrong": wrong}
        for name, (n, wrong) in counts.items()
    ]
    return rows, failed


def _inputs(number: int, seed: int, scratch: Path) -> Iterator[tuple[str, str]]:
    for case in fault_inputs.campaign(number, seed, scratch):
        yield f"damaged {case.what}", case.wrong


def _plants(seed: int, scratch: Path) -> Iterator[tuple[str, str]]:
    for case in fault_plants.campaign(seed, scratch):
        passed = f"passed verification; {case.why}" if case.passed else ""
        yield f"planted, {case.artifact}: {case.what}", passed


# Kills and limits ---------------------------------------------------------------------------------


def _commands(scratch: Path) -> dict[str, Sequence[object]]:
    """Verb -> its command, which writes scratch/at/out."""
    model, text = small_model(scratch / "model"), scratch / "text.txt"
    write_text(text, "\n<|endoftext|>\n".join(embedded.calibration_text()[:40]))
    out = scratch / "at" / "out"
    asked = ("--calib", text, *SHORT, "--intermediate", 64)
    shrink: Sequence[object] = ("shrink", model, "-o", out, *asked)
    printed = dotexport(*shrink, "--print-recipe").said
    recipe = scratch / "recipe.yaml"
    write_text(recipe, printed.replace("eval: null", f"eval: {{text: {text}, seqlen: 32}}"))
    return {
        "shrink": shrink,
        "export": ("export", model, "--target", "hf", "-o", out),
        "run": ("run", recipe, "-o", out),
        "heal": (*shrink, "--heal", "local+12", "--heal-precision", "fp32"),
    }


def _kills(number: int, seed: int, scratch: Path) -> Iterator[tuple[str, str]]:
    for verb, command in _commands(scratch).items():
        home = scratch / "at"
        started = time.monotonic()
        whole = _remade(home, command)
        if whole.code != 0:
            raise UsageError(f"{verb} fails without any kill: {whole.sentence}")
        lasts, right = time.monotonic() - started, _stock(home / "out")
        rng = random.Random(f"{seed} {verb}")
        for _ in range(number):
            share = rng.random()
            _remade(home, command, kill_after=share * lasts)
            wrong = _half(home / "out", right)
            again = dotexport(*command)
            # One that had ended before the kill is there already, and says so.
            if not wrong and not (again.code == 0 or "not empty" in again.said or _added(again)):
                wrong = f"the same command ended with {again.code}: {again.sentence}"
            wrong = wrong or _half(home / "out", right) or _leftovers(home)
            yield f"killed {verb}: at {share:.0%}", wrong


def _remade(home: Path, command: Sequence[object], **how: Any) -> Ending:
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    return dotexport(*command, **how)


def _added(ending: Ending) -> bool:
    return ending.code == 2 and "is an output of dotexport already" in ending.said


def _stock(out: Path) -> dict[str, Any]:
    return manifest.hash_files(out / "hf")


def _half(out: Path, right: dict[str, Any]) -> str:
    """What is wrong with an output that is there."""
    if out.exists() and _stock(out) != right:
        return "an output is there, and its checkpoint is not that of a whole run"
    return ""


def _leftovers(home: Path) -> str:
    left = sorted(entry.name for entry in home.iterdir() if entry.name != "out")
    return f"left behind: {', '.join(left)}" if left else ""


def _limits(number: int, seed: int, scratch: Path) -> Iterator[tuple[str, str]]:
    commands = _commands(scratch)
    home = scratch / "at"
    rng = random.Random(f"{seed} limits")
    for index in range(number):
        verb = list(commands)[index % len(commands)]
        for kind, what, most in (
            (resource.RLIMIT_AS, "memory", memory_now() + rng.randrange(1 << 20, 300 << 20)),
            (resource.RLIMIT_FSIZE, "disk", rng.randrange(1 << 10, 4 << 20)),
        ):
            ending = _remade(home, commands[verb], limits={kind: most})
            wrong = "" if ending.clear else f"ended with {ending.code}: {ending.sentence}"
            kept = ".out.unfinished-"  # what the same command goes on from
            left = [e.name for e in home.iterdir() if not e.name.startswith(kept)]
            if not wrong and ending.code != 0 and left and verb not in ("run",):
                wrong = f"failed, and left {', '.join(left)}"
            yield f"too little {what}: {verb}, {most:,} bytes", wrong
