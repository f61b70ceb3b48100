"""Text that a model samples itself: what the model says, whatever is computed beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dotexport.embedded import MODEL_DIR
from dotexport.errors import CalibrationError
from dotexport.generation import own_text
from dotexport.generation.lockstep import Lockstep, drawn
from dotexport.generation.own_text import Row, sample_text, texts_without_end, write_own_text
from dotexport.generation.starts import CHAT, Script, Starts, chat_pieces
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.loading import load_float32
from dotexport.models.text_options import TextOptions
from dotexport.models.text_windows import token_windows
from dotexport.storage.workspace import Workspace

# Every class of attention: plain, in windows, with caps, with scales of its own, with states.
FAMILIES: list[dict[str, Any]] = [
    {"model_type": "llama"},
    {"model_type": "mistral", "sliding_window": 16},
    {"model_type": "qwen2", "hidden_size": 64, "num_attention_heads": 4, "head_dim": None},
    {"model_type": "qwen3"},
    {"model_type": "qwen3_5_text"},
    {"model_type": "lfm2", "intermediate_size": 132},
    {"model_type": "granitemoehybrid", "attention_multiplier": 0.1},
    {"model_type": "gemma2", "tie_word_embeddings": True, "sliding_window": 16},
    {"model_type": "gemma3_text", "tie_word_embeddings": True, "sliding_window": 16},
    {"model_type": "gemma4_text", "final_logit_softcapping": 5.0},
    {"model_type": "olmo2", "hidden_size": 64, "num_attention_heads": 4, "head_dim": None},
    {"model_type": "phi3", "hidden_size": 64, "num_attention_heads": 4, "head_dim": None},
    {"model_type": "granite", "hidden_size": 64, "num_attention_heads": 4, "head_dim": None},
]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


@pytest.mark.parametrize("changes", FAMILIES, ids=lambda changes: changes["model_type"])
def test_a_row_that_begins_anew_says_what_a_text_alone_would(
    tiny_model: Callable[..., Path], changes: dict[str, Any]
) -> None:
    checkpoint = Checkpoint.open(tiny_model(**changes))
    model = load_float32(checkpoint)
    tokens_BT = torch.randint(3, 80, (2, 12), generator=torch.Generator().manual_seed(0))
    alone = [
        [model(input_ids=tokens_BT[:1]).logits[0]],
        [model(input_ids=piece[None]).logits[0] for piece in tokens_BT[1].split([5, 7])],
    ]
    rows = Lockstep(load_float32(checkpoint), 12)
    starts = torch.tensor([[0] * 12, [0] * 5 + [5] * 7])
    said = torch.stack([rows.read(tokens_BT[:, t], starts[:, t]) for t in range(12)], dim=1)
    # Logits are of the order of 1; both sum in float32, in another order.
    torch.testing.assert_close(said[0], torch.cat(alone[0]), rtol=0, atol=2e-4)
    torch.testing.assert_close(said[1], torch.cat(alone[1]), rtol=0, atol=2e-4)


def test_a_model_goes_on_talking_and_reads_as_before(
    tiny_llama: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is said together; and a batch that was kept is not said again."""
    folder, workspace = tiny_llama("wide-heads"), Workspace(tmp_path / "kept")
    monkeypatch.setattr(own_text, "LONGEST", 48)
    model = load_float32(Checkpoint.open(folder))
    tokens_BT = torch.arange(3, 13)[None]
    before, said = model(input_ids=tokens_BT).logits, []
    for rows, keep in ((2, workspace), (3, Workspace())):
        monkeypatch.setattr(own_text, "ENDLESS_ROWS", {"cpu": rows})
        texts = texts_without_end(model, folder, seed=1, first=7, workspace=keep)
        said.append(list(islice(texts, 6)))
    assert said[0] == said[1]
    assert len(set(said[0])) > 1
    assert torch.equal(model(input_ids=tokens_BT).logits, before)
    monkeypatch.setattr(own_text, "ENDLESS_ROWS", {"cpu": 2})
    monkeypatch.setattr(own_text, "_batch", lambda *_: pytest.fail("said again"))
    texts = texts_without_end(model, folder, seed=1, first=7, workspace=workspace)
    assert list(islice(texts, 6)) == said[0]


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    probability_V = torch.tensor([0.5, 0.0, 0.3, 0.2])
    uniform_B = (torch.arange(1000) + 0.5) / 1000
    found = drawn(probability_V.log().expand(1000, 4), uniform_B)
    assert found.bincount(minlength=4).tolist() == [500, 0, 300, 200]


def test_a_row_is_filled_with_turns_and_texts() -> None:
    """7 ends; a script of two pieces is asked twice before it is over."""
    row = Row(repeat(Script(CHAT, ((1, 2), (3, 4)))), frozenset({7}))
    tokens = [row.first()]
    for slot, drawn_here in enumerate([0, 11, 7, 0, 12, 7, 0, 13], start=1):
        tokens.append(row.next(drawn_here, slot))
    assert tokens == [1, 2, 11, 3, 4, 12, 1, 2, 13]
    assert row.start == 6
    row.close()
    assert [(ids, ended) for _, ids, ended in row.said] == [
        ([1, 2, 11, 3, 4, 12, 7], True),
        ([1, 2, 13], False),
    ]


