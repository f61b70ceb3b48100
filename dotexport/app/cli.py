"""The command line: its verbs in their order, and what every one of them shares.

The verbs stand in commands/; heavy imports wait until one of them needs them.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from dotexport.app.commands import artifacts, chains, comparing, machine, measuring
from dotexport.app.commands import deciding as sizes
from dotexport.app.endings import ended
from dotexport.app.flags import with_options
from dotexport.app.hearing import listen
from dotexport.app.terminal import stderr
from dotexport.encoders.kinds import holds_encoder
from dotexport.errors import CheckpointError, UsageError
from dotexport.processes.torchrun import one_process, silence_others
from dotexport.version import __version__


class Verbs(TyperGroup):
    """Ends an interrupted verb with a word and exit code 130, whatever the release of typer.

    A verb that is given a diffusers pipeline is the one of app/commands/pipelines.py instead, and
    one that is given a text encoder the one of app/commands/encoders.py.
    """

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> Any:  # type: ignore[override]
        # What an output holds so far says nothing of the model that is to replace it.
        given = [arg for before, arg in pairwise(args) if before not in ("-o", "--out")]
        if any(map(_holds_pipeline, given)):
            one_process("what is done with a diffusers pipeline")
            from dotexport.app.commands.pipelines import app as pipelines

            known = typer.main.get_command(pipelines)
            if args[0] in getattr(known, "commands", {}):
                return known.resolve_command(ctx, args)  # type: ignore[attr-defined]
        if encoder := next(filter(_holds_encoder, given), None):
            one_process("what is done with a text encoder")
            from dotexport.app.commands.encoders import app as encoders

            known = typer.main.get_command(encoders)
            can = getattr(known, "commands", {})
            if args[0] in can:
                return known.resolve_command(ctx, args)  # type: ignore[attr-defined]
            if args[0] in VERBS:
                raise UsageError(
                    f"{encoder} is a text encoder, which {args[0]} does not take; expected a "
                    f"decoder LLM. Of encoders there are {', '.join(can)}"
                )
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            kept = escape(str(error)) or "nothing unfinished was kept"
            stderr.print(f"[bold red]interrupted[/]: {kept}", soft_wrap=True, highlight=False)
            raise typer.Exit(130) from error


def _holds_pipeline(argument: str) -> bool:
    folder = Path(argument)
    try:
        return any((at / "model_index.json").is_file() for at in (folder, folder / "pipeline"))
    except OSError:  # no name of a folder at all
        return False


def _holds_encoder(argument: str) -> bool:
    try:
        return Path(argument).is_dir() and holds_encoder(Path(argument))
    except (OSError, CheckpointError):
        return False


app = typer.Typer(
    name="dotexport",
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="""Narrow a trained model by optimal transport, export it to every runtime, prove it.

    [bold]dotexport demo[/bold] shows the whole chain on a model that ships inside, offline.

    Exit codes: 0 ok, 1 failure, 2 usage, 3 parity failed, 4 gate failed, 5 impossible sizes or
    unsupported model, 6 runtime missing or provider fell back, 130 interrupted.""",
)
VERBS: dict[str, Callable[..., None]] = {
    "demo": chains.demo,
    "run": chains.run,
    "plan": sizes.plan,
    "shrink": sizes.shrink,
    "export": artifacts.export,
    "verify": artifacts.verify,
    "rejoin": artifacts.rejoin,
    "eval": artifacts.evaluate,
    "bench": measuring.bench,
    "latency": measuring.latency,
    "frontier": measuring.frontier,
    "compare": comparing.compare,
    "history": comparing.show_history,
    "report": comparing.report,
    "targets": machine.targets,
    "doctor": machine.doctor,
}
SHARED = {"shrink"}  # that several processes can do together
for name, verb in VERBS.items():
    app.command(name)(with_options(verb))


def _version(value: bool) -> None:
    if value:
        typer.echo(f"dotexport {__version__}")
        raise typer.Exit


@app.callback()
def common(
    ctx: typer.Context,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say what is done.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    if ctx.invoked_subcommand not in SHARED:
        one_process(f"dotexport {ctx.invoked_subcommand}")
    listen(verbose=verbose)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Entry point: errors become one message and the documented exit code."""
    silence_others()
    signal.signal(signal.SIGTERM, _interrupt)  # so that a stopped run tidies up like Ctrl-C
    ended(app)


if __name__ == "__main__":
    main()
