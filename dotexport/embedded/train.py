"""Train the embedded model from scratch: `python -m dotexport.embedded.train --help`.

Shapes: B windows in a batch, L tokens in a window, V words in the vocabulary.

Everything that is random hangs on the seed, and the learning rate is constant until the decay
begins: stopping before that and resuming with other `--steps` equals a run with those steps.
On cores shared with other work, OMP_WAIT_POLICY=passive more than halves the CPU time of a step.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.logging import RichHandler
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from dotexport.embedded import MODEL_DIR, evaluation_text
from dotexport.embedded.loss import WINDOW, HeldOutLoss, held_out_loss
from dotexport.embedded.publish import write_model
from dotexport.embedded.stream import Corpus, batches, read_corpus
from dotexport.embedded.training_options import TrainOptions, warmup_stable_decay

logger = logging.getLogger(__name__)


def new_model(options: TrainOptions, separator: int) -> Any:
    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=False,
        bos_token_id=separator,
        eos_token_id=separator,
    )
    return LlamaForCausalLM(config).to(options.device)  # type: ignore[arg-type]


def new_optimizers(model: Any, options: TrainOptions) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, head and norms."""
    hidden = [p for name, p in model.named_parameters() if "layers" in name and p.ndim == 2]
    inside = set(map(id, hidden))
    rest = [p for p in model.parameters() if id(p) not in inside]
    if options.optimizer == "adamw":
        hidden, rest = [], hidden + rest
    found: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            rest, lr=options.lr, betas=(0.9, 0.95), weight_decay=options.weight_decay, fused=True
        )
    ]
    if hidden:
        found.append(
            torch.optim.Muon(
                hidden,
                lr=options.muon_lr,
                weight_decay=options.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    for optimizer in found:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return found


@dataclass
class Progress:
    """What a checkpoint must hold besides weights: how far, and how long it took."""

    step: int = 0
    seconds: float = 0.0


def train(
    corpus: Corpus, options: TrainOptions, folder: Path, stop_after: int | None = None
) -> tuple[Any, Progress]:
    assert corpus.tokenizer.bos_token_id is not None
    model = new_model(options, corpus.tokenizer.bos_token_id)
    optimizers = new_optimizers(model, options)
    progress = _resume(model, optimizers, folder)

    def loss_of(window_BL: torch.Tensor) -> torch.Tensor:
        with torch.autocast(options.device, dtype=torch.bfloat16):
            logits_BLV = model(input_ids=window_BL[:, :-1], use_cache=False).logits
        return cross_entropy(logits_BLV.flatten(0, 1).float(), window_BL[:, 1:].flatten())

    compiled: Any = torch.compile(loss_of)
    texts = evaluation_text()
    smooth, began = math.nan, time.monotonic()
    for window_BL in batches(corpus.windows_NL, options, progress.step):
        if progress.step == stop_after:
            break
        loss = compiled(window_BL.to(options.device))
        loss.backward()
        _update(model, optimizers, warmup_stable_decay(progress.step, options))
        value = loss.item()
        smooth = value if math.isnan(smooth) else 0.98 * smooth + 0.02 * value
        progress.step += 1
        if progress.step % 50 == 0:
            began = _count_time(progress, began)
            _report(progress, options, smooth)
        if progress.step % options.every == 0 or progress.step == options.steps:
            _save_checkpoint(model, optimizers, progress, folder)
            _log_loss(progress.step, held_out_loss(model, corpus.tokenizer, texts, num_windows=32))
            began = _count_time(progress, began)
    return model, progress


def _update(model: Any, optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _count_time(progress: Progress, began: float) -> float:
    now = time.monotonic()
    progress.seconds += now - began
    return now


def _report(progress: Progress, options: TrainOptions, loss: float) -> None:
    rate = progress.step * options.batch * WINDOW / progress.seconds
    logger.info(
        "step %d/%d  loss %.3f  %.0f s  %.0f tokens/s",
        progress.step,
        options.steps,
        loss,
        progress.seconds,
        rate,
    )


def _log_loss(step: int, loss: HeldOutLoss) -> None:
    logger.info(
        "step %d  held out (first windows): %.4f nats/token, %.4f bits/character",
        step,
        loss.nats_per_token,
        loss.bits_per_character,
    )


def _save_checkpoint(
    model: Any, optimizers: list[torch.optim.Optimizer], progress: Progress, folder: Path
) -> None:
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "progress": asdict(progress),
    }
    partial = folder / "partial.pt"
    torch.save(state, partial)
    partial.rename(folder / f"step-{progress.step:06d}.pt")


def _resume(model: Any, optimizers: list[torch.optim.Optimizer], folder: Path) -> Progress:
    saved = sorted(folder.glob("step-*.pt"))
    if not saved:
        return Progress()
    state = torch.load(saved[-1], map_location="cpu")
    model.load_state_dict(state["model"])
    for optimizer, values in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(values)
    logger.info("resuming from %s", saved[-1])
    return Progress(**state["progress"])


def parse() -> tuple[TrainOptions, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="python -m dotexport.embedded.train",
        description="Train the embedded model on the Python sources installed here.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, value in asdict(TrainOptions()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("embedded-training"),
        help="folder for tokens and checkpoints; a run resumes from what is there",
    )
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="model folder to write")
    parser.add_argument(
        "--stop-after",
        type=int,
        default=None,
        help="stop at this step and write the model as it is then",
    )
    chosen = parser.parse_args()
    options = TrainOptions(**{name: getattr(chosen, name) for name in asdict(TrainOptions())})
    return options, chosen


def main() -> None:
    options, chosen = parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler()])
    torch.set_num_threads(options.threads)
    chosen.work.mkdir(parents=True, exist_ok=True)
    corpus = read_corpus(options, chosen.work)
    logger.info("%d windows of %d tokens", *corpus.windows_NL.shape)
    model, progress = train(corpus, options, chosen.work, chosen.stop_after)
    loss = write_model(
        model, corpus, options, steps=progress.step, seconds=progress.seconds, folder=chosen.out
    )
    _log_loss(progress.step, loss)


if __name__ == "__main__":
    main()
