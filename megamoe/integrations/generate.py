"""python -m megamoe.integrations.generate: text in, text out, through a model whose experts megamoe serves.

What it prints before the text is how far the served logits are from the model's own, and which part of that is the
number format's and which the kernel's: the same quantization in plain torch (megamoe/steps.py) stands between the two.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from megamoe.config import WEIGHT_FORMATS, EPConfig
from megamoe.integrations.logits import eager_logits, logits_error, served_logits, serving_logits
from megamoe.integrations.tiny import TINY_NAMES, save_tiny_model, tiny_family
from megamoe.integrations.transformers import Serving, enable
from megamoe.ranks import RankInfo, init_process_group, rank_from_env

EPILOG = """examples
  a model of 3 layers with random weights, made on the spot; CPU or GPU, whichever is there:
    python -m megamoe.integrations.generate --model tiny --prompt "To be or not"
  a downloaded Qwen3-MoE, Mixtral, DeepSeek-V3 or gpt-oss (safetensors: bf16, block-FP8, MXFP4), one GPU:
    python -m megamoe.integrations.generate --model ./Qwen3-30B-A3B --prompt "The capital of France is"
  two GPUs (or two CPU ranks): half the experts and every second prompt on each:
    torchrun --nproc-per-node 2 -m megamoe.integrations.generate --model DIR --prompt A --prompt B --local-experts

the error table
  rel L2 is ||a - b|| / ||b|| over the logits of all prompt positions, top-1 the share of positions where the same token
  is the most likely one.
    megamoe against eager      what a user sees: format and kernel together
    steps.py against eager     the number format alone: the same quantization in plain torch
    megamoe against steps.py   the kernel alone (on CPU exactly 0: there megamoe runs steps.py)
"""


def parse(argv: list[str] | None, refuse: Callable[[str], NoReturn] | None = None) -> argparse.Namespace:
    """refuse: says what is wrong with the arguments and ends; default: as argparse does."""
    parser = argparse.ArgumentParser(
        prog="python -m megamoe.integrations.generate", epilog=EPILOG, description=__doc__.partition(": ")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--model", default="tiny", help="directory with config.json, safetensors and tokenizer; or `tiny` (default), "
        "`tiny-mixtral`, `tiny-deepseek_v3`, `tiny-gpt_oss`: random weights, made on the spot")  # fmt: skip
    add("--prompt", action="append", help="text to continue; repeat for more, prompt i goes to rank i %% ranks")
    add("--max-new-tokens", type=int, default=24, help="tokens to add, greedily, to each prompt (default 24)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda if there is a GPU")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="of the model; default: bfloat16 on "
        "cuda, float32 on cpu")  # fmt: skip
    add("--weight-format", choices=("auto", *WEIGHT_FORMATS), default="auto", help="of the served experts; bf16 means "
        "unquantized, CPU only. Default: fp8 on cuda, bf16 on cpu")  # fmt: skip
    add("--capacity", type=int, help="num_max_tokens_per_rank; default: what the longest prompt needs")
    add("--local-experts", action="store_true", help="read only this rank's experts from the files; the comparison "
        "with eager is then not run, since no rank has them all")  # fmt: skip
    add("--no-compare", action="store_true", help="skip the error table")
    refuse = refuse or parser.error
    given = parser.parse_args(argv)
    given.prompt = given.prompt or ["The quick brown fox", "Megamoe: "]
    if any(not text for text in given.prompt):
        refuse("--prompt '' has no token to start from; give at least one character")
    given.family = tiny_family(given.model)
    if given.family is None and not Path(given.model).is_dir():
        refuse(f"--model {given.model}: no such folder; give a model's, or {TINY_NAMES}")
    for name in ("max_new_tokens", "capacity"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            refuse(f"--{name.replace('_', '-')} {getattr(given, name)} must be at least 1")
    if given.device == "cuda" and not torch.cuda.is_available():
        refuse("--device cuda: torch finds no CUDA device; use --device cpu or install a CUDA build of torch")
    if given.device == "auto":
        given.device = "cuda" if torch.cuda.is_available() else "cpu"
    if given.dtype == "auto":
        given.dtype = "bfloat16" if given.device == "cuda" else "float32"
    if given.weight_format == "auto":
        given.weight_format = "fp8" if given.device == "cuda" else "bf16"
    return given


def main(argv: list[str] | None = None) -> int:
    """Prints the table and the texts. Exit status 2 where the model, or the request, cannot be served: why is on
    stderr."""
    given = parse(argv)
    try:
        run(given)
    except (ValueError, OSError) as error:
        print(f"generate: {error}", file=sys.stderr)
        return 2
    return 0


def run(given: argparse.Namespace) -> None:
    """What main does; its errors as they come."""
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    rank = rank_from_env()
    with ExitStack() as stack:
        if given.family is not None:  # one a rank, all alike; before the group exists: later, only rank 0 could save
            given.model = save_tiny_model(stack.enter_context(tempfile.TemporaryDirectory()), family=given.family)
        if rank.ep_size > 1 and not dist.is_initialized():
            init_process_group()
            stack.callback(dist.destroy_process_group)
        tokenizer = AutoTokenizer.from_pretrained(given.model)
        device = torch.device("cuda", rank.local_rank) if given.device == "cuda" else torch.device("cpu")
        model = load(given, device)
        prompts = [tokenizer(text, return_tensors="pt")["input_ids"].to(device) for text in given.prompt]
        if any(not ids.numel() for ids in prompts):
            raise ValueError(f"--model {given.model}: its tokenizer makes no token of a prompt; are its files there?")
        capacity = given.capacity or max(ids.shape[1] for ids in prompts)
        how = {
            "ep_config": EPConfig(capacity),
            "weight_format": given.weight_format,
            "checkpoint": given.model if given.local_experts or is_quantized(given.model) else None,
        }
        mine = prompts[rank.ep_rank :: rank.ep_size]
        num_rounds = -(-len(prompts) // rank.ep_size)
        if rank.ep_rank == 0:
            print(f"{rank.ep_size} rank(s), {device}, model {given.dtype}, experts {given.weight_format}, "
                  f"capacity {capacity} tokens a rank", flush=True)  # fmt: skip
        references = {} if given.no_compare else reference_logits(model, mine, num_rounds, how, given.local_experts)
        with enable(model, **how) as serving:
            if references:
                tell_errors(rank, serving_logits(model, serving, mine, num_rounds), references)
            for i in range(num_rounds):
                ids = mine[i] if i < len(mine) else None
                new = greedy(model, serving, ids, given.max_new_tokens, tokenizer.eos_token_id, device)
                if ids is not None:
                    prompt = given.prompt[rank.ep_rank + i * rank.ep_size]
                    tell(rank, f"{prompt!r} -> {tokenizer.decode(new, skip_special_tokens=True)!r}")
            serving.check()


def load(given: argparse.Namespace, device: torch.device):
    """The model, in eval mode, on `device`."""
    dtype = getattr(torch, given.dtype)
    if given.local_experts:
        from megamoe.integrations.dense import load_without_experts

        return load_without_experts(given.model, dtype=dtype, device=device)
    if is_quantized(given.model):  # for eager; transformers' own quantizers want further packages, and GPUs
        from megamoe.integrations.dequantized import load_dequantized

        return load_dequantized(given.model, dtype=dtype, device=device)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(given.model, dtype=dtype).to(device).eval()


def is_quantized(path: str | Path) -> bool:
    """Whether a checkpoint's experts are block-FP8 or MXFP4: these are served as they are in the files."""
    config = Path(path) / "config.json"
    return config.is_file() and "quantization_config" in json.loads(config.read_text())


