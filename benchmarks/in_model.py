#!/usr/bin/env python3
"""The layer inside transformers models: are the logits right, and what does a call and a block cost.

    python benchmarks/in_model.py
        one rank: a GPU if there is one, else a CPU with small sizes
    torchrun --nproc-per-node 2 benchmarks/in_model.py --results
        two ranks: experts halved, every rank its own sequences; rows go to results/in_model/, for report.py

Parts, by --parts (default: all):
    logits    four model families with random weights that lie on the grid of each of --formats. Teacher-forced logits,
              served, against the model's own eager experts with the same (dequantized) weights; steps.py, the same
              quantization in plain torch, is the floor. What the kernel cannot do runs as the bf16 specification,
              and its row says so
    overhead  what an eager call costs the host, argument checks included (GPU only)
    text      a model trained on the standard library for --seconds continues eight prompts greedily: eager, steps.py,
              one rank, all ranks; where texts differ, by how little (in_model_text.py). Not among the default parts
    block     router and experts of one Qwen3-MoE block at 1, 8 and 64 tokens: megamoe beside transformers' `eager`,
              `grouped_mm` and `batched_mm`; eager, compiled and graph-captured

Exit status: 0 when logits and texts held their gates and every block of megamoe ran, else 1. What another
implementation cannot run is a row with its reason.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

if __name__ == "__main__":
    import checkout  # noqa: F401 (makes this checkout's packages importable; it lies beside this file)
from benchmarks.cases import parse_choices, parse_tokens
from benchmarks.record import machine
from benchmarks.results import IN_MODEL_DIR, append_json, check_folders
from megamoe import EPConfig, MoEConfig, MoELayer, Workspace, support
from megamoe.config import WEIGHT_FORMATS
from megamoe.integrations.dequantized import round_experts
from megamoe.integrations.experts import find_experts
from megamoe.integrations.logits import eager_logits, logits_error, served_logits
from megamoe.integrations.tiny import FAMILIES, tiny_model
from megamoe.integrations.transformers import IMPLEMENTATION, enable
from megamoe.ranks import init_process_group, rank_from_env

PARTS = ("logits", "overhead", "block", "text")
MODEL_SIZES = {
    "qwen3_moe": {"hidden_size": 1024, "moe_intermediate_size": 512, "num_experts": 32, "num_experts_per_tok": 4},
    "mixtral": {"hidden_size": 1024, "intermediate_size": 1024},
    "deepseek_v3": {"hidden_size": 1024, "moe_intermediate_size": 512, "n_routed_experts": 32, "n_group": 8,
                    "topk_group": 4, "num_experts_per_tok": 8},
    "gpt_oss": {"hidden_size": 960, "intermediate_size": 480, "num_local_experts": 32, "num_experts_per_tok": 4},
}  # fmt: skip
BLOCK_SIZES = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
SMALL_BLOCK = {"hidden_size": 256, "moe_intermediate_size": 128, "num_experts": 8}
MAX_KL_OVER_FLOOR = 2.0
"""Served KL may be this many times the floor's, plus 1e-5: sums run in another order, and neither is the truth."""
IMPLEMENTATIONS = (IMPLEMENTATION, "eager", "grouped_mm", "batched_mm")


