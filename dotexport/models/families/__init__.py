"""Model families: one table per architecture, and the class that each is written as."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from dotexport.errors import CheckpointError, UnsupportedModelError
from dotexport.models.families.ernie4_5 import ERNIE4_5
from dotexport.models.families.gemma2 import GEMMA2
from dotexport.models.families.gemma3 import GEMMA3
from dotexport.models.families.gemma4 import GEMMA4
from dotexport.models.families.gpt_oss import GPT_OSS
from dotexport.models.families.granite import GRANITE, GRANITE_MOE
from dotexport.models.families.granite_hybrid import GRANITE_HYBRID
from dotexport.models.families.hunyuan import HUNYUAN
from dotexport.models.families.lfm2 import LFM2
from dotexport.models.families.llama import LLAMA
from dotexport.models.families.ministral import MINISTRAL, MINISTRAL3
from dotexport.models.families.mistral import MISTRAL
from dotexport.models.families.mixtral import MIXTRAL
from dotexport.models.families.olmo2 import OLMO2
from dotexport.models.families.phi3 import PHI3
from dotexport.models.families.qwen2 import QWEN2
from dotexport.models.families.qwen3 import QWEN3
from dotexport.models.families.qwen3_5 import QWEN3_5
from dotexport.models.families.qwen3_5_moe import QWEN3_5_MOE
from dotexport.models.families.qwen3_moe import QWEN3_MOE
from dotexport.models.families.seed_oss import SEED_OSS
from dotexport.models.families.smollm3 import SMOLLM3
from dotexport.models.family import ALWAYS, Family, Linear
from dotexport.models.shapes import EXPERTS, Sizes

TABLES = (
    LLAMA,
    MISTRAL,
    MINISTRAL,
    MINISTRAL3,
    SMOLLM3,
    GRANITE,
    GRANITE_MOE,
    GRANITE_HYBRID,
    QWEN2,
    QWEN3,
    QWEN3_5,
    LFM2,
    PHI3,
    GEMMA2,
    GEMMA3,
    GEMMA4,
    OLMO2,
    SEED_OSS,
    ERNIE4_5,
    HUNYUAN,
    QWEN3_MOE,
    QWEN3_5_MOE,
    MIXTRAL,
    GPT_OSS,
)
SUPPORTED: dict[str, Family] = {family.architecture: family for family in TABLES}
"""Architecture -> family table."""
BUFFERS = {sub.scaled_by for family in TABLES for sub in family.sublayers if sub.scaled_by}
ROW_KEYS = tuple(dict.fromkeys(key for family in TABLES for key in family.row_keys))
"""What config.json calls the number of tokens, in any class."""


def is_buffer(name: str) -> bool:
    """Whether files hold this, and torch counts it as no parameter, in any class."""
    return name.rpartition(".")[2] in BUFFERS


def table_of(architecture: str, config: Mapping[str, Any]) -> Family | None:
    """Of two tables for one class, that with experts where config.json says that there are some."""
    family = SUPPORTED.get(architecture)
    mixture = family.mixture if family else None
    return mixture if mixture and config.get(str(mixture.experts_key)) else family


def find_family(config: Mapping[str, Any]) -> Family:
    """The table for the architecture that config.json names.

    Raises:
        UnsupportedModelError: no table describes it.
        CheckpointError: model_type is not that of the architecture.
    """
    known = SUPPORTED
    listed = config.get("architectures") or []
    named = [listed] if isinstance(listed, str) else [str(name) for name in listed]
    for architecture in named:
        if (family := table_of(architecture, config)) is not None:
            if config.get("model_type") != family.model_type:
                raise CheckpointError(
                    f"config.json gives model_type = {config.get('model_type')!r} beside "
                    f"{architecture}; expected {family.model_type!r}: take the config.json that "
                    "belongs to these weights"
                )
            _check_flags(family, config)
            return family
    what = ", ".join(named) or "what names no architecture"
    hint = "docs/adding-a-family.md shows how to add a table"
    if any(config.get(key) for key in EXPERTS):
        hint = (
            "it is a mixture of experts for which there is no table; take the dense model of its "
            "series"
        )
    elif "text_config" in config:
        hint = (
            "it holds more than a language model: save its language model alone, under its class "
            "for causal language modelling, and narrow that"
        )
    raise UnsupportedModelError(
        f"{what} is not supported (model_type {config.get('model_type')}); dotexport narrows "
        f"{', '.join(sorted(known))}. {hint}"
    )


HARMLESS = {"decoder_sparse_step": 1}  # flags that are numbers -> the one that changes nothing


def _check_flags(family: Family, config: Mapping[str, Any]) -> None:
    wrong = [(flag, meaning) for flag, meaning in family.refused if _is_set(flag, config.get(flag))]
    if not config.get("is_causal", True):  # transformers 5 asks this of every class
        wrong.append(("is_causal", "attends to later tokens too"))
    if config.get("per_layer_config"):
        wrong.append(("per_layer_config", "has layers of different sizes"))
    for flag, meaning in wrong:
        raise UnsupportedModelError(
            f"config.json sets {flag}, with which {family.architecture} {meaning}; dotexport "
            "narrows decoders of equal layers that see what came before"
        )


def _is_set(flag: str, said: Any) -> bool:
    return said not in (None, HARMLESS[flag]) if flag in HARMLESS else bool(said)


def find_carrier(family: Family, sizes: Sizes) -> Family:
    """The class that these sizes are written as: the first of the carriers that can hold them."""
    for architecture in family.carriers:
        carrier = family if architecture == family.architecture else SUPPORTED[architecture]
        whole_heads = not carrier.divides or sizes.hidden_size % sizes.num_attention_heads == 0
        windows = carrier.windows or not sizes.windowed
        if (
            whole_heads
            and windows
            and (carrier is family or _has_place_for(family, carrier, sizes))
        ):
            return carrier
    return family


def _has_place_for(family: Family, carrier: Family, sizes: Sizes) -> bool:
    """Whether the carrier has layers that are made of the same spaces, one after another, and
    their biases."""
    return _holds(family, carrier, tuple(sizes.each_kind), sizes.biases)


@cache
def _holds(family: Family, carrier: Family, kinds: Sequence[str], biases: frozenset[str]) -> bool:
    """The same: a search over sizes asks this thousands of times, and it hangs on few of them."""
    in_any = [space for space, _ in _spaces(carrier.linears)]
    for kind in kinds:
        ours, theirs = _spaces(family.linears_in(kind)), _spaces(carrier.linears_in(kind))
        biased = [linear.bias == ALWAYS or linear.bias in biases for _, linear in ours]
        if [space for space, _ in ours] != in_any:
            return False
        if any(b and their.bias is None for b, (_, their) in zip(biased, theirs, strict=True)):
            return False
    return True


def _spaces(linears: Iterable[Linear]) -> list[tuple[str, Linear]]:
    """Each space of their rows, and which it is of."""
    return [(space, linear) for linear in linears for space in linear.outs]


def apart(
    family: Family, carrier: Family, sizes: Sizes, kinds: Iterable[str]
) -> Iterator[tuple[Linear, Linear, tuple[int, int]]]:
    """Linears of a layer of each of these kinds, and which of their rows are which linear of the
    carrier: the class itself has them as they are, another has one for each space."""
    for kind in kinds:
        theirs = iter(carrier.linears_in(kind))
        for linear in family.linears_in(kind):
            parts = sizes.rows(linear)
            start = 0
            for rows in [sum(parts)] if carrier is family else parts:
                yield linear, next(theirs), (start, start + rows)
                start += rows


def carried_biases(family: Family, carrier: Family, sizes: Sizes) -> frozenset[str]:
    """The carrier's flags for biases: those that are on, and those of linears that have one."""
    on: set[str | None] = set(sizes.biases)
    pairs = apart(family, carrier, sizes, sizes.each_kind)
    on |= {theirs.bias for linear, theirs, _ in pairs if sizes.has_bias(linear)}
    return frozenset(flag for flag in carrier.bias_flags if flag in on)


FLOAT_WEIGHTS = {
    "mxfp4": "save it in bfloat16 first: AutoModelForCausalLM.from_pretrained(MODEL, "
    "dtype='bfloat16', quantization_config=Mxfp4Config(dequantize=True)).save_pretrained(FOLDER)"
}
"""How the float model is had of what is published quantised alone."""


def check_quantised(config: Mapping[str, Any]) -> None:
    """Refuse weights that are already quantised.

    Raises:
        UnsupportedModelError: config.json has a quantization_config.
    """
    if (said := config.get("quantization_config")) is not None:
        method = said.get("quant_method") if isinstance(said, Mapping) else None
        float_weights = FLOAT_WEIGHTS.get(str(method))
        raise UnsupportedModelError(
            "the model is already quantised (config.json has quantization_config); "
            "narrow the float model first, quantise what comes out"
            + (f". Of {method} weights, {float_weights}" if float_weights else "")
        )
