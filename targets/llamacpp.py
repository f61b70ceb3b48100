"""llama.cpp itself, where it is installed: does it compute from our GGUF files what torch does?

Whatever brought it here (a release archive, a package manager, llama-cpp-python, node-llama-cpp)
came with its library, and llama_library.py asks that in a process of its own. All of its logits
are held against torch's: prompts, cached steps, and sequences side by side.

Shapes: B sequences, L tokens of the longest prompt, V vocabulary.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from dotexport import manifest
from dotexport.adapter import Logits, Tokens
from dotexport.checkpoint import Checkpoint
from dotexport.errors import RuntimeMissingError, UsageError
from dotexport.parity import Parity, measure
from dotexport.reference import Reference, compute_reference
from dotexport.verifying import STOCK, changed_files, write_report

NAME = "llama.cpp"
GGUF = "gguf"
FILE = "model.gguf"
WORKER = Path(__file__).with_name("llama_library.py")
LIBRARY = re.compile(r"(lib)?llama(\.v?[\d.]+\d)?\.(so|dylib|dll)(\.\d+)*")
LAST_LINES = 8


class LlamaCppError(RuntimeError):
    """llama.cpp does not run a file."""


class LlamaCpp:
    """A session of one GGUF file; also a context manager, which ends the process.

    Args:
        context: tokens of the longest sequence.
    """

    def __init__(
        self, library: Path, file: Path, *, context: int, threads: int | None = None
    ) -> None:
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        # Its threads wait for each other by spinning: one too many costs more than one too few.
        settings = [str(context), str(threads or max(1, (os.cpu_count() or 1) // 2))]
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), str(library), str(file), *settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
        )

    def start(self, tokens_BL: Tokens, lengths_B: Sequence[int] | None = None) -> Logits:
        B, L = tokens_BL.shape
        lengths = [L] * B if lengths_B is None else list(lengths_B)
        prompts = [row[:length].tolist() for row, length in zip(tokens_BL, lengths, strict=True)]
        logits_TV = self._logits({"start": prompts})
        logits_BLV = np.zeros((B, L, logits_TV.shape[1]), dtype=np.float32)
        ends = np.cumsum(lengths)
        for row, length, end in zip(logits_BLV, lengths, ends, strict=True):
            row[:length] = logits_TV[end - length : end]
        return logits_BLV

    def step(self, tokens_B: Tokens) -> Logits:
        return self._logits({"step": tokens_B.tolist()})

    def tokenize(self, text: str) -> list[int]:
        """What the tokenizer inside the file makes of a text, the start token included."""
        tokens: list[int] = self._ask({"tokenize": text})
        return tokens

    def _logits(self, asked: dict[str, Any]) -> Logits:
        shape = self._ask(asked)
        assert self.process.stdout is not None
        content = self.process.stdout.read(4 * int(np.prod(shape)))
        return np.frombuffer(content, dtype=np.float32).reshape(shape)

    def _ask(self, asked: dict[str, Any]) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(asked).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise LlamaCppError(self._last_words()) from None
        line = self.process.stdout.readline()
        if not line:
            raise LlamaCppError(self._last_words())
        return json.loads(line)

    def _last_words(self) -> str:
        code = self.process.wait()
        self.log.seek(0)
        said = self.log.read().decode(errors="replace").strip().splitlines()
        return f"llama.cpp ended with code {code}; its last lines:\n" + "\n".join(
            said[-LAST_LINES:]
        )

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.communicate()
        self.log.close()


def verify_llama_cpp(out: Path, where: Path) -> list[Parity]:
    """Hold what llama.cpp computes from every GGUF artifact of an output against torch.

    `where` is a folder of llama.cpp, or one of its programs or libraries. The report says what was
    found under the artifact's name and llama.cpp's.

    Raises:
        RuntimeMissingError: no llama.cpp there, or one that does not load here.
        UsageError: the output holds no GGUF artifact.
    """
    library = find_library(where)
    artifacts = manifest.read(out).get("artifacts", {})
    files = {name: entry for name, entry in artifacts.items() if entry["target"] == GGUF}
    if not files:
        raise UsageError(f"{out} holds no GGUF file; expected dotexport export {out} --target gguf")
    _check_library(library)
    rounded = any(entry["precision"].startswith("int") for entry in files.values())
    reference = compute_reference(Checkpoint.open(out / STOCK), rounded=rounded)
    parities = []
    for name, entry in files.items():
        parity = run(library, out / name, entry["precision"], reference, artifact=f"{name}-{NAME}")
        changed = changed_files(out / name, entry["files"])
        parities.append(replace(parity, problems=(*changed, *parity.problems)))
    write_report(out, parities, reference)
    return parities


def run(
    library: Path, folder: Path, precision: str, reference: Reference, *, artifact: str
) -> Parity:
    """Measure one artifact; one that llama.cpp does not run has failed."""
    context = max(map(len, reference.sequences))
    try:
        with LlamaCpp(library, folder / FILE, context=context) as session:
            return measure(session, reference, artifact=artifact, target=NAME, precision=precision)
    except LlamaCppError as error:
        problem = f"it cannot be run: {error}"
        return Parity(artifact, NAME, precision, problems=(problem,))


def find_library(where: Path) -> Path:
    """libllama of an installation, of which `where` is the folder or any file.

    Raises:
        RuntimeMissingError: there is none.
    """
    if where.is_file() and LIBRARY.fullmatch(where.name):
        return where
    home = where.resolve().parent if where.is_file() else where
    beside = [home.parent / "lib"] if where.is_file() else []
    for folder in (home, *beside):
        found = sorted(file for file in folder.rglob("*llama*") if LIBRARY.fullmatch(file.name))
        if found:
            return min(found, key=lambda file: (len(file.parts), len(file.name)))
    raise RuntimeMissingError(
        f"{where} holds no library of llama.cpp (libllama.so, libllama.dylib or llama.dll); "
        "expected the folder of a llama.cpp release, or one of its programs"
    )


def _check_library(library: Path) -> None:
    """Whether it loads at all: what fails later is then the file's fault."""
    done = subprocess.run(
        [sys.executable, str(WORKER), str(library)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise RuntimeMissingError(
            f"{library} cannot be used ({last}); expected llama.cpp of 2025-07 or later, built for "
            "this machine"
        )
