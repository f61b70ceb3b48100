"""What a shrink made, and what OUT says of it: dotexport.json, reports/shrink.json, the card."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dotexport.app.shrink_options import ShrinkOptions
from dotexport.axes.plan import Plan
from dotexport.narrowing.calibration_text import CalibrationText
from dotexport.narrowing.closed_form import ClosedForm
from dotexport.narrowing.judging import Cost
from dotexport.outputs import card
from dotexport.sizes.allocation import Allocation
from dotexport.storage import manifest
from dotexport.storage.files import write_json

OWN_TEXT = "reports/self.jsonl"
SECOND_TEXT = "reports/second.jsonl"


@dataclass(frozen=True)
class Shrunk:
    """What shrink made.

    Attributes:
        costs: of the closed form on held-out calibration text, on the tokens that stay, and nothing
            where nothing but tokens left; then on text of another kind where there is.
        vocabulary: which tokens stay, and what the smaller tokenizer was held to.
    """

    out: Path
    plan: Plan
    basis: dict[str, Any]
    costs: tuple[Cost, ...]
    seconds: float
    num_windows: int
    sites: list[dict[str, Any]]
    allocation: Allocation | None = None
    healing: dict[str, Any] | None = None
    vocabulary: Mapping[str, Any] | None = None

    @property
    def divergence(self) -> float:
        """Of the closed form on held-out calibration text, nats per token."""
        return self.costs[0].kl

    def cost(self) -> dict[str, float]:
        """Against the original on held-out windows of the calibration text, healing included; of
        the closed form also on text of another kind."""
        if self.healing is None:
            return {
                f"{kind}{name}": value
                for kind, cost in zip(("", "other_"), self.costs, strict=False)
                for name, value in asdict(cost).items()
            }
        after, before = self.healing["perplexity"][1], self.healing["original_perplexity"]
        return {"kl": self.healing["kl"][1], "perplexity_ratio": after / before}

    def as_dict(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "sizes": self.plan.as_dict(),
            "kept_layers": self.plan.kept_layers,
            "architecture": self.plan.architectures,
            "basis": self.basis,
            "held_out_kl": self.divergence,
            "held_out_perplexity_ratio": self.costs[0].perplexity_ratio,
            "other_kl": self.costs[1].kl if self.costs[1:] else None,
            "seconds": round(self.seconds, 2),
            "calibration_windows": self.num_windows,
            "sites": self.sites,
            **({"allocation": self.allocation.as_dict()} if self.allocation else {}),
            **({"healing": self.healing} if self.healing else {}),
            **({"vocabulary": self.vocabulary} if self.vocabulary else {}),
        }


def describe(
    folder: Path,
    source: dict[str, Any],
    options: ShrinkOptions,
    shrunk: Shrunk,
    text: CalibrationText,
    own: Mapping[str, Any],
    closed: ClosedForm,
    passes: torch.dtype,
) -> None:
    recipe = json.loads(json.dumps(asdict(options)))
    exact = (shrunk.vocabulary or {}).get("exact", False)
    manifest.update(
        folder,
        source=source,
        shrink=recipe | {"sha256": hashlib.sha256(json.dumps(recipe).encode()).hexdigest()},
        calibration={
            "source": options.text.source,
            "windows": len(text.windows_NL),
            "seqlen": text.length,
            **({"every": every} if (every := options.text.every or 1) > 1 else {}),
            "sha256": sha256_of(text.windows_NL),
            **({"sinks": list(text.sinks)} if text.sinks else {}),
            **({"own_text": {"file": OWN_TEXT, **own}} if own else {}),
            **({"other": _second(options.other, *text.kinds[1:])} if text.kinds[1:] else {}),
        },
        sizes=shrunk.plan.as_dict(),
        kept_layers=shrunk.plan.kept_layers,
        architecture=shrunk.plan.architectures,
        basis=closed.basis,
        **({} if exact else {"held_out": shrunk.cost()}),
        **({"vocabulary": shrunk.vocabulary} if shrunk.vocabulary else {}),
        artifacts={"hf": _artifact(folder / "hf")},
        timings={"shrink_seconds": round(shrunk.seconds, 2)},
        environment=manifest.environment()
        | {"device": closed.device, "passes": str(passes).removeprefix("torch.")},
        **({"healing": shrunk.healing} if shrunk.healing else {}),
    )
    write_json(folder / "reports" / "shrink.json", shrunk.as_dict())
    card.write(folder)


def _artifact(folder: Path) -> dict[str, Any]:
    """The stock checkpoint is an artifact too, of the target `hf`."""
    files = manifest.hash_files(folder)
    num_bytes = sum(entry["bytes"] for entry in files.values())
    stored = {"target": "hf", "precision": "as-stored", "bytes": num_bytes}
    return stored | {"files": files, "parity": None}


def _second(source: str, windows_NL: torch.Tensor) -> dict[str, Any]:
    return {"source": source, "windows": len(windows_NL), "sha256": sha256_of(windows_NL)}


def sha256_of(windows_NL: torch.Tensor) -> str:
    return hashlib.sha256(windows_NL.numpy().tobytes()).hexdigest()
