"""What OUT/dotexport.json holds, as far as anything reads it: its sections are open for more."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeInt,
    model_validator,
)


class Section(BaseModel):
    """Strict: a manifest is ours, and a number in quotes is a sign of damage."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


def _is_name(name: str) -> str:
    if name in ("", ".", "..") or re.search(r"[/\\\0]", name):
        raise ValueError("must be the name of a folder in the output")
    return name


def _is_inside(name: str) -> str:
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or re.search(r"[\\\0]", name):
        raise ValueError("must be a path below its folder")
    return name


Name = Annotated[str, AfterValidator(_is_name)]
Inside = Annotated[str, AfterValidator(_is_inside)]
Word = Annotated[str, Field(pattern=r"^[\w-]+$")]
Number = FiniteFloat | int
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)] | Annotated[int, Field(gt=0)]


class StoredFile(Section):
    """Of an artifact."""

    bytes: NonNegativeInt
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class PhaseFigures(Section):
    """An artifact against torch in one phase; null: not finite, or not asked."""

    max_abs: Number | None = None
    kl: Number | None = None
    top1: Number | None = None


class Verdict(Section):
    """What verification came to."""

    passed: bool
    problems: list[str]
    unverified: str | None = None
    phases: dict[str, PhaseFigures] = {}
    limits: dict[str, Number | None] = {}
    perplexity_ratio: Number | None = None


class StoredRounding(Section):
    """Of one matrix: relative error of its outputs, that of rounding to nearest, and its values."""

    loss: Number
    nearest: Number
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class RoundedFor(Section):
    """The text that an artifact's weights were rounded for, and what came of it."""

    text: str
    tokens: NonNegativeInt
    tensors: dict[str, StoredRounding]


class StoredArtifact(Section):
    """One folder of the output; no `calibration`: rounded to nearest, if at all."""

    target: str
    precision: str
    bytes: NonNegativeInt
    files: dict[Inside, StoredFile]
    parity: Verdict | None
    calibration: RoundedFor | None = None


class Source(Section):
    """The model that went in."""

    model: str
    licence: str | None
    bytes: NonNegativeInt
    sha256: dict[str, str] = {}


class Machine(Section):
    """What figures depend on."""

    cpu: str | None = None
    cores: dict[str, Any] = {}
    libraries: dict[str, str] = {}


class Manifest(Section):
    """What outputs of every kind share."""

    with_shrink: ClassVar[tuple[str, ...]] = ()
    """Sections that one which was shrunk has besides; its card is written from them."""

    dotexport: str
    created: str | None = None
    source: Source | None = None
    environment: Machine = Machine()
    artifacts: dict[Name, StoredArtifact] = {}
    recipe: str | None = None

    @model_validator(mode="after")
    def is_whole(self) -> Manifest:
        if "shrink" in self.model_fields_set:
            for name in ("shrink", *self.with_shrink):
                if not getattr(self, name):
                    raise ValueError(f"says how it was shrunk and must say {name} as well")
        return self


class VerifyReport(Section):
    """reports/verify.json."""

    artifacts: dict[str, Verdict] = {}


class Site(Section):
    """A refit; of the head `layer` is null."""

    layer: int | None
    site: str
    error: Number | None = None
    analytic_error: Number | None = None


class ShrinkReport(Section):
    """reports/shrink.json."""

    sites: list[Site] = []


# Of decoder LLMs ---------------------------------------------------------------------------------


class Narrow(Section):
    """Methods, as the card tells them."""

    mlp: Word
    heads: Word
    refit: bool
    local: dict[str, Any] | None
    seed: int


class Shrink(Section):
    """Options of shrink."""

    narrow: Narrow


class Basis(Section):
    """Of the residual stream."""

    method: Word


class SecondText(Section):
    """Text of another kind, in windows as long as those of the first."""

    source: str
    windows: NonNegativeInt


class Calibration(Section):
    """The text that a model was narrowed on."""

    source: str
    windows: NonNegativeInt
    seqlen: NonNegativeInt
    other: SecondText | None = None


class Continuations(Section):
    """Of one model behind one kind of prompt."""

    model: str
    kind: str
    repetition: Number
    stopped: Number
    agreement: dict[str, Number]
    words: list[str]


class Generation(Section):
    """What models go on with; for each kind the original's is among the rows."""

    rows: list[Continuations]

    @model_validator(mode="after")
    def has_originals(self) -> Generation:
        known = {row.kind for row in self.rows if row.model == "original"}
        if strange := {row.kind for row in self.rows} - known:
            raise ValueError(f"rows must have an original's of kind {min(strange)}")
        return self


class Answers(Section):
    """Of one model to one task; the gap is to the original's value."""

    value: Number
    error: Number | None = None
    gap: Number = 0
    gap_error: Number | None = None


class TaskRow(Section):
    """One metric of a task."""

    task: str
    metric: str
    questions: NonNegativeInt
    models: dict[str, Answers]

    @model_validator(mode="after")
    def has_original(self) -> TaskRow:
        if "original" not in self.models:
            raise ValueError(f"models of {self.task} must have the original")
        return self


class BitsPerByte(Section):
    """How well models of any vocabulary read one text."""

    text: str
    models: dict[str, Positive]

    @model_validator(mode="after")
    def has_original(self) -> BitsPerByte:
        if "original" not in self.models or "hf" not in self.models:
            raise ValueError(f"models that read {self.text} must have the original and hf")
        return self


