"""Whether two texts come from one source: what is fitted to one is not tested by the other."""

from __future__ import annotations

from pathlib import Path

from dotexport.models.documents import EMBEDDED
from dotexport.models.text_options import SELF, parts_of


def one_source(calibration: str, judged: str, own: Path, *, every: int = 1) -> str | None:
    """What to doubt of quality on a text, in a sentence; None: it is of another source.

    Files of one folder count as one source: they usually are the parts of one data set.

    Args:
        own: the file that `self` stands for.
        every: one window in so many was calibrated on.
    """
    ours = [_origin(part.source, own) for part in parts_of(calibration)]
    theirs = [_origin(part.source, own) for part in parts_of(judged)]
    shared = next((a for a in ours for b in theirs if a == b), None)
    if shared is None:
        return None
    said = (
        f"the model was calibrated on text of the source it is judged on ({shared}), so this shows "
        "quality on the kind of text of its calibration only; judge it on another kind as well"
    )
    if every > 1 and (same := _sources(calibration) & _sources(judged)):
        said += (
            f"; one window in {every} of {min(same)} was calibrated on, and those that judge may "
            "be among them"
        )
    return said


def _sources(text: str) -> set[str]:
    return {part.source for part in parts_of(text)}


def _origin(source: str, own: Path) -> str:
    """A data set: its id, its folder, or what ships inside."""
    if source.startswith(EMBEDDED):
        return "the sources that ship inside"
    path = own if source == SELF else Path(source).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if path.is_file() or path.suffix:
        return str(path.resolve().parent)
    return source.partition(":")[0]
