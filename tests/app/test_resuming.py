"""A shrink that was stopped goes on where it was: the same bytes as one that nobody disturbed, no
finished step made twice, and nothing taken that another command, another text or damage left."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dotexport import embedded
from dotexport.app import resuming
from dotexport.app.resuming import decided_once, workspace_of
from dotexport.app.shrink_options import ShrinkOptions
from dotexport.app.shrinking import shrink
from dotexport.axes.plan import SizeOptions
from dotexport.bench.tables.forked import KILLED
from dotexport.bench.tables.forked import dotexport as in_a_fork
from dotexport.errors import UsageError
from dotexport.healing.heal_options import HealOptions
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.origin import describe_source
from dotexport.models.text_options import TextOptions
from dotexport.narrowing.narrow_options import LocalOptions, NarrowOptions
from dotexport.narrowing.run import Narrowing
from dotexport.narrowing.streams import Streams
from dotexport.sizes.budget import plan
from dotexport.storage.workspace import Workspace
from dotexport.vocabulary.vocabulary_options import VocabularyOptions

from ..conftest import randomise
from .conftest import Command

LAYERS = 4
TEXT = TextOptions(source="text", samples=4, seqlen=32)
QUICK = NarrowOptions(local=LocalOptions(least_steps=4, passes=0.1, tokens=32))
PLAIN = ShrinkOptions(
    sizes=SizeOptions(hidden_size=32, intermediate_size=64), text=TEXT, narrow=QUICK
)
COMMANDS = {
    "local healing": PLAIN,
    "no refit of the stream's width": replace(PLAIN, sizes=SizeOptions(intermediate_size=64)),
    "all bases, no healing": replace(PLAIN, narrow=NarrowOptions(basis="auto", local=None)),
    "vocabulary, layers, measured": replace(
        PLAIN,
        sizes=SizeOptions(params="0.3x", axes="intermediate_size,num_hidden_layers"),
        vocabulary=VocabularyOptions(vocab=700),
        allocate="measured",
    ),
    "distilled, fewer layers": replace(
        PLAIN,
        sizes=SizeOptions(hidden_size=32, num_hidden_layers=3),
        heal=HealOptions(steps=3, every=1, precision="fp32"),
    ),
}


class StopError(Exception):
    """What ends a run in these tests."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with the tokenizer of the model that ships inside."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model") / "m"
    rows = json.loads((embedded.MODEL_DIR / "config.json").read_text("utf-8"))["vocab_size"]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=192,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        vocab_size=rows,
        tie_word_embeddings=False,
    )
    randomise(LlamaForCausalLM(config)).to(torch.bfloat16).save_pretrained(folder)
    for file in embedded.MODEL_DIR.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n<|endoftext|>\n".join(embedded.calibration_text()[:3]), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def commands(text: str) -> dict[str, ShrinkOptions]:
    reads = replace(TEXT, source=text)
    return {name: replace(options, text=reads) for name, options in COMMANDS.items()}


