"""Tiny random transformers models of every family, the oracles of the parity tests."""

from typing import Any

import torch
import transformers

VOCAB = 97
_SMALL = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1}
_TRUNK = {
    **_SMALL,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_GPT2 = {**_SMALL, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2-tied": ("gpt2", _GPT2),
    "gpt2-free-head": ("gpt2", {**_GPT2, "tie_word_embeddings": False, "n_inner": 40}),
    "gpt2-gelu": ("gpt2", {**_GPT2, "activation_function": "gelu", "layer_norm_epsilon": 1e-3}),
    "gpt2-relu": ("gpt2", {**_GPT2, "activation_function": "relu"}),
    "llama-mha": ("llama", _TRUNK),
    "llama-gqa-tied": ("llama", {**_TRUNK, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama-mqa-biases": ("llama", {**_TRUNK, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {**_TRUNK, "head_dim": 16, "num_key_value_heads": 2}),
    "llama-gelu": ("llama", {**_TRUNK, "hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-3}),
    "llama-rope-llama3": ("llama", {**_TRUNK, "head_dim": 16, "rope_parameters": _LLAMA3}),
    "llama-rope-linear": ("llama", {**_TRUNK, "rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}}),
    "llama-rope-yarn": (
        "llama",
        {
            **_TRUNK,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
        },
    ),
    "llama-rope-yarn-mscale": (
        "llama",
        {
            **_TRUNK,
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "mscale": 0.7,
                "mscale_all_dim": 0.4,
                "beta_fast": 8.0,
                "beta_slow": 2.0,
            },
        },
    ),
    "qwen2-gqa": ("qwen2", {**_TRUNK, "num_key_value_heads": 2}),
    "qwen2-window": (
        "qwen2",
        {
            **_TRUNK,
            "num_key_value_heads": 4,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-head-dim": ("qwen3", {**_TRUNK, "num_key_value_heads": 2, "head_dim": 16}),
    "qwen3-tied-biases": (
        "qwen3",
        {**_TRUNK, "num_key_value_heads": 4, "head_dim": 8, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "qwen3-window": (
        "qwen3",
        {**_TRUNK, "num_key_value_heads": 2, "head_dim": 8, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
}


def reference_model(setting: str) -> transformers.PreTrainedModel:
    """The transformers model of a setting, float32, in eval mode, every parameter random: ones and zeros hide mistakes."""
    model_type, options = SETTINGS[setting]
    config = transformers.AutoConfig.for_model(model_type, **options)
    torch.manual_seed(len(setting))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or ".ln_" in name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter) if name.endswith("weight") else 0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def random_tokens(num_rows: int, num_tokens: int, *, seed: int = 1) -> torch.Tensor:
    """(num_rows, num_tokens) ids."""
    return torch.randint(0, VOCAB, (num_rows, num_tokens), generator=torch.Generator().manual_seed(seed))
