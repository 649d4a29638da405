"""How checkpoints name and shape the experts of a layer: one `Part` for each tensor that an expert's weights come from.

A layout is found from the names alone, `prefix` being the experts' module (`model.layers.0.mlp.experts`):

    separate   {prefix}.{expert}.{gate,up,down}_proj.weight: Qwen3-MoE, DeepSeek-V3 and others; plain, or block-FP8 with
               a `weight_scale_inv` beside each (fp32 or bf16, one per 128x128 block, the last ones cut); it multiplies
    mixtral    the same as w1, w3, w2 under `block_sparse_moe` instead of `mlp`
    stacked    {prefix}.gate_up_proj [num_experts, hidden, 2 * intermediate] with gate and up columns alternating,
               .down_proj [num_experts, intermediate, hidden], and their `_bias`: gpt-oss in bf16
    blocks     {prefix}.gate_up_proj_blocks and _scales (MXFP4): gpt-oss as published; megamoe/checkpoint_mxfp4.py reads
               those
"""

from collections.abc import Iterable
from typing import NamedTuple

from megamoe.config import BLOCK, MoEConfig

PLAIN_DTYPES = ("BF16", "F16", "F32")
SF_DTYPES = ("F32", "BF16")
PROJECTIONS = {"separate": ("gate_proj", "up_proj", "down_proj"), "mixtral": ("w1", "w3", "w2")}
FILE_NAMES = {".mlp.experts": ".block_sparse_moe.experts", ".mlp.gate.": ".block_sparse_moe.gate."}
"""Where a Mixtral checkpoint says otherwise than transformers' modules: module's name -> file's."""


class Part(NamedTuple):
    """One tensor of a checkpoint that holds weights of an expert.

    name, shape, dtypes: in the file, dtypes as safetensors spells them. expert: whose it is; row: None, or the expert's
    index along the first dimension of a tensor of all experts. fills: "gate", "up", "down", "gate_up" or a bias,
    "linear1_bias", "linear2_bias". sf_name: the tensor of its scale factors, or None. swap: columns are outputs.
    """

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    expert: int
    row: int | None
    fills: str
    sf_name: str | None = None
    swap: bool = False


class Layout(NamedTuple):
    """kind: a word of the module's docstring. prefix: of the names in the files. fp8: block-FP8."""

    kind: str
    prefix: str
    fp8: bool = False

    def parts(self, config: MoEConfig, sizes: tuple[int, int], experts: Iterable[int]) -> list[Part]:
        """sizes: hidden and intermediate in the files."""
        hidden, inter = sizes
        found = []
        for expert in experts:
            if self.kind == "stacked":
                num = config.num_experts
                for name, shape, fills, swap in (
                    ("gate_up_proj", (num, hidden, 2 * inter), "gate_up", True),
                    ("gate_up_proj_bias", (num, 2 * inter), "linear1_bias", False),
                    ("down_proj", (num, inter, hidden), "down", True),
                    ("down_proj_bias", (num, hidden), "linear2_bias", False),
                ):
                    part = Part(f"{self.prefix}.{name}", shape, PLAIN_DTYPES, expert, expert, fills, swap=swap)
                    found += [part] if config.bias or not name.endswith("_bias") else []
                continue
            for projection, fills in zip(PROJECTIONS[self.kind], ("gate", "up", "down"), strict=True):
                name = f"{self.prefix}.{expert}.{projection}.weight"
                shape = (hidden, inter) if fills == "down" else (inter, hidden)
                dtypes, sf_name = (("F8_E4M3",), f"{name}_scale_inv") if self.fp8 else (PLAIN_DTYPES, None)
                found.append(Part(name, shape, dtypes, expert, None, fills, sf_name))
        return found


def find_layout(names: Iterable[str], prefix: str) -> Layout:
    """The layout of the experts under `prefix`; "separate" where nothing there says otherwise."""
    mixtral = prefix.replace(".mlp.experts", FILE_NAMES[".mlp.experts"])
    here = {place: set() for place in (prefix, mixtral)}
    for name in names:
        for place, rest in here.items():
            if name.startswith(f"{place}."):
                rest.add(name[len(place) + 1 :])
    found = prefix if here[prefix] or not here[mixtral] else mixtral
    rest = here[found]
    kind = "separate" if found == prefix else "mixtral"
    kind = "stacked" if "gate_up_proj" in rest else kind
    kind = "blocks" if rest & {"gate_up_proj_blocks", "down_proj_blocks"} else kind
    return Layout(kind, found, any(name.endswith(".weight_scale_inv") for name in rest))


def blocks_of(length: int) -> int:
    """Blocks of 128 that `length` elements take, the last one cut."""
    return -(-length // BLOCK)