def logits_rows(family: str, formats: list[str], device: torch.device, positions: int, sequence: int, sizes: dict):
    """One row a format: errors over `positions` of all ranks. Collective."""
    rank = rank_from_env()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:  # drawn there: hundreds of millions of weights take a CPU seconds
        model = tiny_model(family, **sizes).to(dtype)
    count = -(-positions // (sequence * rank.ep_size))
    generator = torch.Generator().manual_seed(rank.ep_rank)
    ids = [torch.randint(256, (1, sequence), generator=generator).to(device) for _ in range(count)]
    for weight_format in formats:  # the later one rounds what the earlier has rounded: on its grid all the same
        row = {"part": "logits", "family": family, "weight_format": weight_format, "ranks": rank.ep_size,
               "positions": count * sequence * rank.ep_size}  # fmt: skip
        yield row | _errors(model, ids, weight_format, EPConfig(sequence), device)


def _errors(
    model: torch.nn.Module, ids: list[torch.Tensor], weight_format: str, ep_config: EPConfig, device: torch.device
) -> dict:
    ep_size = rank_from_env().ep_size
    config = next(iter(find_experts(model, weight_format).values())).config
    reasons = support(config, ep_config, device, ep_size=ep_size).reasons
    how = {"ep_config": ep_config, "weight_format": "bf16" if reasons else weight_format}
    if reasons:
        row = {"kernel": f"not run: {'; '.join(reasons)}"}
        served = served_logits(model, ids, spec=True, **how)
        floor = eager = eager_logits(model, ids)
    else:
        row = {"kernel": "run" if device.type == "cuda" else "steps.py on a CPU"}
        round_experts(model, weight_format)
        eager = eager_logits(model, ids)
        floor = served_logits(model, ids, spec=True, **how)
        served = served_logits(model, ids, **how)
    for name, logits in (("served", served), ("floor", floor)):
        error = logits_error(logits, eager)
        numbers = torch.tensor([error.kl, error.top1, error.rel_l2], dtype=torch.float64, device=device)
        if ep_size > 1:
            dist.all_reduce(numbers)
        row |= {f"{name}_{key}": value / ep_size for key, value in zip(("kl", "top1", "rel_l2"), numbers.tolist())}
    limit = MAX_KL_OVER_FLOOR * row["floor_kl"] + 1e-5 if not reasons else 1e-3
    return row | {"ok": row["served_kl"] <= limit}


@torch.no_grad()
def overhead_row(device: torch.device) -> dict:
    """Median host time of one eager call, the queue never full: 50 calls of one token between two synchronizations.

    forward_us: of layer.forward, which compiled graphs call: without the look for hooks.
    launch_us: of it, the driver and the 0.2 us of Python around it. gpu_us: from the start of one call to that of the
    next on the GPU; where that is no longer than a call, the host was what it waited for.
    """
    if device.type != "cuda":
        return {"part": "overhead", "not_run": "a CPU call computes where it is issued"}
    rank = rank_from_env()
    config = MoEConfig(1024, 512, 32, 4)
    with Workspace(config, EPConfig(64), device=device) as workspace:
        layer, local = MoELayer(config, workspace), config.num_local_experts(rank.ep_size)
        layer.load_weights(*(torch.randn(local, n, k, device=device) / k**0.5 for n, k in ((1024, 1024), (1024, 512))))
        x = torch.randn(1, 1024, device=device, dtype=torch.bfloat16)
        topk_idx = torch.arange(4, device=device)[None]
        topk_weights, out = torch.full((1, 4), 0.25, device=device), torch.empty_like(x)
        stream = torch.cuda.current_stream(device).cuda_stream
        times, gpu_us = _host_us(lambda: layer(x, topk_idx, topk_weights, num_tokens_bound=1, out=out))
        forward_times, _ = _host_us(lambda: layer.forward(x, topk_idx, topk_weights, num_tokens_bound=1, out=out))
        (launch,) = layer._engine.launches.values()
        launch_times, _ = _host_us(lambda: launch(stream))  # the last call again
        layer.check()
    return {
        "part": "overhead",
        "us_per_call": statistics.median(times),
        "min_us": min(times),
        "forward_us": statistics.median(forward_times),
        "launch_us": statistics.median(launch_times),
        "gpu_us": gpu_us,
        "ranks": rank.ep_size,
    }


def _host_us(call: Callable, rounds: int = 30, calls: int = 50) -> tuple[list[float], float]:
    """Host time of a call in each round but the first five, and the GPU's time of one in the last."""
    times = []
    for _ in range(rounds):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - begin) / calls * 1e6)
        last.record()
        torch.cuda.synchronize()
    return times[5:], first.elapsed_time(last) * 1e3 / calls


