"""What verbs do where torchrun started several processes: shrink shares its text between them, and
the others refuse.

The processes are forks of this one with the variables that torchrun sets, so that none of them has
to import torch; one test asks torchrun itself.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dotexport.app.cli import main
from dotexport.axes.plan import SizeOptions
from dotexport.embedded import MODEL_DIR
from dotexport.healing import distil
from dotexport.healing.distil import Healing
from dotexport.narrowing.narrow_options import LocalOptions
from dotexport.narrowing.run import Narrowing
from dotexport.processes.parcels import packed
from dotexport.processes.processes import Several
from dotexport.processes.torchrun import one_process
from dotexport.sizes.budget import plan
from dotexport.sizes.sharing import exchanged_bytes

from .conftest import written

TinyLlama = Callable[[str], Path]
Before = Callable[[int], object]
SIZES = ("--hidden", 40, "--intermediate", 56, "--kv-heads", 1)
QUICK = ("--heal", "none", "--mlp", "select")
PLAIN = ("--samples", 10, "--seqlen", 32, "--other", "none", *SIZES)


@dataclass(frozen=True)
class Ending:
    """Exit code of a process, and all that it said."""

    code: int
    said: str


def torchrun(
    size: int, home: Path, *words: object, before: Before = lambda rank: None
) -> list[Ending]:
    """How a command ends in each of so many processes; `before` is called in each."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    files = [home / f"said-{rank}" for rank in range(size)]
    command = ["dotexport", *map(str, words)]
    started = [
        fork.Process(target=_one_of, args=(rank, size, port, file, command, before))
        for rank, file in enumerate(files)
    ]
    for process in started:
        process.start()
    try:
        for process in started:
            process.join(300)
        codes = [process.exitcode for process in started]
    finally:
        for process in started:
            process.kill()
    said = [file.read_text() for file in files]
    for file in files:
        file.unlink()
    return [Ending(-1 if code is None else code, of) for code, of in zip(codes, said, strict=True)]


def _one_of(
    rank: int, size: int, port: int, file: Path, command: list[str], before: Before
) -> None:
    os.environ |= {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ["MASTER_PORT"] = str(port)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, closefd=False)  # type: ignore[misc]  # noqa: SIM115
    sys.argv = command
    before(rank)
    main()


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = " ".join(f"w{n}" for n in drawn(600))
    return written(tmp_path_factory.mktemp("words") / "text.txt", text)


def drawn(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 87, size=count)


def asked(model: Path, out: Path, text: Path, *options: object) -> tuple[object, ...]:
    return ("shrink", model, "-o", out, "--calib", text, *PLAIN, *options)


def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "reports" / "shrink.json").read_text())
    return found


def test_what_several_narrow_is_what_one_narrows(
    tiny_llama: TinyLlama, words: Path, tmp_path: Path
) -> None:
    """Tables and readers, whose rows are the neurons that stay, by the order of float32 products
    and sums through three layers: 1e-4 of the largest entry. What a writer does with directions
    that its inputs hardly have is open, so of writers logits tell, on text of the same kind."""
    hard = ("--mlp", "dot", "--heads", "dot", "--ridge", 0.01, "--heal", "none")
    for size in (1, 2, 4):
        command = asked(tiny_llama("wide-heads"), tmp_path / f"{size}", words, *hard)
        endings = torchrun(size, tmp_path, *command)
        assert [ending.code for ending in endings] == [0] * size, endings
        assert not any(ending.said for ending in endings[1:])
    one = load_file(tmp_path / "1" / "hf" / "model.safetensors")
    wanted = report(tmp_path / "1")
    for size in (2, 4):
        found = load_file(tmp_path / f"{size}" / "hf" / "model.safetensors")
        assert found.keys() == one.keys()
        writers = ("o_proj.weight", "down_proj.weight")
        assert apart(found, {n: t for n, t in one.items() if not n.endswith(writers)}) < 1e-4
        gap = (logits(tmp_path / f"{size}" / "hf") - logits(tmp_path / "1" / "hf")).abs().max()
        assert gap < 1e-3 * logits(tmp_path / "1" / "hf").abs().max()
        told = report(tmp_path / f"{size}")
        assert told["sizes"] == wanted["sizes"]
        assert [s.get("kept") for s in told["sites"]] == [s.get("kept") for s in wanted["sites"]]
        assert told["held_out_kl"] == pytest.approx(wanted["held_out_kl"], rel=1e-4)


