"""Healing: what it minimises, what it never makes worse, and that it can be stopped anywhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dotexport import embedded
from dotexport.app import cli
from dotexport.app.shrink_options import ShrinkOptions
from dotexport.app.shrinking import shrink
from dotexport.axes.plan import SizeOptions
from dotexport.errors import RuntimeMissingError, UsageError
from dotexport.exports.quality import evaluate
from dotexport.generation import own_text
from dotexport.healing import distil, distil_memory
from dotexport.healing.distil_judge import Judgement
from dotexport.healing.distil_loss import distillation_loss
from dotexport.healing.heal_options import (
    HealOptions,
    native_precision,
    parse_heal,
)
from dotexport.healing.healing_text import HealingText, batch, healing_text
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.loading import load_float32
from dotexport.models.text_options import TextOptions
from dotexport.models.text_windows import token_windows
from dotexport.narrowing.calibration_text import CalibrationText
from dotexport.narrowing.narrow_options import LocalOptions, NarrowOptions
from dotexport.narrowing.run import Narrowing
from dotexport.narrowing.streams import held_out_windows
from dotexport.storage import manifest

TEXT = TextOptions(source="embedded:calibration", samples=10, seqlen=64)
STEPS = HealOptions(steps=6, batch=4, every=2, rate=2e-4, precision="fp32")
# Without refit: what few windows can repair must be broken enough.
ROUGH = ShrinkOptions(
    sizes=SizeOptions(hidden_size=128, intermediate_size=256),
    text=TEXT,
    narrow=NarrowOptions(refit=False),
    heal=STEPS,
)


def weights(out: Path) -> bytes:
    return (out / "hf" / "model.safetensors").read_bytes()


def stop_at(step: int) -> Callable[[str, int, int], None]:
    """A progress callback that ends the run as Ctrl-C would."""

    def progress(stage: str, done: int, total: int) -> None:
        if stage.startswith("healing") and done == step:
            raise KeyboardInterrupt

    return progress


@pytest.fixture(scope="module")
def healed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, narrowed and healed for a few steps without interruption."""
    out = tmp_path_factory.mktemp("healed") / "out"
    shrink(embedded.MODEL_DIR, out, ROUGH)
    return out


@pytest.fixture
def tiny_text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"w{n * n % 87}" for n in range(400)))
    return file


def tiny(text: Path, **changes: Any) -> ShrinkOptions:
    options = ShrinkOptions(
        sizes=SizeOptions(intermediate_size=40),
        text=TextOptions(source=str(text), samples=8, seqlen=32),
        heal=STEPS,
    )
    return replace(options, **changes)


# What comes out ---------------------------------------------------------------------------------


def test_healing_lowers_held_out_divergence(healed: Path, tmp_path: Path) -> None:
    """On the windows of both texts that healing never trains on, with the figures of `eval`."""
    half = TEXT.samples // 2
    second = replace(TEXT, source=str(healed / "reports" / "second.jsonl"), every=1)
    texts = replace(TEXT, every=manifest.read(healed)["calibration"]["every"]), second
    halves = [token_windows(embedded.MODEL_DIR, text)[:half] for text in texts]
    held_NL = torch.cat([kind_NL[sorted(held_out_windows(half))] for kind_NL in halves])
    shrink(embedded.MODEL_DIR, tmp_path / "plain", replace(ROUGH, heal=None))
    before, after = (
        evaluate(out / "hf", embedded.MODEL_DIR, held_NL) for out in (tmp_path / "plain", healed)
    )
    report = json.loads((healed / "reports" / "shrink.json").read_text())["healing"]
    # The same predictions in batches of another size.
    assert report["kl"] == pytest.approx([before.kl, after.kl], rel=1e-4)
    assert report["perplexity"] == pytest.approx([before.perplexity, after.perplexity], rel=1e-4)
    assert after.kl is not None
    assert before.kl is not None
    assert after.kl < 0.99 * before.kl
    assert [point["step"] for point in report["curve"]] == [0, 2, 4, 6]


def test_reports_say_what_was_done(healed: Path) -> None:
    record = manifest.read(healed)
    assert record["healing"]["options"] == asdict(STEPS)
    assert record["shrink"]["heal"]["steps"] == 6
    assert record["healing"]["tokens"] == 6 * 4 * 64
    assert record["healing"]["tokens_per_second"] > 0
    assert "6 steps" in (healed / "README.md").read_text(encoding="utf-8")


