"""report.html: one file that needs nothing beside it, for eyes and ears, whatever the names."""

from __future__ import annotations

import base64
import csv
import html
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from dotexport.bench import table
from dotexport.bench.report import words, write_report
from dotexport.bench.report.collected import collect
from dotexport.bench.report.page import draw, render, write_figures
from dotexport.errors import CheckpointError, DotexportError, UsageError
from dotexport.outputs import card, summary
from dotexport.storage import manifest
from dotexport.storage.files import write_json

Fill = Callable[..., Path]
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Elements with their attributes, and a complaint for each tag that is closed out of turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def text(report: Path) -> str:
    return report.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def figures(text: str) -> Iterator[str]:
    yield from re.findall(r"<figure.*?</figure>", text, flags=re.S)


def test_nothing_is_loaded_from_anywhere(text: str, page: Page) -> None:
    loading = {"src", "href", "xlink:href", "poster", "data", "action", "srcset"}
    for tag, attributes in page.elements:
        for name in loading & attributes.keys():
            assert str(attributes[name]).startswith(("#", "data:")), (tag, attributes[name])
    assert not page.all("script")
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    policies = [m["content"] for m in page.all("meta") if m.get("http-equiv")]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_tags_are_nested_and_ids_are_one_of_a_kind(page: Page) -> None:
    assert page.wrong == []
    assert page.open == []
    ids = [str(attributes["id"]) for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for _, attributes in page.elements:
        if labelled := attributes.get("aria-labelledby"):
            assert labelled in ids


def test_every_reference_inside_a_picture_leads_somewhere(text: str, page: Page) -> None:
    ids = {attributes.get("id") for _, attributes in page.elements}
    asked = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text))
    assert asked
    assert {a or b for a, b in asked} <= ids


def test_every_figure_has_words_and_a_table_and_files(text: str) -> None:
    found = list(figures(text))
    assert len(found) >= 9
    for figure in found:
        part = Page(figure)
        (plot,) = [a for a in part.all("div") if a.get("role") == "img"]
        assert len(str(plot["aria-label"])) > 20
        assert part.all("table")
        assert all(a.get("scope") in ("col", "row") for a in part.all("th"))
        links = {str(a["download"]).rpartition(".")[2]: str(a["href"]) for a in part.all("a")}
        assert base64.b64decode(links["png"].partition(",")[2]).startswith(b"\x89PNG")
        rows = list(csv.reader(unquote(links["csv"].partition(",")[2]).splitlines()))
        assert len(rows) == len(part.all("tr"))
        assert len({len(row) for row in rows}) == 1


def test_a_reader_of_screens_finds_its_way(page: Page) -> None:
    assert [a.get("lang") for a in page.all("html")] == ["en"]
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert len(page.all("main")) == 1
    assert all(a["tabindex"] == "0" for a in page.all("div") if a.get("class") == "scroll")


def test_the_summary_says_size_quality_speed_and_parity(text: str) -> None:
    said = html.unescape(re.sub(r"<[^>]+>", " ", text))
    assert "from 5,000,000 to 3,000,000 parameters, 40 % fewer" in said
    assert "perplexity is 8.00 against 7.50 of the original (1.067×, 95 % interval 1.046 to" in said
    assert re.search(r"decode 1\.2\dx faster \(95 % interval 1\.\d\d to 1\.\d\d\)", said)
    assert "Every artifact computes what torch computes: hf, ort-cpu-fp32" in said
    assert "Over 2 workloads of a sweep, decode is 1.2" in said
    assert "dotexport run recipe.yaml -o small" in said


def test_no_gain_is_said_in_words(fill: Fill, make: Any, tmp_path: Path) -> None:
    folder = fill(tmp_path / "same")
    write_json(folder / "reports/bench-ort-cpu-fp32.json", make(1.0).as_dict())
    written = render(collect([folder]), [])
    assert written.count("no measurable gain") >= 4
    assert re.search(r'class="figure">no measurable gain<', written)


