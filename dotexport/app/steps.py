"""Steps of the chain as verbs and recipes take them: their fields are the flags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dotexport.app.shrink_options import ShrinkOptions
from dotexport.axes.plan import SizeOptions
from dotexport.errors import UsageError
from dotexport.exports.rounding_options import RoundingOptions
from dotexport.generation.generation_options import GenerationOptions
from dotexport.healing.heal_options import parse_heal
from dotexport.models.text_options import MIXED, SELF, SOURCES, TextOptions
from dotexport.narrowing.narrow_options import NarrowOptions
from dotexport.options import build, flags_of, group, option, values_of
from dotexport.sizes.plan_file import read_plan
from dotexport.tasks.task_options import TaskOptions
from dotexport.vocabulary.vocabulary_options import VocabularyOptions

OF_LATENCY = ("latency_table", "force_latency_table")


@dataclass(frozen=True, kw_only=True)
class ShrinkStep:
    """Flags of `dotexport shrink`."""

    sizes: SizeOptions = group(SizeOptions)
    vocabulary: VocabularyOptions = group(VocabularyOptions)
    allocate: str = option(
        "measured",
        help="How a budget of parameters or bytes is shared between the axes: measured cuts each "
        "alone first (plan says how long that takes); rule reads config.json only.",
    )
    text: TextOptions = group(
        source={"key": "calib", "default": SELF, "help": f"Calibration text. {SOURCES} {MIXED}"}
    )
    other: str = option(
        SELF,
        help="A second text, of another kind, for half of the windows: self, a source as --calib "
        "takes it, or none.",
    )
    narrow: NarrowOptions = group(NarrowOptions)
    heal: str = option(
        "local",
        help="Gradient steps after the refit: local (each sublayer alone, while it is in memory), "
        "distillation of the whole model on a number of tokens (300k, 20M) or of steps (200), both "
        "(local+20M), or none. plan --heal says how long it takes.",
    )
    heal_text: str | None = option(
        None,
        help="Text that distillation trains on, read as it is needed, or said by the original; as "
        "--calib. Default: the calibration text.",
    )
    heal_samples: int | None = option(
        None, help="Windows of the calibration text that healing trains on, from --skip on."
    )
    heal_precision: str = option(
        "auto", help="bf16, fp32, or auto: bf16 where the device multiplies it."
    )
    heal_compile: bool = option(
        False,
        help="Compile the layers for distillation by torch.compile: minutes first, then faster "
        "steps on a GPU; hardly on a CPU.",
    )

    def planned(self, file: Path, config: Mapping[str, Any]) -> ShrinkStep:
        """The same with the sizes of a plan, which must be of this model.

        Raises:
            UsageError: not such a plan, or sizes were given besides.
        """
        given = values_of(self)
        flags = [*flags_of(SizeOptions), *flags_of(VocabularyOptions)]
        sizes = [flag for flag in flags if flag.key not in OF_LATENCY]
        defaults = {flag.key: flag.default for flag in sizes} | {"allocate": "measured"}
        besides = [key for key, default in defaults.items() if given[key] != default]
        if besides:
            flag = "--" + besides[0].replace("_", "-")
            raise UsageError(f"give sizes by --plan {file} or by {flag}, not both")
        return build(ShrinkStep, **given | read_plan(file, config))

    def options(self) -> ShrinkOptions:
        local, distil = parse_heal(
            self.heal,
            text=self.heal_text,
            samples=self.heal_samples,
            precision=self.heal_precision,
            compiled=self.heal_compile,
            seed=self.narrow.seed,
        )
        return ShrinkOptions(
            sizes=self.sizes,
            vocabulary=self.vocabulary,
            text=self.text,
            other=self.other,
            narrow=replace(self.narrow, local=local),
            allocate=self.allocate,
            heal=distil,
        )


EVAL_DTYPES = ("fp32", "bf16")  # of evaluations.DTYPES, which imports torch


@dataclass(frozen=True, kw_only=True)
class EvalStep:
    """Flags of `dotexport eval`."""

    text: TextOptions = group(source={"help": f"Held-out text. {SOURCES}"}, samples={"default": 64})
    other: str = option(
        SELF,
        help="A second text, of another kind: self is text that the original samples itself; a "
        "source as --text takes it; or none.",
    )
    generation: GenerationOptions = group(GenerationOptions)
    tasks: TaskOptions = group(TaskOptions)
    rival: str | None = option(
        None,
        help="Another model that could be taken instead, such as a smaller sibling: a folder, GGUF "
        "file or hub id, with commas between several. Compared in bits per byte, continuations and "
        "tasks.",
    )
    dtype: str = option(
        "fp32",
        help="What the original and hf/ compute in: fp32, or bf16, in half the memory. It is "
        "recorded.",
    )
    target: str | None = option(
        None,
        help="Artifacts of OUT whose continuations and tasks are judged besides hf/: NAME or "
        "NAME:PRECISION, with commas between several.",
    )

    def __post_init__(self) -> None:
        if self.dtype not in EVAL_DTYPES:
            raise UsageError(f"dtype must be one of {', '.join(EVAL_DTYPES)}, not {self.dtype!r}")

    @property
    def artifacts(self) -> tuple[str, ...]:
        return tuple(self.target.split(",")) if self.target else ()

    @property
    def rivals(self) -> tuple[str, ...]:
        return tuple(self.rival.split(",")) if self.rival else ()


@dataclass(frozen=True, kw_only=True)
class BenchStep:
    """Flags of `dotexport bench`; what is None comes from the preset, or from `Workload`."""

    target: str = option("ort-cpu", help="Runtime to measure on; hf is torch.")
    precision: str | None = option(None, help="Precision of both artifacts.")
    device: str | None = option(None, help="hf: cpu or cuda.")
    dtype: str | None = option(None, help="hf: fp32, bf16 or fp16.")
    compiled: bool = option(
        False,
        help="hf: decode through torch.compile.",
        words=("--compile/--no-compile",),
    )
    llama_cpp: str | None = option(
        None, help="gguf: folder of llama.cpp to run the files in; without, torch does."
    )
    preset: str | None = option(None, help="chat, rag, edge or offline.")
    prompt: int | None = option(None, help="Tokens of a prompt (128).")
    generate: int | None = option(None, help="Tokens generated (64).")
    batch: int | None = option(None, help="Sequences at once (1).")
    threads: int | None = option(None, help="CPU threads; default: one per physical core.")
    concurrency: int | None = option(
        None, help="Processes of each model at once, sharing the threads."
    )
    rounds: int = option(8, help="Pairs of fresh processes, at least.")
    roofline: bool = option(True, help="Measure the device's own limits too.")
    min_iterations: int = option(30, help="Requests of each model, at least.")
    min_seconds: float = option(10.0, help="Seconds for each model, at least.")
    warmups: int = option(10, help="Requests before measuring, at least.")
    seed: int = option(0, help="Of token ids and bootstrap.")
    gate: str | None = option(
        None, help="YAML file of limits; exit code 4 if one is missed. See compare."
    )

    def runtime(self) -> dict[str, Any]:
        """Options of the target that were asked for."""
        asked = {
            "device": self.device,
            "dtype": self.dtype,
            "compiled": self.compiled or None,
            "llama_cpp": self.llama_cpp,
        }
        return {name: value for name, value in asked.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class FrontierStep:
    """Flags of `dotexport frontier`."""

    target: tuple[str, ...] = option(
        (),
        help="NAME for all precisions of one target, or NAME:PRECISION, repeated (ort-cpu).",
    )
    text: TextOptions = group(source={"help": f"Held-out text. {SOURCES}"}, samples={"default": 16})
    other: str | None = option(None, help="A second text, of another kind; as --text.")
    rival: tuple[str, ...] = option(
        (),
        help="Another model that could be taken instead, such as a smaller sibling, repeated: a "
        "folder, GGUF file or hub id. Its vocabulary may differ.",
    )
    rounding: RoundingOptions = group(RoundingOptions)
    timed: bool = option(True, help="Measure speed and memory, too.", words=("--times/--no-times",))
    llama_cpp: str | None = option(
        None, help="gguf: folder of llama.cpp to time the files in; without, nothing is timed."
    )
    prompt: int = option(128, help="Tokens of a prompt.")
    generate: int = option(64, help="Tokens generated.")
    threads: int | None = option(None, help="CPU threads; default: one per physical core.")
    rounds: int = option(3, help="Fresh processes of each artifact.")
    min_iterations: int = option(12, help="Requests of each artifact, at least.")
    min_seconds: float = option(3.0, help="Seconds for each artifact, at least.")
    seed: int = option(0, help="Of token ids.")

    def texts(self) -> list[TextOptions]:
        others = [replace(self.text, source=self.other)] if self.other else []
        return [self.text, *others]


@dataclass(frozen=True, kw_only=True)
class ServedStep:
    """Flags of `dotexport bench --target vllm` besides those of every bench."""

    python: Path | None = option(
        None,
        help="Python of an environment with vLLM, for --target vllm.",
        flag="vllm_python",
        panel="With --target vllm",
    )
    kind: str = option(
        "latency",
        help="latency, throughput or serve: which of vLLM's benchmarks.",
        flag="vllm_bench",
        panel="With --target vllm",
    )
    rounds: int | None = option(
        None,
        help="A B B A turns; default: 2, and 8 with servers, which stay up.",
        flag="vllm_rounds",
        panel="With --target vllm",
    )
    arguments: str = option(
        "",
        help="More flags of its engine, e.g. '--enforce-eager'.",
        flag="vllm_args",
        panel="With --target vllm",
    )
    requests: int = option(
        32, help="Requests of each turn (throughput, serve).", panel="With --target vllm"
    )
    request_rate: float | None = option(
        None, help="Poisson arrivals for each second (serve).", panel="With --target vllm"
    )
