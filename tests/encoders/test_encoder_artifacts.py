"""Artifacts of text encoders through the command line: written, held against torch, refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dotexport.app.cli import app
from dotexport.encoders.encoder_folder import open_encoder
from dotexport.encoders.encoder_verifying import check
from dotexport.errors import CheckpointError, ParityError, UsageError
from dotexport.exports.encoder_target import EncoderGraph
from dotexport.exports.target import find_target

from .command import run

for runtime in ("onnxscript", "openvino", "executorch"):
    pytest.importorskip(runtime)

Made = Callable[[Path, str], Path]


@pytest.fixture(scope="module")
def exported(sentence_transformer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output with an artifact of every target in every precision."""
    out = tmp_path_factory.mktemp("exported") / "out"
    specs = [f"onnx:{p}" for p in ("fp32", "fp16", "int8")]
    specs += [f"openvino:{p}" for p in ("fp32", "fp16", "int8")] + ["executorch"]
    run("export", sentence_transformer, "-o", out, *(x for s in specs for x in ("--target", s)))
    return out


def test_every_artifact_computes_what_torch_computes(exported: Path) -> None:
    told = {one["artifact"]: one for one in run("verify", exported)}
    assert all(one["passed"] for one in told.values())
    assert set(told) == {
        *("hf", "onnx-fp32", "onnx-fp16", "onnx-int8", "openvino-fp32", "openvino-fp16"),
        *("openvino-int8", "executorch-fp32"),
    }
    for name, one in told.items():
        if name.endswith("fp32"):
            assert one["difference"] < 1e-5
        elif name != "hf":  # it is rounded, and not by much
            assert 1e-5 < one["difference"] < one["limit"]
    assert one["shapes"] == ["1 x 1", "3 x 17", "1 x 40"]


def test_artifacts_lie_where_their_readers_look(exported: Path, sentence_transformer: Path) -> None:
    graphs = {
        "onnx-fp32": "onnx/model.onnx",
        "onnx-fp16": "onnx/model_fp16.onnx",
        "onnx-int8": "onnx/model_quantized.onnx",
        "openvino-fp32": "openvino/openvino_model.xml",
        "executorch-fp32": "model.pte",
    }
    for name, graph in graphs.items():
        assert (exported / name / graph).is_file()
        for beside in ("config.json", "tokenizer.json", "modules.json", "1_Pooling/config.json"):
            carried = (exported / name / beside).read_bytes()
            assert carried == (sentence_transformer / beside).read_bytes()
        assert not list((exported / name).rglob("*.safetensors"))
    bytes_of = {n: (exported / n / g).stat().st_size for n, g in graphs.items()}
    assert bytes_of["onnx-int8"] < bytes_of["onnx-fp16"] < bytes_of["onnx-fp32"]


HEADS = {
    "bert": "ORTModelForFeatureExtraction",
    "roberta": "ORTModelForSequenceClassification",
    "xlm-roberta": "ORTModelForTokenClassification",
    "distilbert": "ORTModelForQuestionAnswering",
    "modernbert-TokenClassification": "ORTModelForTokenClassification",
    "deberta-v2": "ORTModelForSequenceClassification",
}
TOKENS = torch.tensor([[1, 9, 8, 7, 2]])


