"""Qwen3-MoE: the attention of Qwen3, and in the place of its MLP a mixture of experts."""

from __future__ import annotations

from dataclasses import replace

from dotexport.models.families.qwen3 import QWEN3
from dotexport.models.family import Linear, Sublayer


def mixture(
    module: str,
    *,
    router: str = "gate",
    gate: str,
    up: str,
    down: str,
    neurons: str,
    bias: str | None = None,
) -> Sublayer:
    """A router, and the three matrices of each expert by their names below it; `neurons` is the
    space between them, `bias` the flag of config.json that gives all of them a bias."""
    expert = f"{module}.experts.{{}}"
    return Sublayer(
        module=module,
        norm="post_attention_layernorm",
        readers=(
            Linear(f"{module}.{router}", out="experts", in_="residual", bias=bias),
            Linear(f"{expert}.{gate}", out=neurons, in_="residual", bias=bias),
            Linear(f"{expert}.{up}", out=neurons, in_="residual", bias=bias),
        ),
        writer=Linear(f"{expert}.{down}", out="residual", in_=neurons, bias=bias),
    )


ATTENTION, _ = QWEN3.sublayers
EXPERTS = mixture("mlp", gate="gate_proj", up="up_proj", down="down_proj", neurons="expert")
DENSE = "has dense layers among the sparse ones"
QWEN3_MOE = replace(
    QWEN3,
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    sublayers=(ATTENTION, EXPERTS),
    gated="mlp.experts.{}.gate_proj",
    head_dim=None,
    num_key_value_heads=4,
    refused=tuple((flag, DENSE) for flag in ("mlp_only_layers", "decoder_sparse_step")),
    experts_key="num_experts",
)
