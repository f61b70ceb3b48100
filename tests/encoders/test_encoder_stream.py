"""A narrower stream of a text encoder: what is there twice leaves without a trace, embeddings come
back to the original's width, heads answer as before, and what cannot be narrow is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

from dotexport.encoders import encoder_stream
from dotexport.encoders.encoder_folder import Encoder, describe_source, open_encoder
from dotexport.encoders.encoder_sizes import Sizes, num_parameters, parameters_after
from dotexport.encoders.encoder_walk import Walked, walk
from dotexport.encoders.pooling import Pooling, embed, mean_cosine, pooling_of
from dotexport.encoders.sentences import Batch
from dotexport.errors import CheckpointError, UnsupportedModelError, UsageError

from .command import run

Made = Callable[[Path, str], Path]
HEADS = ["roberta", "xlm-roberta", "distilbert", "modernbert-SequenceClassification"]
HEADS += ["modernbert-TokenClassification", "modernbert-QuestionAnswering"]


def some_text() -> list[Batch]:
    dice = torch.Generator().manual_seed(0)
    made = []
    for number in range(12):
        tokens_NL = torch.randint(4, 200, (16, 12), generator=dice)
        mask_NL = (torch.arange(12) < torch.randint(5, 13, (16, 1), generator=dice)).long()
        inputs = {"input_ids": tokens_NL * mask_NL, "attention_mask": mask_NL}
        made.append(Batch(inputs, held=number % 4 == 3))
    return made


def twice(rows: Tensor, *, dim: int = 0) -> Tensor:
    """The second half is what the first one is."""
    first = rows.chunk(2, dim)[0]
    return torch.cat([first, first], dim)


@torch.no_grad()
def say_everything_twice(encoder: Encoder) -> None:
    """Every dimension of the stream, every head, and every output of a head's dense layer."""
    kind, base = encoder.kind, encoder.base
    inside = set(encoder.layers.modules())
    linear = [part for part in encoder.model.modules() if isinstance(part, nn.Linear)]
    dense = [part for part in linear if part not in inside and part.out_features == 24]
    for part in encoder.model.modules():
        if isinstance(part, nn.Embedding):
            part.weight.copy_(twice(part.weight, dim=1))
        elif isinstance(part, nn.LayerNorm) or part in dense:
            for values in part.parameters():
                values.copy_(twice(values))
    for layer in base.get_submodule(kind.stack):  # type: ignore[union-attr]
        for name in encoder_stream.attention_readers(layer, kind):
            for values in layer.get_submodule(name).parameters():
                blocks = values.split(24)
                values.copy_(torch.cat([twice(block) for block in blocks]))
        for name in (kind.attention, kind.writer):
            for values in layer.get_submodule(name).parameters():
                values.copy_(twice(values))


def narrowed(encoder: Encoder, some: list[Batch]) -> Walked:
    kept = encoder_stream.leaving(encoder, some, 12).kept(24, 12)
    return walk(encoder, some, range(len(encoder.layers)), 64, "dot", dimensions=kept)


@torch.no_grad()
def answers(model: nn.Module, batch: Batch) -> Tensor:
    made = model(**batch.inputs)
    found = [made[name] for name in ("logits", "start_logits", "end_logits") if name in made]
    return torch.cat([x[batch.mask] if len(x) and x.shape[:2] == (16, 12) else x for x in found])


@pytest.mark.parametrize("name", ["bert", "modernbert", *HEADS])
def test_what_is_said_twice_is_said_once(name: str, made: Made, tmp_path: Path) -> None:
    """Half of the dimensions and of the heads leave; twice the same has the mean and the variance
    that it has once, so that no norm sees a difference."""
    encoder, some = open_encoder(made(tmp_path / "model", name)), some_text()
    held = some[-1]

    def gaps() -> list[float]:
        walked = narrowed(encoder, some)
        assert walked.back is not None
        pooling, found = pooling_of(encoder), []
        wanted = embed(encoder.base, [held], pooling)
        base: Any = walked.model.base_model
        found.append(float((embed(base, [held], pooling, walked.back) - wanted).norm() / 4))
        if name in HEADS:
            said, expected = answers(walked.model, held), answers(encoder.model, held)
            found.append(float((said - expected).norm() / expected.norm()))
        return found

    assert min(gaps()) > 3e-2  # nothing is there twice yet
    say_everything_twice(encoder)
    # The ridge that held-out tokens prefer and float32 sums leave about 1e-5.
    assert max(gaps()) < 2e-3


