"""The verdict of a gate for pipelines: JUnit XML, and annotations and summary of GitHub Actions."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

from dotexport.storage.files import write_text

from .gate import DOUBT, MISSED, Line

# What XML 1.0 cannot hold at all, not even escaped.
NO_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
LEVELS = {MISSED: "error", DOUBT: "warning"}


def write_junit(file: Path, lines: Sequence[Line], properties: dict[str, str]) -> None:
    """One testcase for each line of the gate; a missed one holds what was found as its failure."""
    missed = sum(line.outcome == MISSED for line in lines)
    counts = {"tests": str(len(lines)), "failures": str(missed), "errors": "0", "skipped": "0"}
    root = ElementTree.Element("testsuites", {"name": "dotexport compare", **counts})
    suite = ElementTree.SubElement(root, "testsuite", {"name": "gate", **counts, "time": "0"})
    listed = ElementTree.SubElement(suite, "properties")
    for name, value in properties.items():
        held = {"name": _xml(name), "value": _xml(value)}
        ElementTree.SubElement(listed, "property", held)
    for line in lines:
        _testcase(suite, line)
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    write_text(file, f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n')


def _testcase(suite: ElementTree.Element, line: Line) -> None:
    named = {"classname": f"gate.{_xml(line.of)}", "name": _xml(str(line.limit)), "time": "0"}
    case = ElementTree.SubElement(suite, "testcase", named)
    if line.outcome == MISSED:
        failure = ElementTree.SubElement(
            case, "failure", {"type": "GateError", "message": _xml(f"found {line.said}")}
        )
        failure.text = _xml(_sentence(line))
    else:
        ElementTree.SubElement(case, "system-out").text = _xml(_sentence(line))


def annotated(lines: Iterable[Line]) -> Iterator[str]:
    """Workflow commands of GitHub Actions for what was missed or is in doubt."""
    for line in lines:
        if level := LEVELS.get(line.outcome):
            title = _property(f"dotexport gate {line.outcome}: {line.limit.name}")
            yield f"::{level} title={title}::{_data(_sentence(line))}"


def write_step_summary(lines: Sequence[Line], notes: Iterable[str]) -> None:
    """Append a table to the summary of the step, where GitHub asks for one."""
    file = os.environ.get("GITHUB_STEP_SUMMARY")
    if not file:
        return
    missed = sum(line.outcome == MISSED for line in lines)
    verdict = f"missed by {missed} of {len(lines)}" if missed else f"kept, {len(lines)} limits"
    text = [f"### dotexport gate: {verdict}", ""]
    text += ["| figure | limit | found | verdict | |", "|---|---|---|---|---|"]
    for line in lines:
        cells = (f"{line.of}: {line.limit.name}", line.limit.text, line.said, line.outcome)
        text.append("| " + " | ".join(map(_cell, (*cells, line.reason))) + " |")
    text += ["", *(f"* {_cell(note)}" for note in notes), ""]
    with Path(file).open("a", encoding="utf-8") as stream:
        stream.write("\n".join(text) + "\n")


def _sentence(line: Line) -> str:
    tail = f"; {line.reason}" if line.reason else ""
    return f"{line.of}: {line.limit}: found {line.said}, {line.outcome}{tail}"


def _xml(text: str) -> str:
    return NO_XML.sub("\N{REPLACEMENT CHARACTER}", text)


def _data(text: str) -> str:
    """Escaped as the runner's toolkit does it: a line end would end the command."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def _cell(text: str) -> str:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return escaped.replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>")
