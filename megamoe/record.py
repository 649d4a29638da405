"""Expert load over time: counters read after each step of a model, kept on the device, saved as npz for the planner.

    python -m megamoe record --model tiny --prompt "To be or not" --out load.npz
    python -m megamoe plan load.npz --ranks 4 --redundant 4
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megamoe.config import EPConfig


class Recorder:
    """Collects the rows per logical expert of several layers, step by step.

    layers: {name: MoELayer} of equal num_experts. On CUDA the layers' workspace needs room for plans
    (EPConfig.num_staged_experts or num_redundant_slots_per_rank), or the kernel counts nothing.
    step(kind) enqueues a few copies and waits for nothing; save() waits.
    """

    def __init__(self, layers: Mapping):
        self.names = list(layers)
        self._layers = list(layers.values())
        self._steps: list[tuple[str, torch.Tensor]] = [("", self._counts())]

    def _counts(self) -> torch.Tensor:
        loads = [layer.load_counts() for layer in self._layers]
        sums = [sum(one.logical for one in load) if isinstance(load, list) else load.logical for load in loads]
        return torch.stack(sums)

    def step(self, kind: str) -> None:
        """What was served since the last step was one step of this kind, such as "prefill" or "decode"."""
        self._steps.append((kind, self._counts()))

    def arrays(self) -> dict[str, np.ndarray]:
        """load int64 [steps, layers, num_experts], summed over all ranks of torch.distributed; kind str [steps]; layer
        str [layers]. Collective.
        """
        total = torch.stack([counts for _, counts in self._steps])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(total)
        load = np.diff(total.cpu().numpy(), axis=0)
        return {"load": load, "kind": np.array([kind for kind, _ in self._steps[1:]]), "layer": np.array(self.names)}

    def save(self, path) -> None:
        """arrays() as npz. Collective; rank 0 writes."""
        arrays = self.arrays()
        if not dist.is_initialized() or dist.get_rank() == 0:
            np.savez_compressed(path, **arrays)


def main(argv: list[str] | None = None) -> int:
    """The verb: serve a transformers model's experts on prompts and save what they were asked for."""
    parser = argparse.ArgumentParser(prog="python -m megamoe record", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--model", default="tiny", help="folder of a model that generate takes, or `tiny` (default), `tiny-mixtral`, "
        "...: random weights")  # fmt: skip
    add("--prompt", action="append", help="text to continue; repeat for more")
    add("--max-new-tokens", type=int, default=16, help="of each prompt (default 16)")
    add("--out", required=True, help="npz to write")
    given = parser.parse_args(argv)
    from megamoe.integrations import generate

    out = Path(given.out)
    if out.suffix != ".npz":  # as NumPy would name it
        out = out.with_name(f"{out.name}.npz")
    if not out.resolve().parent.is_dir():  # before a model has run, not after
        parser.error(f"--out {out}: its folder is not there; make it first")
    prompts = [f"--prompt={text}" for text in given.prompt or ()]
    how = generate.parse(["--model", given.model, "--max-new-tokens", str(given.max_new_tokens), *prompts],
                         refuse=parser.error)  # fmt: skip
    try:
        steps, layers, experts = _record(how, out)
    except (ValueError, OSError) as error:
        print(f"record: {error}", file=sys.stderr)
        return 2
    print(f"{out}: {steps} steps of {layers} layers with {experts} experts")
    return 0


def _record(how: argparse.Namespace, out: Path) -> tuple[int, int, int]:
    """-> the shape of what was saved: steps, layers, experts"""
    from transformers import AutoTokenizer

    from megamoe.integrations import generate
    from megamoe.integrations.tiny import save_tiny_model
    from megamoe.integrations.transformers import enable

    with ExitStack() as stack:
        if how.family is not None:
            how.model = save_tiny_model(stack.enter_context(tempfile.TemporaryDirectory()), family=how.family)
        tokenizer = AutoTokenizer.from_pretrained(how.model)
        device = torch.device(how.device)
        model = generate.load(how, device)
        ids = [tokenizer(text, return_tensors="pt")["input_ids"].to(device) for text in how.prompt]
        if any(not one.numel() for one in ids):
            raise ValueError(f"--model {how.model}: its tokenizer makes no token of a prompt; are its files there?")
        ep_config = EPConfig(max(one.shape[1] for one in ids), num_staged_experts=1)
        with enable(model, ep_config=ep_config, weight_format=how.weight_format) as serving:
            recorder = Recorder(serving.layers)
            for one in ids:
                generate.greedy(model, serving, one, how.max_new_tokens, tokenizer.eos_token_id, device,
                                on_step=recorder.step)  # fmt: skip
            serving.check()
            recorder.save(out)
            return recorder.arrays()["load"].shape
