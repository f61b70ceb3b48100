"""A recipe: the whole chain in one file, replayable and resumable.

    model: path/to/model            # folder or hub id; `embedded` is the model that ships inside
    shrink: {params: 0.7x, calib: text.jsonl}
    export: [ort-cpu:fp32, ort-cpu:int4]
    eval: {text: held-out.txt}
    bench: [{target: ort-cpu, precision: fp32}]

The keys of each step are the flags of its verb. A step that is left out is not run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml

from dotexport.app.steps import BenchStep, EvalStep, ShrinkStep
from dotexport.errors import UsageError
from dotexport.options import build, flags_of, values_of

T = TypeVar("T")

KEYS = ("model", "shrink", "export", "eval", "bench")


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
        fields = _checked(content, where, KEYS, needed=KEYS[:2])
        fields["model"] = _value(fields["model"], str, f"{where}: model")
        fields["shrink"] = _step(ShrinkStep, fields["shrink"], f"{where}: shrink")
        fields["export"] = tuple(
            _value(spec, str, f"{where}: export")
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
        content = {
            "model": self.model,
            "shrink": values_of(self.shrink),
            "export": list(self.export),
            "eval": values_of(self.eval) if self.eval else None,
            "bench": [values_of(step) for step in self.bench],
        }
        return yaml.safe_dump(content, sort_keys=False)


def _checked(
    content: Any, where: str, known: Iterable[str], *, needed: Iterable[str]
) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        raise UsageError(f"{where} must be a mapping of keys to values, not {content!r}")
    if unknown := [str(key) for key in content if key not in known]:
        raise UsageError(f"{where} has the unknown key {unknown[0]!r}; known: {', '.join(known)}")
    if missing := [key for key in needed if key not in content]:
        raise UsageError(f"{where} lacks the key {missing[0]!r}")
    return dict(content)


def _step(kind: type[T], content: Any, where: str) -> T:
    flags = {flag.key: flag for flag in flags_of(kind)}
    needed = [key for key, flag in flags.items() if flag.default is MISSING]
    given = _checked(content, where, flags, needed=needed)
    values = {k: _value(v, flags[k].kind, f"{where}.{k}") for k, v in given.items()}
    return build(kind, **values)


def _value(value: Any, declared: Any, where: str) -> Any:
    """A YAML value as its flag declares it; YAML reads 1e-2 as a string and 1 as an integer."""
    allowed = get_args(declared) or (declared,)
    if value is None and type(None) in allowed:
        return None
    kind = allowed[0]
    if kind is float and isinstance(value, str):
        value = _number(value)
    readers: dict[type, tuple[type, ...]] = {
        bool: (bool,),
        int: (int,),
        float: (int, float),
        str: (str, int, float),
    }
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, readers[kind]):
        words = " | ".join("None" if one is type(None) else one.__name__ for one in allowed)
        raise UsageError(f"{where} must be {words}, not {value!r}")
    return str(value) if kind is str else value


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