@torch.no_grad()
def block_rows(device: torch.device, batches: list[int], sizes: dict):
    """One row an implementation, mode and batch; all ranks run all of them, in this order."""
    on_cuda, rank = device.type == "cuda", rank_from_env()
    dtype = torch.bfloat16 if on_cuda else torch.float32
    with device:
        model = tiny_model("qwen3_moe", num_hidden_layers=1, **sizes).to(dtype)
    block = model.model.layers[0].mlp
    weight_format = "fp8" if on_cuda else "bf16"
    with enable(model, ep_config=EPConfig(max(batches)), weight_format=weight_format) as serving:
        for batch in batches:
            x = torch.randn(1, batch, sizes["hidden_size"], device=device, dtype=dtype)
            serving.num_tokens_bound = batch
            for implementation in IMPLEMENTATIONS:
                model.set_experts_implementation(implementation)
                for mode in ("eager", "compiled", "graph"):
                    row = {"part": "block", "implementation": implementation, "mode": mode, "batch": batch,
                           "ranks": rank.ep_size, "experts": weight_format if implementation == IMPLEMENTATION
                           else str(dtype).removeprefix("torch.")}  # fmt: skip
                    yield row | _timed(lambda x=x: block(x), mode, implementation, on_cuda)
        model.set_experts_implementation(IMPLEMENTATION)
        serving.check()


def _timed(call: Callable, mode: str, implementation: str, on_cuda: bool) -> dict:
    if implementation == "eager" and mode != "eager":
        return {"not_run": "transformers' eager experts loop over experts that the host must know"}
    if mode != "eager" and not on_cuda:
        return {"not_run": "no GPU"}
    try:
        if mode == "compiled":
            torch._dynamo.reset()
            call = torch.compile(call, fullgraph=True)
        # transformers' eager loop takes 10 to 30 ms a call
        warm, count = (1, 5) if implementation == "eager" or not on_cuda else (5, 30)
        for _ in range(warm):
            call()
        return {"us": _median_us(_captured(call) if mode == "graph" else call, on_cuda, count)}
    except Exception as error:  # a rival that cannot is a row, not the end of the run
        text = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}" if str(error) else repr(error)
        return {"failed" if implementation == IMPLEMENTATION else "not_run": text}


def _captured(call: Callable) -> Callable:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        call()
    return graph.replay


def _median_us(call: Callable, on_cuda: bool, count: int) -> float:
    times = []
    for _ in range(count):
        if on_cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3)
        else:
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e6)
    us = torch.tensor(statistics.median(times), dtype=torch.float64, device="cuda" if on_cuda else "cpu")
    if dist.is_initialized():
        dist.all_reduce(us, op=dist.ReduceOp.MAX)
    return float(us)


