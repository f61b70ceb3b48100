"""The verbs that decide sizes and narrow: plan, shrink."""

from __future__ import annotations

from typing import Annotated

import typer

from dotexport.app.commands.shared_options import (
    TEXT_HELP,
    Bias,
    Device,
    ForceLatencyTable,
    Hidden,
    Intermediate,
    Json,
    KvHeads,
    Latency,
    LatencyTable,
    Model,
    Out,
    Overwrite,
    Params,
    PlanFile,
    Samples,
    Seqlen,
    Size,
    Skip,
    Square,
    Tied,
)
from dotexport.app.terminal import (
    progress,
    show_allocation,
    show_costs,
    show_json,
    show_rows,
    show_summary,
)


def plan(
    model: Model,
    params: Params = None,
    size: Size = None,
    latency: Latency = None,
    latency_table: LatencyTable = None,
    force_latency_table: ForceLatencyTable = False,
    hidden: Hidden = None,
    intermediate: Intermediate = None,
    kv_heads: KvHeads = None,
    tied: Tied = None,
    bias: Bias = False,
    square: Square = False,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME or NAME:PRECISION that must take the sizes, e.g. gguf:int4; vllm reads hf."
        ),
    ] = None,
    tensor_parallel: Annotated[
        int, typer.Option(help="Devices that share every matrix: heads and MLP must divide.")
    ] = 1,
    group: Annotated[
        int, typer.Option(help="Weights per scale in later quantisation, e.g. 128: rows divide.")
    ] = 1,
    as_json: Json = False,
) -> None:
    """Show sizes that all named targets take, and what they cost. Reads config.json only.

    Example: dotexport plan ./llama --params 0.7x --target gguf:int4 --target ort-cpu:int4
    """
    from dotexport.app.pipeline import planned_time, source_folder
    from dotexport.models.checkpoint import read_config
    from dotexport.sizes.budget import SizeOptions
    from dotexport.sizes.planning import Deployment, choose

    asked = SizeOptions(
        params=params,
        size=size,
        latency=latency,
        latency_table=latency_table,
        force_latency_table=force_latency_table,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_key_value_heads=kv_heads,
        tied=tied,
        bias=bias,
        square=square,
    )
    where = Deployment(targets=tuple(target or ()), tensor_parallel=tensor_parallel, group=group)
    config = read_config(source_folder(model, config_only=True))
    chosen = choose(config, asked, where)
    timed = planned_time(chosen.plan, asked, where.targets)
    if as_json:
        show_json(chosen.as_dict() | timed)
        return
    show_rows("sizes", {"sizes": chosen.plan.as_dict(), **timed})
    show_costs(chosen)


def shrink(
    model: Model,
    out: Out,
    calib: Annotated[str, typer.Option(help=f"Calibration text. {TEXT_HELP}")],
    plan_file: PlanFile = None,
    params: Params = None,
    size: Size = None,
    latency: Latency = None,
    latency_table: LatencyTable = None,
    force_latency_table: ForceLatencyTable = False,
    hidden: Hidden = None,
    intermediate: Intermediate = None,
    kv_heads: KvHeads = None,
    tied: Tied = None,
    bias: Bias = False,
    square: Square = False,
    allocate: Annotated[
        str,
        typer.Option(
            help="How a budget is shared between the axes: rule, or measured, which cuts each "
            "alone first and takes minutes."
        ),
    ] = "rule",
    samples: Samples = 128,
    seqlen: Seqlen = None,
    skip: Skip = 0,
    basis: Annotated[
        str | None,
        typer.Option(
            help="Of the residual stream: learned, pca, dot, select, or auto, which measures all; "
            "default: learned, or pca where the head stays tied. Gemma 2 and 3, OLMo 2: dot (the "
            "default), obs, select, auto."
        ),
    ] = None,
    mlp: Annotated[
        str,
        typer.Option(
            help="Neurons: obs, dot (OBS, then transport if refitted), select (magnitude)."
        ),
    ] = "obs",
    heads: Annotated[str, typer.Option(help="KV groups: obs, dot, select; as for --mlp.")] = "obs",
    transport: Annotated[
        str, typer.Option(help="Transport plan: semi-relaxed or balanced.")
    ] = "semi-relaxed",
    epsilon: Annotated[
        float, typer.Option(help="Entropic regularisation of the plan; 0 is exact.")
    ] = 0.05,
    refit: Annotated[
        bool, typer.Option("--refit/--no-refit", help="Closed-form least-squares repair.")
    ] = True,
    feedback: Annotated[
        bool,
        typer.Option("--feedback/--no-feedback", help="Writers repair earlier drift, too."),
    ] = True,
    ridge: Annotated[
        float | None,
        typer.Option(help="Of every refit; default: per solve the best on held-out windows."),
    ] = None,
    heal: Annotated[
        str,
        typer.Option(
            help="Gradient steps after the refit: local (each sublayer alone, while it is in "
            "memory), a number of steps of distillation of the whole model, both (local+200), or "
            "none. The state of distillation lies in .OUT.healing-* beside OUT: after an "
            "interruption the same command goes on from there."
        ),
    ] = "local",
    heal_samples: Annotated[
        int | None,
        typer.Option(
            help="Windows of the calibration text that healing trains on, from --skip on."
        ),
    ] = None,
    heal_precision: Annotated[
        str, typer.Option(help="bf16, fp32, or auto: bf16 where the device multiplies it.")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    device: Device = "auto",
    overwrite: Overwrite = False,
    print_recipe: Annotated[
        bool, typer.Option("--print-recipe", help="Print these choices as a recipe, and stop.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Narrow a model: MODEL in, OUT/hf of the same stock class out.

    Example: dotexport shrink ./llama -o out --params 0.7x --calib text.jsonl

    A diffusers pipeline folder has options of its own: dotexport shrink FOLDER --help
    """
    from dotexport.app.pipeline import keep_promise, source_folder
    from dotexport.app.recipe import Recipe, ShrinkStep
    from dotexport.app.shrinking import shrink as narrow
    from dotexport.models.checkpoint import read_config

    step = ShrinkStep(
        params=params,
        size=size,
        latency=latency,
        latency_table=latency_table,
        force_latency_table=force_latency_table,
        allocate=allocate,
        hidden=hidden,
        intermediate=intermediate,
        kv_heads=kv_heads,
        tied=tied,
        bias=bias,
        square=square,
        calib=calib,
        samples=samples,
        seqlen=seqlen,
        skip=skip,
        basis=basis,
        mlp=mlp,
        heads=heads,
        transport=transport,
        epsilon=epsilon,
        refit=refit,
        feedback=feedback,
        ridge=ridge,
        heal=heal,
        heal_samples=heal_samples,
        heal_precision=heal_precision,
        seed=seed,
    )
    if plan_file is not None:
        step = step.planned(plan_file, read_config(source_folder(model, config_only=True)))
    options = step.options()
    recipe = Recipe(model=model, shrink=step).dump()
    if print_recipe:
        typer.echo(recipe, nl=False)
        return
    with progress() as report:
        shrunk = narrow(
            source_folder(model),
            out,
            options,
            overwrite=overwrite,
            device=device,
            recipe=recipe,
            progress=report,
        )
        timed = keep_promise(out, source_folder(model), options.sizes, progress=report)
    if as_json:
        show_json(shrunk.as_dict() | timed)
        return
    if shrunk.allocation:
        show_allocation(shrunk.allocation)
    show_summary(out, f"narrowed in {shrunk.seconds:.0f} s")
