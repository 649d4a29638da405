"""A Qwen3-MoE for any machine: random weights, a byte tokenizer, written as a checkpoint of the usual form."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, plus <eos> and <pad>: any text goes in and comes back, no file and no network needed."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: idx for idx, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def tiny_config(**changes) -> Qwen3MoeConfig:
    """hidden 256, 3 layers, 8 experts of intermediate 128, top 2; changes: fields of Qwen3MoeConfig.

    Weights of std 0.05 make the logits, and the experts' part of them, of order 1: an absolute error then says much.
    """
    tokenizer = byte_tokenizer()
    sizes = {
        "vocab_size": len(tokenizer), "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "num_experts": 8,
        "num_experts_per_tok": 2, "norm_topk_prob": True, "max_position_embeddings": 1024, "initializer_range": 0.05,
        "tie_word_embeddings": False, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    return Qwen3MoeConfig(**(sizes | changes))


def save_tiny_model(path: str | Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> Path:
    """Write config.json, model.safetensors (the names Qwen3-MoE releases use) and the tokenizer to `path`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3MoeForCausalLM(tiny_config(**changes)).to(dtype)
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return Path(path)