def test_a_failed_parity_is_no_small_print(fill: Fill, tmp_path: Path) -> None:
    folder = fill(tmp_path / "broken")
    artifacts = manifest.read(folder)["artifacts"]
    artifacts["ort-cpu-fp32"]["parity"] |= {"passed": False, "problems": ["prefill is off"]}
    manifest.update(folder, artifacts=artifacts)
    written = render(collect([folder]), [])
    assert "Parity failed: ort-cpu-fp32 does not compute what torch computes." in written
    assert "prefill is off" in written


def test_names_are_text_and_nothing_else(fill: Fill, tmp_path: Path) -> None:
    name = "<script>alert('x')\u200c<script> & \"q\" $a_b$"
    folder = fill(tmp_path / name, evil={"a": 1})
    twin = fill(tmp_path / "twin")
    outputs = collect([folder, twin])
    some = [(heading, plots[:1]) for heading, plots in draw(outputs)]
    written = render(outputs, some)
    page = Page(written)
    assert not page.all("script")
    assert page.wrong == []
    assert "alert(" in written
    assert not [a for _, a in page.elements if any(key.startswith("on") for key in a)]


def test_several_outputs_share_the_plots(fill: Fill, output: Path, tmp_path: Path) -> None:
    other = fill(tmp_path / "other")
    shown = dict(draw(collect([output, other])))
    (size, speed) = shown["Quality against size and speed"]
    assert {row[0] for row in size.rows} == {"original", "small", "other"}
    assert {row[0] for row in speed.rows} == {"original", "small", "other"}
    # The frontier: nothing is both smaller and better than a point on it.
    best = [row for row in size.rows if row[-1] == "yes"]
    for row in best:
        assert not any(o[2] < row[2] and o[3] < row[3] for o in size.rows)  # type: ignore[operator]
    assert 0 < len(best) < len(size.rows)


def test_an_output_without_measurements_still_has_a_page(fill: Fill, tmp_path: Path) -> None:
    folder = fill(tmp_path / "bare")
    shutil.rmtree(folder / "reports")
    manifest.update(folder, quality=None, artifacts={})
    written = write_report([folder]).read_text(encoding="utf-8")
    assert not list(figures(written))
    assert "5,000,000 to 3,000,000 parameters" in written


def test_files_of_every_figure_are_written_when_asked(output: Path, tmp_path: Path) -> None:
    plots = dict(draw(collect([output])))["Size and memory"]
    write_figures(tmp_path / "figures", plots)
    found = {path.name for path in (tmp_path / "figures").iterdir()}
    assert found == {f"{plot.name}.{kind}" for plot in plots for kind in ("png", "svg", "csv")}


def test_the_same_output_gives_the_same_pictures(output: Path) -> None:
    first, second = ([plots[0].svg for _, plots in draw(collect([output]))] for _ in range(2))
    assert first == second