class OnText(Section):
    """How well one text is predicted; the baseline's only where one stood beside it."""

    perplexity: Positive
    baseline_perplexity: Positive
    kl: Number
    top1_agreement: Number
    num_tokens: NonNegativeInt
    text: str
    log_ratio_error: Number | None = None


class Quality(OnText):
    """Of an evaluation.

    Attributes:
        other: the same on a second text, of another kind.
        bits_per_byte: where rivals were asked for: of every text, by original, hf and rivals.
    """

    other: OnText | None = None
    bits_per_byte: list[BitsPerByte] = []
    generation: Generation | None = None
    one_source: str | None = None
    tasks: list[TaskRow] = []


class HeldOut(Section):
    """What narrowing cost on windows of the calibration text that were not fitted on, and on text
    of another kind."""

    kl: Number
    perplexity_ratio: Positive
    other_kl: Number | None = None
    other_perplexity_ratio: Positive | None = None


class Figures(Section):
    """Of one model in a bench."""

    prefill_tok_s: Positive
    decode_tok_s: Positive
    artifact_bytes: NonNegativeInt
    peak_rss_bytes: NonNegativeInt


class Ratio(Section):
    """Of times, with its 95 % interval."""

    ratio: Positive
    low: Positive
    high: Positive


class Comparisons(Section):
    """The metrics that are shown."""

    ttft: Ratio
    tpot: Ratio


class Asked(Section):
    """Shape of a request."""

    prompt_length: int
    generation_length: int
    batch_size: int
    threads: int | None


class Headline(Section):
    """A bench, without its samples."""

    verdict: str
    workload: Asked
    baseline: Figures
    candidate: Figures
    comparisons: Comparisons


class Served(Section):
    """One of vLLM's own benchmarks, with a median of each metric that is compared."""

    comparisons: dict[str, Ratio]
    baseline: dict[str, Any]
    candidate: dict[str, Any]

    @model_validator(mode="after")
    def has_medians(self) -> Served:
        for metric in self.comparisons:
            for side in (self.baseline, self.candidate):
                if not isinstance(side.get(f"p50_{metric}_ms"), float | int):
                    raise ValueError(f"p50_{metric}_ms must be a number")
        return self


class Healing(Section):
    """Distillation, as the card tells it."""

    steps: int
    tokens_per_step: int
    windows: int
    best_step: int
    held_out_windows: int
    tokens: int | None = None
    tokens_per_second: Number | None = None
    text: str | None = None
    kl: Annotated[list[Number], Field(min_length=2, max_length=2)]
    perplexity: Annotated[list[Number], Field(min_length=2, max_length=2)]
    original_perplexity: Number


class Measured(Section):
    """A ratio to the original's time."""

    ratio: Positive
    low: Number
    high: Number


class Latency(Section):
    """A budget of time, and what was measured again."""

    metric: str
    batch: int
    target: str
    precision: str
    limit: Number
    predicted: Number | None
    measured: Measured | None = None
    original_ms: Number = 0
    narrowed_ms: Number = 0
    verdict: str = ""


class DecoderManifest(Manifest):
    """Output of shrink, export or run for a decoder LLM."""

    with_shrink = ("source", "sizes", "basis", "calibration")

    kind: None = None
    sizes: dict[str, Annotated[list[int | bool], Field(min_length=2, max_length=2)]] = {}
    kept_layers: list[NonNegativeInt] = []
    architecture: Annotated[list[str], Field(min_length=2, max_length=2)] = ["", ""]
    shrink: Shrink | None = None
    basis: Basis | None = None
    calibration: Calibration | None = None
    held_out: HeldOut | None = None
    quality: Quality | None = None
    bench: dict[str, Headline] = {}
    served: dict[str, Served] = {}
    healing: Healing | None = None
    latency: Latency | None = None


# Of pipelines ------------------------------------------------------------------------------------


class PipelineSizes(Section):
    """Before and after."""

    parameters: Annotated[list[int], Field(min_length=2, max_length=2)]


class PipelineManifest(Manifest):
    """Output of shrink or export for a diffusers pipeline."""

    with_shrink = ("source", "sizes", "calibration", "denoiser")

    kind: Literal["diffusion"]
    shrink: dict[str, Any] | None = None
    sizes: PipelineSizes | None = None
    calibration: dict[str, Any] | None = None
    denoiser: dict[str, Any] | None = None
    quality: dict[str, Any] | None = None
    bench: dict[str, dict[str, Any]] = {}
    bench_bytes: dict[str, list[int]] = {}


# Of encoders -------------------------------------------------------------------------------------


class EncoderManifest(Manifest):
    """Output of shrink for a text encoder."""

    with_shrink = ("source", "sizes", "calibration", "held_out")

    kind: Literal["encoder"]
    shrink: dict[str, Any] | None = None
    sizes: dict[str, Annotated[list[int], Field(min_length=2, max_length=2)]] = {}
    kept_layers: list[NonNegativeInt] = []
    calibration: dict[str, Any] | None = None
    held_out: dict[str, Number] | None = None
    map_back: bool = False
    quality: dict[str, Any] | None = None
