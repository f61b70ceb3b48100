"""Llama: pre-norm RMSNorm, rotary attention with grouped KV heads, gated SwiGLU MLP.

Most decoders since are this with other biases: their tables are made from the same sublayers.
"""

from __future__ import annotations

from dotexport.models.family import Family, InnerNorm, Linear, Sublayer


def sublayers(
    *,
    readers: str | None = None,
    writer: str | None = None,
    mlp: str | None = None,
    inner_norms: tuple[InnerNorm, ...] = (),
) -> tuple[Sublayer, Sublayer]:
    """Attention and MLP; each argument is the flag of config.json that gives those a bias."""
    return (
        Sublayer(
            module="self_attn",
            norm="input_layernorm",
            readers=(
                Linear("self_attn.q_proj", out="query", in_="residual", bias=readers),
                Linear("self_attn.k_proj", out="kv", in_="residual", bias=readers),
                Linear("self_attn.v_proj", out="kv", in_="residual", bias=readers),
            ),
            writer=Linear("self_attn.o_proj", out="residual", in_="query", bias=writer),
            inner_norms=inner_norms,
        ),
        Sublayer(
            module="mlp",
            norm="post_attention_layernorm",
            readers=(
                Linear("mlp.gate_proj", out="mlp", in_="residual", bias=mlp),
                Linear("mlp.up_proj", out="mlp", in_="residual", bias=mlp),
            ),
            writer=Linear("mlp.down_proj", out="residual", in_="mlp", bias=mlp),
        ),
    )


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    embedding="model.embed_tokens",
    layer="model.layers.{}",
    sublayers=sublayers(readers="attention_bias", writer="attention_bias", mlp="mlp_bias"),
    final_norm="model.norm",
    head=Linear("lm_head", out="vocab", in_="residual"),
    gated="mlp.gate_proj",
    divides=True,
    # The others ask for no multiple of the heads; Granite's has the biases that Mistral's lacks.
    carriers=("LlamaForCausalLM", "MistralForCausalLM", "GraniteForCausalLM"),
)