def tell(rank: RankInfo, text: str) -> None:
    # One write, with the end of line: of an unbuffered stream, print() would make two, and other ranks' lines between.
    print(f"[rank {rank.ep_rank}] {text}\n" if rank.ep_size > 1 else f"{text}\n", end="", flush=True)


def reference_logits(model, mine: list[torch.Tensor], num_rounds: int, how: dict, local_experts: bool) -> dict:
    """{name: logits [positions, vocabulary], or None where it cannot be run}. Collective."""
    spec = served_logits(model, mine, num_rounds, spec=True, **how)
    return {"eager": None if local_experts else eager_logits(model, mine), "steps.py": spec}


def tell_errors(rank: RankInfo, served: torch.Tensor, references: dict[str, torch.Tensor | None]) -> None:
    """The table of EPILOG, for this rank's prompts."""
    if not len(served):
        tell(rank, "no prompt of its own: took part with zero tokens")
        return
    eager, spec = references["eager"], references["steps.py"]
    tell(rank, f"logits of {len(served):<5} positions      rel L2    max abs    top-1")
    for name, logits, reference in (
        ("megamoe against eager", served, eager),
        ("steps.py against eager", spec, eager),
        ("megamoe against steps.py", served, spec),
    ):
        if reference is None:
            tell(rank, f"  {name:<25} not run: with --local-experts no rank has all experts")
            continue
        error = logits_error(logits, reference)
        tell(rank, f"  {name:<25} {error.rel_l2:9.2e}  {error.max_abs:9.2e}  {error.top1:6.1%}")


@torch.no_grad()
def greedy(
    model, serving: Serving, ids: torch.Tensor | None, max_new_tokens: int, eos: int | None, device, on_step=None
) -> list[int]:
    """Continue ids [1, n] by the most likely token each; collective.

    A rank that has no prompt (ids None), or has met `eos`, goes on taking part with zero tokens until all are done.
    on_step: None, or called with "prefill" or "decode" after each step in which this rank's prompt took part.
    """
    new, cache, active = [], None, ids is not None
    for step in range(max_new_tokens):
        serving.num_tokens_bound = 1 if step else None  # the prompt first, then one token a rank
        if not any_rank(active, device):
            break
        if not active:
            serving.idle()
            continue
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        if on_step is not None:
            on_step("decode" if step else "prefill")
        new.append(int(ids))
        active = new[-1] != eos
    return new


def any_rank(flag: bool, device: torch.device) -> bool:
    if not dist.is_initialized():
        return flag
    flags = torch.tensor(int(flag), device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags)


if __name__ == "__main__":
    raise SystemExit(main())
