"""Which tasks a model is asked, and where their questions lie."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dotexport.errors import UsageError
from dotexport.options import option

VARIABLE = "DOTEXPORT_TASKS_DATA"
HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Tasks of lm-evaluation-harness, asked without examples.

    Attributes:
        tasks: names, with commas between them.
        data: folder of JSON lines; a task that has its file there needs no network.
        limit: questions of each task, at most; None: all.
    """

    tasks: str | None = option(
        None,
        help="Tasks of lm-evaluation-harness, with commas between them, for both models and the "
        "artifacts of --target; needs pip install 'dotexport[tasks]'.",
    )
    data: str | None = option(
        None,
        help="Folder with lambada_openai.jsonl, piqa.jsonl, arc_easy.jsonl or copa.jsonl, which "
        f"these tasks read then, offline; default: ${VARIABLE}. Others come from the hub.",
        flag="tasks_data",
    )
    limit: int | None = option(None, help="Questions of each task, at most, from its start.")

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"--limit must be at least 1, not {self.limit}")
        if self.tasks is None and (self.data is not None or self.limit is not None):
            raise UsageError("--tasks-data and --limit are for --tasks; name some")
        if self.tasks is not None and not all(self.names):
            raise UsageError(f"--tasks {self.tasks!r} has an empty name; expected NAME,NAME")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.tasks.split(","))) if self.tasks else ()

    def definition(self, name: str) -> tuple[Path, Path] | None:
        """The definition of a task that ships with dotexport, and the file of its questions; None:
        the harness has it from the hub.

        Raises:
            UsageError: the folder of questions is none.
        """
        folder = self.data or os.environ.get(VARIABLE)
        if not folder:
            return None
        if not Path(folder).expanduser().is_dir():
            raise UsageError(f"--tasks-data {folder} is no folder; expected one of .jsonl files")
        ours, rows = HERE / f"{name}.yaml", Path(folder).expanduser() / f"{name}.jsonl"
        return (ours, rows) if ours.is_file() and rows.is_file() else None
