"""The run verb: shrink, export, verify, evaluate, bench, report, in one resumable chain.

Each step leaves its result in OUT as soon as it is whole, under the hash of the recipe; a run that
was killed goes on with the first step whose result is not there.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dotexport import embedded
from dotexport.app.benching import (
    bench_into,
    bench_name,
    bench_report,
    check_gate,
    spec_of,
    workload_of,
)
from dotexport.app.door import benches
from dotexport.app.evaluations import check_eval, evaluate_into
from dotexport.app.opening import check_apart
from dotexport.app.recipe import Recipe
from dotexport.app.shrink_options import ShrinkOptions
from dotexport.app.shrinking import shrink
from dotexport.axes import axes_of
from dotexport.axes.plan import Plan, SizeOptions, read_model, resized
from dotexport.errors import CalibrationError, SizeError, UsageError
from dotexport.exports.target import Target, parse_spec
from dotexport.models.checkpoint import read_config, stored_config
from dotexport.models.documents import documents
from dotexport.models.finding import find_model
from dotexport.models.text_windows import window_length
from dotexport.narrowing.norm_statistics import Progress
from dotexport.outputs import card
from dotexport.processes.processes import Processes
from dotexport.sizes.allocation import accepted
from dotexport.sizes.beside_towers import beside_towers
from dotexport.sizes.budget import plan
from dotexport.sizes.latency import check_runtime, promise
from dotexport.sizes.latency_options import LatencyOptions
from dotexport.sizes.latency_table import cache_file
from dotexport.sizes.planning import Rule, rules_of_target, ways_out
from dotexport.storage import manifest
from dotexport.storage.files import write_json
from dotexport.storage.output import occupied
from dotexport.storage.reading import read_json


def run(
    recipe: Recipe,
    out: Path,
    *,
    overwrite: bool = False,
    device: str = "auto",
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Run a recipe into `out` and return its manifest.

    Raises:
        UsageError: `out` holds something else, or was made by another recipe.
        GateError: a bench misses the limits of its gate; everything was made, the report too.
        DotexportError: whatever a step raises; what earlier steps made stays, and the same command
            goes on from there.
    """
    check_apart(Path(recipe.model), out)
    model = source_folder(recipe.model)
    _check_later_steps(recipe, model)
    with occupied(out):
        return _run(recipe, model, out, overwrite, device, progress)


def _run(
    recipe: Recipe, model: Path, out: Path, overwrite: bool, device: str, progress: Progress
) -> dict[str, Any]:
    if overwrite or not _resumable(out, recipe):
        shrink(
            model,
            out,
            recipe.shrink.options(),
            overwrite=overwrite,
            device=device,
            recipe=recipe.dump(),
            progress=progress,
            accept=_accepted_by(_rules(model, _specs(recipe))),
        )
    if "latency" not in manifest.read(out):
        keep_promise(out, model, recipe.shrink.options().sizes, progress=progress)
    _export(recipe, out, progress)
    if recipe.eval and "quality" not in manifest.read(out):
        evaluate_into(out, model, recipe.eval, device=device, progress=progress)
    for step in recipe.bench:
        if bench_name(step) not in manifest.read(out).get("bench", {}):
            bench_into(out, model, step, progress=progress)
    write_report(out)
    _require_gates(recipe, out)
    return manifest.read(out)


def source_folder(model: str, *, config_only: bool = False, tokenizer: bool = False) -> Path:
    """A folder, what a GGUF file unpacks to, the snapshot of a hub id, or the model that ships
    inside (`embedded`)."""
    if model == "embedded":
        return embedded.MODEL_DIR
    return find_model(model, config_only=config_only, tokenizer=tokenizer)


def find_here(processes: Processes, model: str) -> None:
    """Have the model on this machine too, once the first process has it on its own."""
    source_folder(model)


def _check_later_steps(recipe: Recipe, model: Path) -> None:
    """Refuse now what a step would refuse after an hour of narrowing."""
    from dotexport.exports.target import resolve
    from dotexport.exports.verifying import require_device, require_runtime

    options, specs = recipe.shrink.options(), _specs(recipe)
    if recipe.eval:
        check_eval(recipe.eval, recipe.export)
    for target, _ in map(resolve, specs):
        require_runtime(target)
        require_device(target)
    for step in recipe.bench:
        workload_of(step)
        check_gate(step)
        benches().check_options(resolve(spec_of(step))[0], step.runtime())
    names = [bench_name(step) for step in recipe.bench]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UsageError(
            f"two bench steps measure {', '.join(twice)}; expected steps that differ in target or "
            "precision: put the other workload into a recipe of its own"
        )
    if recipe.eval:
        text = recipe.eval.text
        window_length(model, text)
        if next(documents(text.source), None) is None:
            raise CalibrationError(f"{text.source} holds no text; expected UTF-8 documents")
    _check_sizes(model, options, specs)


def _check_sizes(model: Path, options: ShrinkOptions, specs: Sequence[str]) -> None:
    """Refuse sizes that a target of the recipe cannot hold, where they are known beforehand.

    Raises:
        SizeError: with every reason of each target.
    """
    if options.sizes.latency is not None:
        return
    config, rules = read_config(model), _rules(model, specs)
    sizes = beside_towers(stored_config(model), options.sizes)
    decided = plan(config, sizes)
    if options.allocate == "measured" and sizes.budgeted:
        decided, *_ = [*accepted(config, sizes, _accepted_by(rules)), decided]
    if problems := [f"  {rule.name}: {text}" for rule in rules for text in rule.problems(decided)]:
        raise SizeError(
            "the sizes of this recipe cannot be exported:\n"
            + "\n".join([*problems, *ways_out(config, [decided], _targets(specs), rules)])
        )


