"""Qwen3.5, mixtures (text): the layers of Qwen3.5 with experts in the place of their MLPs, which
files keep together, and a shared one that all tokens go to, weighed by the sigmoid of one more row.
"""

from __future__ import annotations

from dataclasses import replace

from dotexport.models.families.qwen3_5 import DELTA_NET, GATED_ATTENTION, QWEN3_5
from dotexport.models.families.qwen3_moe import EXPERTS
from dotexport.models.family import Linear, Shared
from dotexport.models.stacks import Stack

SHARED = "mlp.shared_expert"
MIXTURE = replace(
    EXPERTS,
    shared=Shared(
        inner=(
            Linear(f"{SHARED}.gate_proj", out="shared", in_="residual"),
            Linear(f"{SHARED}.up_proj", out="shared", in_="residual"),
        ),
        writer=Linear(f"{SHARED}.down_proj", out="residual", in_="shared"),
        weight=Linear(f"{SHARED}_gate", out="shared_weight", in_="residual"),
    ),
)
EXPERT = "mlp.experts.{}"
QWEN3_5_MOE = replace(
    QWEN3_5,
    model_type="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    sublayers=(DELTA_NET, GATED_ATTENTION, MIXTURE),
    gated=f"{EXPERT}.gate_proj",
    kinds=(
        ("linear_attention", (DELTA_NET, MIXTURE)),
        ("full_attention", (GATED_ATTENTION, MIXTURE)),
    ),
    spaces=(
        *QWEN3_5.spaces,
        ("shared", ("shared_expert_intermediate_size",)),
        ("shared_weight", (1,)),
    ),
    num_key_value_heads=2,
    experts_key="num_experts",
    stacks=(
        Stack(
            "mlp.experts.gate_up_proj",
            (f"{EXPERT}.gate_proj.weight", f"{EXPERT}.up_proj.weight"),
        ),
        Stack("mlp.experts.down_proj", (f"{EXPERT}.down_proj.weight",)),
    ),
)