def test_steps_that_harm_are_not_kept(
    tiny_llama: Callable[[str], Path], tiny_text: Path, tmp_path: Path
) -> None:
    harmful = replace(STEPS, rate=10.0)
    model = tiny_llama("wide-heads")
    shrink(model, tmp_path / "plain", tiny(tiny_text, heal=None))
    shrunk = shrink(model, tmp_path / "out", tiny(tiny_text, heal=harmful))
    assert shrunk.healing is not None
    assert shrunk.healing["best_step"] == 0
    assert shrunk.healing["kl"][0] == shrunk.healing["kl"][1]
    assert weights(tmp_path / "out") == weights(tmp_path / "plain")


def test_the_best_step_is_kept_where_a_later_one_is_worse_and_still_beats_the_start(
    tiny_llama: Callable[[str], Path],
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, states = tiny_llama("wide-heads"), []
    shrink(model, tmp_path / "plain", tiny(tiny_text, heal=None))
    divergences = iter([0.5, 0.3, 0.2, 0.4])
    monkeypatch.setattr(distil, "judge", lambda *_: Judgement(next(divergences), 9.0, 8.0))
    windows_NL = token_windows(model, tiny(tiny_text).text)
    healed = distil.heal(
        Checkpoint.open(tmp_path / "plain" / "hf"),
        Checkpoint.open(model),
        torch.eye(48),
        HealingText(windows_NL[1:], windows_NL[:1]),
        STEPS,
        device=torch.device("cpu"),
        save=lambda tensors, course: states.append({n: t.clone() for n, t in tensors.items()}),
    )
    assert healed.report["best_step"] == 4
    assert healed.report["kl"] == [0.5, 0.2]
    for name, tensor in healed.tensors.items():
        assert torch.equal(tensor, states[1][f"student.{name}"])


def test_a_run_that_diverges_ends_with_its_best_step(
    tiny_llama: Callable[[str], Path],
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []

    def broken(*arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        loss = distillation_loss(*arguments, **options)
        return loss * float("nan") if len(calls) > 2 else loss

    monkeypatch.setattr(distil, "distillation_loss", broken)
    shrunk = shrink(tiny_llama("wide-heads"), tmp_path / "out", tiny(tiny_text))
    assert shrunk.healing is not None
    assert [point["step"] for point in shrunk.healing["curve"]] == [0, 2]
    assert len(calls) == 3


@pytest.mark.parametrize("name", ["tied-bf16", "biased"])
def test_every_weight_moves_and_the_class_stays(
    tiny_llama: Callable[[str], Path], tiny_text: Path, tmp_path: Path, name: str
) -> None:
    """Tied tables too, as one; and what is stored keeps its dtype."""
    model, states = tiny_llama(name), []
    shrink(model, tmp_path / "plain", tiny(tiny_text, heal=None))
    student, source = Checkpoint.open(tmp_path / "plain" / "hf"), Checkpoint.open(model)
    windows_NL = token_windows(model, tiny(tiny_text).text)
    healed = distil.heal(
        student,
        source,
        torch.eye(48),
        HealingText(windows_NL[1:], windows_NL[:1]),
        STEPS,
        device=torch.device("cpu"),
        save=lambda tensors, course: states.append({n: t.clone() for n, t in tensors.items()}),
    )
    assert ("lm_head.weight" in student.specs) == (name != "tied-bf16")
    for tensor, spec in student.specs.items():
        assert not torch.equal(student.tensor(tensor).float(), states[-1][f"student.{tensor}"])
        assert healed.tensors[tensor].dtype == spec.dtype
    assert healed.tensors.keys() == student.specs.keys()


def test_held_out_windows_are_never_trained_on() -> None:
    windows_NL = token_windows(embedded.MODEL_DIR, TEXT)
    for samples in (None, 14):
        options = replace(STEPS, samples=samples)
        text = healing_text(CalibrationText(windows_NL), embedded.MODEL_DIR, TEXT, options)
        seen = {tuple(row.tolist()) for row in text.train_NL}
        held = {tuple(windows_NL[n].tolist()) for n in held_out_windows(len(windows_NL))}
        assert held == {tuple(row.tolist()) for row in text.held_NL}
        assert not seen & held
        assert len(text.train_NL) == (samples or 10) - len(held)


@pytest.mark.parametrize("source", ["a.txt", "a.txt,self"])
def test_text_that_is_read_again_and_again_is_said(
    source: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Of 8 windows of 64 tokens 7 are trained on: 4,032 tokens are nine times as many."""
    windows_NL = torch.arange(8 * 64).reshape(8, 64)
    text = TextOptions(source=source, samples=8, seqlen=64)
    for tokens, told in ((7 * 64 * 7, 0), (7 * 64 * 9, 1)):
        options = HealOptions(tokens=tokens, batch=1)
        healing_text(CalibrationText(windows_NL), Path("nowhere"), text, options)
        assert caplog.text.count("9 times") == told
    assert "--heal-text a.txt,self" in caplog.text


def test_every_window_comes_once_per_epoch() -> None:
    windows_NL = torch.arange(6 * 8).reshape(6, 8)
    schedule = HealOptions(steps=9, batch=4, seqlen=4).settled(8)
    drawn = torch.cat([batch(windows_NL, step, schedule=schedule, seed=0) for step in range(6)])
    for epoch_NL in torch.split(drawn, 12):
        assert sorted(epoch_NL.flatten().tolist()) == list(range(48))
    assert not torch.equal(drawn[:12], drawn[12:])


# Memory and precision ---------------------------------------------------------------------------


def test_gradient_checkpointing_changes_no_result(
    tiny_llama: Callable[[str], Path],
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for free in (1 << 60, 0):
        monkeypatch.setattr(distil_memory, "free_bytes", lambda device, free=free: free)
        shrunk = shrink(tiny_llama("biased"), tmp_path / str(free), tiny(tiny_text))
        assert shrunk.healing is not None
        assert shrunk.healing["gradient_checkpointing"] == (free == 0)
    assert weights(tmp_path / "0") == weights(tmp_path / str(1 << 60))


def test_compiled_layers_compute_the_same(
    tiny_llama: Callable[[str], Path],
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With activations that are computed twice, too."""
    curves = []
    for name, compiled, free in (
        ("eager", False, 1 << 60),
        ("compiled", True, 1 << 60),
        ("twice", True, 0),
    ):
        monkeypatch.setattr(distil_memory, "free_bytes", lambda device, free=free: free)
        options = tiny(tiny_text, heal=replace(STEPS, compiled=compiled))
        shrunk = shrink(tiny_llama("biased"), tmp_path / name, options)
        assert shrunk.healing is not None
        assert shrunk.healing["compiled"] == compiled
        curves.append([point["kl"] for point in shrunk.healing["curve"]])
    # Products in another order; a few optimiser steps let rounding grow.
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)
    assert curves[2] == pytest.approx(curves[0], rel=1e-3)


def test_a_machine_without_a_compiler_is_told_before_anything_is_narrowed(
    tiny_llama: Callable[[str], Path],
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1")

    monkeypatch.setattr(torch, "compile", broken)
    options = tiny(tiny_text, heal=replace(STEPS, compiled=True))
    with pytest.raises(RuntimeMissingError, match=r"--heal-compile: .* no working C\+\+ compiler"):
        shrink(tiny_llama("biased"), tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_the_estimate_of_activations_is_about_right(tiny_llama: Callable[[str], Path]) -> None:
    """Against what autograd keeps: within a factor of 1.5, as the limit is a rough one too."""
    model = load_float32(Checkpoint.open(tiny_llama("wide-heads")))
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model.get_decoder()(torch.ones(2, 64, dtype=torch.long))  # alive: no place used twice
    estimate = distil_memory.activation_bytes(model.config, 2 * 64)
    assert 1 / 1.5 < estimate / sum(kept.values()) < 1.5
    del out


def test_a_batch_in_pieces_has_the_gradient_of_the_whole(
    tiny_llama: Callable[[str], Path],
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    curves = []
    for num_bytes in (1 << 30, 1):
        monkeypatch.setattr(distil_memory, "PASS_BYTES", {"cpu": num_bytes})
        shrunk = shrink(tiny_llama("biased"), tmp_path / str(num_bytes), tiny(tiny_text))
        assert shrunk.healing is not None
        curves.append([point["kl"] for point in shrunk.healing["curve"]])
    # Sums in another order; a few optimiser steps let rounding grow.
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)


def test_steps_in_bf16_are_those_in_float32_but_for_rounding(
    tiny_llama: Callable[[str], Path], tiny_text: Path, tmp_path: Path
) -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        options = tiny(tiny_text, heal=replace(STEPS, precision=precision))
        shrunk = shrink(tiny_llama("wide-heads"), tmp_path / precision, options)
        assert shrunk.healing is not None
        assert shrunk.healing["precision"] == precision
        losses.append([point["loss"] for point in shrunk.healing["curve"][1:]])
    assert losses[0] != losses[1]
    # bfloat16 keeps 8 bits: products are off by 0.4 %, and KL is a small difference of them.
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_auto_precision_follows_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for name, expected in (("avx512_bf16", "bf16"), ("avx2", "fp32")):
        capabilities = {name: True}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda c=capabilities: c, raising=False)
        assert native_precision(cpu) == expected


# Stopped and resumed ----------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 3, 6])
def test_a_resumed_run_equals_the_uninterrupted_one(
    healed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        shrink(embedded.MODEL_DIR, out, ROUGH, progress=stop_at(step))
    assert not out.exists()
    (workspace,) = tmp_path.iterdir()
    assert workspace.name.startswith(".out.unfinished-")
    suffixes = {file.suffix for file in workspace.rglob("*") if file.is_file()}
    assert suffixes == {".safetensors"}
    seen: list[int] = []
    monkeypatch.setattr(Narrowing, "_start", lambda _: pytest.fail("narrowed again"))
    shrink(
        embedded.MODEL_DIR,
        out,
        ROUGH,
        progress=lambda stage, done, total: seen.append(done) if "healing" in stage else None,
    )
    assert seen[0] == (step - 1) // 2 * 2  # every second step is kept
    assert weights(out) == weights(healed)
    assert list(tmp_path.iterdir()) == [out]
    resumed, whole = (
        json.loads((folder / "reports" / "shrink.json").read_text()) for folder in (out, healed)
    )
    assert resumed["healing"]["curve"] == whole["healing"]["curve"]
    assert resumed["sites"] == whole["sites"]
    assert manifest.read(out)["basis"] == manifest.read(healed)["basis"]


def test_streamed_text_goes_on_where_it_was(
    tiny_llama: Callable[[str], Path],
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A file, and what the original says: that is said once, and the weights are the same."""
    monkeypatch.setattr(own_text, "ENDLESS_ROWS", {"cpu": 2})
    monkeypatch.setattr(own_text, "LONGEST", 40)
    mix, said = f"{tiny_text}=2,self", []
    heal = replace(STEPS, batch=2, seqlen=16, text=mix)
    model = tiny_llama("wide-heads")
    options = replace(tiny(tiny_text, heal=heal), other="none")
    batch_of_texts = own_text._batch
    monkeypatch.setattr(
        own_text, "_batch", lambda *asked: said.append(asked[2]) or batch_of_texts(*asked)
    )
    shrink(model, tmp_path / "whole", options)
    whole = list(said)
    assert whole[0].start == distil.FIRST_ROW
    with pytest.raises(KeyboardInterrupt):
        shrink(model, tmp_path / "out", options, progress=stop_at(5))
    shrink(model, tmp_path / "out", options)
    assert said == whole * 2
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    record = manifest.read(tmp_path / "out")["healing"]
    assert (record["text"], record["windows"], record["tokens"]) == (mix, 12, 12 * 16)
    assert not list(tmp_path.glob(".out.unfinished-*"))


def test_another_command_does_not_touch_what_was_stopped(
    tiny_llama: Callable[[str], Path], tiny_text: Path, tmp_path: Path
) -> None:
    model, out = tiny_llama("wide-heads"), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        shrink(model, out, tiny(tiny_text), progress=stop_at(3))
    (workspace,) = tmp_path.glob(".out.unfinished-*")
    before = sorted(workspace.rglob("*"))
    for other in (None, replace(STEPS, steps=7)):
        with pytest.raises(UsageError, match="unfinished work of another command"):
            shrink(model, out, tiny(tiny_text, heal=other))
    assert sorted(workspace.rglob("*")) == before
    shrink(model, out, tiny(tiny_text, heal=None), overwrite=True)
    assert not workspace.exists()


# Requests ---------------------------------------------------------------------------------------


def test_a_number_of_steps_is_read() -> None:
    assert parse_heal("none") == (None, None)
    assert parse_heal("local") == (LocalOptions(), None)
    assert parse_heal("200", seed=3) == (None, HealOptions(steps=200, seed=3))
    assert parse_heal("local+200", seed=3) == (LocalOptions(), HealOptions(steps=200, seed=3))


@pytest.mark.parametrize(
    ("spec", "tokens"), [("300k", 300_000), ("20M", 20_000_000), ("1.5B", 1_500_000_000)]
)
def test_a_number_with_a_suffix_counts_tokens(spec: str, tokens: int) -> None:
    assert parse_heal(spec, samples=9) == (None, HealOptions(tokens=tokens, samples=9))
    assert parse_heal(f"local+{spec}") == (LocalOptions(), HealOptions(tokens=tokens))


@pytest.mark.parametrize("tokens", [1, 5_000, 300_000, 2_000_000, 20_000_000])
@pytest.mark.parametrize("calibration", [64, 500, 2048])
def test_steps_are_as_many_as_the_tokens_ask_for(tokens: int, calibration: int) -> None:
    schedule = HealOptions(tokens=tokens).settled(calibration)
    assert (schedule.steps - 1) * schedule.tokens_per_step < tokens
    assert tokens <= schedule.steps * schedule.tokens_per_step
    assert schedule.length <= min(512, calibration)
    assert 1024 <= schedule.tokens_per_step <= 16384
    assert schedule.steps >= 150 or schedule.tokens_per_step <= 2048
    assert max(schedule.evaluations) == schedule.steps
    assert len(schedule.evaluations) <= 20


def test_steps_are_of_four_whole_windows_of_calibration() -> None:
    schedule = HealOptions(steps=60).settled(2048)
    assert (schedule.steps, schedule.batch, schedule.length) == (60, 4, 2048)
    assert schedule.evaluations == {0, 25, 50, 60}


@pytest.mark.parametrize(
    "spec", ["", "0", "-3", "1.5", "many", "local+", "200steps", "0.5", "2T", "1e6", "M"]
)
def test_a_spec_that_is_none_is_refused_by_the_command_line(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["dotexport", "shrink", "embedded", "-o", str(tmp_path / "out"), "--params", "0.7x"]
    monkeypatch.setattr(
        sys, "argv", [*command, "--calib", "embedded:calibration", f"--heal={spec}"]
    )
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert f"--heal {spec!r} is not known; expected none, local" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"batch": 0},
        {"seqlen": 1},
        {"samples": 0},
        {"rate": 0.0},
        {"rate": float("nan")},
        {"warmup": 1.0},
        {"hidden_weight": -1.0},
        {"every": 0},
        {"precision": "fp16"},
        {"seed": -1},
        {"tokens": 5},
        {"steps": None, "tokens": 0},
        {"steps": None},
    ],
)
def test_options_are_checked_when_made(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=[*wrong][-1]):
        HealOptions(**{"steps": 10} | wrong)


def test_fewer_windows_than_calibration_has_are_refused() -> None:
    windows_NL = torch.zeros(4, 8, dtype=torch.long)
    options = replace(STEPS, samples=3)
    with pytest.raises(UsageError, match="--heal-samples 3 is less than the 4 windows"):
        healing_text(CalibrationText(windows_NL), embedded.MODEL_DIR, TEXT, options)


def test_the_rate_rises_and_falls() -> None:
    schedule = HealOptions(steps=40, warmup=0.1).settled(8)
    factors = [schedule.factor(step) for step in range(40)]
    assert factors[:5] == sorted(factors[:5])
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert 0 < factors[-1] < 0.01
    assert max(factors) == 1.0


def test_rates_fall_with_the_square_of_the_width_and_rise_with_the_root_of_the_tokens() -> None:
    options = HealOptions(steps=1)
    narrow, wide = (options.peak_rate(width, 2048) for width in (192, 576))
    assert narrow == pytest.approx(3e-4, rel=0.01)
    assert narrow == pytest.approx(9 * wide)
    assert options.peak_rate(192, 8192) == pytest.approx(2 * narrow)
    assert options.peak_rate(8192, 2048) == 1e-5  # a square would come to nothing
    assert HealOptions(steps=1, rate=0.5).peak_rate(192, 8192) == 0.5


@pytest.mark.parametrize("size", [1, 4, 6])
def test_other_text_has_the_tokens_that_attention_rests_on(size: int) -> None:
    """One window of four over all steps, the tokens by turns; the same windows otherwise."""
    held_NL = token_windows(embedded.MODEL_DIR, replace(TEXT, samples=1))
    with_none = HealingText(held_NL, held_NL, TEXT.source, embedded.MODEL_DIR)
    schedule = HealOptions(steps=12, batch=size).settled(held_NL.shape[1])
    plain, sown = (
        torch.cat([batches(step) for step in range(12)])
        for batches in (
            text.batches(schedule, 0, own=list)
            for text in (with_none, replace(with_none, sinks=(7, 8)))
        )
    )
    windows, places = torch.nonzero(plain != sown, as_tuple=True)
    assert windows.tolist() == list(range(0, 12 * size, 4))
    assert sown[windows, places].tolist() == ([7, 8] * 12 * size)[: len(windows)]
    assert len(set(places.tolist())) > 1
