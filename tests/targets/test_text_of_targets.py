"""Every artifact with a tokenizer reads text, and stops, as the model does in transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dotexport import embedded
from dotexport.errors import RuntimeMissingError
from dotexport.exports.exporting import Request, export
from dotexport.exports.target import resolve, target_names
from dotexport.exports.text_parity import check_text
from dotexport.exports.verifying import verify
from dotexport.models.checkpoint import Checkpoint

TEMPLATE = "{% for m in messages %}{{ bos_token }}{{ m.role }}\n{{ m.content }}{% endfor %}"
END = 7  # beside the one in config.json
PUTS_A_START = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [],
    "special_tokens": {
        "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with all that an adapter may forget."""
    folder = Path(shutil.copytree(embedded.MODEL_DIR, tmp_path_factory.mktemp("text") / "model"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    for name, key, value in (
        ("generation_config.json", "eos_token_id", [END, 0]),
        ("tokenizer.json", "post_processor", PUTS_A_START),
    ):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {key: value}))
    return folder


@pytest.fixture(scope="module")
def out(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text-out") / "out"
    export(model, ["hf"], out=folder, verify=False)
    return folder


@pytest.mark.parametrize("name", [name for name in target_names() if name != "ort-cuda"])
def test_an_artifact_reads_text_as_the_model_does(name: str, model: Path, out: Path) -> None:
    try:
        target, precision = resolve(name)
    except RuntimeMissingError as error:
        pytest.skip(str(error))
    if target.missing():
        pytest.skip("; ".join(target.missing()))
    folder = out / Request(target, precision).name
    if name != "hf":
        export(out, [name], verify=False)
    verdict = check_text(target, folder, Checkpoint.open(model))
    assert verdict is not None
    assert verdict.problems == ()
    assert (verdict.num_texts, verdict.num_conversations) == (191, 3)
    # And what transformers then reads otherwise is found.
    file = out / "hf" / "generation_config.json"
    content = file.read_text()
    file.write_text(json.dumps(json.loads(content) | {"eos_token_id": [0, 9]}))
    try:
        [parity] = verify(out, [name])
    finally:
        file.write_text(content)
    if name != "hf":  # which is the yardstick
        assert any("stop tokens: 9" in problem for problem in parity.problems)
