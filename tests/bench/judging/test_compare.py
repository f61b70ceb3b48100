"""`dotexport compare`: exit codes, refusals, and what pipelines are told."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from dotexport.app.cli import main
from dotexport.bench import Workload, ci
from dotexport.bench.gate import MISSED, Line, parse_gate
from dotexport.bench.intervals import Estimate

Write = Callable[..., Path]
Call = Callable[..., int]
GATE = 'decode_tok_s: ">=1.15x"\nttft_p90: "<=1.0x"\npeak_rss: "<=0.7x"\n'


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run a verb and give its exit code."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["dotexport", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    return run


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    file = tmp_path / "gate.yaml"
    file.write_text(GATE, encoding="utf-8")
    return file


def squeezed(text: str) -> str:
    return " ".join(text.split())


def test_a_missed_limit_is_exit_code_4_and_everything_is_said(
    write: Write, call: Call, gate: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("compare", write(), "--gate", gate) == 4
    said = capsys.readouterr()
    assert "missed by 1" in said.err
    assert "peak_rss <=0.7x: found 0.800x" in squeezed(said.err)
    assert "took turns" in squeezed(said.out)


def test_a_gate_that_is_met_is_exit_code_0_and_one_document_with_json(
    write: Write, call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gate.yaml"
    file.write_text('decode_tok_s: ">=1.15x"', encoding="utf-8")
    assert call("compare", write(), "--gate", file, "--json", "--github") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["passed"] is True
    (line,) = document["gate"]
    assert line["verdict"] == "met"
    assert line["low"] < line["found"] < line["high"]
    assert document["comparisons"][0]["ratios"]["decode_tok_s"]["value"] == line["found"]


def test_two_reports_compare_their_candidates_and_say_how(
    write: Write, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = write("a.json", pace=0.8, seed=1), write("b.json", pace=0.72, seed=2)
    assert call("compare", before, after, "--json") == 0
    said = capsys.readouterr()
    (found,) = json.loads(said.out)["comparisons"]
    assert found["ratios"]["p50_tpot_ms"]["value"] == pytest.approx(0.9, rel=0.02)
    assert "unpaired bootstrap" in found["interval"]
    assert found["notes"] == []


def test_a_machine_that_moved_is_told(
    write: Write, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = write("a.json", pace=0.8), write("b.json", pace=0.96, baseline=1.2)
    assert call("compare", before, after) == 0
    assert "the machine itself moved" in squeezed(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"machine": {"cpu": "Another CPU"}}, "cpu: Test CPU against Another CPU"),
        ({"machine": {"cores": {"physical": 1, "usable": 1}}}, "cores: 2 against 1"),
        ({"machine": {"gpus": [{"name": "G"}]}}, "gpus: not recorded against name G"),
        (
            {"machine": {"libraries": {"onnxruntime": "1.26.0"}}},
            "runtime: onnxruntime 1.25.0 against onnxruntime 1.26.0",
        ),
        ({"precision": "int4"}, "precision: fp32 against int4"),
        ({"target": "ort-cuda"}, "target: ort-cpu against ort-cuda"),
        (
            {"workload": Workload(prompt_length=9, generation_length=4, threads=2)},
            "prompt_length: 8 against 9",
        ),
        (
            {"workload": Workload(prompt_length=8, generation_length=4, threads=1)},
            "threads: 2 against 1",
        ),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_other_devices_runtimes_and_workloads_are_refused_unless_forced(
    write: Write,
    call: Call,
    change: dict[str, Any],
    difference: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before, after = write("a.json"), write("b.json", **change)
    assert call("compare", before, after) == 2
    refused = squeezed(capsys.readouterr().err)
    assert difference in refused
    assert "--force" in refused
    assert call("compare", before, after, "--force") == 0
    assert difference in squeezed(capsys.readouterr().out)


def test_effort_library_of_another_runtime_and_our_own_version_may_differ(
    write: Write, call: Call
) -> None:
    libraries = {"dotexport": "9.9", "onnxruntime": "1.25.0", "torch": "9.9"}
    patient = Workload(
        prompt_length=8, generation_length=4, threads=2, min_seconds=99, rounds=1, seed=3
    )
    after = write("b.json", machine={"libraries": libraries}, workload=patient)
    assert call("compare", write("a.json"), after) == 0


def test_points_of_two_sweeps_find_their_partners(
    write: Write, make: Any, call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def sweep(name: str, *sizes: int) -> Path:
        file = tmp_path / name
        shape = {"prompt_length": 8, "generation_length": 4, "threads": 2}
        found = [make(workload=Workload(**shape, batch_size=size)).as_dict() for size in sizes]
        file.write_text(json.dumps({"schema": "dotexport.sweep/1", "results": found}))
        return file

    assert call("compare", sweep("a.json", 1, 4), sweep("b.json", 4, 1), "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert ["batch 4" in one["label"] for one in document["comparisons"]] == [True, False]
    assert call("compare", sweep("a.json", 1, 4), sweep("b.json", 1, 8)) == 2
    assert "batch 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (None, 2, "is not there; expected a report"),
        ("{", 1, "is not valid JSON"),
        ("{}", 2, "is no bench report: schema is None"),
        ('{"schema": "dotexport.bench/2"}', 2, "is no bench report"),
        ('{"schema": "dotexport.bench/1"}', 1, "is damaged or of another version"),
        ('{"schema": "dotexport.sweep/1", "results": []}', 2, "a sweep without results"),
        ('{"kl": 1, "perplexity": 2}', 2, "give it with --quality"),
    ],
)
def test_what_is_no_report_is_one_message(
    call: Call,
    tmp_path: Path,
    content: str | None,
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "r.json"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    assert call("compare", file) == code
    said = squeezed(capsys.readouterr().err)
    assert message in said
    assert "Traceback" not in said


def test_a_folder_is_answered_with_its_reports(
    call: Call, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("compare", output) == 2
    assert "reports/bench-ort-cpu-fp32.json" in capsys.readouterr().err.replace("\n", "")


def test_the_bench_of_a_pipeline_is_compared_and_its_device_is_not_known(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    timed = {"samples_ms": [[[10.0, 10.2]] * 9, [[8.0, 8.1]] * 9]}
    stored = {"target": "onnx", "threads": 1, "batch": 1, "steps": 4, "bytes": [200, 100]}
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file in files:
        file.write_text(json.dumps(stored | {"step": timed, "whole": timed}), encoding="utf-8")
    gate = tmp_path / "g.yaml"
    gate.write_text('step_p50: "<=0.85x"\nartifact_bytes: "<=0.5x"', encoding="utf-8")
    assert call("compare", files[0], "--gate", gate) == 0
    assert call("compare", *files) == 2
    assert "not recorded" in capsys.readouterr().err


def test_the_bench_of_an_encoder_is_held_to_speed_embeddings_and_answers(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    timed = {"samples_ms": [[[10.0, 10.2]] * 9, [[8.0, 8.1]] * 9]}
    stored = {"target": "onnx:int8", "threads": 1, "batch": 2, "seqlen": 9, "bytes": [200, 100]}
    stored |= {"call": timed, "sentences_per_second": [198.0, 248.0], "environment": {"cpu": "a"}}
    file, other, quality = (tmp_path / name for name in ("a.json", "b.json", "q.json"))
    file.write_text(json.dumps(stored), encoding="utf-8")
    other.write_text(json.dumps(stored | {"environment": {"cpu": "b"}}), encoding="utf-8")
    right = {"original": {"accuracy": 0.8}, "narrowed": {"accuracy": 0.78}}
    judged = {"cosine": 0.96, "recall_at_10": 0.8, "labelled": {"rows": 50, **right}}
    quality.write_text(json.dumps(judged), encoding="utf-8")
    gate = tmp_path / "g.yaml"
    kept = ["call_p50: '<=0.85x'", "sentences_per_second: ['>=1.2x', '>=240']", "cosine: '>=0.95'"]
    kept += ["labelled_accuracy: ['>=0.97x', '>=0.75']", "artifact_bytes: '<=0.5x'"]
    gate.write_text("\n".join(kept), encoding="utf-8")
    assert call("compare", file, "--gate", gate, "--quality", quality) == 0
    for missed in ("recall_at_10: '>=0.85'", "labelled_accuracy: '>=0.98x'", "cosine: '>=0.97x'"):
        gate.write_text(missed, encoding="utf-8")
        assert call("compare", file, "--gate", gate, "--quality", quality) == 4, missed
    gate.write_text("labelled_f1: '>=0.5'", encoding="utf-8")
    assert call("compare", file, "--gate", gate, "--quality", quality) == 2
    assert call("compare", file, other) == 2
    assert "cpu: a against b" in " ".join(capsys.readouterr().err.split())


# What pipelines are told --------------------------------------------------------------------------


def test_junit_has_a_testcase_for_each_limit_and_a_failure_for_each_missed_one(
    write: Write, call: Call, gate: Path, tmp_path: Path
) -> None:
    file = tmp_path / "deep" / "junit.xml"
    assert call("compare", write(), "--gate", gate, "--junit", file) == 4
    suites = ElementTree.parse(file).getroot()
    (suite,) = suites
    cases = suite.findall("testcase")
    assert suites.get("tests") == suite.get("tests") == str(len(cases)) == "3"
    assert suites.get("failures") == suite.get("failures") == "1"
    assert [case.get("name") for case in cases] == [
        "decode_tok_s >=1.15x",
        "ttft_p90 <=1.0x",
        "peak_rss <=0.7x",
    ]
    (failure,) = suite.iter("failure")
    assert failure.text is not None
    assert "found 0.800x" in failure.text
    properties = {p.get("name"): p.get("value") for p in suite.iter("property")}
    assert properties["cpu"] == "Test CPU"


NASTY = Line(parse_gate({"kl": "<=0.1"}, "g")[0], Estimate(0.5), MISSED, 'a,b:c\n::x 50% <&>"\x00|')


def test_junit_holds_any_name(tmp_path: Path) -> None:
    ci.write_junit(tmp_path / "j.xml", [NASTY], {"report": NASTY.of})
    (case,) = ElementTree.parse(tmp_path / "j.xml").getroot().iter("testcase")
    # An attribute cannot hold a line end as it is, and XML no zero byte at all.
    assert '::x 50% <&>"\N{REPLACEMENT CHARACTER}|' in str(case.get("classname"))


def test_annotations_stay_one_line_each_whatever_they_name() -> None:
    (said,) = ci.annotated([NASTY])
    assert "\n" not in said
    head, _, message = said.removeprefix("::error title=").partition("::")
    assert head == "dotexport gate missed%3A kl"
    assert message.startswith("a,b:c%0A::x 50%25 <&>")


def test_github_gets_annotations_for_what_is_missed_and_a_table_of_all(
    write: Write,
    call: Call,
    gate: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    summary = tmp_path / "summary.md"
    summary.write_text("before\n", encoding="utf-8")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    assert call("compare", write(), "--gate", gate, "--github") == 4
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("::")]
    assert len(told) == 1
    assert told[0].startswith("::error title=dotexport gate missed%3A peak_rss::")
    text = summary.read_text(encoding="utf-8")
    assert text.startswith("before\n### dotexport gate: missed by 1 of 3")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    # A cell cannot end its row or its table.
    assert len(rows) == 2 + 3
    ci.write_step_summary([NASTY], [])
    nasty = summary.read_text(encoding="utf-8").split("### ")[-1]
    (row,) = [line for line in nasty.splitlines() if line.startswith("| a,b")]
    assert "<&>" not in row
    assert row.count("|") - row.count("\\|") == 6


def test_a_gate_of_the_bench_verb_cannot_be_misspelt_after_an_hour(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = call("bench", tmp_path, "--baseline", tmp_path, "--gate", tmp_path / "none.yaml")
    assert code == 2
    assert "none.yaml cannot be read" in squeezed(capsys.readouterr().err)


BROKEN: dict[str, tuple[tuple[str | int, ...], Any]] = {
    "no samples": (("candidate", "samples"), []),
    "samples in text": (("candidate", "samples"), "many"),
    "a sample without tokens": (("candidate", "samples", 0, "itl_ms"), []),
    "time that stood still": (("baseline", "samples", 0, "ttft_ms"), 0),
    "time that ran back": (("baseline", "samples", 0, "itl_ms"), [-1.0]),
    "a group that only one has": (("candidate", "samples", 0, "group"), 99),
    "groups of other sizes": (("candidate", "samples", 0, "group"), 1),
    "a machine that is none": (("environment",), "fast"),
    "cores that are none": (("environment", "cores"), 7),
    "a workload of nothing": (("workload",), {"prompt_length": "long"}),
    "a workload of another kind": (("workload",), []),
    "rates without memory": (("rates",), {"device": "cpu", "memory": [], "arithmetic": {}}),
    "bytes below nothing": (("candidate", "artifact_bytes"), -1),
    "one model": (("candidate",), None),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_report_of_any_shape_is_refused_in_a_sentence(
    call: Call, write: Write, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write()
    assert call("compare", file) == 0
    path, value = BROKEN[name]
    stored = json.loads(file.read_text())
    place = stored
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file.write_text(json.dumps(stored))
    capsys.readouterr()
    assert call("compare", file) == 1
    said = capsys.readouterr().err
    assert str(file) in said.replace("\n", "")
    assert "measure again with `dotexport bench`" in said
    assert "did not expect" not in said
