"""The command line, in this process."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner

from dotexport.app.cli import app


def run(*args: object) -> Any:
    """What a verb prints as JSON; errors of dotexport are raised as they are."""
    result = CliRunner().invoke(app, [*map(str, args), "--json"])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])
