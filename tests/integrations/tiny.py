"""Tiny seeded models of transformers, each with the attention that it is compared with: SDPA, or eager where SDPA does
not offer what the model asks for."""

import torch
import transformers

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
DECODER = SMALL | {
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER)), "sdpa"


def mistral():
    return transformers.MistralForCausalLM(transformers.MistralConfig(**DECODER, sliding_window=6)), "sdpa"


def gemma2():
    config = transformers.Gemma2Config(
        **DECODER, head_dim=16, sliding_window=6, attn_logit_softcapping=2.0, query_pre_attn_scalar=16
    )
    return transformers.Gemma2ForCausalLM(config), "eager"  # SDPA ignores the soft cap


def gpt_oss():
    config = transformers.GptOssConfig(
        **DECODER, head_dim=16, sliding_window=6, num_local_experts=2, num_experts_per_tok=1
    )
    return transformers.GptOssForCausalLM(config), "eager"


def llama4():
    config = transformers.Llama4TextConfig(
        **DECODER, head_dim=16, attention_chunk_size=5, num_local_experts=2, intermediate_size_mlp=96, moe_layers=[]
    )
    return transformers.Llama4ForCausalLM(config), "sdpa"


def qwen2():
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**DECODER)), "sdpa"


def qwen3():
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**DECODER, head_dim=16)), "sdpa"


def phi():
    return transformers.PhiForCausalLM(transformers.PhiConfig(**DECODER)), "sdpa"


DECODERS = [llama, mistral, gemma2, gpt_oss, llama4]
PLAIN = [qwen2, qwen3, phi]  # with the attention of Llama


def build(maker, device="cpu"):
    """The model with its seeded weights, ready to generate without an end, and the peer's name."""
    torch.manual_seed(0)
    model, peer = maker()
    for name, parameter in model.named_parameters():
        if "sinks" in name or name.endswith("bias"):
            parameter.data.normal_()
    model.eval()
    if model.can_generate():
        model.generation_config.eos_token_id = None
    return model.to(device), peer
