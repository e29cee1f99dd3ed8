"""Small language models for the tests of decoding."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 256,
}

EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}


def llama(seed=0, **options):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES | options)).eval()


def mixtral(seed=0, **options):
    torch.manual_seed(seed)
    return MixtralForCausalLM(MixtralConfig(**EXPERTS | SIZES | options)).eval()


def greedy(model, ids, count):
    """One token at a time, no cache."""
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids
