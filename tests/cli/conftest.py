import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moert.cli.checkpoint import byte_tokenizer

SIZES = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
MOE = {"moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}


def save(model_class, config, directory):
    torch.manual_seed(0)
    # Not transformers' 0.02: logits far enough apart that rounding cannot change which byte is best.
    config.initializer_range = 0.3
    model_class(config).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A tiny MoE checkpoint with a byte tokenizer."""
    return save(Qwen3MoeForCausalLM, Qwen3MoeConfig(**SIZES, **MOE), tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="session")
def dense_checkpoint(tmp_path_factory):
    return save(Qwen3ForCausalLM, Qwen3Config(**SIZES), tmp_path_factory.mktemp("dense"))