def test_several_choose_the_experts_that_one_chooses(
    tiny_model: Callable[..., Path], words: Path, tmp_path: Path
) -> None:
    """An expert is judged by its tokens in all windows, and fitted on these. Which neurons of it
    stay is a choice among near equals on so few of them, so all of them do here."""
    mixture = {"num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    model = tiny_model(model_type="qwen3_moe", num_hidden_layers=2, norm_topk_prob=True, **mixture)
    sizes = ("--hidden", 40, "--experts", 6, "--ridge", 0.01, "--heal", "none", "--basis", "pca")
    plain = ("--calib", words, "--samples", 10, "--seqlen", 32, "--other", "none")
    for size in (1, 2):
        command = ("shrink", model, "-o", tmp_path / f"{size}", *plain, *sizes)
        endings = torchrun(size, tmp_path, *command)
        assert [ending.code for ending in endings] == [0] * size, endings
    one, two = (report(tmp_path / name) for name in ("1", "2"))
    chosen, others = ([s["experts"] for s in of["sites"] if "experts" in s] for of in (one, two))
    assert chosen == others
    assert [len(experts) for experts in chosen] == [6, 6]
    assert two["held_out_kl"] == pytest.approx(one["held_out_kl"], rel=1e-4)
    ours, theirs = (logits(tmp_path / name / "hf") for name in ("2", "1"))
    assert (ours - theirs).abs().max() < 1e-3 * theirs.abs().max()


def test_healing_takes_the_steps_of_one_process(
    tiny_llama: TinyLlama, words: Path, tmp_path: Path
) -> None:
    """Adam divides a gradient by its own size: where it is nothing but rounding, an entry goes
    either way, so tensors are compared as a whole, and to 1e-2. With steps on a share of the tokens
    the refits behind them are off by their own size."""
    for size in (1, 2):
        command = asked(tiny_llama("wide-heads"), tmp_path / f"{size}", words, "--ridge", 0.01)
        endings = torchrun(size, tmp_path, *command, before=_healed_briefly)
        assert [ending.code for ending in endings] == [0] * size, endings
    one, two = (load_file(tmp_path / n / "hf" / "model.safetensors") for n in ("1", "2"))
    assert max(float((two[n] - t).norm() / t.norm()) for n, t in one.items()) < 1e-2
    sites, others = (report(tmp_path / name)["sites"] for name in ("1", "2"))
    healed = [[s["error_after"] for s in of if "error_after" in s] for of in (sites, others)]
    assert len(healed[0]) == 6
    assert healed[0] == pytest.approx(healed[1], rel=1e-3)


DISTILLED = ("--heal", 40, "--heal-precision", "fp32", "--ridge", 0.01, "--basis", "pca")
# All of them: which ones stay is a choice among near equals here, that rounding may decide.
NEURONS = ("--intermediate", 88)


@pytest.mark.parametrize(
    ("kind", "sizes", "close"), [("wide-heads", (2, 4), 1e-3), ("tied-bf16", (2,), 1e-2)]
)
def test_several_distil_to_what_one_does(
    kind: str,
    sizes: tuple[int, ...],
    close: float,
    tiny_llama: TinyLlama,
    words: Path,
    tmp_path: Path,
) -> None:
    """On text that the first process reads: from closed forms that agree the curve does, less so
    where these are stored in bfloat16, and weights as a whole to 1e-2 as above. Untied and tied
    heads, whose gradients come by different ways; several compute their activations twice."""
    text = written(tmp_path / "much.txt", " ".join(f"w{n}" for n in drawn(8000)))
    for size in (1, *sizes):
        options = (*DISTILLED, *NEURONS, "--heal-text", text)
        command = asked(tiny_llama(kind), tmp_path / f"{size}", words, *options)
        endings = torchrun(size, tmp_path, *command, before=_short_of_memory)
        assert [ending.code for ending in endings] == [0] * size, endings
        assert not any(ending.said for ending in endings[1:])
    one, wanted = load_file(tmp_path / "1" / "hf" / "model.safetensors"), report(tmp_path / "1")
    before, after = wanted["healing"]["kl"]
    assert after < 0.9 * before  # there is something to agree about
    for size in sizes:
        found = load_file(tmp_path / f"{size}" / "hf" / "model.safetensors")
        assert found.keys() == one.keys()
        assert max(float((found[n] - t).norm() / t.norm()) for n, t in one.items()) < 1e-2
        healing = report(tmp_path / f"{size}")["healing"]
        assert healing["tokens"] == wanted["healing"]["tokens"]
        for ours, theirs in zip(healing["curve"], wanted["healing"]["curve"], strict=True):
            assert ours == pytest.approx(theirs, rel=close)


def test_several_teach_a_model_that_lost_tokens_to_spell_them(tmp_path: Path) -> None:
    """Nothing is narrowed, so that both begin with the same bits; the rest as above."""
    for size in (1, 2):
        command = ("shrink", MODEL_DIR, "-o", tmp_path / f"{size}", "--vocab", 700)
        command += (
            "--calib",
            "embedded:calibration",
            "--samples",
            8,
            "--seqlen",
            32,
            "--other",
            "none",
        )
        options = ("--heal", 4, "--heal-precision", "fp32", "--device", "cpu")
        endings = torchrun(size, tmp_path, *command, *options)
        assert [ending.code for ending in endings] == [0] * size, endings
    one, two = (report(tmp_path / name)["healing"] for name in ("1", "2"))
    assert two["tokens"] == one["tokens"]
    assert one["kl"][1] < one["kl"][0]
    for ours, theirs in zip(two["curve"], one["curve"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_several_distil_a_mixture_on_what_the_original_says(
    tiny_model: Callable[..., Path], words: Path, tmp_path: Path
) -> None:
    """Experts are fused in memory and apart in files; text is said by the first process. To 1e-2:
    a token near a tie may go to another expert."""
    mixture = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    model = tiny_model(model_type="qwen3_moe", num_hidden_layers=2, norm_topk_prob=True, **mixture)
    options = ("--samples", 10, "--seqlen", 32, "--other", "none", "--hidden", 32)
    options += (*DISTILLED, "--heal", 12, "--heal-text", "self")
    for size in (1, 2):
        out = tmp_path / f"{size}"
        endings = torchrun(size, tmp_path, "shrink", model, "-o", out, "--calib", words, *options)
        assert [ending.code for ending in endings] == [0] * size, endings
    one, two = (report(tmp_path / name)["healing"]["curve"] for name in ("1", "2"))
    for ours, theirs in zip(two, one, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-2)


def _short_of_memory(rank: int) -> None:
    distil.needs_recomputing = lambda *model: int(os.environ["WORLD_SIZE"]) > 1


def test_several_that_are_killed_while_they_distil_go_on_with_the_same_bits(
    tiny_llama: TinyLlama, words: Path, tmp_path: Path
) -> None:
    """With bfloat16 passes: what is kept is float32."""
    model = tiny_llama("wide-heads")
    options = ("--heal", 52, "--heal-precision", "bf16", "--ridge", 0.01, "--basis", "pca")
    command = asked(model, tmp_path / "right", words, *options)
    assert torchrun(2, tmp_path, *command)[0].code == 0
    right = (tmp_path / "right" / "hf" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "right")
    command = asked(model, tmp_path / "out", words, *options)
    first, second = torchrun(2, tmp_path, *command, before=_killed_in_step_30)
    assert (first.code, second.code) == (1, -signal.SIGKILL)
    assert first.said.count("another process ended") == 1
    first, second = torchrun(2, tmp_path, *command, before=_from_step_25)
    assert (first.code, second.code) == (0, 0), (first, second)
    assert (tmp_path / "out" / "hf" / "model.safetensors").read_bytes() == right


def _from_step_25(rank: int) -> None:
    advance = Healing.advance

    def advanced(self: Healing) -> bool:
        assert self.course.step >= 25
        return advance(self)

    Healing.advance = advanced  # type: ignore[method-assign]


def _killed_in_step_30(rank: int) -> None:
    advance = Healing.advance

    def advanced(self: Healing) -> bool:
        if rank == 1 and self.course.step == 30:
            os.kill(os.getpid(), signal.SIGKILL)
        return advance(self)

    Healing.advance = advanced  # type: ignore[method-assign]


def _healed_briefly(rank: int) -> None:
    LocalOptions.num_steps = lambda self, tokens: 6  # type: ignore[method-assign]


def logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        found: Tensor = model(input_ids=torch.from_numpy(3 + drawn(32))[None]).logits
    return found


def apart(some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """The largest difference, in units of a tensor's largest entry."""
    return max(float((some[n] - t).abs().max() / t.abs().max()) for n, t in others.items())


def test_plan_counts_what_processes_send_each_other(
    tiny_llama: TinyLlama, words: Path, tmp_path: Path
) -> None:
    """A run of shrink's defaults with two texts, whose tensors were counted as they were sent: to a
    tenth, for there are tokens and words besides."""
    model = tiny_llama("wide-heads")
    text = written(tmp_path / "text.txt", " ".join(f"w{n % 7} w{n % 11}" for n in range(400)))
    options = ("--samples", 16, "--seqlen", 32, "--other", text, *SIZES, "--basis", "pca")
    command = ("shrink", model, "-o", tmp_path / "out", "--calib", words, *options)
    endings = torchrun(2, tmp_path, *command, before=partial(_counting, tmp_path / "sent"))
    assert [ending.code for ending in endings] == [0, 0], endings
    sent = sum(map(int, (tmp_path / "sent").read_text().split()))
    sizes = SizeOptions(hidden_size=40, intermediate_size=56, num_key_value_heads=1)
    decided = plan(json.loads((model / "config.json").read_text()), sizes)
    assert exchanged_bytes(decided, samples=16, seqlen=32) == pytest.approx(sent, rel=0.1)


def _counting(file: Path, rank: int) -> None:
    """What is added up, and what the first process tells, one number for each."""
    if rank != 0:
        return
    add, tell = Several.sum, Several._from

    def note(tensors: Iterable[Tensor]) -> None:
        with file.open("a") as lines:
            print(sum(t.nbytes for t in tensors), file=lines)

    def added(self: Several, *tensors: Tensor) -> None:
        note(tensors)
        add(self, *tensors)

    def told(self: Several, by: int, value: Any) -> Any:
        note(packed(value)[1] if by == 0 else [])
        return tell(self, by, value)

    Several.sum, Several._from = added, told  # type: ignore[method-assign]


def test_sizes_that_are_measured_and_layers_that_leave_are_the_same(
    tiny_llama: TinyLlama, words: Path, tmp_path: Path
) -> None:
    """With a second text, all bases, and ridges that are chosen: these and the sizes are the same,
    and so is the cost; weights that hardly matter may be anything below a ridge of 1e-6."""
    more = (
        "--params",
        "0.6x",
        "--axes",
        "hidden_size,num_hidden_layers",
        "--heal",
        "none",
        "--basis",
        "auto",
    )
    plain = ("--samples", 10, "--seqlen", 32, "--other", words)
    text = written(tmp_path / "text.txt", " ".join(f"w{n % 7} w{n % 11}" for n in range(200)))
    for size in (1, 2):
        out = ("-o", tmp_path / f"{size}", "--calib", text)
        endings = torchrun(size, tmp_path, "shrink", tiny_llama("biased"), *out, *plain, *more)
        assert [ending.code for ending in endings] == [0] * size, endings
    one, two = (report(tmp_path / name) for name in ("1", "2"))
    assert len(one["kept_layers"]) < 3
    for same in ("sizes", "kept_layers", "calibration_windows"):
        assert one[same] == two[same]
    assert one["basis"]["tried"] == pytest.approx(two["basis"]["tried"], rel=1e-3)
    for cost in ("held_out_kl", "other_kl", "held_out_perplexity_ratio"):
        assert one[cost] == pytest.approx(two[cost], rel=1e-3)


def test_a_killed_process_ends_all_and_the_same_command_goes_on(
    tiny_llama: TinyLlama, words: Path, tmp_path: Path
) -> None:
    """To the same bytes as a run that nobody disturbed."""
    model = tiny_llama("wide-heads")
    assert torchrun(2, tmp_path, *asked(model, tmp_path / "right", words, *QUICK))[0].code == 0
    right = (tmp_path / "right" / "hf" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "right")
    command = asked(model, tmp_path / "out", words, *QUICK)
    first, second = torchrun(2, tmp_path, *command, before=_killed_in_layer_2)
    assert (first.code, second.code) == (1, -signal.SIGKILL)
    assert first.said.count("another process ended") == 1
    assert not (tmp_path / "out").exists()
    (kept,) = tmp_path.glob(".out.*")
    assert (kept / "layer-0000.safetensors").is_file()
    first, second = torchrun(2, tmp_path, *command)
    assert (first.code, second.code) == (0, 0), (first, second)
    assert "going on at layer 2 of 3" in first.said
    assert (tmp_path / "out" / "hf" / "model.safetensors").read_bytes() == right
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def _killed_in_layer_2(rank: int) -> None:
    layer = Narrowing._layer

    def narrowed(self: Narrowing, number: int, *given: Any) -> None:
        if rank == 1 and number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        layer(self, number, *given)

    Narrowing._layer = narrowed  # type: ignore[method-assign]


def test_whoever_fails_first_says_why_and_nobody_else(
    tiny_llama: TinyLlama, words: Path, tmp_path: Path
) -> None:
    def before(rank: int) -> None:
        def broken(self: Narrowing, *given: Any) -> None:
            raise MemoryError

        if rank == 1:
            Narrowing._layer = broken  # type: ignore[method-assign]

    command = asked(tiny_llama("wide-heads"), tmp_path / "out", words)
    first, second = torchrun(2, tmp_path, *command, before=before)
    assert (first.code, second.code) == (1, 1)
    assert "process 1 of 2" in second.said
    assert "memory ran out" in second.said
    assert "error" not in first.said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words_of"),
    [
        (("--samples", 3), ("4 processes", "3 windows", "--samples")),
        (("--device", "cuda:0"), ("one GPU for 4 processes", "--device cuda")),
        (("--hidden", 41), ()),
    ],
    ids=["fewer windows", "one GPU", "sizes"],
)
def test_what_they_cannot_share_is_refused_once(
    options: tuple[object, ...],
    words_of: tuple[str, ...],
    tiny_llama: TinyLlama,
    words: Path,
    tmp_path: Path,
) -> None:
    command = asked(tiny_llama("wide-heads"), tmp_path / "out", words, *options)
    first, *others = torchrun(4, tmp_path, *command)
    assert first.code in (2, 5), first
    assert first.said.count("error:") == 1
    for word in words_of:
        assert word in " ".join(first.said.split())
    # The store of these forks is the first one's, and torch has words for its end.
    assert all(other.code != 0 and "error:" not in other.said for other in others), others
    assert list(tmp_path.iterdir()) == []


def test_torchrun_is_heard_by_verbs_that_run_in_one_process() -> None:
    """The launcher itself, whose variables the tests above only pretend."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launch, "-m", "dotexport", "targets"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = " ".join(done.stderr.split())
    assert done.returncode != 0
    assert said.count("dotexport targets runs in one process, and torchrun started 2") == 1
    assert done.stdout == ""


@pytest.mark.parametrize("world", [{}, {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "1"}])
def test_one_process_is_let_through(world: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And so is a size that others than torchrun have set."""
    for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    place = {"RANK": "0", "LOCAL_RANK": "0"}
    for name, value in (world | place if world else {"WORLD_SIZE": "4"}).items():
        monkeypatch.setenv(name, value)
    one_process("dotexport targets")
