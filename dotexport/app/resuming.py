"""How a shrink that was stopped is known again, and what it decided before its layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dotexport.app.shrink_options import ShrinkOptions
from dotexport.axes.plan import Plan
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.shapes import Sizes
from dotexport.storage import manifest
from dotexport.storage.workspace import Workspace
from dotexport.version import __version__

Measure = Callable[[Plan], float]

PLAN, CUTS, CLOSER_CUTS, HEALED_CUTS = "plan", "cuts", "closer-cuts", "healed-cuts"
LIBRARIES = ("torch", "transformers", "tokenizers")


def workspace_of(
    out: Path,
    original: Checkpoint,
    source: dict[str, Any],
    options: ShrinkOptions,
    device: torch.device,
    passes: torch.dtype,
    processes: int = 1,
) -> Workspace:
    """Where this command keeps what it has finished; any other one has another place.

    Args:
        source: what the manifest says of the original, with the hashes of its files.
        processes: that share the text: sums of another number are rounded in another order.
    """
    identity = {
        "version": __version__,
        "libraries": {name: version(name) for name in LIBRARIES},
        "source": source,
        "companions": {file.name: manifest.sha256(file) for file in original.companions()},
        "options": json.loads(json.dumps(asdict(options))),
        "device": str(device),
        "passes": str(passes),
        **({"processes": processes} if processes > 1 else {}),
    }
    return Workspace.of(out, identity)


def remembered(measure: Measure, workspace: Workspace, step: str) -> Measure:
    """The same, of which every figure is kept by this name."""
    kept = workspace.load(step)
    figures: dict[str, float] = kept[0] if kept else {}

    def recalled(asked: Plan) -> float:
        sizes = json.dumps(_words(asked), sort_keys=True)
        if sizes not in figures:
            figures[sizes] = measure(asked)
            workspace.save(step, figures)
        return figures[sizes]

    return recalled


def decided_once(decided: Plan, workspace: Workspace) -> Plan:
    """What was decided first: sizes within a budget of time differ from one timing to the next."""
    if kept := workspace.load(PLAN):
        after = kept[0]["after"]
        # JSON has no tuples, and what they say is no size that was decided.
        same = {k: value for k, value in vars(decided.after).items() if isinstance(value, tuple)}
        sizes = Sizes(**after | same | {"biases": frozenset(after["biases"])})
        return replace(decided, after=sizes)
    workspace.save(PLAN, _words(decided))
    return decided


def steps_of(decided: Plan, workspace: Workspace) -> None:
    """From now on, steps are of these sizes."""
    workspace.given(_words(decided))


def _words(decided: Plan) -> dict[str, Any]:
    after = asdict(decided.after)
    after["biases"] = sorted(decided.after.biases)
    return {"after": after, "layers": decided.layers and list(decided.layers)}
