"""A model with fewer tokens: the same logits for those that stay, and an original for all that
comes behind.

Shapes: L tokens, V rows of the original's tables, K of those that stay.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from dotexport import ShrinkOptions, SizeOptions, TextOptions, shrink
from dotexport.app.cli import app
from dotexport.app.pipeline import evaluate_into
from dotexport.app.shrink_record import Shrunk
from dotexport.app.steps import EvalStep
from dotexport.embedded import MODEL_DIR
from dotexport.errors import UsageError
from dotexport.exports.exporting import export
from dotexport.exports.quality import evaluate
from dotexport.exports.verifying import verify
from dotexport.generation.second_text import NONE
from dotexport.healing.heal_options import parse_heal
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.text_windows import token_windows
from dotexport.narrowing.narrow_options import NarrowOptions
from dotexport.narrowing.streams import held_out_windows
from dotexport.storage import manifest
from dotexport.storage.workspace import Workspace
from dotexport.vocabulary.expecting import expected
from dotexport.vocabulary.joining import END, UNKNOWN, Spellings
from dotexport.vocabulary.segmenting import Reading
from dotexport.vocabulary.trimming import Trimmed, trim
from dotexport.vocabulary.vocabulary_options import VocabularyOptions

TEXT = TextOptions(source="embedded:calibration", samples=8, seqlen=128)
QUICK = NarrowOptions(local=None, basis="pca")
PARAMETERS = 4_458_752  # of the embedded model


def asked(vocab: int | None = 1000, **more: Any) -> ShrinkOptions:
    cut = VocabularyOptions(vocab=vocab)
    options = {"text": TEXT, "other": NONE, "narrow": QUICK, "vocabulary": cut}
    return ShrinkOptions(**options | more)


@pytest.fixture(scope="session")
def cut(tmp_path_factory: pytest.TempPathFactory, assets: Path) -> Callable[[str], Shrunk]:
    """`embedded` (untied, bfloat16, byte level) or `stories260k` (tied, byte fallback) with fewer
    tokens, and nothing else changed."""

    @cache
    def make(name: str) -> Shrunk:
        folder, vocab = (MODEL_DIR, 1000) if name == "embedded" else (assets / name, 400)
        return shrink(folder, tmp_path_factory.mktemp(name) / "out", asked(vocab))

    return make


def kept(out: Path) -> list[int]:
    ids: list[int] = json.loads((out / "reports/vocabulary.json").read_text())["original_ids"]
    return ids


def _trimmed(scratch: Path) -> Trimmed:
    original, cut = Checkpoint.open(MODEL_DIR), VocabularyOptions(vocab=1000)
    expect = partial(expected, original, dtype=torch.float32, device=torch.device("cpu"))
    return trim(original, cut, TEXT.source, scratch, expect=expect)


def vocab_size(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])


def original_of(name: str, assets: Path) -> Path:
    return MODEL_DIR if name == "embedded" else assets / name


NAMES = pytest.mark.parametrize("name", ["embedded", "stories260k"])


@pytest.mark.assets
@NAMES
def test_tokens_that_stay_have_the_logits_they_had(
    name: str, cut: Callable[[str], Shrunk], assets: Path
) -> None:
    shrunk = cut(name)
    ids_K = torch.tensor(kept(shrunk.out))
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder).double()
        for folder in (original_of(name, assets), shrunk.out / "hf")
    )
    new_L = torch.randint(len(ids_K), (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits_LV, logits_LK = before(ids_K[new_L]).logits[0], after(new_L).logits[0]
    # float64, and fewer columns in one product: nothing but the order of sums may differ.
    torch.testing.assert_close(logits_LK, logits_LV[:, ids_K], rtol=0, atol=1e-11)
    log_LK = torch.log_softmax(logits_LV, -1)[:, ids_K]
    rest = torch.logsumexp(log_LK, -1, keepdim=True)
    torch.testing.assert_close(torch.log_softmax(logits_LK, -1), log_LK - rest, rtol=0, atol=1e-11)


@pytest.mark.assets
@NAMES
def test_every_weight_is_the_originals(
    name: str, cut: Callable[[str], Shrunk], assets: Path
) -> None:
    shrunk, folder = cut(name), original_of(name, assets)
    ids = kept(shrunk.out)
    before, after = (load_file(f / "model.safetensors") for f in (folder, shrunk.out / "hf"))
    assert after.keys() == before.keys()
    for tensor, found in after.items():
        rows = ids if tensor in ("model.embed_tokens.weight", "lm_head.weight") else slice(None)
        assert found.dtype == before[tensor].dtype
        assert torch.equal(found, before[tensor][rows]), tensor
    config = json.loads((shrunk.out / "hf/config.json").read_text())
    tied = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (len(ids), tied)
    assert sum(tensor.numel() for tensor in after.values()) == shrunk.plan.parameters_after


@pytest.mark.assets
@NAMES
def test_runtimes_take_it_tokenizer_and_all(
    name: str, cut: Callable[[str], Shrunk], assets: Path
) -> None:
    pytest.importorskip("gguf")
    out = cut(name).out
    export(out, ["hf", "gguf:fp16", "ort-cpu:fp32"])
    for parity in verify(out):
        assert parity.passed, parity.problems
        assert parity.text is not None
        assert parity.text["texts"] > 100
    tokens = _tokens_of(out / "gguf-fp16/model.gguf")
    assert tokens == [t for t, _ in sorted(Reading.of(out / "hf").ids.items(), key=lambda p: p[1])]


def _tokens_of(file: Path) -> list[str]:
    import gguf

    field = gguf.GGUFReader(file).get_field("tokenizer.ggml.tokens")
    return [bytes(field.parts[at]).decode() for at in field.data]


@pytest.mark.assets
@NAMES
def test_what_left_is_told_everywhere(
    name: str, cut: Callable[[str], Shrunk], assets: Path
) -> None:
    shrunk = cut(name)
    record = manifest.read(shrunk.out)
    before, after = record["sizes"]["vocab_size"]
    assert before == vocab_size(original_of(name, assets))
    assert record["vocabulary"]["rows"] == [before, after]
    assert record["vocabulary"] == json.loads(json.dumps(shrunk.as_dict()["vocabulary"]))
    assert record["vocabulary"]["exact"] is True
    assert sum(record["vocabulary"]["kept"].values()) == after
    card = (shrunk.out / "README.md").read_text()
    assert f"| vocab_size | {before:,} | {after:,} |" in card
    assert f"vocabulary: {after:,} of {before:,} tokens stay" in card
    assert "every weight is the original's" in card
    assert "only numbers in `config.json` and the tokenizer changed" in card
    assert record["source"]["model"] == shrunk_name(name)
    assert record["source"]["sha256"].keys() == {"config.json", "model.safetensors"}


def shrunk_name(name: str) -> str:
    return "dotexport-embedded" if name == "embedded" else name


# Beside a budget ----------------------------------------------------------------------------------


def test_a_budget_is_a_share_of_the_whole_original(tmp_path: Path) -> None:
    options = asked(sizes=SizeOptions(params="0.5x"), allocate="rule")
    shrunk = shrink(MODEL_DIR, tmp_path / "out", options)
    assert shrunk.plan.parameters_before == PARAMETERS
    assert 0.4 * PARAMETERS < shrunk.plan.parameters_after <= 0.5 * PARAMETERS
    assert shrunk.plan.after.hidden_size < 256
    tensors = load_file(tmp_path / "out/hf/model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == shrunk.plan.parameters_after
    assert len(tensors["lm_head.weight"]) == 1024
    record = manifest.read(tmp_path / "out")
    assert record["vocabulary"]["exact"] is False
    assert "every weight is the original's" not in (tmp_path / "out/README.md").read_text()
    assert shrunk.divergence > 0


def test_a_budget_that_the_vocabulary_meets_leaves_the_rest_alone(tmp_path: Path) -> None:
    shrunk = shrink(MODEL_DIR, tmp_path / "out", asked(sizes=SizeOptions(params="0.7x")))
    assert shrunk.plan.vocabulary_alone
    assert shrunk.allocation is None  # there was nothing to choose
    assert shrunk.plan.ratio < 0.7
    assert shrunk.divergence == 0


def test_cuts_are_measured_on_the_tokens_that_stay(tmp_path: Path) -> None:
    sizes = SizeOptions(params="0.5x")
    shrunk = shrink(MODEL_DIR, tmp_path / "out", asked(sizes=sizes, allocate="measured"))
    assert shrunk.allocation is not None
    assert all(row["parameters"] <= 0.5 * PARAMETERS for row in shrunk.allocation.checked)


def test_healing_has_the_original_with_all_of_its_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[Path] = []
    found = Workspace.of

    def noted(out: Path, identity: Any) -> Workspace:
        place = found(out, identity)
        assert place.folder is not None
        places.append(place.folder)
        return place

    monkeypatch.setattr(Workspace, "of", noted)
    text = replace(TEXT, samples=4, seqlen=32)
    _, distil = parse_heal("1", samples=None, precision="fp32", seed=0)
    sizes = SizeOptions(params="0.5x")
    options = asked(sizes=sizes, text=text, heal=distil, allocate="rule")
    narrowed = shrink(MODEL_DIR, tmp_path / "out", options)
    exact = shrink(MODEL_DIR, tmp_path / "exact", asked(text=text))
    every = manifest.read(narrowed.out)["calibration"]["every"]
    windows_NL = token_windows(tmp_path / "exact/hf", replace(text, every=every))
    held_NL = windows_NL[sorted(held_out_windows(4))]
    assert narrowed.healing is not None
    # What it says of the text by its own tokens, for each token of ours, one window after another.
    spellings = Spellings.of(_trimmed(tmp_path))
    assert spellings.kept == tuple(kept(exact.out))
    original = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    nats, count = 0.0, 0
    for window_L in held_NL:
        joined = spellings.joined(window_L[None])
        given, at = joined.given_C.tolist(), joined.at_C.tolist()
        with torch.inference_mode():
            log_p_LO = original(joined.ids_BL).logits[0].log_softmax(-1)
        for place in range(len(given) - 1):
            if UNKNOWN not in given[place : place + 2]:
                count += 1
                if given[place] == END:
                    nats -= float(log_p_LO[at[place], joined.ids_BL[0, at[place] + 1]])
    assert count > 0.9 * held_NL[:, 1:].numel()
    expected = math.exp(nats / count)
    assert narrowed.healing["original_perplexity"] == pytest.approx(expected, rel=1e-4)
    # Where an interrupted run is looked for hangs on nothing that another run has otherwise.
    shrink(MODEL_DIR, tmp_path / "out", options, overwrite=True)
    assert places[0] == places[2] != places[1]


def test_a_plan_is_an_order_for_the_same_tokens(tmp_path: Path) -> None:
    run = CliRunner()
    model, plan, out = str(MODEL_DIR), tmp_path / "plan.json", tmp_path / "out"
    sizes = ["--vocab", "1000", "--params", "0.5x", "--vocab-for", "embedded:calibration"]
    done = run.invoke(app, ["plan", model, *sizes, "--json"])
    assert done.exit_code == 0, done.output
    planned = json.loads(done.stdout)
    assert planned["vocab_size"] == [4096, 1024]
    assert planned["shrink"]["vocab"] == 1024
    assert planned["shrink"]["vocab_for"] == "embedded:calibration"
    assert planned["vocabulary"]["rows"] == [4096, 1024]
    plan.write_text(done.stdout)
    text = ["--calib", TEXT.source, "--samples", "4", "--seqlen", "64", "--heal", "none"]
    done = run.invoke(app, ["shrink", model, "-o", str(out), "--plan", str(plan), *text, "--json"])
    assert done.exit_code == 0, done.output
    assert manifest.read(out)["sizes"]["parameters"] == planned["parameters"]
    assert yaml.safe_load((out / "recipe.yaml").read_text())["shrink"]["vocab"] == 1024
    done = run.invoke(app, ["shrink", model, "-o", "x", "--plan", str(plan), "--vocab", "9", *text])
    assert isinstance(done.exception, UsageError)
    assert "or by --vocab, not both" in str(done.exception)
    planned["shrink"]["vocab"] = 2048
    plan.write_text(json.dumps(planned))
    done = run.invoke(app, ["shrink", model, "-o", "x", "--plan", str(plan), *text])
    assert isinstance(done.exception, UsageError)
    assert "it was edited" in str(done.exception)


# Quality ------------------------------------------------------------------------------------------


@pytest.mark.assets
@NAMES
def test_quality_beside_the_original_is_per_token_of_the_original(
    name: str, cut: Callable[[str], Shrunk], assets: Path, tmp_path: Path
) -> None:
    """Sums by hand, from the tokens of the same text."""
    original, out = original_of(name, assets), cut(name).out
    text = tmp_path / "text.txt"
    words = "for the story of a big dog that was named \u00e9clair, xylophone and quixotic " * 3
    text.write_text(words)
    before, after = Reading.of(original), Reading.of(out / "hf")
    one, other = before.encode(words.strip()), after.encode(words.strip())
    assert len(other) > len(one)  # some of it left
    options = TextOptions(source=str(text), samples=1, seqlen=len(one))
    found = evaluate_into(out, original, EvalStep(text=options), device="cpu")
    nats, start = [], found["num_tokens"]
    for folder, ids, first in (
        (original, one, len(one) - start),
        (out / "hf", other, _behind(one[: len(one) - start], before, after)),
    ):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.inference_mode():
            log_LV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        nats.append(-sum(float(log_LV[n - 1, ids[n]]) for n in range(first, len(ids))))
    expected = [torch.tensor(total / start).exp().item() for total in nats]
    assert [found["baseline_perplexity"], found["perplexity"]] == pytest.approx(expected, rel=1e-4)
    assert found["across"]["tokens_per_byte"][1] > found["across"]["tokens_per_byte"][0]
    per_bit = found["across"]["bits_per_byte"]
    assert per_bit[1] / per_bit[0] == pytest.approx(nats[1] / nats[0], rel=1e-6)
    assert 0 < found["across"]["mass_of_shared"] < 1
    assert "per token of the original" in (out / "README.md").read_text()


def _behind(ids: list[int], before: Reading, after: Reading) -> int:
    """Tokens of the other tokenizer for the same bytes."""
    wanted, number, total = int(before.widths[ids].sum()), 0, 0
    text = before.decode(ids)
    for token in after.encode(text):
        if total == wanted:
            break
        total += int(after.widths[token])
        number += 1
    return number


def test_on_text_of_tokens_that_stay_nothing_moved(tmp_path: Path, cut: Any) -> None:
    out = cut("embedded").out
    reading = Reading.of(MODEL_DIR)
    spaced = "def f(self):\n    return self.x\n" * 8
    assert set(reading.encode(spaced)) <= set(kept(out))
    text = tmp_path / "text.txt"
    text.write_text(spaced)
    step = EvalStep(text=TextOptions(source=str(text), samples=1, seqlen=32))
    found = evaluate_into(out, MODEL_DIR, step, device="cpu")
    # The softmax has no rest to lose to, and KL is over the tokens that both have: float32 only.
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["perplexity"] < found["baseline_perplexity"]
    assert found["num_tokens"] == 31
    whole_NL = token_windows(MODEL_DIR, step.text)
    assert found["baseline_perplexity"] == pytest.approx(
        evaluate(MODEL_DIR, None, whole_NL).perplexity, rel=1e-5
    )


def test_as_many_other_tokens_are_no_same_vocabulary(tmp_path: Path, cut: Any) -> None:
    other = shrink(
        MODEL_DIR,
        tmp_path / "other",
        asked(vocabulary=VocabularyOptions(vocab=1000, vocab_for=str(_words(tmp_path)))),
    )
    windows_NL = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(UsageError, match="1024 rows each, and other tokens in them"):
        evaluate(other.out / "hf", cut("embedded").out / "hf", windows_NL)
    step = EvalStep(text=TEXT)
    with pytest.raises(UsageError, match=r"tokens that .* lacks .*expected the original"):
        evaluate_into(other.out, cut("embedded").out / "hf", step, device="cpu")
    with pytest.raises(UsageError, match="the vocabularies differ"):
        evaluate(other.out / "hf", MODEL_DIR, windows_NL)


def _words(folder: Path) -> Path:
    file = folder / "words.txt"
    file.write_text("a few words of English, which are no Python at all. " * 40)
    return file
