"""The table of families in targets: cells that are known are not measured again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dotexport import embedded
from dotexport.bench.tables.matrix import FAMILIES, main, write_original
from dotexport.models.checkpoint import Checkpoint

HELD = {"worst logit": 2e-5, "KL": 1e-12, "bytes": "0.690x", "decode": "1.40x"}
REFUSED = {"worst logit": "", "KL": "", "bytes": "", "decode": "", "refused": "SizeError: a window"}


def test_a_run_that_was_stopped_ends_from_its_notes_alone(tmp_path: Path) -> None:
    cells = {"onnx": HELD | {"interval": "1.3 to 1.5", "refused": ""}, "gguf": REFUSED}
    with (tmp_path / ".matrix.jsonl").open("w", encoding="utf-8") as notes:
        for spec, cell in cells.items():
            row = {"family": "Llama", "written as": "LlamaForCausalLM", "target": spec, **cell}
            notes.write(json.dumps({"budget": "Llama", "step": spec, "row": row}) + "\n")
    main(tmp_path, ["Llama"], ["onnx", "gguf"])
    table = (tmp_path / "matrix.md").read_text(encoding="utf-8")
    assert "| Llama | LlamaForCausalLM | 2e-05, 0.690x, 1.40x | refused |" in table
    assert "SizeError: a window" in table
    assert not (tmp_path / ".matrix.jsonl").exists()


@pytest.mark.parametrize("name", ["Llama", "Phi-3"])
def test_an_original_has_the_weights_of_the_embedded_model(name: str, tmp_path: Path) -> None:
    """Phi-3's are the same, fused."""
    write_original(FAMILIES[name], tmp_path / "model")
    made, taken = Checkpoint.open(tmp_path / "model"), Checkpoint.open(embedded.MODEL_DIR)
    assert made.num_parameters == taken.num_parameters
    gate = "model.layers.1.mlp.gate_proj.weight"
    rows = taken.specs[gate].shape[0]
    name = gate if gate in made.specs else gate.replace("gate_proj", "gate_up_proj")
    assert torch.equal(made.tensor(name)[:rows], taken.tensor(gate))
