"""A table of what narrowed models make of special tokens, and of the text behind them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn.functional import kl_div

from dotexport.bench.tables.result_files import RESULTS, Out, Table, save
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.loading import Loaded
from dotexport.models.origin import model_name
from dotexport.models.text_options import TextOptions
from dotexport.models.text_windows import read_tokenizer, token_windows

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    narrowed: Annotated[list[Path], typer.Argument(help="Model folders.")],
    model: Annotated[Path, typer.Option(help="Folder of the original.")],
    text: Annotated[str, typer.Option(help="Ordinary text.")],
    windows: Annotated[int, typer.Option(help="Of it.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 256,
    out: Out = RESULTS,
) -> None:
    """Put each special token into the middle of ordinary text."""
    windows_NL = token_windows(model, TextOptions(source=text, samples=windows, seqlen=length))
    tokenizer = read_tokenizer(model)
    models = [Loaded(Checkpoint.open(folder)) for folder in (model, *narrowed)]
    rows: Table = []
    known = range(models[0].model.config.vocab_size)
    for number in sorted(set(tokenizer.all_special_ids).intersection(known)):
        tokens_NL = windows_NL.clone()
        tokens_NL[:, length // 2] = number
        row: dict[str, Any] = {"token": tokenizer.convert_ids_to_tokens(number)}
        theirs_NLV, *said = (_log_p(loaded, tokens_NL) for loaded in models)
        for folder, ours_NLV in zip(narrowed, said, strict=True):
            kl_L = kl_div(ours_NLV, theirs_NLV, reduction="none", log_target=True).sum(-1).mean(0)
            parts = kl_L.split([length // 2, 1, length - length // 2 - 1])
            for place, part_L in zip(("before", "at", "behind"), parts, strict=True):
                row[f"{model_name(folder)}, {place}"] = float(part_L.mean())
        rows.append(row)
    save(
        out / "special-tokens",
        "Special tokens in the middle of text",
        PROTOCOL.format(model=model.name, text=Path(text).name, windows=windows, length=length),
        rows,
    )


PROTOCOL = """KL divergence from {model} in nats per token, before, at and behind a special token
in the middle of {windows} windows of {length} tokens of {text}."""


def _log_p(loaded: Loaded, tokens_NL: Tensor) -> Tensor:
    return torch.cat([loaded.logits(window_L[None]) for window_L in tokens_NL]).log_softmax(-1)