def test_nobody_repairs_a_selection(made: Made, tmp_path: Path) -> None:
    encoder, some = open_encoder(made(tmp_path / "model", "bert")), some_text()
    kept = encoder_stream.leaving(encoder, some, 18).kept(24, 18)
    far = {}
    for method in ("select", "obs"):
        model = walk(encoder, some, range(3), 64, method, dimensions=kept).model
        last = encoder_stream.Last.of(encoder, model, some[-1:], kept)
        [ours], [theirs], mask = last.ours, last.theirs, some[-1].mask
        far[method] = float((ours - theirs[..., kept])[mask].detach().norm())
    assert far["obs"] < 0.9 * far["select"]


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_norm_follows_what_it_is_to_say(*, bias: bool) -> None:
    """Whatever of it is scale and shift of single dimensions."""
    torch.manual_seed(0)
    theirs, ours = (nn.LayerNorm(12, bias=bias) for _ in range(2))
    for values in theirs.parameters():
        values.normal_()
    pairs = [(x_TK, theirs(x_TK)) for x_TK in torch.randn(3, 50, 12)]
    encoder_stream.follow(ours, pairs)
    for found, wanted in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(found, wanted, atol=1e-5)  # float32


@pytest.fixture(scope="module")
def slim(
    sentence_transformer: Path, text: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A folder of sentence-transformers with three of four heads."""
    out = tmp_path_factory.mktemp("slim") / "out"
    size = ("--hidden", 18, "--intermediate", 48, "--calib", text)
    return out, run("shrink", sentence_transformer, "-o", out, *size)


def test_embeddings_come_back_to_the_width_of_the_original(
    slim: tuple[Path, dict[str, Any]], sentence_transformer: Path, text: str
) -> None:
    out, shrunk = slim
    loaded, found = transformers.BertModel.from_pretrained(out / "hf", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    config = loaded.config
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (18, 3, 48)
    modules = json.loads((out / "hf/modules.json").read_text(encoding="utf-8"))
    words = [str(module["type"]).rpartition(".")[2] for module in modules]
    assert words == ["Transformer", "Pooling", "Dense"]
    assert [module["idx"] for module in modules] == [0, 1, 2]
    dense = json.loads((out / "hf" / modules[2]["path"] / "config.json").read_text("utf-8"))
    assert (dense["in_features"], dense["out_features"]) == (18, 24)
    assert dense["activation_function"].endswith("Identity")  # else a tanh, by default
    weights = safetensors.torch.load_file(out / "hf" / modules[2]["path"] / "model.safetensors")
    before, after = shrunk["sizes"]["parameters"]
    added = sum(value.numel() for value in weights.values())
    assert after == sum(p.numel() for p in loaded.parameters()) + added < before
    quality = run("eval", out, "--baseline", sentence_transformer, "--text", text)
    assert 0.6 < quality["cosine"] < 1


SAID = {
    "in_features": 24,
    "out_features": 10,
    "bias": True,
    "activation_function": "torch.nn.modules.activation.Tanh",
}
DENSE = {"type": "a.models.Dense", "path": "2_Dense"}


def with_dense(model: Path, folder: Path, **changes: Any) -> Path:
    """A copy with a linear layer behind its pooling; returns the copy."""
    folder = Path(shutil.copytree(model, folder))
    file = folder / "modules.json"
    add_module(file, {**DENSE, "idx": 2, "name": "2"})
    (place := folder / "2_Dense").mkdir()
    (place / "config.json").write_text(json.dumps(SAID | changes), encoding="utf-8")
    torch.manual_seed(0)
    theirs = {"linear.weight": torch.randn(10, 24), "linear.bias": torch.randn(10)}
    safetensors.torch.save_file(theirs, place / "model.safetensors")
    return folder


def add_module(file: Path, *modules: Any) -> None:
    listed = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    file.write_text(json.dumps([*listed, *modules]), encoding="utf-8")


def test_the_map_goes_into_a_linear_layer_that_is_there(
    slim: tuple[Path, dict[str, Any]], sentence_transformer: Path, text: str, tmp_path: Path
) -> None:
    model = with_dense(sentence_transformer, tmp_path / "model")
    place, said = model / "2_Dense", SAID
    theirs = safetensors.torch.load_file(place / "model.safetensors")
    (place / "pytorch_model.bin").touch()  # the same in another form
    size = ("--hidden", 18, "--intermediate", 48, "--calib", text)
    run("shrink", model, "-o", tmp_path / "out", *size)
    there = tmp_path / "out/hf/2_Dense"
    assert sorted(file.name for file in there.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((there / "config.json").read_text("utf-8")) == said | {"in_features": 18}
    ours = safetensors.torch.load_file(there / "model.safetensors")
    back = safetensors.torch.load_file(slim[0] / "hf/2_Dense/model.safetensors")
    weight, bias = back["linear.weight"], back["linear.bias"]
    wanted = theirs["linear.weight"] @ weight
    assert torch.allclose(ours["linear.weight"], wanted, rtol=1e-5, atol=1e-5)  # float32
    wanted = theirs["linear.weight"] @ bias + theirs["linear.bias"]
    assert torch.allclose(ours["linear.bias"], wanted, rtol=1e-5, atol=1e-5)
    quality = run("eval", tmp_path / "out", "--baseline", model, "--text", text)
    assert 0.6 < quality["cosine"] < 1
    (place / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"linear\.weight"):
        run("eval", tmp_path / "out", "--baseline", model, "--text", text)
    (place / "config.json").write_text(json.dumps(said | {"activation_function": "x.Softplus"}))
    with pytest.raises(UnsupportedModelError, match="Softplus"):
        run("eval", tmp_path / "out", "--baseline", model, "--text", text)


def test_distillation_takes_the_map_along(
    slim: tuple[Path, dict[str, Any]], sentence_transformer: Path, text: str, tmp_path: Path
) -> None:
    size = ("--hidden", 18, "--intermediate", 48, "--calib", text, "--heal", 30)
    shrunk = run("shrink", sentence_transformer, "-o", tmp_path / "out", *size)
    closed, healed = shrunk["cosine"]
    assert closed == slim[1]["cosine"][1]
    assert healed > closed
    file = "hf/2_Dense/model.safetensors"
    before, after = (safetensors.torch.load_file(x / file) for x in (slim[0], tmp_path / "out"))
    assert not torch.equal(before["linear.weight"], after["linear.weight"])


@pytest.mark.parametrize("name", HEADS)
def test_a_head_answers_in_a_narrower_stream(
    name: str, text: str, made: Made, tmp_path: Path
) -> None:
    model = made(tmp_path / "model", name)
    shrunk = run("shrink", model, "-o", tmp_path / "out", "--hidden", 18, "--calib", text)
    encoder = open_encoder(tmp_path / "out")
    assert num_parameters(encoder.model) == shrunk["sizes"]["parameters"][1]
    quality = run("eval", tmp_path / "out", "--baseline", model, "--text", text)
    assert "cosine" not in quality  # of vectors of two widths
    assert quality["agreement"] > 0.5
    assert 0 < quality["recall_at_10"] <= 1


@pytest.mark.parametrize("name", ["bert", "modernbert-deep", "distilbert"])
def test_sizes_are_counted_as_they_are_made(name: str, made: Made, tmp_path: Path) -> None:
    encoder, some = open_encoder(made(tmp_path / "model", name)), some_text()
    kept = encoder_stream.leaving(encoder, some, 12).kept(24, 18)
    layers = [0, 1, 2][: len(encoder.layers)]
    walked = walk(encoder, some, layers, 40, "obs", dimensions=kept)
    assert parameters_after(encoder, Sizes(40, 3, 18)) == num_parameters(walked.model)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("deberta-v2", "relative positions"),
        ("masked", "table of embeddings"),
        ("bert", "token vectors"),
    ],
)
def test_a_stream_that_has_to_stay_says_why(
    name: str, reason: str, text: str, made: Made, tmp_path: Path
) -> None:
    model = made(tmp_path / "model", name)
    with pytest.raises(UsageError, match=reason):
        run("shrink", model, "-o", tmp_path / "out", "--hidden", 18, "--calib", text)
    with pytest.raises(UsageError, match=reason):
        run("plan", model, "--params", "0.9x", "--axes", "hidden_size")
    assert not (tmp_path / "out").exists()


def test_refusals_say_what_can_be_asked(sentence_transformer: Path) -> None:
    with pytest.raises(UsageError, match="such as 6"):
        run("plan", sentence_transformer, "--hidden", 0)
    with pytest.raises(UsageError, match="names nothing"):
        run("plan", sentence_transformer, "--params", "0.8x", "--axes", " , ")
    with pytest.raises(UsageError, match="such as 18"):
        run("plan", sentence_transformer, "--hidden", 20)
    with pytest.raises(UsageError, match="none of hidden_size"):
        run("plan", sentence_transformer, "--params", "0.8x", "--axes", "width")
    with pytest.raises(UsageError, match="give a budget"):
        run("plan", sentence_transformer, "--hidden", 18, "--axes", "hidden_size")
    asked = ("--params", "0.8x", "--count", "layers", "--axes", "hidden_size")
    with pytest.raises(UsageError, match="count all parameters"):
        run("plan", sentence_transformer, *asked)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_residual": True}, "use_residual"),
        ({"module_input_name": "token_embeddings"}, "module_input_name"),
        ({"module_output_name": "other"}, "module_output_name"),
        ({"in_features": 23}, "finite matrix"),
        ({"out_features": 24}, "finite matrix"),
    ],
)
def test_a_linear_layer_that_does_something_else_is_refused(
    changes: dict[str, Any], reason: str, sentence_transformer: Path, text: str, tmp_path: Path
) -> None:
    model = with_dense(sentence_transformer, tmp_path / "model", **changes)
    with pytest.raises((CheckpointError, UnsupportedModelError), match=reason):
        run("shrink", model, "-o", tmp_path / "out", "--hidden", 18, "--calib", text)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ({"type": "a.Normalize", "path": ""}, "in this order"),  # in front of the linear layer
        ({"type": "a.LSTM", "path": ""}, "LSTM"),
        ({"path": ""}, "no list of modules"),
        ("Normalize", "no list of modules"),
    ],
)
def test_modules_in_another_order_or_of_other_kinds_are_refused(
    module: Any, reason: str, sentence_transformer: Path, text: str, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(sentence_transformer, tmp_path / "model"))
    shutil.copytree(with_dense(model, tmp_path / "other") / "2_Dense", model / "2_Dense")
    add_module(model / "modules.json", module, DENSE)
    with pytest.raises((CheckpointError, UnsupportedModelError), match=reason):
        run("shrink", model, "-o", tmp_path / "out", "--hidden", 18, "--calib", text)


def test_nothing_outside_of_the_folder_is_read_or_written(
    sentence_transformer: Path, text: str, tmp_path: Path
) -> None:
    outside = with_dense(sentence_transformer, tmp_path / "outside") / "2_Dense"
    before = {file.name: file.read_bytes() for file in outside.iterdir()}
    for number, path in enumerate((str(outside), "../outside/2_Dense")):
        model = Path(shutil.copytree(sentence_transformer, tmp_path / f"model{number}"))
        add_module(model / "modules.json", DENSE | {"path": path})
        with pytest.raises(CheckpointError, match="lies outside"):
            run("shrink", model, "-o", tmp_path / "out", "--hidden", 18, "--calib", text)
    assert {file.name: file.read_bytes() for file in outside.iterdir()} == before


def test_a_classifier_without_pooling_needs_no_map(text: str, made: Made, tmp_path: Path) -> None:
    """As CrossEncoder saves it: modules.json names the transformer alone."""
    model = made(tmp_path / "model", "roberta")
    counts = run("plan", model, "--hidden", 18)["choices"]
    add_module(model / "modules.json", {"idx": 0, "name": "0", "path": "", "type": "a.Transformer"})
    assert run("plan", model, "--hidden", 18)["choices"] == counts
    streams = {row["hidden_size"] for row in run("plan", model, "--params", "0.8x")["choices"]}
    assert streams == {24, 18, 12}
    shrunk = run("shrink", model, "-o", tmp_path / "out", "--hidden", 18, "--calib", text)
    assert shrunk["sizes"]["parameters"][1] == counts[0]["parameters"]
    assert not list((tmp_path / "out/hf").glob("*Dense*"))


def test_what_is_narrowed_again_is_counted_as_it_was(
    slim: tuple[Path, dict[str, Any]], sentence_transformer: Path, text: str, tmp_path: Path
) -> None:
    """Its linear layer included, which the original did not have."""
    size = ("--hidden", 12, "--calib", text)
    again = run("shrink", slim[0] / "hf", "-o", tmp_path / "again", *size)
    assert again["sizes"]["parameters"][0] == slim[1]["sizes"]["parameters"][1]
    quality = run("eval", tmp_path / "again", "--baseline", sentence_transformer, "--text", text)
    assert 0.5 < quality["cosine"] < 1
    told = describe_source(open_encoder(slim[0]))["sha256"]
    assert {"modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"} <= told.keys()


def test_the_map_is_of_what_is_pooled(made: Made, tmp_path: Path) -> None:
    """First tokens are read alone, and what is true of all tokens on average is less so of them."""
    encoder, some = open_encoder(made(tmp_path / "model", "bert")), some_text()
    kept = encoder_stream.leaving(encoder, some, 12).kept(24, 12)
    first, close = Pooling("cls"), {}
    wanted_ND = embed(encoder.base, some[-1:], first)
    for pooling in (first, Pooling("mean")):
        walked = walk(encoder, some, range(3), 64, "dot", dimensions=kept, pooling=pooling)
        base: Any = walked.model.base_model
        close[pooling.mode] = mean_cosine(embed(base, some[-1:], first, walked.back), wanted_ND)
    assert close["cls"] > close["mean"]
