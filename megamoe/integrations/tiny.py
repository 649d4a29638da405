"""Models for any machine, one a family: random weights, a byte tokenizer, written as checkpoints of the usual form."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

COMMON = {
    "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "num_experts_per_tok": 2, "max_position_embeddings": 1024, "initializer_range": 0.05, "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES = {
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 8, "intermediate_size": 512, "moe_intermediate_size": 128,
                               "norm_topk_prob": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 8, "intermediate_size": 256}),
    # A dense layer, then experts in 4 groups of which 2 are kept, and a shared expert
    "deepseek_v3": ("DeepseekV3", {
        "n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "intermediate_size": 512, "moe_intermediate_size": 128, "q_lora_rank": 96,
        "kv_lora_rank": 64, "qk_rope_head_dim": 32, "head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 64,
        "num_key_value_heads": 4, "num_nextn_predict_layers": 0}),
    # Sizes that are no multiples of 128, as the published ones: 2880
    "gpt_oss": ("GptOss", {"hidden_size": 192, "intermediate_size": 160, "num_local_experts": 8,
                           "layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2,
                           "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
}  # fmt: skip
"""Family -> (prefix of its transformers classes, what its configuration has besides COMMON)."""
TINY_NAMES = ", ".join(["tiny", *(f"tiny-{family}" for family in FAMILIES if family != "qwen3_moe")])
"""What `--model` takes in the place of a folder."""
ROUTERS = ("gate.weight", "router.weight")


def tiny_family(name: str) -> str | None:
    """The family that `--model tiny`, `tiny-mixtral`, ... mean; None for anything else."""
    family = {"tiny": "qwen3_moe"}.get(name, name.removeprefix("tiny-"))
    return family if name.startswith("tiny") and family in FAMILIES else None


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, plus <eos> and <pad>: any text goes in and comes back, no file and no network needed."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: idx for idx, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def tiny_config(family: str = "qwen3_moe", **changes) -> PreTrainedConfig:
    """A configuration of 2 or 3 layers; changes: its fields.

    Weights of std 0.05 make the logits, and the experts' part of them, of order 1: an absolute error then says much.
    """
    tokenizer = byte_tokenizer()
    prefix, sizes = FAMILIES[family]
    tokens = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id,
              "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}  # fmt: skip
    return getattr(transformers, f"{prefix}Config")(**(COMMON | tokens | sizes | changes))


def tiny_model(family: str = "qwen3_moe", seed: int = 0, **changes) -> torch.nn.Module:
    """fp32, in eval mode; what a family initialises with zeros (biases, sinks, router corrections) is drawn too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{FAMILIES[family][0]}ForCausalLM")(tiny_config(family, **changes)).eval()
        with torch.no_grad():
            for name, value in [*model.named_parameters(), *model.named_buffers()]:
                if name.endswith(("bias", "sinks")) or (name.endswith(ROUTERS) and not value.any()):
                    value.normal_(std=0.05)
    return model


def save_tiny_model(
    path: str | Path, *, family: str = "qwen3_moe", seed: int = 0, dtype: torch.dtype = torch.float32, **changes
) -> Path:
    """Write config.json, model.safetensors (the names the family's releases use) and the tokenizer to `path`."""
    tiny_model(family, seed, **changes).to(dtype).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return Path(path)
