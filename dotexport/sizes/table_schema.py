"""What the file of a latency table holds, as far as it is read (sizes/latency_table.py)."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, create_model

from dotexport.axes import AXES

Ratio = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Stored(BaseModel):
    """Open for what is only shown."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


class Measured(Stored):
    """Time at some sizes over the original's."""

    ratio: Ratio


class Judged(Measured):
    """The same, and what the table says of it."""

    measured: Ratio
    predicted: Ratio


_SIZES: dict[str, Any] = {axis.name: (PositiveInt, ...) for axis in AXES if axis.timed}
_Sizes = create_model("_Sizes", __base__=Stored, **_SIZES)


class Row(_Sizes):  # type: ignore[valid-type, misc]
    """Sizes that were measured."""

    batch: PositiveInt
    layers: PositiveInt
    decode: Measured
    prefill: Measured


class HeldOut(_Sizes):  # type: ignore[valid-type, misc]
    """Sizes that judge the table."""

    batch: PositiveInt
    decode: Judged
    prefill: Judged


class Original(Stored):
    """Milliseconds."""

    decode_ms: Ratio
    prefill_ms: Ratio


class Layers(Stored):
    """How many were measured, of how many."""

    model: PositiveInt
    measured: PositiveInt
    shallow: PositiveInt | None


class Table(Stored):
    """The file."""

    target: str
    precision: str
    threads: PositiveInt
    model: _Sizes  # type: ignore[valid-type]
    device: dict[str, Any]
    layers: Layers
    original: Annotated[
        dict[Annotated[str, Field(pattern=r"^[1-9][0-9]{0,8}$")], Original], Field(min_length=1)
    ]
    rows: Annotated[list[Row], Field(min_length=1)]
    held_out: list[HeldOut]
