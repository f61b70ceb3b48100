"""What a token costs a device at the least: bytes that must be read, and arithmetic.

Counted from shapes alone, as the roofline model does (Williams, Waterman and Patterson, 2009):
every weight of a matrix product is read once in a forward pass, whatever the batch, and takes two
operations per sequence and position; the KV cache is read once by every decode step.

Shapes: B sequences of a batch, L prompt tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dotexport.errors import DotexportError
from dotexport.exports.target import Target

from .workload import Workload

NUMBER_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# What matrix products multiply, where it is not float32: with few bits in weights, some runtimes
# round activations to 8 bits and multiply integers, others widen the weights.
MULTIPLIED = {
    ("ort-cpu", "int4"): "int8",
    ("ort-cpu", "fp16"): "fp16",
    ("ort-cuda", "fp16"): "fp16",
    ("ort-cuda", "bf16"): "bf16",
    ("ort-cuda", "int4"): "fp16",
    ("onnx", "int8"): "int8",
    ("executorch", "int4"): "int8",
    ("gguf", "int8"): "int8",
    ("gguf", "int4"): "int8",
    ("gguf", "int6-k"): "int8",
    ("gguf", "int4-k"): "int8",
    ("gguf", "int3-k"): "int8",
    ("gguf", "int2-k"): "int8",
}


@dataclass(frozen=True)
class Work:
    """Of one forward pass.

    Attributes:
        num_bytes: weights and KV cache that it reads, and keys and values that it writes.
        flops: multiplications and additions of its matrix products and its attention.
    """

    num_bytes: float
    flops: float


@dataclass(frozen=True)
class Cost:
    """What decides the work of a model in one runtime.

    Attributes:
        weight_bytes: read in every forward pass: all but an embedding table that is no head too.
        cache_bytes: keys and values of one token in all layers.
        layer_parameters: of the matrix products in all layers.
        head_parameters: of the product with the output head.
        attention_width: query heads x head_dim, summed over layers.
        number: of the matrix products: fp32, bf16, fp16 or int8.
    """

    weight_bytes: int
    cache_bytes: int
    layer_parameters: int
    head_parameters: int
    attention_width: int
    number: str

    def decode(self, asked: Workload) -> Work:
        """One step at the mean position of a request."""
        B, position = asked.batch_size, asked.prompt_length + asked.generation_length / 2
        products = 2 * B * (self.layer_parameters + self.head_parameters)
        return Work(
            self.weight_bytes + B * position * self.cache_bytes,
            products + 4 * B * position * self.attention_width,
        )

    def prefill(self, asked: Workload, answered: int) -> Work:
        """A whole prompt, with logits of `answered` positions of each sequence."""
        B, L = asked.batch_size, asked.prompt_length
        products = 2 * B * (L * self.layer_parameters + answered * self.head_parameters)
        causal = 4 * B * self.attention_width * L * (L + 1) / 2
        return Work(self.weight_bytes + B * L * self.cache_bytes, products + causal)


def find_cost(
    config: Mapping[str, Any], target: Target, precision: str, number: str | None
) -> Cost | None:
    """The cost of the model that this config.json describes; None: its family is not known.

    Args:
        number: in which torch holds all weights, whatever was stored; None: as the target wrote.
    """
    # Imported late, for torch comes with them.
    from dotexport.models.families import find_family
    from dotexport.models.shapes import (
        attended,
        cached_numbers,
        num_parameters,
        read_sizes,
        shapes,
    )
    from dotexport.sizes.planning import bytes_of_cached_number, weight_bytes

    try:
        family = find_family(config)
        sizes = read_sizes(family, config)
    except DotexportError:
        return None
    table = sizes.vocab_size * sizes.hidden_size
    looked_up = 0 if sizes.tied else table
    if family.per_layer:
        looked_up += sizes.vocab_size * sizes.spaces[family.per_layer.projection.out]
    bits: Sequence[float] | None = getattr(target, "weight_bits", {}).get(precision)
    if number is not None:
        bits = (8.0 * NUMBER_BYTES[number],) * 2
    if bits is not None:  # a head is read as all matrices are, whatever lies beside it
        read = weight_bytes(family, sizes, bits[:2]) - round(looked_up * bits[1] / 8)
    elif own := getattr(target, "read_bytes", None):
        read = own(family, sizes, precision)
    else:
        return None
    each = NUMBER_BYTES[number] if number else bytes_of_cached_number(target, precision)
    products = sum(s[0] * s[1] for _, s in shapes(family, sizes) if len(s) == 2)
    assert products <= num_parameters(family, sizes)
    return Cost(
        weight_bytes=read,
        cache_bytes=cached_numbers(family, sizes) * each,
        layer_parameters=products - table - looked_up,
        head_parameters=table,
        attention_width=round(attended(family, sizes)),
        number=number or MULTIPLIED.get((target.name, precision), "fp32"),
    )