def line(row: dict) -> str:
    """One row for people."""
    if row["part"] == "logits":
        return (f"logits  {row['family']:<12}{row['weight_format']:<6}{'ok' if row['ok'] else 'WRONG':<6} "
                f"KL {row['served_kl']:.2e} (floor {row['floor_kl']:.2e}), top-1 {row['served_top1']:.2%} "
                f"(floor {row['floor_top1']:.2%}), rel L2 {row['served_rel_l2']:.2e} (floor "
                f"{row['floor_rel_l2']:.2e}), {row['positions']} positions; kernel {row['kernel']}")  # fmt: skip
    what = row["part"]
    if row["part"] == "block":
        what = f"block   {row['batch']:>3} {row['implementation']:<11}{row['mode']:<9}"
    for kind in ("not_run", "failed"):
        if kind in row:
            return f"{what} {kind.replace('_', ' ')}: {row[kind]}"
    if row["part"] == "overhead":
        return (f"{what} {row['us_per_call']:9.1f} us of the host a call, {row['forward_us']:.1f} of layer.forward, "
                f"{row['launch_us']:.1f} of them the launch; {row['gpu_us']:.1f} us on the GPU")  # fmt: skip
    if row["part"] == "text":
        same = ", ".join(f"{count} as {name}" for name, count in row["same"].items())
        gaps = [fork["gap"] for fork in row["forks"]]
        return (f"text    {row['weight_format']:<6}{'ok' if row['ok'] else 'WRONG':<6} ranks {row['ranks']}: of "
                f"{row['prompts']} texts {same}; largest gap at a fork {max(gaps, default=0):.2e}, allowed "
                f"{row['max_gap']:.2e}; logits off by {row['errors']['eager']:.2e} (floor {row['floor_error']:.2e}); "
                f"{row['bits_per_byte']:.2f} bits per byte: {row['example']!r}")  # fmt: skip
    return f"{what} {row['us']:9.1f} us ({row['experts']})"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="logits,overhead,block",
                        help=f"some of {','.join(PARTS)}; default %(default)s")  # fmt: skip
    parser.add_argument("--families", default=",".join(FAMILIES), help="of models, for logits; default %(default)s")
    parser.add_argument("--formats", default="fp8,mxfp4", help="number formats of the experts, for logits")
    parser.add_argument("--positions", type=int, help="over all ranks; default 4096, on a CPU 64")
    parser.add_argument("--sequence", type=int, help="tokens a forward; default 512, on a CPU 32")
    parser.add_argument("--batches", default="1,8,64", help="tokens of the block")
    parser.add_argument("--seconds", type=float, help="of the text model's training; default 40, on a CPU 3")
    parser.add_argument("--bytes", type=int, default=128, help="that the text model adds to each prompt")
    parser.add_argument("--model", type=Path, help="folder to train the text model into; one that is there is used")
    parser.add_argument("--json", type=Path, help="file to append one JSON object a row to")
    parser.add_argument("--results", type=Path, nargs="?", const=IN_MODEL_DIR, metavar="DIR",
                        help=f"append the rows that did not fail (default: results/{IN_MODEL_DIR.name})")  # fmt: skip
    parser.add_argument("--commit", help="commit hash to record, '-dirty' at its end if it is (default: ask git)")
    return parser


def main(argv: list[str] | None = None) -> int:
    given = parser().parse_args(argv)
    try:
        parts, families, formats = (parse_choices(f"--{name}", getattr(given, name), allowed) for name, allowed in (
            ("parts", PARTS), ("families", tuple(FAMILIES)), ("formats", WEIGHT_FORMATS)))  # fmt: skip
        batches = parse_tokens(given.batches, "--batches")
        own_group = rank_from_env().ep_size > 1 and not dist.is_initialized()
        rank = init_process_group() if rank_from_env().ep_size > 1 else rank_from_env()
        check_folders(rank.ep_rank == 0, given.json, given.results)
    except ValueError as error:
        print(f"in_model.py: {error}", file=sys.stderr)
        return 2
    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank.local_rank) if on_cuda else torch.device("cpu")
    positions, sequence = given.positions or (4096 if on_cuda else 64), given.sequence or (512 if on_cuda else 32)
    facts = machine(device, rank.ep_size if on_cuda else 0, given.commit)
    ok = True

    def tell(row: dict) -> None:
        nonlocal ok
        wrong = "failed" in row or not row.get("ok", True)
        ok = ok and not wrong
        if rank.ep_rank == 0:
            print(line(row), flush=True)
            if given.json:
                with given.json.open("a") as file:
                    file.write(json.dumps(row | facts) + "\n")
            if given.results and not wrong:
                append_json(row | facts, given.results)

    begin = time.perf_counter()
    if "logits" in parts:
        for family in families:
            sizes = MODEL_SIZES[family] if on_cuda else {}
            for row in logits_rows(family, formats, device, positions, sequence, sizes):
                tell(row)
    if "overhead" in parts:
        tell(overhead_row(device))
    if "text" in parts:
        from benchmarks.in_model_text import text_rows

        seconds = given.seconds or (40 if on_cuda else 3)
        for row in text_rows(formats, device, seconds, given.bytes, given.model):
            tell(row)
    if "block" in parts:
        for row in block_rows(device, batches, BLOCK_SIZES if on_cuda else SMALL_BLOCK):
            tell(row)
    if rank.ep_rank == 0:
        print(f"{time.perf_counter() - begin:.0f} s", flush=True)
    if own_group:
        dist.destroy_process_group()
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
