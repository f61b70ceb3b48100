"""The verbs that write artifacts and judge what was made: export, verify, eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dotexport.app.commands.shared_options import (
    Device,
    Held,
    Home,
    Json,
    Output,
    Overwrite,
)
from dotexport.app.progress import progress
from dotexport.app.steps import EvalStep
from dotexport.app.terminal import show_json, show_parities, show_rows, show_written, stderr
from dotexport.errors import UsageError
from dotexport.exports.rounding_options import RoundingOptions


def export(
    model: Annotated[Path, typer.Argument(help="Output of dotexport, or a plain model.")],
    target: Annotated[list[str], typer.Option(help="NAME or NAME:PRECISION, e.g. ort-cpu:int4.")],
    rounding: RoundingOptions,
    out: Home = None,
    verify: Held = True,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write artifacts for runtimes, each held against torch before it is kept.

    Example: dotexport export OUT --target ort-cpu --target ort-cpu:int4
    """
    from dotexport.app.rounding_text import text_of
    from dotexport.exports.exporting import export as write
    from dotexport.outputs import card

    with progress() as report:
        report(f"exporting {', '.join(target)}", 0, 1)
        artifacts = write(
            model,
            target,
            out=out,
            verify=verify,
            overwrite=overwrite,
            read=text_of(rounding, report),
            progress=report,
        )
    home = artifacts[0].folder.parent
    card.write(home)
    show_written(home, [artifact.name for artifact in artifacts], as_json=as_json)


def verify(
    out: Output,
    target: Annotated[
        list[str] | None,
        typer.Option(help="Only these, vllm and llama.cpp among them; default: all artifacts."),
    ] = None,
    vllm_python: Annotated[
        Path | None, typer.Option(help="Python of an environment with vLLM, for --target vllm.")
    ] = None,
    llama_cpp: Annotated[
        Path | None, typer.Option(help="Folder of llama.cpp, for --target llama.cpp.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Hold every artifact against torch: prefill, cached decode, padding, greedy tokens, NaN.

    Exit code 3 if one of them does not compute what torch computes, 6 if all do as far as can be
    told and one needs a device that is not here. With --target vllm, hf/ is loaded by vLLM, which
    must say torch's greedy tokens; with --target llama.cpp, every GGUF file is run by llama.cpp.
    """
    from dotexport.exports.verifying import require
    from dotexport.exports.verifying import verify as check
    from dotexport.targets import llamacpp
    from dotexport.targets.vllm_tokens import NAME, verify_vllm

    by_vllm = NAME in (target or ())
    if by_vllm != (vllm_python is not None):
        raise UsageError("expected --target vllm and --vllm-python together, or neither")
    if (llamacpp.NAME in (target or ())) != (llama_cpp is not None):
        raise UsageError("expected --target llama.cpp and --llama-cpp together, or neither")
    outside = {NAME, llamacpp.NAME}
    others = None if target is None else [name for name in target if name not in outside]
    with stderr.status("verifying"):
        parities = [] if others == [] else check(out, others)
        if vllm_python is not None:
            parities.append(verify_vllm(out, vllm_python))
        if llama_cpp is not None:
            parities += llamacpp.verify_llama_cpp(out, llama_cpp)
    if as_json:
        show_json([parity.as_dict() for parity in parities])
    else:
        show_parities(parities)
    require(parities)


def rejoin(
    out: Output,
    model: Annotated[str, typer.Argument(help="What OUT was narrowed from: folder or hub id.")],
    whole: Annotated[
        Path, typer.Option("-o", "--out", help="Output folder; hf/ in it is the whole.")
    ],
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Put a narrowed language model back among the towers of a model that sees or hears.

    Of such a MODEL, shrink narrows the language model alone; the towers stay as they are, so
    hidden_size and the vocabulary must have stayed as well.

    Example: dotexport rejoin OUT gemma-3-4b-it -o smaller-gemma
    """
    from dotexport.app.pipeline import source_folder
    from dotexport.app.rejoining import rejoin as join
    from dotexport.outputs import card

    with progress() as report:
        join(out, source_folder(model), whole, overwrite=overwrite, progress=report)
    card.write(whole)
    show_written(whole, ["hf"], as_json=as_json)


def evaluate(
    out: Output,
    baseline: Annotated[str, typer.Option(help="The original: folder, GGUF file or hub id.")],
    step: EvalStep,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """What the model predicts on held-out text, and what it says by itself, beside the original.

    Example: dotexport eval OUT --baseline MODEL --text held-out.txt
    """
    from dotexport.app.evaluations import evaluate_into
    from dotexport.app.pipeline import source_folder

    with progress() as report:
        record = evaluate_into(out, source_folder(baseline), step, device=device, progress=report)
    if as_json:
        show_json(record)
        return
    show_rows("quality", {"quality": record})
