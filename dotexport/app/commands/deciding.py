"""The verbs that decide sizes and narrow: plan, shrink."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from dotexport.app.progress import progress
from dotexport.app.steps import ShrinkStep
from dotexport.app.terminal import (
    show_allocation,
    show_costs,
    show_json,
    show_next,
    show_rows,
    show_shares,
    show_summary,
)
from dotexport.axes.plan import SizeOptions
from dotexport.healing.heal_options import parse_heal
from dotexport.models.text_options import MOST
from dotexport.sizes.deployment import Deployment
from dotexport.vocabulary.vocabulary_options import VocabularyOptions

from .shared_options import Device, Json, Model, Out, Overwrite


def plan(
    model: Model,
    sizes: SizeOptions,
    vocabulary: VocabularyOptions,
    where: Deployment,
    samples: Annotated[
        int,
        typer.Option(help="Windows of calibration text, for the estimates.", min=1, max=MOST),
    ] = 128,
    seqlen: Annotated[
        int | None,
        typer.Option(help="Their tokens; default: 2048 or the context.", min=2, max=MOST),
    ] = None,
    heal: Annotated[
        str,
        typer.Option(help="Distillation to estimate besides, as shrink --heal takes it: 20M, 200."),
    ] = "local",
    processes: Annotated[
        int, typer.Option(help="Of torchrun, to estimate shrink with.", min=1, max=MOST)
    ] = 1,
    as_json: Json = False,
) -> None:
    """Show sizes that all named targets take, and what they cost. Reads no weights.

    Example: dotexport plan ./llama --params 0.7x --target gguf:int4 --target ort-cpu:int4
    """
    from dotexport.app.pipeline import planned_time, source_folder
    from dotexport.models.checkpoint import read_config, stored_config
    from dotexport.sizes.beside_towers import beside_towers
    from dotexport.sizes.planning import calibrated, choose

    _, distil = parse_heal(heal)
    folder = source_folder(model, config_only=True, tokenizer=vocabulary.asked)
    config, sizes = read_config(folder), beside_towers(stored_config(folder), sizes)
    if vocabulary.asked:
        from dotexport.sizes.vocabulary_first import choose_behind

        chosen = choose_behind(folder, config, sizes, vocabulary, where)
        sizes = replace(sizes, vocab_size=chosen.plan.after.vocab_size)
    else:
        chosen = choose(config, sizes, where)
    chosen = calibrated(config, chosen, samples, seqlen, distil, processes)
    timed = planned_time(chosen.plan, sizes, where.targets)
    if as_json:
        show_json(chosen.as_dict() | timed)
        return
    show_rows("sizes", {"sizes": chosen.plan.as_dict(), **timed})
    for sentence in filter(None, (chosen.shortfall, *chosen.frozen)):
        typer.echo(sentence, err=True)
    show_shares(chosen.plan)
    show_costs(chosen)


def shrink(
    model: Model,
    out: Out,
    step: ShrinkStep,
    plan_file: Annotated[
        Path | None,
        typer.Option(
            "--plan", help="Take the sizes that dotexport plan MODEL --json printed to it."
        ),
    ] = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume",
            help="Go on where the same command was stopped: what it finished lies in "
            ".OUT.unfinished-* beside OUT. --no-resume discards that, and starts afresh.",
        ),
    ] = True,
    print_recipe: Annotated[
        bool, typer.Option("--print-recipe", help="Print these choices as a recipe, and stop.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Narrow a model: MODEL in, OUT/hf of the same stock class out.

    Example: dotexport shrink ./llama -o out --params 0.7x --calib text.jsonl

    torchrun --nproc-per-node 4 -m dotexport shrink ... shares the work between processes.

    A diffusers pipeline folder has options of its own: dotexport shrink FOLDER --help
    """
    from dotexport.app.pipeline import find_here, keep_promise, source_folder
    from dotexport.app.recipe import Recipe
    from dotexport.models.checkpoint import read_config, stored_config
    from dotexport.models.multimodal import is_multimodal

    if plan_file is not None:
        step = step.planned(plan_file, read_config(source_folder(model, config_only=True)))
    options = step.options()
    recipe = Recipe(model=model, shrink=step).dump()
    if print_recipe:
        typer.echo(recipe, nl=False)
        return
    from dotexport.app.opening import check_apart
    from dotexport.app.shrinking import shrink as narrow
    from dotexport.processes.processes import met

    check_apart(Path(model), out)
    with met(device) as processes:
        if not processes.leads:
            processes.follow()
            return
        folder = source_folder(model)
        processes.tell(find_here, model)
        with progress() as report:
            shrunk = narrow(
                folder,
                out,
                options,
                overwrite=overwrite,
                resume=resume,
                device=device,
                recipe=recipe,
                progress=report,
                processes=processes,
            )
    with progress() as report:
        timed = keep_promise(out, folder, options.sizes, progress=report)
    if as_json:
        show_json(shrunk.as_dict() | timed)
        return
    if shrunk.allocation:
        show_allocation(shrunk.allocation)
    show_summary(out, f"narrowed in {shrunk.seconds:.0f} s")
    show_next(out, model, multimodal=is_multimodal(stored_config(folder)))