def test_a_message_without_an_end_is_ended() -> None:
    row = Row(repeat(Script(CHAT, ((1,), (3,)))), frozenset({7}))
    row.first()
    said = [row.next(11, slot) for slot in range(1, own_text.MESSAGE + 3)]
    assert said == [11] * own_text.MESSAGE + [3, 11]


def test_the_same_seed_says_the_same_however_many_rows_are_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = Checkpoint.open(MODEL_DIR)
    monkeypatch.setattr(own_text, "LONGEST", 24)

    def said(rows: int, seed: int = 0) -> list[str]:
        monkeypatch.setattr(own_text, "MOST_ROWS", {"cpu": rows})
        found = sample_text(source, tokens=60, seed=seed)
        assert found.num_tokens >= 60
        return [text.text for text in found.texts]

    assert said(1) == said(3)
    assert said(3) != said(3, seed=1)


def test_what_is_sampled_is_likely_to_the_model(assets: Path) -> None:
    """The mean surprise of text that a model samples is the entropy of its predictions."""
    model_dir = assets / "stories260k"
    sampled = sample_text(Checkpoint.open(model_dir), tokens=4000)
    model = load_float32(Checkpoint.open(model_dir))
    tokenizer = Starts.of(model_dir).tokenizer
    surprise, entropy = [], []
    for text in sampled.texts:
        ids = tokenizer(text.text, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            log_LV = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        surprise += log_LV.gather(1, ids[0, 1:, None])[8:, 0].neg().tolist()
        entropy += (-(log_LV.exp() * log_LV).sum(-1))[8:].tolist()
    # 4,000 predictions with a spread of 1.5 nats: three standard errors, and what reading the text
    # as other tokens than were said changes.
    assert np.mean(surprise) == pytest.approx(np.mean(entropy), abs=0.12)


@pytest.fixture
def chatting(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    import shutil

    model = shutil.copytree(tiny_model(model_type="llama"), tmp_path / "chatting")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    return model


def test_half_of_the_texts_are_conversations_where_there_is_a_template(chatting: Path) -> None:
    sampled = sample_text(Checkpoint.open(chatting), tokens=2000)
    chats = [text for text in sampled.texts if text.kind == CHAT]
    assert 0.3 < len(chats) / len(sampled.texts) < 0.7
    assert all(text.text.startswith("<s>user:") for text in chats)
    assert all(text.text != "<s>user:" for text in chats)
    whole = [text for text in chats if text.ended]
    assert whole
    assert all(text.text.count("</s><s>assistant:") == 1 for text in whole)


def test_a_template_that_takes_no_conversation_is_left_alone(
    chatting: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (chatting / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    starts = Starts.of(chatting)
    assert starts.chat is None
    assert "takes no conversation" in caplog.text
    tokenizer = starts.tokenizer
    tokenizer.chat_template = "always the same"
    assert chat_pieces(tokenizer) is None
    assert all(
        script.kind != CHAT
        for script, _ in zip(starts.scripts(np.random.default_rng(0)), range(50), strict=False)
    )


def test_the_file_is_read_again_as_the_same_windows(tmp_path: Path) -> None:
    file = tmp_path / "self.jsonl"
    text = TextOptions(source="self", samples=3, seqlen=32)
    source = Checkpoint.open(MODEL_DIR)
    cpu = torch.device("cpu")
    read, record = write_own_text(source, text, 3, file, seed=0, device=cpu)
    assert record["sha256"]
    assert {"text", "kind", "ended"} == set(json.loads(file.read_text().splitlines()[0]))
    ours = token_windows(MODEL_DIR, read)
    again = token_windows(MODEL_DIR, TextOptions(source=str(file), samples=3, seqlen=32))
    assert torch.equal(ours, again)
    assert ours.shape == (3, 32)


def test_a_mix_samples_no_more_than_its_share(tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("import os\n" * 2000)
    text = TextOptions(source=f"{other}=3,self", samples=8, seqlen=32)
    file, cpu = tmp_path / "self.jsonl", torch.device("cpu")
    read, record = write_own_text(Checkpoint.open(MODEL_DIR), text, 8, file, seed=0, device=cpu)
    assert 64 <= record["tokens"] < 64 + 600  # two windows, and the end of a row
    windows_NL = token_windows(MODEL_DIR, read)
    own = token_windows(MODEL_DIR, TextOptions(source=str(file), samples=2, seqlen=32))
    assert torch.equal(windows_NL[[3, 7]], own)


def test_text_of_its_own_is_for_calibration_alone(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"self is text .* OUT/reports/self.jsonl"):
        token_windows(MODEL_DIR, TextOptions(source="self"))
    text = TextOptions(source="other.txt")
    asked = {"seed": 0, "device": torch.device("cpu")}
    read, record = write_own_text(
        Checkpoint.open(MODEL_DIR), text, 8, tmp_path / "self.jsonl", **asked
    )
    assert (read, record) == (text, {})
