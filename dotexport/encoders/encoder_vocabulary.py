"""An encoder with fewer tokens: rows of its embedding and of a head over tokens, its tokenizer, and
every id in its files.

Text whose tokens all stay is embedded as before, exactly; other text is split into smaller pieces.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dotexport.encoders.encoder_folder import Encoder, copy_beside
from dotexport.encoders.encoder_walk import Progress
from dotexport.errors import UnsupportedModelError
from dotexport.models.checkpoint import COMPANIONS
from dotexport.vocabulary.trimming import trim_text
from dotexport.vocabulary.vocabulary_options import VocabularyOptions

SPELLED = ("*.model", "unigram.json")
"""The same tokens once more, in forms that no fast tokenizer reads."""


def trimmed(
    encoder: Encoder,
    options: VocabularyOptions,
    text: str,
    folder: Path,
    progress: Progress = lambda stage, done, total: None,
) -> tuple[Encoder, Mapping[str, Any]]:
    """The encoder with fewer tokens, its files in `folder`; and what is said of it.

    Args:
        text: counts where `--vocab-for` names none.
        folder: an empty one.

    Raises:
        UnsupportedModelError, CheckpointError, CalibrationError, SizeError, UsageError.
    """
    copy_beside(encoder, folder)
    home = folder / encoder.home.relative_to(encoder.root)
    companions = []
    for file in sorted(set(chain.from_iterable(map(home.glob, (*COMPANIONS, *SPELLED))))):
        if file.is_file():
            companions.append(encoder.home / file.name)
            file.unlink()
    made = trim_text(encoder.home, encoder.config, companions, options, text, home, progress)
    settings: Any = encoder.model.config
    padding = int(settings.pad_token_id or 0)
    if encoder.kind.counts_from_padding and made.kept.new_ids.get(padding) != padding:
        raise UnsupportedModelError(
            f"{encoder.home} counts positions from {padding}, its padding token, and tokens before "
            "it would leave; leave --vocab and --vocab-for out"
        )
    changed = {w: v for w, v in made.config.items() if encoder.config.get(w) != v}
    model = _of_rows(encoder.model, list(made.kept.ids), changed)
    report = {**made.report, "original_ids": list(made.kept.ids)}
    return replace(encoder, root=folder, home=home, config=made.config, model=model), report


def _of_rows(model: nn.Module, ids: list[int], changed: Mapping[str, Any]) -> nn.Module:
    """A copy that holds these rows of whatever has one per token.

    Args:
        changed: words of its config that say something else then.
    """
    settings: Any = copy.deepcopy(model.config)
    for word, value in changed.items():
        setattr(settings, word, value)
    smaller: nn.Module = type(model)(settings).eval()
    shapes = {name: value.shape for name, value in smaller.state_dict().items()}
    rows = torch.tensor(ids)
    smaller.load_state_dict(
        {
            name: value if value.shape == shapes[name] else value[rows]
            for name, value in model.state_dict().items()
        }
    )
    return smaller