@pytest.fixture(scope="module")
def whole(
    model: Path, commands: dict[str, ShrinkOptions], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Name in COMMANDS -> its output where nobody disturbed it, made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = shrink(model, tmp_path_factory.mktemp("whole") / "o", commands[name]).out
        return made[name]

    return make


def content(out: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """All bytes of the checkpoint, and all figures of the report but for times."""
    report = json.loads((out / "reports" / "shrink.json").read_text("utf-8"))
    del report["seconds"], report["out"]
    for rate in ("seconds", "tokens_per_second"):
        report.get("healing", {}).pop(rate, None)
    return {file.name: file.read_bytes() for file in (out / "hf").iterdir()}, report


@dataclass
class Watch:
    """What is kept and made while it looks."""

    saved: list[str] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    seen = Watch()
    save, layer = Workspace.save, Narrowing._layer

    def saving(self: Workspace, step: str, *given: Any) -> None:
        if self.folder is not None:
            seen.saved.append(step)
        save(self, step, *given)

    def narrowing(self: Narrowing, number: int, place: int, *given: Any) -> None:
        if self.workspace.folder is not None:  # not a rehearsal
            seen.layers.append(place)
        layer(self, number, place, *given)

    monkeypatch.setattr(Workspace, "save", saving)
    monkeypatch.setattr(Narrowing, "_layer", narrowing)
    return seen


@pytest.mark.parametrize("name", COMMANDS)
def test_stopped_behind_every_step_it_makes_none_twice_and_ends_with_the_same_bytes(
    name: str,
    model: Path,
    commands: dict[str, ShrinkOptions],
    whole: Callable[[str], Path],
    tmp_path: Path,
    watch: Watch,
) -> None:
    right, out, before = content(whole(name)), tmp_path / "out", None
    watch.saved.clear()
    with pytest.MonkeyPatch.context() as patch:
        save = Workspace.save

        def once(self: Workspace, step: str, *given: Any) -> None:
            save(self, step, *given)
            if self.folder is not None:
                raise StopError

        patch.setattr(Workspace, "save", once)
        while before != len(watch.saved):
            before = len(watch.saved)
            try:
                shrink(model, out, commands[name])
            except StopError:
                assert not out.exists()
    # Of these every figure is kept as it is found.
    figures = {"cuts", "closer-cuts", "depth", "distillation"}
    report = right[1]
    asked = report.get("allocation", {"curves": [], "checked": []})
    points = sum(len(curve["sizes"]) - 1 for curve in asked["curves"])
    assert bool(points) <= watch.saved.count("cuts") <= points
    assert watch.saved.count("closer-cuts") == len(asked["checked"])
    gone = LAYERS - len(report["kept_layers"])
    assert gone <= watch.saved.count("depth") <= LAYERS - 1
    steps = [step for step in watch.saved if step not in figures]
    assert len(steps) == len(set(steps))
    assert {"embedding", "layer-0000", "head"} <= set(steps)
    assert content(out) == right
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("name", ["local healing", "vocabulary, layers, measured"])
def test_stopped_anywhere_it_loses_one_layer_at_most(
    name: str,
    model: Path,
    commands: dict[str, ShrinkOptions],
    whole: Callable[[str], Path],
    tmp_path: Path,
    watch: Watch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Anywhere: in front of one of the passes over the text, drawn by seed."""
    right, out, rng, stops = content(whole(name)), tmp_path / "out", random.Random(0), 0
    watch.layers.clear()
    left = [rng.randrange(5, 12)]
    advance = Streams.advance_original

    def advancing(self: Streams, step: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            left[0] = rng.randrange(5, 12)
            raise StopError
        advance(self, step)

    monkeypatch.setattr(Streams, "advance_original", advancing)
    while not out.exists():
        try:
            shrink(model, out, commands[name])
        except StopError:
            stops += 1
            assert stops < 40
    assert stops >= 2
    depth = len(set(watch.layers))
    assert depth >= 2
    assert len(watch.layers) <= depth + stops
    assert content(out) == right
    assert list(tmp_path.iterdir()) == [out]


def test_killed_at_random_moments_the_same_command_makes_the_same_bytes(
    model: Path, text: str, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    asked = ("shrink", model, "-o", home / "out", "--calib", text, "--samples", 4)
    command = (*asked, "--seqlen", 32, "--hidden", 32, "--intermediate", 64)
    started = time.monotonic()
    assert in_a_fork(*command).code == 0
    lasts, right = time.monotonic() - started, content(home / "out")
    shutil.rmtree(home / "out")
    rng = random.Random(0)
    for _ in range(3):
        ending = in_a_fork(*command, kill_after=lasts * rng.uniform(0.3, 0.6))
        if ending.code != KILLED or (home / "out").exists():
            break  # It was sooner than the first: whole, as is compared below.
    if not (home / "out").exists():
        last = in_a_fork(*command)
        assert last.code == 0, last.said
    assert content(home / "out") == right
    assert [entry.name for entry in home.iterdir()] == ["out"]


def stopped_behind(step: str, model: Path, out: Path, options: ShrinkOptions) -> Path:
    """The workspace of a run that ended when it had kept this step."""
    save = Workspace.save

    def saving(self: Workspace, name: str, *given: Any) -> None:
        save(self, name, *given)
        if name == step:
            raise StopError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workspace, "save", saving)
        with pytest.raises(StopError):
            shrink(model, out, options)
    (folder,) = out.parent.glob(f".{out.name}.unfinished-*")
    return folder


@pytest.mark.parametrize("step", ["basis-learned", "embedding", "layer-0001"])
def test_a_damaged_step_and_what_comes_behind_it_are_made_again(
    step: str,
    model: Path,
    commands: dict[str, ShrinkOptions],
    whole: Callable[[str], Path],
    tmp_path: Path,
    watch: Watch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    right, out = content(whole("local healing")), tmp_path / "out"
    plain = commands["local healing"]
    file = stopped_behind("layer-0002", model, out, plain) / f"{step}.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-3] ^= 1
    file.write_bytes(damaged)
    watch.layers.clear()
    shrink(model, out, plain)
    assert f"{file} is damaged" in caplog.text
    assert content(out) == right
    assert watch.layers == {"layer-0001": [1, 2, 3], "embedding": [0, 1, 2, 3]}.get(step, [3])


def test_steps_of_another_text_are_not_taken(
    model: Path, tmp_path: Path, watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    file, out = tmp_path / "text.txt", tmp_path / "out"
    options = replace(PLAIN, text=replace(TEXT, source=str(file)))
    texts = embedded.calibration_text()
    file.write_text(texts[0] * 3, encoding="utf-8")
    stopped_behind("layer-0002", model, out, options)
    file.write_text(texts[1] * 3, encoding="utf-8")
    watch.layers.clear()
    shrink(model, out, options)
    assert "of other inputs: this step is made again" in caplog.text
    assert watch.layers == [0, 1, 2, 3]
    assert content(out) == content(shrink(model, tmp_path / "afresh", options).out)


def test_sizes_that_were_timed_are_decided_once(model: Path, tmp_path: Path) -> None:
    config = Checkpoint.open(model).config
    first, other = (plan(config, SizeOptions(intermediate_size=n)) for n in (64, 96))
    workspace = Workspace.of(tmp_path / "out", {})
    assert decided_once(first, workspace) == first
    assert decided_once(other, workspace) == first


def test_no_resume_starts_afresh(
    model: Path,
    commands: dict[str, ShrinkOptions],
    whole: Callable[[str], Path],
    tmp_path: Path,
    watch: Watch,
) -> None:
    right, out = content(whole("local healing")), tmp_path / "out"
    plain = commands["local healing"]
    other = stopped_behind("layer-0002", model, out, commands["all bases, no healing"])
    with pytest.raises(UsageError, match=rf"{other} holds the unfinished .* --no-resume"):
        shrink(model, out, plain)
    other.rename(tmp_path / "elsewhere")
    stopped_behind("layer-0002", model, out, plain)
    (tmp_path / "elsewhere").rename(other)
    watch.layers.clear()
    shrink(model, out, plain, resume=False)
    assert watch.layers == [0, 1, 2, 3]
    assert content(out) == right
    assert list(tmp_path.iterdir()) == [out]


def test_the_command_line_says_where_it_goes_on(
    dotexport: Command, model: Path, text: str, tmp_path: Path, watch: Watch
) -> None:
    out = tmp_path / "out"
    asked = ("shrink", model, "-o", out, "--calib", text, "--samples", 4, "--seqlen", 32)
    command = (*asked, "--intermediate", 64, "--heal", "none")
    save = Workspace.save

    def interrupted(self: Workspace, step: str, *given: Any) -> None:
        save(self, step, *given)
        if step == "layer-0002":
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workspace, "save", interrupted)
        stopped = dotexport(*command)
    (folder,) = tmp_path.iterdir()
    assert stopped.code == 130
    assert f"interrupted: what was finished is kept in {folder} (" in stopped.err
    assert "run the same command again and it goes on from there" in stopped.err
    watch.layers.clear()
    again = dotexport(*command)
    assert again.code == 0, again.err
    assert "going on at layer 4 of 4" in again.err
    assert watch.layers == [3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workspace, "save", interrupted)
        assert dotexport(*command, "--overwrite").code == 130
    watch.layers.clear()
    assert dotexport(*command, "--overwrite", "--no-resume").code == 0
    assert watch.layers == [0, 1, 2, 3]
    assert list(tmp_path.iterdir()) == [out]


def test_what_makes_another_command(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options, the original's files, device, dtype of passes, dotexport's and torch's releases."""
    out, original, cpu = tmp_path / "out", Checkpoint.open(model), torch.device("cpu")

    def place(
        checkpoint: Checkpoint = original,
        options: ShrinkOptions = PLAIN,
        device: torch.device = cpu,
        passes: torch.dtype = torch.float32,
    ) -> Path | None:
        said = describe_source(checkpoint)
        return workspace_of(out, checkpoint, said, options, device, passes).folder

    def changed(name: str) -> Checkpoint:
        copy = shutil.copytree(model, tmp_path / name.partition(".")[0])
        with (copy / name).open("r+b") as stream:
            stream.seek(-2, 2)
            byte = stream.read(1)
            stream.seek(-2, 2)
            stream.write(bytes([byte[0] ^ 1]))
        return Checkpoint(
            copy, original.config, {n: copy / f.name for n, f in original.files.items()}
        )

    mine = place()
    assert mine == place()
    others = [place(options=options) for name, options in COMMANDS.items() if options != PLAIN]
    others += [place(changed(name)) for name in ("model.safetensors", "tokenizer.json")]
    others += [place(device=torch.device("cuda:0")), place(passes=torch.bfloat16)]
    monkeypatch.setattr(resuming, "__version__", "0.0.0")
    others.append(place())
    monkeypatch.undo()
    monkeypatch.setattr(resuming, "version", lambda name: "0")
    others.append(place())
    assert len({mine, *others}) == len(others) + 1
