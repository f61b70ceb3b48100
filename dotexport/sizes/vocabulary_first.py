"""A plan of a model that loses tokens before anything else is decided.

Budgets stay those of the whole original: what the vocabulary frees, the other axes need not give.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dotexport.axes.plan import SizeOptions
from dotexport.sizes.deployment import Deployment
from dotexport.sizes.plan_file import fingerprint
from dotexport.sizes.planning import Choice, choose
from dotexport.vocabulary.trimming import choose_tokens, renumbered
from dotexport.vocabulary.vocabulary_options import VocabularyOptions


def choose_behind(
    folder: Path,
    config: Mapping[str, Any],
    asked: SizeOptions,
    vocabulary: VocabularyOptions,
    where: Deployment,
) -> Choice:
    """`choose` for the tokens that stay; reads the model's tokenizer and the text, no weights.

    Raises:
        SizeError, UsageError, UnsupportedModelError, RuntimeMissingError: as `choose` and
            `choose_tokens`.
    """
    _, kept = choose_tokens(folder, config, vocabulary, None)
    cut = replace(asked, vocab_size=len(kept.ids))
    chosen = choose(renumbered(config, kept), cut, where)
    flags = {
        "vocab": len(kept.ids),
        "vocab_for": vocabulary.vocab_for,
        "keep_tokens": vocabulary.keep_tokens,
    }
    named = {name: value for name, value in flags.items() if value is not None}
    return replace(
        chosen,
        flags={**chosen.flags, **named},
        config_sha256=fingerprint(config),
        vocabulary=kept.as_dict(),
    )
