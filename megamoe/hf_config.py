"""MoEConfig from a model's config.json, without transformers."""

import json
from pathlib import Path

from megamoe.config import BLOCK, MoEConfig

NUM_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")
INTERMEDIATE = ("moe_intermediate_size", "intermediate_size")


def moe_config_of(path: str | Path, weight_format: str = "fp8") -> MoEConfig:
    """Sizes of a model's experts, rounded up to 128 as the loader pads them.

    path: config.json, or the directory it is in. ValueError names what the file lacks: it may be no MoE model.
    """
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a model's config.json, or the directory it is in")
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); copy it again") from error
    found = found.get("text_config", found) if isinstance(found, dict) else {}

    def first(*names: str) -> int:
        value = next((found[name] for name in names if isinstance(found.get(name), int)), None)
        if value is None:
            raise ValueError(f"{path} has none of {', '.join(names)}; it describes no mixture-of-experts model")
        return value

    sizes = first("hidden_size"), first(*INTERMEDIATE)
    num_experts, topk = first(*NUM_EXPERTS), first("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts")
    gpt_oss = found.get("model_type") == "gpt_oss"
    return MoEConfig(
        *(-(-size // BLOCK) * BLOCK for size in sizes), num_experts, topk, weight_format,
        swiglu_limit=found.get("swiglu_limit", 7.0 if gpt_oss else None),
        activation="swiglu_oai" if gpt_oss else "swiglu", bias=gpt_oss,
    )  # fmt: skip
