"""The verbs that look at this machine: targets, doctor."""

from __future__ import annotations

from dataclasses import asdict

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dotexport.app.commands.shared_options import Json
from dotexport.app.terminal import missing_here, show_diagnosis, show_json
from dotexport.errors import RuntimeMissingError


def targets(as_json: Json = False) -> None:
    """List what can be exported to, and what is missing to use it here."""
    from dotexport.exports.target import list_targets

    rows = list_targets()
    if as_json:
        show_json([asdict(row) for row in rows])
        return
    table = Table("target", "precisions", "what", "missing here")
    for row in rows:
        missing = escape(missing_here(row))
        table.add_row(row.name, ", ".join(row.precisions), row.summary, missing)
    Console().print(table)


def doctor(as_json: Json = False) -> None:
    """Which runtimes are here, on what they can compute, what clashes, and what mends it.

    Exit code 6 if something that is installed cannot work.
    """
    from dotexport.targets.doctor import examine

    found = examine()
    if as_json:
        show_json(found.as_dict())
    else:
        show_diagnosis(found)
    if not found.healthy:
        raise typer.Exit(RuntimeMissingError.exit_code)
