"""What the JSON of a bench holds, as far as it is read back: samples, conditions, device rates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

Time = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Stored(BaseModel):
    """Open for figures that follow from what is here, and for those of later versions."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


class StoredSample(Stored):
    """One request, in milliseconds."""

    group: NonNegativeInt
    ttft_ms: Time
    itl_ms: Annotated[Sequence[Time], Field(min_length=1)]
    round: NonNegativeInt = 0


class StoredCost(Stored):
    """Least work of a token (counts.py)."""

    weight_bytes: NonNegativeInt
    cache_bytes: NonNegativeInt
    layer_parameters: NonNegativeInt
    head_parameters: NonNegativeInt
    attention_width: NonNegativeInt
    number: str

    model_config = ConfigDict(extra="forbid", strict=True)


class StoredMeasurement(Stored):
    """One model."""

    name: str
    source: str
    artifact: str
    artifact_bytes: NonNegativeInt
    num_parameters: PositiveInt | None
    vocabulary: PositiveInt
    import_s: Amount
    load_s: Amount
    first_run_ms: Amount
    warmups: NonNegativeInt
    warmed_up: bool
    harness_overhead_us: Amount
    rss_before_load_bytes: NonNegativeInt
    peak_rss_bytes: NonNegativeInt
    providers: Sequence[str]
    samples: Annotated[Sequence[StoredSample], Field(min_length=2)]
    peak_device_bytes: NonNegativeInt | None = None
    answered_positions: NonNegativeInt | None = None
    energy: dict[str, Any] | None = None
    cost: StoredCost | None = None

    @property
    def sizes(self) -> dict[int, int]:
        """Group -> number of samples."""
        found: dict[int, int] = {}
        for sample in self.samples:
            found[sample.group] = found.get(sample.group, 0) + 1
        return found


class StoredRate(Stored):
    """Of one size of array."""

    bytes: PositiveInt
    bytes_per_s: Annotated[Sequence[Time], Field(min_length=1)]


class StoredRates(Stored):
    """What the device did at best."""

    device: str
    memory: Annotated[Sequence[StoredRate], Field(min_length=1)]
    arithmetic: dict[str, Sequence[Time]]


class StoredCores(Stored):
    """Of the machine, and of those the ones that the bench might use."""

    physical: int | None
    usable: int


class StoredMachine(Stored):
    """Conditions that are compared or shown."""

    python: str
    platform: str
    cpu: str | None
    cores: StoredCores
    memory_bytes: NonNegativeInt
    libraries: dict[str, str]
    load_average: Sequence[float] | None
    container: dict[str, Any] | None = None


class StoredResult(Stored):
    """Two models, measured in the same groups."""

    target: str
    precision: str
    workload: dict[str, Any]
    environment: StoredMachine
    candidate: StoredMeasurement
    baseline: StoredMeasurement
    runtime: dict[str, Any] = {}
    rates: StoredRates | None = None

    @model_validator(mode="after")
    def is_paired(self) -> StoredResult:
        one, two = self.candidate.sizes, self.baseline.sizes
        if one.keys() != two.keys() or len(one) < 2:
            raise ValueError("both models must have samples of the same groups, of two at least")
        if len({*one.values(), *two.values()}) > 1:
            raise ValueError("every group must have as many samples as every other")
        rounds = len({sample.round for sample in self.candidate.samples})
        if len(one) % rounds:
            raise ValueError("rounds must have equally many groups")
        return self
