"""The stock checkpoint itself, run by transformers on torch: what vLLM and others load too.

Shapes: B sequences, L tokens of the longest prompt, V vocabulary.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.utils import logging as transformers_logging

from dotexport.adapter import Logits, Tokens
from dotexport.checkpoint import INDEX, Checkpoint
from dotexport.errors import CheckpointError


class HuggingFace:
    """Loads with `AutoModelForCausalLM.from_pretrained`, without remote code."""

    name = "hf"
    summary = "stock transformers checkpoint: torch, vLLM, SGLang, TGI"
    precisions = ("as-stored",)
    exact_rounding = ()
    weight_bits: Mapping[str, tuple[float, float]] = {}  # as stored

    def missing(self) -> list[str]:
        return []  # torch and transformers are what dotexport itself stands on

    def problems(self, checkpoint: Checkpoint, precision: str) -> list[str]:
        if checkpoint.config.get("auto_map"):
            return [
                "config.json names remote code (auto_map), which dotexport does not run; "
                "take a model whose class is in transformers"
            ]
        try:
            AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True)
        except Exception as error:  # whatever the config class objects to is the answer
            return [f"transformers refuses config.json: {_first_line(error)}"]
        return []

    def config_problems(self, config: Mapping[str, Any], precision: str) -> list[str]:
        settings = dict(config)
        try:
            AutoConfig.for_model(settings.pop("model_type", ""), **settings)
        except Exception as error:  # whatever the config class objects to is the answer
            return [f"transformers refuses config.json: {_first_line(error)}"]
        return []

    def write(self, checkpoint: Checkpoint, folder: Path, precision: str) -> None:
        weights = set(checkpoint.files.values())
        index = checkpoint.folder / INDEX
        for file in [checkpoint.folder / "config.json", *weights, *checkpoint.companions()]:
            shutil.copyfile(file, folder / file.name)
        if index.is_file():
            shutil.copyfile(index, folder / INDEX)

    def open(self, folder: Path, *, threads: int | None = None) -> TorchSession:
        """Load in float32; `threads` is torch's setting for the whole process.

        Raises:
            CheckpointError: tensors that config.json calls for are missing, or others are left.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        loader: Any = AutoModelForCausalLM  # its stubs do not know output_loading_info
        try:
            with _no_progress_bar():
                model, report = loader.from_pretrained(
                    folder,
                    dtype=torch.float32,
                    local_files_only=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                )
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"transformers cannot load {folder}: {_first_line(error)}; export it again"
            ) from error
        _check_complete(folder, report)
        return TorchSession(model.eval())


class TorchSession:
    """Transformers with its own growing cache.

    A cache slot of a padded position stays masked for good, and the positions of the tokens that
    follow go on from each prompt's own length.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.apart: list[TorchSession] = []

    @torch.inference_mode()
    def start(self, tokens_BL: Tokens, lengths_B: Sequence[int] | None = None) -> Logits:
        B, L = tokens_BL.shape
        lengths = [L] * B if lengths_B is None else list(lengths_B)
        self.cache = DynamicCache(config=self.model.config)
        self.position_B = torch.tensor(lengths)
        self.apart = []
        if min(lengths) < L and getattr(self.model.config, "sliding_window", None):
            return self._start_apart(tokens_BL, lengths)
        # Without padding no mask is needed, and attention takes its faster causal path.
        ragged = min(lengths) < L
        self.mask_BL = (torch.arange(L) < self.position_B[:, None]).long() if ragged else None
        position_BL = torch.arange(L).expand(B, L)
        return self._run(torch.from_numpy(np.ascontiguousarray(tokens_BL)), position_BL)

    @torch.inference_mode()
    def step(self, tokens_B: Tokens) -> Logits:
        if self.apart:
            alone = zip(self.apart, tokens_B, strict=True)
            return np.concatenate([session.step(token[None]) for session, token in alone])
        if self.mask_BL is not None:
            seen = self.mask_BL.new_ones(len(tokens_B), 1)
            self.mask_BL = torch.cat([self.mask_BL, seen], dim=1)
        token_B1 = torch.from_numpy(np.ascontiguousarray(tokens_B))[:, None]
        logits_B1V = self._run(token_B1, self.position_B[:, None])
        self.position_B = self.position_B + 1
        return logits_B1V[:, 0]

    def _start_apart(self, tokens_BL: Tokens, lengths: Sequence[int]) -> Logits:
        """A window counts slots of the cache, padding included: every prompt gets a cache alone."""
        self.apart = [TorchSession(self.model) for _ in lengths]
        logits_BLV = np.zeros((*tokens_BL.shape, self.model.config.vocab_size), dtype=np.float32)
        for row, (session, length) in enumerate(zip(self.apart, lengths, strict=True)):
            logits_BLV[row, :length] = session.start(tokens_BL[row : row + 1, :length])[0]
        return logits_BLV

    def _run(self, token_BL: torch.Tensor, position_BL: torch.Tensor) -> Logits:
        with warnings.catch_warnings():
            # Granite's forward has another name for it since 5.24, and the others have not.
            warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
            output = self.model(
                input_ids=token_BL,
                attention_mask=self.mask_BL,
                position_ids=position_BL,
                past_key_values=self.cache,
                use_cache=True,
            )
        logits_BLV: Logits = output.logits.numpy()
        return logits_BLV


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """A library does not print; transformers would."""
    switch: Any = transformers_logging
    shown = switch.is_progress_bar_enabled()
    switch.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            switch.enable_progress_bar()


def _check_complete(folder: Path, report: dict[str, Any]) -> None:
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    wrong = {kind: sorted(map(str, report[kind])) for kind in kinds if report.get(kind)}
    if wrong:
        listed = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(v)}" for kind, v in wrong.items())
        raise CheckpointError(
            f"{folder} does not hold exactly the tensors its config.json calls for ({listed}); "
            "export it again"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
