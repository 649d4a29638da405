"""Load all of a transformers model but its experts.

Their parameters stay on the meta device (no memory), where a call of them is refused, and
`enable(model, checkpoint=path)` serves this rank's share of them: a rank never holds, or reads, the other ranks'.
"""

import re
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from megamoe.checkpoint import Checkpoint, CheckpointError
from megamoe.checkpoint_layouts import FILE_NAMES
from megamoe.config import BLOCK
from megamoe.integrations.absent import watch
from megamoe.integrations.experts import experts_modules


def load_without_experts(
    path: str | Path, *, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
) -> nn.Module:
    """A causal language model in eval mode from a safetensors directory; block-FP8 tensors are dequantized.

    CheckpointError lists every tensor outside the experts that is missing, extra or misshapen.
    """
    checkpoint = Checkpoint(path)
    config = AutoConfig.from_pretrained(path)
    # The architecture is built in `dtype`; megamoe, not a quantizer of transformers, serves the FP8 experts
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for _, module in experts_modules(model):
        watch(module)
    experts = tuple(f"{name}." for name, _ in experts_modules(model))
    wanted = {name: p for name, p in model.state_dict(keep_vars=True).items() if not name.startswith(experts)}
    # Layers of a checkpoint that transformers leaves aside, such as DeepSeek-V3's for multi-token prediction
    left_out = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    present = {
        _module_name(name): name for name in checkpoint.names
        if not _module_name(name).startswith(experts) and not any(p.search(name) for p in left_out)
    }  # fmt: skip
    scales = {name for name in present if name.endswith("_scale_inv") and name.removesuffix("_scale_inv") in present}
    found = [name for name in wanted if name in present]
    extra = sorted(present.keys() - scales - wanted.keys())
    problems = [f"extra: {name}" for name in extra if not name.endswith("rotary_emb.inv_freq")]
    for name in found:
        info = checkpoint.describe(present[name])
        if info is None or info.shape != tuple(wanted[name].shape):
            shape = "not in its file" if info is None else list(info.shape)
            problems.append(f"misshapen: {name} is {shape}, the configuration needs {list(wanted[name].shape)}")
    if not problems:
        sf = {name: checkpoint.read_row(present[name], None).float() for name in scales}
        _fill(model, checkpoint, {present[name]: name for name in found}, sf, dtype, device)
        model.tie_weights()  # a tied output head has no tensor of its own in the file
        _rebuild_buffers(model, device)
        problems += [
            f"missing: {name}"
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]
            if tensor.device.type == "meta" and not name.startswith(experts)
        ]
    if problems:
        raise CheckpointError(checkpoint.path, problems)
    return model.eval()


def _module_name(file_name: str) -> str:
    for module_part, file_part in FILE_NAMES.items():
        file_name = file_name.replace(file_part, module_part)
    return file_name


def _fill(model: nn.Module, checkpoint: Checkpoint, names: dict[str, str], sf: dict, dtype, device) -> None:
    """names: file's name -> module's; sf: by module's name."""
    in_fp32 = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    for file_name, tensor in checkpoint.read(names):
        name = names[file_name]
        if f"{name}_scale_inv" in sf:
            tensor = dequantize_cut(tensor, sf[f"{name}_scale_inv"])
        parent, _, leaf = name.rpartition(".")
        value = tensor.to(device, torch.float32 if any(part in name for part in in_fp32) else dtype)
        module = model.get_submodule(parent)
        if leaf in module._buffers:
            setattr(module, leaf, value)
        else:
            module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))


def dequantize_cut(values: torch.Tensor, sf: torch.Tensor) -> torch.Tensor:
    """fp32 of a block-FP8 matrix of any size: the last block of a row or column may be cut."""
    rows, columns = values.shape
    spread = sf.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return values.float() * spread


def _rebuild_buffers(model: nn.Module, device) -> None:
    """Buffers that no file holds (rotary frequencies) are computed by their module's constructor: run it off meta."""
    for module in model.modules():
        names = [name for name, buffer in module.named_buffers(recurse=False) if buffer.device.type == "meta"]
        if names and hasattr(module, "config"):
            fresh = type(module)(module.config)
            for name in names:
                setattr(module, name, getattr(fresh, name).to(device))