def _specs(recipe: Recipe) -> Sequence[str]:
    return (*recipe.export, *(spec_of(step) for step in recipe.bench))


def _targets(specs: Sequence[str]) -> list[tuple[Target, str]]:
    from dotexport.exports.target import resolve

    return [resolve(spec) for spec in specs]


def _rules(model: Path, specs: Sequence[str]) -> list[Rule]:
    config = read_config(model)
    return [rule for pair in _targets(specs) for rule in rules_of_target(config, *pair)]


def _accepted_by(rules: Sequence[Rule]) -> Callable[[Plan], bool]:
    return lambda decided: not any(rule.problems(decided) for rule in rules)


def _resumable(out: Path, recipe: Recipe) -> bool:
    if not manifest.is_output(out):
        return False
    identity = hashlib.sha256(recipe.dump().encode()).hexdigest()
    if manifest.read(out).get("recipe") == identity:
        return True
    raise UsageError(
        f"{out} was made by another recipe; give another output folder, or --overwrite"
    )


def _export(recipe: Recipe, out: Path, progress: Progress) -> None:
    from dotexport.app.rounding_text import text_of
    from dotexport.exports.calibrating import grids_of
    from dotexport.exports.exporting import Request, export
    from dotexport.exports.target import resolve
    from dotexport.exports.verifying import STOCK
    from dotexport.models.checkpoint import Checkpoint

    wanted = {Request(*resolve(spec)).name: spec for spec in ("hf", *recipe.export)}
    made = manifest.read(out).get("artifacts", {})
    left = [spec for name, spec in wanted.items() if not _proven(made.get(name, {}))]
    if left:
        progress(f"exporting and verifying {len(left)}", 0, 1)
        # What lies there unproven is of a run that was killed, or was spoilt since.
        read, checkpoint = text_of(recipe.round, progress), Checkpoint.open(out / STOCK)
        chosen = [
            spec
            for spec, (target, precision) in zip(left, map(resolve, left), strict=True)
            if read is not None and grids_of(target, checkpoint, precision)
        ]
        for specs, text in ((chosen, read), ([s for s in left if s not in chosen], None)):
            if specs:
                export(out, specs, overwrite=True, read=text, progress=progress)
        card.write(out)


def _proven(artifact: Mapping[str, Any]) -> bool:
    return bool((artifact.get("parity") or {}).get("passed"))


def write_report(out: Path) -> Path:
    """OUT/reports/report.html from what lies in OUT by now."""
    file: Path = benches().write_report([out])
    return file


def _require_gates(recipe: Recipe, out: Path) -> None:
    gated = ((step.gate, out / bench_report(step)) for step in recipe.bench)
    found = (benches().judge([report], gate=Path(gate)).lines for gate, report in gated if gate)
    benches().require([line for lines in found for line in lines])


def measure_latency(
    model: Path,
    options: LatencyOptions,
    *,
    batch: str = "1",
    out: Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> tuple[dict[str, Any], Path]:
    """Measure a latency table and store it: in `out`, or where plan and shrink look by themselves.

    Args:
        options: the target may have its precision behind it, NAME:PRECISION.
        batch: sequences at once, as flags say it: 1, or several as 1,4.

    Raises:
        UsageError, SizeError, UnsupportedModelError, RuntimeMissingError, DotexportError: as
            `measure_table`.
    """
    name, said = parse_spec(options.target)
    if not re.fullmatch(r"\d+(,\d+)*", batch):
        raise UsageError(f"--batch {batch!r} must be numbers such as 1 or 1,4")
    if options.precision and said and options.precision != said:
        raise UsageError(
            f"--target {options.target} and --precision {options.precision} contradict each other"
        )
    batches = tuple(map(int, batch.split(",")))
    precision = options.precision or said
    asked = replace(options, target=name, precision=precision, batches=batches)
    table = benches().measure_table(model, asked, progress=progress)
    file = out or cache_file(table)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, table)
    return table, file


def planned_time(decided: Plan, asked: SizeOptions, targets: Sequence[str]) -> dict[str, Any]:
    """What a budget of time promises of planned sizes, as a section of a record; empty: none.

    Raises:
        UsageError: the table was measured in none of the targets.
    """
    if asked.latency is None:
        return {}
    check_runtime(decided, asked, targets)
    promised = promise(decided, asked)
    return {"latency": asdict(promised)} if promised else {}


def keep_promise(
    out: Path,
    model: Path,
    asked: SizeOptions,
    *,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """After a shrink to a budget of time: measure again, and record promise and measurement.

    Returns the section `latency` of the manifest, which reports/shrink.json gets as well; empty
    where time was not the budget.

    Raises:
        DotexportError: the result could not be measured; the narrowed model itself is whole.
    """
    if asked.latency is None:
        return {}
    family, before = read_model(read_config(model))
    made = manifest.read(out)["sizes"]
    after = resized(before, {axis.name: made[axis.name][1] for axis in axes_of(before)})
    rows = made["vocab_size"][1] if "vocab_size" in made else before.vocab_size
    cut = Plan(family, before, replace(after, vocab_size=rows))
    promised = promise(cut, replace(asked, vocab_size=rows))
    assert promised is not None
    section = {"latency": benches().measure_again(out, model, promised, progress)}
    manifest.update(out, **section)
    report = out / "reports" / "shrink.json"
    write_json(report, read_json(report, advice="shrink again") | section)
    card.write(out)
    return section
