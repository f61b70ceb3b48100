"""Exported folders in `ORTDiffusionPipeline` itself, in an environment of its own.

optimum-onnx 0.1 does not live with transformers 5. DOTEXPORT_OPTIMUM_PYTHON names the python of an
environment with torch 2.13.0, optimum-onnx 0.1.0, transformers 4.57.6, diffusers 0.39.0 and
onnxruntime; without it these tests are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dotexport.diffusion.sampling import load

PYTHON = os.environ.get("DOTEXPORT_OPTIMUM_PYTHON")  # taken from where pytest was started
pytestmark = [
    pytest.mark.optimum,
    pytest.mark.skipif(PYTHON is None, reason="needs DOTEXPORT_OPTIMUM_PYTHON"),
]

SAMPLE = """
import json, sys
import numpy as np, torch
from optimum.onnxruntime import ORTDiffusionPipeline

asked = json.load(open(sys.argv[1]))
pipe = ORTDiffusionPipeline.from_pretrained(asked["folder"])
for case in asked["cases"]:
    latents = torch.from_numpy(np.load(case["latents"]))
    np.save(case["pictures"], pipe(latents=latents, **case["call"]).images)
print(type(pipe).__name__)
"""
CLASSES = {
    "sd3": "ORTStableDiffusion3Pipeline",
    "flux": "ORTFluxPipeline",
    "unet": "ORTStableDiffusionPipeline",
    "sdxl": "ORTStableDiffusionXLPipeline",
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.heavy if n.startswith("sd") else ()) for n in CLASSES],
)
def test_a_pruned_pipeline_samples_in_optimum(
    name: str, exported: Callable[[str], Path], calls: dict[str, Any], tmp_path: Path
) -> None:
    """The same noise gives the same pictures as torch, at two batch and two picture sizes."""
    out = exported(name)
    pipe = load(out / "pipeline")
    cases, expected = [], []
    for batch, height in ((2, 16), (3, 8)):
        call = {
            "prompt": ["one", "three", "seven"][:batch],
            "num_inference_steps": 3,
            "guidance_scale": 2.0,
            "height": height,
            "width": 16,
            "output_type": "np",
            **calls[name],
        }
        latents = noise(pipe, batch, height // 2, 8)
        np.save(tmp_path / f"latents-{batch}.npy", latents.numpy())
        files = {key: str(tmp_path / f"{key}-{batch}.npy") for key in ("latents", "pictures")}
        cases.append({"call": call, **files})
        expected.append(pipe(latents=latents, **call).images)
    asked = tmp_path / "asked.json"
    asked.write_text(json.dumps({"folder": str(out / "onnx-fp32"), "cases": cases}))
    assert PYTHON is not None
    done = subprocess.run(
        [Path(PYTHON).absolute(), "-c", SAMPLE, asked],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == CLASSES[name]
    for case, pictures in zip(cases, expected, strict=True):
        assert pictures.std() > 0.05  # they show something
        # Three steps of float32 in two runtimes; one part in a thousand of the range of a picture.
        np.testing.assert_allclose(np.load(case["pictures"]), pictures, rtol=0, atol=1e-3)


def noise(pipe: Any, batch: int, height: int, width: int) -> torch.Tensor:
    latents = torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(1))
    if not hasattr(pipe, "_pack_latents"):
        return latents
    packed: torch.Tensor = pipe._pack_latents(latents, batch, 4, height, width)
    return packed
