"""Every line of stderr is ours: users hear dotexport, and errors of anybody."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dotexport.app.hearing import is_for_users

from .conftest import written

STAGES = (
    *("reading", "looking", "narrowing", "evaluating", "exporting", "preparing", "loading"),
    *("warming up", "measuring", "measured", "healing", "choosing", "checking", "timing"),
)
OURS = re.compile(
    rf"({'|'.join(STAGES)})\b.*"
    r"|/.*  [\d.]+ [MG]B"  # an artifact and its size
    r"|[\s┏┃┡│└├╇━┓┩┘─┴]+.*|.*difference from torch.*"  # tables
    r"|only \d+ windows with .*|no legal sizes .*|no latency table of .*|the mean of .*"
    r"|\d+ of \d+ matrices stay F16, .*|the tokenizer of .* is left out of the GGUF file"
    r"|the model was calibrated on text of the source it is judged on .*|continuing texts: .*"
    r"|sampling text .*"
    r"|report .*|error: target .* cannot be run here.*|.*needs an NVIDIA GPU.*"
)
SHORT = ("--samples", "4", "--seqlen", "32")
TARGETS = ("ort-cpu", "onnx", "openvino", "gguf", "executorch", "mlx")
VERBS: dict[str, tuple[str, ...]] = {
    "plan": ("plan", "MODEL", "--params", "0.7x"),
    "run": ("run", "RECIPE", "-o", "NEW"),
    "verify": ("verify", "OUT"),
    "eval": ("eval", "OUT", "--baseline", "MODEL", "--text", "TEXT", *SHORT),
    "report": ("report", "OUT"),
    "bench": (
        *("bench", "OUT", "--target", "hf", "--baseline", "MODEL", "--rounds", "1"),
        *("--min-iterations", "2", "--min-seconds", "0.1", "--warmups", "1", "--prompt", "8"),
        *("--generate", "4", "--no-roofline"),
    ),
    "targets": ("targets",),
    "doctor": ("doctor",),
    "export": ("export", "OUT", *(word for name in TARGETS for word in ("--target", name))),
    "export ort-cuda": ("export", "OUT", "--target", "ort-cuda"),
}


def called(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dotexport", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def strange(stderr: str) -> list[str]:
    """Lines that nobody here has written."""
    return [line for line in stderr.splitlines() if line.strip() and not OURS.fullmatch(line)]


@pytest.fixture(scope="module")
def places(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """A model, what shrink makes of it, and a recipe; shrink itself is looked at here."""
    home, model = (
        tmp_path_factory.mktemp("home"),
        str(tiny_model(model_type="llama", num_hidden_layers=1)),
    )
    text = str(written(home / "text.txt", "w1 w2 w3 w4 " * 100))
    asked = ("shrink", model, "-o", str(home / "out"), "--calib", text, *SHORT)
    command = (*asked, "--intermediate", "64", "--heal", "local+2")
    made = called(*command)
    assert made.returncode == 0, made.stderr
    assert strange(made.stderr) == []
    recipe = called(*command, "--print-recipe")
    assert strange(recipe.stderr) == []
    return {
        "MODEL": model,
        "TEXT": text,
        "OUT": str(home / "out"),
        "NEW": str(home / "new"),
        "RECIPE": str(written(home / "recipe.yaml", recipe.stdout)),
    }


@pytest.mark.parametrize("verb", VERBS)
def test_every_line_of_stderr_is_ours(verb: str, places: dict[str, str]) -> None:
    ended = called(*(places.get(word, word) for word in VERBS[verb]))
    assert ended.returncode in (0, 6), ended.stderr  # 6: its runtime is not here
    assert strange(ended.stderr) == []


@pytest.mark.parametrize(
    "line",
    [
        "Failed to load .../torchao/_C_mxfp8.so: Could not load this library",
        "W1128 17:26:21.124000 30362 torch/utils/_pytree.py:630] <enum> is an Enum subclass",
        "Warning: Detected no triton, on systems without Triton certain kernels will not work",
        "/x/torch/onnx/utils.py:12: TracerWarning: Converting a tensor to a Python boolean",
        "huggingface/tokenizers: The current process just got forked",
    ],
)
def test_the_look_sees_what_others_write(line: str) -> None:
    """The test above would pass with a pattern that takes everything."""
    assert strange(f"narrowing\n{line}\n") == [line]


def test_errors_of_others_are_heard_and_so_are_words_of_ours() -> None:
    def heard(name: str, level: int) -> bool:
        return is_for_users(logging.LogRecord(name, level, "f", 1, "said", None, None))

    assert heard("dotexport.narrowing.run", logging.WARNING)
    assert heard("torchao", logging.ERROR)
    assert not heard("torchao", logging.WARNING)
    assert not heard("py.warnings", logging.WARNING)
    assert not heard("dotexporter", logging.WARNING)


SAID = """
import logging, sys, warnings
from dotexport.app.hearing import listen
listen(verbose={verbose})
warnings.warn("deprecated", FutureWarning)
logging.getLogger("torchao").warning("no kernel")
logging.getLogger("torchao").error("broken")
logging.getLogger("dotexport.x").warning("ours")
"""


@pytest.mark.parametrize("verbose", [False, True])
def test_verbose_lets_everything_through(verbose: bool) -> None:
    code = [sys.executable, "-c", SAID.format(verbose=verbose)]
    said = subprocess.run(code, capture_output=True, text=True, check=True).stderr
    assert [word for word in ("broken", "ours") if word not in said] == []
    assert all((word in said) == verbose for word in ("deprecated", "no kernel"))
