"""Accuracy in naming the last word of a passage (LAMBADA, arXiv 1606.06031), zero-shot."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from dotexport.models.text_windows import read_tokenizer


@torch.inference_mode()
def accuracy(model: Path, passages: Path, count: int) -> float:
    """Share of the first `count` passages whose last word is the greedy one, in all its tokens.

    Args:
        passages: JSON lines with `context` and `continuation`.
    """
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = read_tokenizer(model)
    lines = passages.read_text(encoding="utf-8").splitlines()[:count]
    right = 0
    for line in lines:
        passage = json.loads(line)
        context = tokenizer(passage["context"])["input_ids"]
        whole = tokenizer(f"{passage['context']} {passage['continuation']}")["input_ids"]
        asked = len(whole) - len(context)
        logits_LV = network(torch.tensor([whole[:-1]])).logits[0, -asked:]
        right += logits_LV.argmax(-1).tolist() == whole[-asked:]
    return right / len(lines)
