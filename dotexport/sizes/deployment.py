"""Where a model is to run: what a plan is asked to serve."""

from __future__ import annotations

from dataclasses import dataclass

from dotexport.errors import UsageError
from dotexport.options import option


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """Where a model is to run.

    Attributes:
        targets: NAME or NAME:PRECISION.
        tensor_parallel: devices that share every matrix.
        group: weights of a row that share one scale, in whatever quantises later.
    """

    targets: tuple[str, ...] = option(
        (),
        help="NAME or NAME:PRECISION that must take the sizes, e.g. gguf:int4; vllm reads hf.",
        flag="target",
    )
    tensor_parallel: int = option(
        1, help="Devices that share every matrix: heads and MLP must divide."
    )
    group: int = option(1, help="Weights per scale in later quantisation, e.g. 128: rows divide.")

    def __post_init__(self) -> None:
        for name in ("tensor_parallel", "group"):
            if (value := getattr(self, name)) < 1:
                raise UsageError(f"{name.replace('_', '-')} must be at least 1, not {value}")
