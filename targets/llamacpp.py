"""llama.cpp itself, where it is installed: does it compute from our GGUF files what torch does?

Whatever brought it here (a release archive, a package manager, llama-cpp-python, node-llama-cpp)
came with its library, and llama_library.py asks that in a process of its own. All of its logits
are held against torch's: prompts, cached steps, and sequences side by side; its tokens, ends and
text against transformers'.

Shapes: B sequences, L tokens of the longest prompt, V vocabulary.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from dotexport.errors import UsageError
from dotexport.exports.kept_reference import reference_of
from dotexport.exports.nasty_texts import Conversation
from dotexport.exports.parity import Parity, measure
from dotexport.exports.reference import Reference
from dotexport.exports.target import Logits, Tokens
from dotexport.exports.text_parity import TextSide, load_tokenizer
from dotexport.exports.verifying import STOCK, Chosen, chosen_for, with_text, write_report
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.loading import Loaded
from dotexport.storage import manifest

from .ggml import FILE, Gguf
from .llama_session import find_library, own_threads, side_by_side, unusable

NAME = "llama.cpp"
GGUF = "gguf"
EXACT = "fp16"  # the precision at which its tokens must be transformers'
PROMPT = "Once upon a time"
NUM_GREEDY = 64
WORKER = Path(__file__).with_name("llama_library.py")
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
        settings = [str(context), str(threads or own_threads())]
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
        return side_by_side(self._logits({"start": prompts}), lengths, L)

    def step(self, tokens_B: Tokens) -> Logits:
        return self._logits({"step": tokens_B.tolist()})

    def tokenize(self, text: str) -> list[int]:
        """What the tokenizer inside the file makes of a text, with what it puts around it and with
        the tokens that the text names."""
        tokens: list[int] = self._ask({"tokenize": text})
        return tokens

    def spell(self, tokens: Sequence[int]) -> bytes:
        """What tokens say, special ones included."""
        return bytes(self._ask({"spell": list(tokens)}))

    def text(self, file: TextSide) -> TextSide:
        """The text side of the file, of which the library was asked all but how jinja renders."""
        start, _, stops, template = self._ask({"vocabulary": None})
        rendered = file.render if template is not None else _no_template
        return replace(
            file, encode=self.tokenize, start=start, stops=frozenset(stops), render=rendered
        )

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


def _no_template(conversation: Conversation) -> str | None:
    return None


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
    checkpoint = Checkpoint.open(out / STOCK)
    reference = reference_of(out, rounded=rounded)
    parities = []
    for name, entry in files.items():
        asked = (library, out / name, entry["precision"], reference)
        chosen = chosen_for(checkpoint, entry)
        parity = run(*asked, artifact=f"{name}-{NAME}", checkpoint=checkpoint, chosen=chosen)
        changed = manifest.changed_files(out / name, entry["files"])
        parities.append(replace(parity, problems=(*changed, *parity.problems)))
    write_report(out, parities, reference)
    return parities


def run(
    library: Path,
    folder: Path,
    precision: str,
    reference: Reference,
    *,
    artifact: str,
    checkpoint: Checkpoint | None = None,
    chosen: Chosen | None = None,
) -> Parity:
    """Measure one artifact; one that llama.cpp does not run has failed.

    With the checkpoint it was made from, its text side is held against transformers' as well.
    """
    far = [reference.long.tokens] if reference.long else []
    context = max(map(len, (*reference.sequences, *far))) + NUM_GREEDY
    try:
        with LlamaCpp(library, folder / FILE, context=context) as session:
            parity = measure(
                session, reference, artifact=artifact, target=NAME, precision=precision
            )
            if checkpoint is None:
                return parity
            return _with_text(parity, session, folder, checkpoint, chosen)
    except LlamaCppError as error:
        problem = f"it cannot be run: {error}"
        return Parity(artifact, NAME, precision, problems=(problem,))


def _with_text(
    parity: Parity,
    session: LlamaCpp,
    folder: Path,
    checkpoint: Checkpoint,
    chosen: Chosen | None,
) -> Parity:
    target: Any = InLlamaCpp(session)
    parity = with_text(parity, target, folder, checkpoint, chosen)
    if parity.text is None or parity.problems or parity.precision != EXACT:
        return parity
    problems = text_in_text_out(session, checkpoint, tie=parity.limits.tie)
    return replace(parity, problems=tuple(problems))


class InLlamaCpp(Gguf):
    """The GGUF target, its text side asked of the library."""

    def __init__(self, session: LlamaCpp) -> None:
        self.session = session

    def text(self, checkpoint: Checkpoint, folder: Path) -> TextSide | None:
        file = super().text(checkpoint, folder)
        return None if file is None else self.session.text(file)


@torch.inference_mode()
def text_in_text_out(session: LlamaCpp, checkpoint: Checkpoint, *, tie: float) -> Iterator[str]:
    """A text goes in, and the most likely tokens come out: the same that transformers finds.

    Two tokens whose logits in torch differ by less than `tie` are both right.
    """
    tokenizer = load_tokenizer(checkpoint.folder)
    prompt = session.tokenize(PROMPT)
    room = (checkpoint.config.get("max_position_embeddings") or 1 << 20) - len(prompt)
    if not prompt or room < 1:
        return
    tokens = list(prompt)
    logits_V = session.start(np.array([prompt]))[0, -1]
    for _ in range(min(NUM_GREEDY, room)):
        tokens.append(int(logits_V.argmax()))
        logits_V = session.step(np.array(tokens[-1:]))[0]
    logits_NV = Loaded(checkpoint).logits(torch.tensor([tokens[:-1]]))[0, len(prompt) - 1 :]
    chosen_N = torch.tensor(tokens[len(prompt) :])
    gap_N = logits_NV.amax(-1) - logits_NV.gather(-1, chosen_N[:, None])[:, 0]
    for step in (gap_N > tie).nonzero()[:1, 0].tolist():
        yield (
            f"text out: token {step + 1} of {len(chosen_N)} after {PROMPT!r} is "
            f"{int(chosen_N[step])} where transformers has {int(logits_NV[step].argmax())}"
        )
    said = session.spell(tokens).decode(errors="replace")
    wanted = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    if "\ufffd" not in said + wanted and said.lstrip(" ") != wanted.lstrip(" "):
        yield f"text out: {said[:80]!r} where transformers writes {wanted[:80]!r}"


def _check_library(library: Path) -> None:
    """Whether it loads at all: what fails later is then the file's fault."""
    done = subprocess.run(
        [sys.executable, str(WORKER), str(library)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise unusable(library, last)
