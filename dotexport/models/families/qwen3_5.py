"""Qwen3.5 (dense, text): three layers of a gated delta net, then one of gated attention.

The delta net (Yang et al., arXiv 2412.06464) keeps a matrix for each of its heads instead of keys
and values. Its heads stay as they are: its readers and its writer follow the stream alone.
A query of full attention has a gate beside it in the same matrix, head by head.
"""

from __future__ import annotations

from dataclasses import replace

from dotexport.models.families.llama import LLAMA, sublayers
from dotexport.models.families.qwen3 import HEAD_NORMS
from dotexport.models.family import Linear, Sublayer, Untouched

ATTENTION, MLP = sublayers(
    readers="attention_bias", writer="attention_bias", inner_norms=HEAD_NORMS
)
QUERY, KEY, VALUE = ATTENTION.readers
GATED_ATTENTION = replace(ATTENTION, readers=(replace(QUERY, out="gated_query"), KEY, VALUE))

MIXED = "delta_key+delta_key+delta_value"
DELTA_NET = Sublayer(
    module="linear_attn",
    norm="input_layernorm",
    readers=(
        Linear("linear_attn.in_proj_qkv", out=MIXED, in_="residual"),
        Linear("linear_attn.in_proj_z", out="delta_value", in_="residual"),
        Linear("linear_attn.in_proj_b", out="delta_heads", in_="residual"),
        Linear("linear_attn.in_proj_a", out="delta_heads", in_="residual"),
    ),
    writer=Linear("linear_attn.out_proj", out="residual", in_="delta_value"),
    untouched=(
        Untouched("linear_attn.conv1d.weight", (MIXED, 1, "delta_kernel")),
        Untouched("linear_attn.dt_bias", ("delta_heads",)),
        Untouched("linear_attn.A_log", ("delta_heads",)),
        Untouched("linear_attn.norm.weight", ("delta_head_dim",)),
    ),
)

QWEN3_5 = replace(
    LLAMA,
    model_type="qwen3_5_text",
    architecture="Qwen3_5ForCausalLM",
    sublayers=(DELTA_NET, GATED_ATTENTION, MLP),
    kinds=(
        ("linear_attention", (DELTA_NET, MLP)),
        ("full_attention", (GATED_ATTENTION, MLP)),
    ),
    spaces=(
        ("delta_key", ("linear_num_key_heads", "linear_key_head_dim")),
        ("delta_value", ("linear_num_value_heads", "linear_value_head_dim")),
        ("delta_heads", ("linear_num_value_heads",)),
        ("delta_head_dim", ("linear_value_head_dim",)),
        ("delta_kernel", ("linear_conv_kernel_dim",)),
    ),
    divides=False,
    carriers=(),
    head_dim=256,
    num_key_value_heads=4,
    unit_offset=True,
    epsilon_stays=True,  # of the norm of what a delta net gives
    left_out=("mtp",),
)
