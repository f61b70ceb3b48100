"""Small models with other weights and words, a text for them, and what they say.

Shapes: B texts, N windows, L tokens, D width before, K width after.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dotexport.app.opening import open_source
from dotexport.axes.plan import SizeOptions
from dotexport.models.text_options import TextOptions
from dotexport.narrowing.basis import Basis
from dotexport.narrowing.calibration_text import CalibrationText
from dotexport.narrowing.narrow_options import NarrowOptions
from dotexport.narrowing.prepare import prepare
from dotexport.narrowing.run import Narrowing
from dotexport.sizes.budget import plan

WINDOWS_NL = torch.randint(3, 90, (64, 32), generator=torch.Generator().manual_seed(0))
TOKENS_BL = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(1))


def rewritten(
    source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None], **words: Any
) -> Path:
    """The same model in one file, with other weights and words."""
    folder.mkdir()
    for file in source.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    tensors: dict[str, torch.Tensor] = {}
    for file in source.glob("*.safetensors"):
        tensors |= load_file(file)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | words
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def letters(folder: Path) -> TextOptions:
    file = folder / "letters.txt"
    drawn = np.random.default_rng(0).integers(0, 87, size=2000)
    file.write_text("".join(chr(33 + n) for n in drawn))
    return TextOptions(source=str(file), samples=12, seqlen=64)


def logits(folder: Path, tokens_BL: torch.Tensor = TOKENS_BL) -> torch.Tensor:
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        found: torch.Tensor = model(input_ids=tokens_BL).logits
    return found


def narrowed(
    model: Path, out: Path, options: NarrowOptions, basis_DK: Any = None, **sizes: int
) -> Narrowing:
    """In the axes that there are, so that nothing but what is named is narrower."""
    (out / "hf").mkdir(parents=True)
    source = open_source(model)
    run = prepare(
        source, plan(source.config, SizeOptions(**sizes)), out, CalibrationText(WINDOWS_NL), options
    )
    same_DD = np.eye(run.original.sizes.hidden_size)
    run.run(Basis(same_DD if basis_DK is None else basis_DK, "none", 1.0))
    run.writer.finish()
    return run
