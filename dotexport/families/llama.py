"""Llama: pre-norm RMSNorm, rotary attention with grouped KV heads, gated SwiGLU MLP."""

from __future__ import annotations

from dotexport.families import Family, Linear, Sublayer

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    embedding="model.embed_tokens",
    layer="model.layers.{}",
    sublayers=(
        Sublayer(
            module="self_attn",
            norm="input_layernorm",
            readers=(
                Linear("self_attn.q_proj", out="query", in_="residual", bias="attention_bias"),
                Linear("self_attn.k_proj", out="kv", in_="residual", bias="attention_bias"),
                Linear("self_attn.v_proj", out="kv", in_="residual", bias="attention_bias"),
            ),
            writer=Linear("self_attn.o_proj", out="residual", in_="query", bias="attention_bias"),
        ),
        Sublayer(
            module="mlp",
            norm="post_attention_layernorm",
            readers=(
                Linear("mlp.gate_proj", out="mlp", in_="residual", bias="mlp_bias"),
                Linear("mlp.up_proj", out="mlp", in_="residual", bias="mlp_bias"),
            ),
            writer=Linear("mlp.down_proj", out="residual", in_="mlp", bias="mlp_bias"),
        ),
    ),
    final_norm="model.norm",
    head=Linear("lm_head", out="vocab", in_="residual"),
    gated="mlp.gate_proj",
    divides=True,
)
