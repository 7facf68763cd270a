"""One tiny random language model of each family, built from its config: nothing is downloaded."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

SIZES = {"vocab_size": 384, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": True}
ROTARY = {**COMMON, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 256}
HEAD = {"head_dim": 8}
SLIDING = {"sliding_window": 6}  # shorter than a prefix: layers that forget are tried too
DELTA = {  # linear attention of Qwen3-Next and Qwen3.5
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
STATES = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}

ATTENTION = {
    "qwen2": ROTARY,
    "qwen3": {**ROTARY, **HEAD},
    "llama": ROTARY,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "opt": {**COMMON, "ffn_dim": 64, "max_position_embeddings": 256, "word_embed_proj_dim": 32},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "gemma": {**ROTARY, **HEAD},
    "gemma2": {**ROTARY, **HEAD, **SLIDING, "query_pre_attn_scalar": 8},
    "gemma3_text": {**ROTARY, **HEAD, **SLIDING, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {**ROTARY, **HEAD, **SLIDING},
    "phi": {**ROTARY, "partial_rotary_factor": 0.5},
}
RECURRENT = {
    "qwen3_5_text": {**ROTARY, **HEAD, **DELTA},
    "qwen3_next": {
        **ROTARY,
        **HEAD,
        **DELTA,
        **EXPERTS,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "lfm2": {**ROTARY, "block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"]},
    "jamba": {**ROTARY, **EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
    "granitemoehybrid": {
        **ROTARY,
        "layer_types": ["linear_attention", "full_attention"],
        "num_local_experts": 4,
        "shared_intermediate_size": 16,
        "mamba_n_heads": 4,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
    "olmo_hybrid": {**ROTARY, "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8},
    "recurrent_gemma": {
        **COMMON,
        "intermediate_size": 64,
        "num_key_value_heads": 1,
        "attention_window_size": 6,
        "block_types": ["recurrent", "attention"],
    },
    "mamba": STATES,
    "mamba2": {**STATES, "num_heads": 4, "head_dim": 16, "n_groups": 2, "chunk_size": 8},
    "falcon_mamba": STATES,
}
REFUSED = {  # they cannot write behind embeddings
    "gemma3": {
        "text_config": {**SIZES, **ROTARY, **HEAD},
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
    },
    "bamba": {**ROTARY, "mamba_n_heads": 4, "mamba_d_state": 8, "attn_layer_indices": [1]},
    "nemotron_h": {**ROTARY, "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8},
    "falcon_h1": {**ROTARY, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_ssm": 32, "mamba_d_state": 8},
}


def tiny_lm(kind: str, seed: int = 0) -> torch.nn.Module:
    """A random model of 32 dimensions and 2 layers, in eval mode."""
    sizes = {**ATTENTION, **RECURRENT, **REFUSED}[kind]
    config = CONFIG_MAPPING[kind](**{**({} if kind in REFUSED and "text_config" in sizes else SIZES), **sizes})
    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # models of the default range, and random, predict all tokens alike
        for name, parameter in lm.named_parameters():
            if parameter.dim() > 1 and not name.endswith("A_log"):
                parameter.mul_(4)
    return lm
