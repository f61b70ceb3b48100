"""Writing the model folder: weights, tokenizer, configs, and a card with the measured loss."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from dotexport.embedded import evaluation_text
from dotexport.embedded.loss import WINDOW, HeldOutLoss, held_out_loss
from dotexport.embedded.model_card import Run, model_card
from dotexport.embedded.stream import Corpus
from dotexport.embedded.tokenizer import save_tokenizer
from dotexport.embedded.training_options import TrainOptions, command_line


def write_model(
    model: Any, corpus: Corpus, options: TrainOptions, *, steps: int, seconds: float, folder: Path
) -> HeldOutLoss:
    """Write a temporary sibling, measure what was written, and only then take the name."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(partial)
    save_tokenizer(corpus.tokenizer, partial)
    token = corpus.tokenizer.bos_token_id
    GenerationConfig(
        bos_token_id=token, eos_token_id=token, pad_token_id=token, do_sample=False
    ).save_pretrained(partial)
    loss = _loss_of_folder(partial, corpus.tokenizer)
    run = Run(
        steps=steps,
        tokens=steps * options.batch * WINDOW,
        corpus_tokens=corpus.windows_NL.shape[0] * WINDOW,
        seconds=seconds,
        device=options.device,
        threads=options.threads,
        shared_lines=corpus.shared_lines,
        command=command_line(options),
    )
    parameters = sum(p.numel() for p in model.parameters())
    card = model_card(model.config, parameters, corpus.sources, run, loss)
    (partial / "README.md").write_text(card, encoding="utf-8")
    for path in partial.iterdir():
        path.chmod(0o644)  # safetensors writes files that only their owner can read
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return loss


def _loss_of_folder(folder: Path, tokenizer: PreTrainedTokenizerBase) -> HeldOutLoss:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return held_out_loss(model, tokenizer, evaluation_text())
