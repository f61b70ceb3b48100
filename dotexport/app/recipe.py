"""A recipe: the whole chain in one file, replayable and resumable.

    model: path/to/model            # folder or hub id; `embedded` is the model that ships inside
    shrink: {params: 0.7x, calib: text.jsonl}
    export: [ort-cpu:fp32, ort-cpu:int4]
    eval: {text: held-out.txt}
    bench: [{target: ort-cpu, precision: fp32}]

The keys of each step are the flags of its verb. A step that is left out is not run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dotexport.app.shrinking import ShrinkOptions
from dotexport.errors import UsageError
from dotexport.healing.heal import parse_heal
from dotexport.merging.ot.coupling import TransportOptions
from dotexport.models.text_windows import TextOptions
from dotexport.narrowing.site import NarrowOptions
from dotexport.sizes.budget import SizeOptions
from dotexport.sizes.plan_file import read_plan

T = TypeVar("T")

# Of a step of shrinking: what says how narrow, which a plan says instead.
SIZE_KEYS = (
    *("params", "size", "latency", "allocate", "hidden", "intermediate", "kv_heads"),
    *("tied", "bias", "square"),
)


@dataclass(frozen=True, kw_only=True)
class ShrinkStep:
    """Flags of `dotexport shrink`."""

    params: str | None = None
    hidden: int | None = None
    intermediate: int | None = None
    kv_heads: int | None = None
    size: str | None = None
    latency: str | None = None
    latency_table: str | None = None
    force_latency_table: bool = False
    allocate: str = "rule"
    tied: bool | None = None
    bias: bool = False
    square: bool = False
    calib: str
    samples: int = 128
    seqlen: int | None = None
    skip: int = 0
    basis: str | None = None
    mlp: str = "obs"
    heads: str = "obs"
    transport: str = "semi-relaxed"
    epsilon: float = 0.05
    refit: bool = True
    feedback: bool = True
    ridge: float | None = None
    heal: str = "local"
    heal_samples: int | None = None
    heal_precision: str = "auto"
    seed: int = 0

    def planned(self, file: Path, config: Mapping[str, Any]) -> ShrinkStep:
        """The same with the sizes of a plan, which must be of this model.

        Raises:
            UsageError: not such a plan, or sizes were given besides.
        """
        plain = ShrinkStep(calib=self.calib)
        besides = [name for name in SIZE_KEYS if getattr(self, name) != getattr(plain, name)]
        if besides:
            flag = "--" + besides[0].replace("_", "-")
            raise UsageError(f"give sizes by --plan {file} or by {flag}, not both")
        return dataclasses.replace(self, **read_plan(file, config))

    def options(self) -> ShrinkOptions:
        local, distil = parse_heal(
            self.heal,
            samples=self.heal_samples,
            precision=self.heal_precision,
            seed=self.seed,
        )
        return ShrinkOptions(
            sizes=SizeOptions(
                hidden_size=self.hidden,
                intermediate_size=self.intermediate,
                num_key_value_heads=self.kv_heads,
                params=self.params,
                size=self.size,
                latency=self.latency,
                latency_table=self.latency_table,
                force_latency_table=self.force_latency_table,
                tied=self.tied,
                bias=self.bias,
                square=self.square,
            ),
            text=TextOptions(
                source=self.calib, samples=self.samples, seqlen=self.seqlen, skip=self.skip
            ),
            narrow=NarrowOptions(
                basis=self.basis,
                mlp=self.mlp,
                heads=self.heads,
                refit=self.refit,
                feedback=self.feedback,
                ridge=self.ridge,
                local=local,
                transport=TransportOptions(plan=self.transport, epsilon=self.epsilon),
                seed=self.seed,
            ),
            allocate=self.allocate,
            heal=distil,
        )


@dataclass(frozen=True, kw_only=True)
class EvalStep:
    """Flags of `dotexport eval`."""

    text: str
    samples: int = 64
    seqlen: int | None = None
    skip: int = 0

    def options(self) -> TextOptions:
        return TextOptions(
            source=self.text, samples=self.samples, seqlen=self.seqlen, skip=self.skip
        )


@dataclass(frozen=True, kw_only=True)
class BenchStep:
    """Flags of `dotexport bench`; what is None comes from the preset, or from `Workload`."""

    target: str = "ort-cpu"
    precision: str | None = None
    device: str | None = None
    dtype: str | None = None
    compiled: bool = False
    llama_cpp: str | None = None
    preset: str | None = None
    prompt: int | None = None
    generate: int | None = None
    batch: int | None = None
    threads: int | None = None
    concurrency: int | None = None
    rounds: int = 8
    roofline: bool = True
    min_iterations: int = 30
    min_seconds: float = 10.0
    warmups: int = 10
    seed: int = 0
    gate: str | None = None

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
class Recipe:
    """What `dotexport run` does, in this order."""

    model: str
    shrink: ShrinkStep
    export: tuple[str, ...] = ()
    eval: EvalStep | None = None
    bench: tuple[BenchStep, ...] = ()

    @classmethod
    def load(cls, file: Path) -> Recipe:
        """Read and check a recipe.

        Raises:
            UsageError: no such file, not YAML, an unknown key or a value of the wrong kind.
        """
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"{file} cannot be read: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UsageError(f"{file} is not YAML: {error}") from error
        return cls.parse(content, str(file))

    @classmethod
    def parse(cls, content: Any, where: str) -> Recipe:
        fields = _checked(cls, content, where)
        fields["model"] = _value(fields["model"], "str", f"{where}: model")
        fields["shrink"] = _step(ShrinkStep, fields["shrink"], f"{where}: shrink")
        fields["export"] = tuple(
            _value(spec, "str", f"{where}: export")
            for spec in _list(fields.get("export"), f"{where}: export")
        )
        if fields.get("eval") is not None:
            fields["eval"] = _step(EvalStep, fields["eval"], f"{where}: eval")
        fields["bench"] = tuple(
            _step(BenchStep, step, f"{where}: bench")
            for step in _list(fields.get("bench"), f"{where}: bench")
        )
        return cls(**fields)

    def dump(self) -> str:
        """YAML with every option spelled out, defaults too."""
        return yaml.safe_dump(_plain(dataclasses.asdict(self)), sort_keys=False)


def _checked(kind: type, content: Any, where: str) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        raise UsageError(f"{where} must be a mapping of keys to values, not {content!r}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = [str(key) for key in content if key not in fields]
    if unknown:
        raise UsageError(f"{where} has the unknown key {unknown[0]!r}; known: {', '.join(fields)}")
    needed = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and name not in content
    ]
    if needed:
        raise UsageError(f"{where} lacks the key {needed[0]!r}")
    return dict(content)


def _step(kind: type[T], content: Any, where: str) -> T:
    fields = _checked(kind, content, where)
    declared = {field.name: str(field.type) for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key, value in fields.items():
        fields[key] = _value(value, declared[key], f"{where}.{key}")
    return kind(**fields)


def _value(value: Any, declared: str, where: str) -> Any:
    """A YAML value as its field declares it; YAML reads 1e-2 as a string and 1 as an integer."""
    allowed = declared.split(" | ")
    if value is None and "None" in allowed:
        return None
    if allowed[0] == "float" and isinstance(value, str):
        value = _number(value)
    readers: dict[str, tuple[type, ...]] = {
        "bool": (bool,),
        "int": (int,),
        "float": (int, float),
        "str": (str, int, float),
    }
    kinds = readers[allowed[0]]
    if isinstance(value, bool) != (allowed[0] == "bool") or not isinstance(value, kinds):
        raise UsageError(f"{where} must be {declared}, not {value!r}")
    return str(value) if allowed[0] == "str" else value


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _list(content: Any, where: str) -> list[Any]:
    if content is None:
        return []
    if not isinstance(content, list):
        raise UsageError(f"{where} must be a list, not {content!r}")
    return content


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value