@pytest.fixture(scope="module")
def narrowed(made: Made, text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs of every kind, by its name, each with an ONNX graph."""
    folder = tmp_path_factory.mktemp("narrowed")
    for name in HEADS:
        run(
            "shrink",
            made(folder / f"of-{name}", name),
            "-o",
            folder / name,
            "--layers",
            1,
            "--calib",
            text,
        )
        run("export", folder / name, "--target", "onnx")
    return folder


def said_by_torch(out: Path) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        made = open_encoder(out).model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS))
    return dict(made)


@pytest.mark.parametrize("name", HEADS)
def test_graphs_have_the_names_that_readers_know(name: str, narrowed: Path) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(narrowed / name / "onnx-fp32/onnx/model.onnx")
    asked = [port.name for port in session.get_inputs()]
    more = ["token_type_ids"] if name == "bert" else []
    assert asked == ["input_ids", "attention_mask", *more]
    feed = dict.fromkeys(asked, torch.zeros_like(TOKENS).numpy())
    feed |= {"input_ids": TOKENS.numpy(), "attention_mask": torch.ones_like(TOKENS).numpy()}
    wanted = said_by_torch(narrowed / name)
    for port, value in zip(session.get_outputs(), session.run(None, feed), strict=True):
        assert (torch.from_numpy(value) - wanted[port.name]).abs().max() < 1e-4
    card = (narrowed / name / "README.md").read_text(encoding="utf-8")
    assert "| `onnx-fp32/` |" in card


def test_a_graph_of_other_weights_is_not_kept(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(tmp_path / "model", "bert")
    target: Any = type(find_target("onnx"))
    write = target.write_encoder

    def spoilt(self: Any, graph: Any, folder: Path, precision: str) -> None:
        write(self, graph, folder, precision)
        file = folder / "onnx/model.onnx"
        content = bytearray(file.read_bytes())
        value = graph.model.encoder.layer[1].output.dense.bias.detach().numpy().tobytes()
        start = content.index(value)
        content[start : start + 4] = torch.tensor([0.05]).numpy().tobytes()
        file.write_bytes(content)

    monkeypatch.setattr(target, "write_encoder", spoilt)
    with pytest.raises(ParityError, match="onnx-fp32: its outputs differ from torch's"):
        run("export", model, "-o", tmp_path / "out", "--target", "onnx")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ParityError, match="it was not kept"):
        run("export", model, "-o", tmp_path / "out", "--target", "onnx", "--target", "openvino")
    assert sorted(f.name for f in (tmp_path / "out").iterdir() if f.is_dir()) == [
        *("hf", "openvino-fp32", "reports")
    ]


def test_what_was_spoilt_later_is_found(exported: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(exported, tmp_path / "out"))
    file = out / "openvino-fp32/openvino/openvino_model.bin"
    content = bytearray(file.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    file.write_bytes(content)
    result = CliRunner().invoke(app, ["verify", str(out), "--target", "openvino:fp32", "--json"])
    assert isinstance(result.exception, ParityError)
    [told] = json.loads(result.stdout.splitlines()[-1])
    assert "changed after the export" in told["problems"][0]
    assert "differ from torch's" in told["problems"][1]
    assert not json.loads((out / "dotexport.json").read_text())["artifacts"]["openvino-fp32"][
        "parity"
    ]["passed"]
    broken = check(
        find_target("onnx"),  # type: ignore[arg-type]
        "fp32",
        open_encoder(out),
        out / "hf",
        "onnx-fp32",
    )
    assert not broken.passed
    assert "cannot be run" in broken.problems[0]


def test_int8_is_the_same_in_every_batch(exported: Path) -> None:
    """Scales are of each token: neither padding nor neighbours change what it gets."""
    session: Any = find_target("onnx")
    answer = session.open_encoder(exported / "onnx-int8")
    tokens = torch.randint(4, 64, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[0, 5:] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": 0 * tokens}
    [together] = answer({name: value.numpy() for name, value in inputs.items()})
    [alone] = answer({name: value[:1, :5].numpy() for name, value in inputs.items()})
    assert abs(together[0, :5] - alone[0]).max() < 1e-4


class Twice(torch.nn.Module):
    """One matrix that two products read, as DeBERTa's when it shares keys."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = torch.nn.Embedding(50, 16), torch.nn.Linear(16, 16)

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x_BLD = self.table(input_ids)
        return {"logits": self.linear(x_BLD) + self.linear(x_BLD.sin())}


def test_a_matrix_that_is_multiplied_twice_is_rounded_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, target = Twice().eval(), find_target("onnx")
    graph = EncoderGraph(model, ("input_ids",), ("logits",), 8)
    target.write_encoder(graph, tmp_path, "int8")  # type: ignore[attr-defined]
    tokens_BL = torch.arange(24).reshape(3, 8)
    [said] = target.open_encoder(tmp_path)({"input_ids": tokens_BL.numpy()})  # type: ignore[attr-defined]
    wanted = model(tokens_BL)["logits"].detach()
    # Steps of 1/127 in tokens, table and matrix.
    assert (torch.from_numpy(said) - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize(
    ("artifact", "least", "most"),
    [
        ("onnx-fp32", 0.99999, 1.00001),
        ("onnx-int8", 0.99, 0.99999),
        ("executorch", 0.99999, 1.00001),
    ],
)
def test_eval_reads_embeddings_of_an_artifact_in_its_runtime(
    artifact: str,
    least: float,
    most: float,
    exported: Path,
    sentence_transformer: Path,
    text: str,
) -> None:
    """Nothing was narrowed here: what differs is what rounding to 8 bits costs."""
    asked = ("--baseline", sentence_transformer, "--text", text, "--samples", 32)
    quality = run("eval", exported, *asked, "--target", artifact)
    assert least < quality["cosine"] < most
    said = json.loads((exported / "dotexport.json").read_text(encoding="utf-8"))
    name = "executorch-fp32" if artifact == "executorch" else artifact
    assert said["artifact_quality"][name]["cosine"] == quality["cosine"]
    assert (exported / f"reports/quality-{name}.json").is_file()


@pytest.mark.parametrize("target", ["torch", "onnx", "openvino:int8"])
def test_bench_times_both_models_in_turns(
    target: str, exported: Path, sentence_transformer: Path
) -> None:
    few = ("--groups", 2, "--seconds", 0, "--batch", 2, "--seqlen", 9)
    asked = ("--baseline", sentence_transformer, "--target", target)
    record = run("bench", exported, *asked, *few)
    times, rates = record["call"], record["sentences_per_second"]
    assert times["low"] <= times["ratio"] <= times["high"]
    assert len(times["samples_ms"][0]) == 2
    assert rates == pytest.approx([2e3 / times["baseline_ms"], 2e3 / times["candidate_ms"]])
    assert record["bytes"][0] == pytest.approx(record["bytes"][1], rel=0.01)  # the same model
    words = f"{target}, 2 x 9 tokens, 1 threads"
    said = json.loads((exported / "dotexport.json").read_text(encoding="utf-8"))
    assert said["bench"][words]["ratio"] == times["ratio"]
    report = exported / f"reports/bench-{target.replace(':', '-')}-2x9.json"
    compared = CliRunner().invoke(app, ["compare", str(report), "--json"])
    assert compared.exit_code == 0, compared.output
    [line] = json.loads(compared.stdout)["comparisons"]
    # Stored times are rounded to 1e-4 ms, of calls that take a few tenths.
    assert line["ratios"]["p50_call_ms"]["value"] == pytest.approx(times["ratio"], rel=1e-2)
    with pytest.raises(UsageError, match="more than the 40 tokens"):
        run("bench", exported, *asked, "--seqlen", 41)


def test_refusals_say_what_to_do(
    sentence_transformer: Path, exported: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="holds no text encoder; expected onnx, openvino, exec"):
        run("export", sentence_transformer, "-o", tmp_path / "out", "--target", "gguf")
    with pytest.raises(UsageError, match="cannot write an encoder as 'int4'; it writes fp32"):
        run("export", sentence_transformer, "-o", tmp_path / "out", "--target", "openvino:int4")
    with pytest.raises(UsageError, match="give an output folder with -o"):
        run("export", sentence_transformer, "--target", "onnx")
    with pytest.raises(UsageError, match="leave the output folder"):
        run("export", exported, "-o", tmp_path / "out", "--target", "onnx")
    with pytest.raises(UsageError, match="not empty"):
        run("export", exported, "--target", "onnx")
    with pytest.raises(UsageError, match="no artifact of mlx; it has hf, onnx-fp32"):
        run("verify", exported, "--target", "mlx")
    with pytest.raises(CheckpointError, match="not an output of dotexport"):
        run("verify", sentence_transformer)
    assert not (tmp_path / "out").exists()


OPTIMUM = """
import json, sys
import torch
import optimum.onnxruntime as ort
tokens = torch.tensor(json.loads(sys.argv[3]))
for name, kind in json.loads(sys.argv[2]).items():
    model = getattr(ort, kind).from_pretrained(f"{sys.argv[1]}/{name}/onnx-fp32")
    said = model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    print(json.dumps({output: value.tolist() for output, value in said.items()}))
"""


@pytest.mark.optimum
def test_optimum_reads_the_folders(narrowed: Path) -> None:
    if "DOTEXPORT_OPTIMUM_PYTHON" not in os.environ:
        pytest.skip("set DOTEXPORT_OPTIMUM_PYTHON to a Python with optimum-onnx")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [os.environ["DOTEXPORT_OPTIMUM_PYTHON"], "-c", OPTIMUM, str(narrowed)]
    command += [json.dumps(HEADS), json.dumps(TOKENS.tolist())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, line in zip(HEADS, done.stdout.splitlines()[-len(HEADS) :], strict=True):
        wanted = said_by_torch(narrowed / name)
        for output, value in json.loads(line).items():
            assert (torch.tensor(value) - wanted[output]).abs().max() < 1e-4


EMBED = """
const embed = await load("feature-extraction");
say((await embed(texts, { pooling: "mean", normalize: true })).tolist());
"""


@pytest.mark.transformersjs
@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-5), ("fp16", 2e-3), ("int8", 2e-1)])
def test_transformers_js_embeds_sentences_as_torch_does(
    precision: str, limit: float, narrowed: Path, in_node: Any
) -> None:
    """Of unit length, mean over tokens; the limits are of float32's sums and of the roundings."""
    from transformers import AutoTokenizer

    texts = ["w1 w2 w3", "w9 w8 w199 w7 w6 w5 w4", "w0"]
    run("export", narrowed / "bert", "--target", f"onnx:{precision}", "--overwrite")
    said_BD = torch.tensor(in_node(EMBED, narrowed / f"bert/onnx-{precision}", texts))
    encoder = open_encoder(narrowed / "bert")
    asked = AutoTokenizer.from_pretrained(encoder.home)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states_BLD = encoder.model(**asked).last_hidden_state
    mask_BL1 = asked["attention_mask"][..., None]
    mean_BD = (states_BLD * mask_BL1).sum(1) / mask_BL1.sum(1)
    wanted_BD = torch.nn.functional.normalize(mean_BD)
    distance_B = (said_BD - wanted_BD).norm(dim=1)
    assert distance_B.max() < limit
    assert torch.cdist(wanted_BD, wanted_BD)[~torch.eye(3, dtype=torch.bool)].min() > limit