def test_what_is_no_output_is_refused(output: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not an output of dotexport"):
        write_report([tmp_path])
    with pytest.raises(UsageError, match="the same output is given twice"):
        write_report([output, output / "."])


def test_a_bench_is_reproduced_with_the_options_it_ran_with(output: Path) -> None:
    from dotexport.bench.report.words import commands

    [found] = collect([output])
    one, *rest = found.benches
    runtime = {"dtype": "bf16", "compiled": True, "llama_cpp": "/opt/llama.cpp"}
    asked = replace(one.result.workload, concurrency=2, rounds=3)
    changed = replace(one, result=replace(one.result, runtime=runtime, workload=asked))
    told = "\n".join(commands(replace(found, benches=(changed, *rest))))
    for flags in ("--dtype bf16 --compile --llama-cpp PATH", "--concurrency 2 --rounds 3"):
        assert flags in told
    assert "/opt" not in told


def _holders(document: Any) -> list[tuple[dict[str, Any], str]]:
    """Every key of a document; of a list, those of its first entry."""
    if isinstance(document, list):
        return _holders(document[0]) if document else []
    if not isinstance(document, dict):
        return []
    below = [found for value in document.values() for found in _holders(value)]
    return [*((document, key) for key in document), *below]


@pytest.mark.parametrize(
    "name",
    ["dotexport.json", *(f"reports/{n}.json" for n in ("shrink", "verify", "bench-ort-cpu-fp32"))],
)
def test_a_record_that_lost_a_key_is_told_or_refused(name: str, fill: Fill, tmp_path: Path) -> None:
    folder = fill(tmp_path / "out")
    artifacts = manifest.read(folder)["artifacts"].items()
    verified = {artifact: entry["parity"] for artifact, entry in artifacts}
    write_json(folder / "reports/verify.json", {"artifacts": verified})
    file = folder / name
    document = json.loads(file.read_text(encoding="utf-8"))
    tried = 0
    for holder, key in _holders(document):
        value = holder.pop(key)
        file.write_text(json.dumps(document), encoding="utf-8")
        with suppress(DotexportError):
            found = collect([folder])
            draw(found)
            render(found, [])
            card.write(folder)
            assert list(summary.rows(found[0].record))
            assert list(summary.paths(folder))
        holder[key] = value
        tried += 1
    assert tried > 3


def test_a_busy_machine_is_the_first_thing_said(fill: Fill, make: Any, tmp_path: Path) -> None:
    folder = fill(tmp_path / "loud")
    busy = make(machine={"load_average": [3.5, 2.0, 1.0]})
    write_json(folder / "reports/bench-ort-cpu-fp32.json", busy.as_dict())
    (folder / "reports/bench-ort-cpu-fp32-sweep.json").unlink()
    said = list(words.sentences(collect([folder])[0]))
    assert said[0].startswith("ort-cpu fp32: other work kept 3.5 processors busy")
    assert not any("busy" in sentence for sentence in said[1:])
    lines = [str(line) for line in table.render(busy).renderables[1:]]
    assert "processors busy" in lines[0]
    calm = list(words.sentences(collect([fill(tmp_path / "calm")])[0]))
    assert not any("busy" in sentence for sentence in calm)


def test_integers_are_said_to_be_rounded_and_never_equal(fill: Fill, tmp_path: Path) -> None:
    folder = fill(tmp_path / "int4")
    artifacts = manifest.read(folder)["artifacts"]
    rounded = json.loads(json.dumps(artifacts["ort-cpu-fp32"]))
    rounded["precision"] = "int4"
    rounded["parity"]["phases"]["prefill"]["kl"] = 0.0123
    rounded["parity"]["limits"]["kl"] = 0.04
    manifest.update(folder, artifacts=artifacts | {"ort-cpu-int4": rounded})
    said = list(words.sentences(collect([folder])[0]))
    assert "Every artifact computes what torch computes: hf, ort-cpu-fp32." in said
    assert said[-1] == (
        "ort-cpu-int4 is torch's model rounded: its predictions are 0.012 nats per token (KL) off, "
        "within the 0.04 that its precision is allowed."
    )


def test_a_ratio_is_that_of_the_figures_in_its_row(make: Any) -> None:
    result = make(0.8)
    shown = {row[0]: row for row in table.rows(result)}
    _, mine, other, ratio = shown["TPOT p50, ms"]
    assert float(ratio.split()[0]) == pytest.approx(float(mine) / float(other), abs=2e-3)
    times = {"ratio": 0.8, "low": 0.78, "high": 0.82}
    assert summary._faster(1.24, times) == "1.24x (1.22 to 1.28)"
    # Half of the run was slow, and one model had more of that half.
    assert summary._faster(1.5, times) == (
        "1.50x; the machine changed its pace, at equal pace 1.22 to 1.28"
    )
    assert summary._faster(1.0, {"low": 0.9, "high": 1.1}).endswith("no measurable gain")


def test_what_nothing_is_known_of_has_no_column_and_no_section(fill: Fill, tmp_path: Path) -> None:
    folder = fill(tmp_path / "bare")
    shutil.rmtree(folder / "reports")
    record = manifest.read(folder)
    (folder / manifest.MANIFEST).unlink()
    (folder / "recipe.yaml").unlink()
    stored = {"artifacts": {"ort-cpu-fp32": record["artifacts"]["ort-cpu-fp32"]}}
    write_json(folder / manifest.MANIFEST, {"dotexport": record["dotexport"], **stored})
    [output] = collect([folder])
    (sizes,) = dict(draw([output]))["Size and memory"]
    assert sizes.columns == ("artifact", "narrowed, MB")
    parity = words.parity(output)
    assert parity is not None
    assert "" not in [cell for column in zip(*parity.rows, strict=True) for cell in set(column)]
    assert "Environment" not in render([output], [])
