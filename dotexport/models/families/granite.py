"""Granite: Llama with a multiplier each for embedding, sublayers, attention scores and logits; and
the same with a mixture of experts, which files keep together, in the place of its MLP.

All but that of the scores are folded into the weights before anything else (models/carriers.py).
"""

from __future__ import annotations

from dataclasses import replace

from dotexport.models.families.llama import LLAMA
from dotexport.models.families.qwen3_moe import mixture
from dotexport.models.stacks import Stack

GRANITE = replace(
    LLAMA,
    model_type="granite",
    architecture="GraniteForCausalLM",
    divides=False,
    carriers=(),
)
EXPERTS = mixture(
    "block_sparse_moe",
    router="router.layer",
    gate="gate_proj",
    up="up_proj",
    down="down_proj",
    neurons="mlp",
)
EXPERT = f"{EXPERTS.module}.experts.{{}}"
ATTENTION, _ = GRANITE.sublayers
GRANITE_MOE = replace(
    GRANITE,
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    sublayers=(ATTENTION, EXPERTS),
    gated=f"{EXPERT}.gate_proj",
    experts_key="num_local_experts",
    release=5,  # before, heads are hidden_size / heads wide, whatever config.json says
    stacks=(
        Stack(
            f"{EXPERTS.module}.input_linear.weight",
            (f"{EXPERT}.gate_proj.weight", f"{EXPERT}.up_proj.weight"),
            held=f"{EXPERTS.module}.experts.gate_up_proj",
        ),
        Stack(
            f"{EXPERTS.module}.output_linear.weight",
            (f"{EXPERT}.down_proj.weight",),
            held=f"{EXPERTS.module}.experts.down_proj",
        ),
    ),
)
