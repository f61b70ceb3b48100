"""A recipe: the whole chain in one file, replayable and resumable.

    model: path/to/model            # folder or hub id; `embedded` is the model that ships inside
    shrink: {params: 0.7x, calib: text.jsonl}
    export: [ort-cpu:fp32, ort-cpu:int4]
    round: {calib: text.jsonl}      # of those, weights that become integers
    eval: {text: held-out.txt}
    bench: [{target: ort-cpu, precision: fp32}]

The keys of each step are the flags of its verb. A step that is left out is not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from functools import cache
from pathlib import Path
from types import GenericAlias
from typing import TYPE_CHECKING, Annotated, Any, get_args

import yaml

from dotexport.app.steps import BenchStep, EvalStep, ShrinkStep
from dotexport.errors import UsageError
from dotexport.exports.rounding_options import RoundingOptions
from dotexport.options import build, flags_of, values_of
from dotexport.storage.reading import brief, read_yaml

if TYPE_CHECKING:
    from pydantic import BaseModel, ConfigDict, ValidationError

KEYS = ("model", "shrink", "export", "round", "eval", "bench")
STEPS: dict[str, type] = {
    "shrink": ShrinkStep,
    "round": RoundingOptions,
    "eval": EvalStep,
    "bench": BenchStep,
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What `dotexport run` does, in this order."""

    model: str
    shrink: ShrinkStep
    export: tuple[str, ...] = ()
    round: RoundingOptions = field(default_factory=RoundingOptions)
    eval: EvalStep | None = None
    bench: tuple[BenchStep, ...] = ()

    @classmethod
    def load(cls, file: Path) -> Recipe:
        """Read and check a recipe.

        Raises:
            UsageError: no such file, not YAML, an unknown key or a value of the wrong kind.
        """
        return cls.parse(read_yaml(file, what=str(file)), str(file))

    @classmethod
    def parse(cls, content: Any, where: str) -> Recipe:
        from pydantic import ValidationError

        try:
            document = _document().model_validate(content)
        except ValidationError as refused:
            raise UsageError(_in_words(refused, where)) from refused
        given = document.model_dump(exclude_unset=True)
        for name, kind in STEPS.items():
            if isinstance(given.get(name), Mapping):
                given[name] = build(kind, **given[name])
        given["round"] = given.get("round") or RoundingOptions()
        given["export"] = tuple(given.get("export") or ())
        given["bench"] = tuple(build(BenchStep, **step) for step in given.get("bench") or ())
        return cls(**given)

    def dump(self) -> str:
        """YAML with every option spelled out, defaults too."""
        content = {
            "model": self.model,
            "shrink": values_of(self.shrink),
            "export": list(self.export),
            **({"round": values_of(self.round)} if self.round.calib else {}),
            "eval": values_of(self.eval) if self.eval else None,
            "bench": [values_of(step) for step in self.bench],
        }
        return yaml.safe_dump(content, sort_keys=False)


# What a recipe looks like ------------------------------------------------------------------------


@cache
def _document() -> type[BaseModel]:
    """The model of a recipe; those of its steps have the flags of their verbs for fields."""
    from pydantic import create_model

    text = _read_as(str)
    fields: dict[str, Any] = {
        "model": (text, ...),
        "shrink": (_step(ShrinkStep), ...),
        "export": (GenericAlias(list, text) | None, None),
        "round": (_step(RoundingOptions) | None, None),
        "eval": (_step(EvalStep) | None, None),
        "bench": (GenericAlias(list, _step(BenchStep)) | None, None),
    }
    return create_model("Recipe", __config__=_strict(), **fields)


def _step(kind: type) -> Any:
    from pydantic import create_model

    fields: dict[str, Any] = {
        flag.key: (_read_as(flag.kind), ... if flag.default is MISSING else flag.default)
        for flag in flags_of(kind)
    }
    return create_model(kind.__name__, __config__=_strict(), **fields)


def _strict() -> ConfigDict:
    return {"extra": "forbid", "strict": True, "protected_namespaces": ()}


def _read_as(declared: Any) -> Any:
    """A YAML value as its flag declares it; YAML reads 1e-2 as a string and 5000 as an integer."""
    from pydantic import BeforeValidator

    readers = {float: _number, str: _spelled}
    parts = get_args(declared) or (declared,)
    if reader := readers.get(parts[0]):
        return Annotated[declared, BeforeValidator(reader)]
    return declared


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _spelled(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if number else value


def _in_words(refused: ValidationError, where: str) -> str:
    """What is wrong with a recipe, in the words of its flags; unknown keys first."""
    errors = refused.errors(include_url=False)
    first = min(errors, key=lambda error: error["type"] != "extra_forbidden")
    path = [part for part in first["loc"] if isinstance(part, str)]
    kinds = {flag.key: flag.kind for flag in flags_of(STEPS[path[0]])} if path[1:] else {}
    if first["type"] in ("extra_forbidden", "missing"):
        *parents, key = path
        place = ": ".join([where, *parents])
        if first["type"] == "missing":
            return f"{place} lacks the key {key!r}"
        return f"{place} has the unknown key {brief(key)}; known: {', '.join(kinds or KEYS)}"
    place = ": ".join([where, ".".join(path)] if path else [where])
    said = {"model_type": "a mapping of keys to values", "list_type": "a list"}
    wanted = said.get(first["type"]) or _kind_in_words(kinds[path[-1]] if kinds else str)
    return f"{place} must be {wanted}, not {brief(first['input'])}"


def _kind_in_words(declared: Any) -> str:
    parts = get_args(declared) or (declared,)
    return " | ".join("None" if part is type(None) else part.__name__ for part in parts)
