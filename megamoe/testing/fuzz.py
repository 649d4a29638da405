"""python -m megamoe.testing.fuzz: layers of drawn shapes, called in drawn sequences with drawn routings, against the
specification. Needs hypothesis.

On the CPU the layer is held against the float64 loop of reference.py, on a GPU the kernel against steps.py. Every call
is also made twice: the bits must be the same. What fails is shrunk to the smallest sequence that fails, and printed
with its seed.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import NamedTuple

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from megamoe import EPConfig, MoEConfig, MoELayer, Workspace
from megamoe.exchange import LocalExchange
from megamoe.steps import RankInput, moe_layer
from megamoe.testing.compare import Verdict, row_limit, verdict_ranks
from megamoe.testing.data import ROUTINGS, Case, make_case
from megamoe.testing.reference import moe_reference

BATCH = 20  # sequences a seed
SAID_S = 10.0  # between two lines that say how far it is


class Call(NamedTuple):
    """One call. counts: tokens of each rank. used: rows that the device's num_tokens leaves, of 4; None without it.
    bound: num_tokens_bound as the smallest legal one; drop: chance of a slot to be unused, in eighths."""

    layer: int
    seed: int
    counts: tuple[int, ...]
    routing: str
    prequantized: bool
    int64: bool
    bf16_weights: bool
    used: int | None
    bound: bool
    drop: int
    poison: bool
    reload: bool


class Sequence(NamedTuple):
    configs: tuple[MoEConfig, ...]
    ep_size: int
    capacity: int
    calls: tuple[Call, ...]


@st.composite
def configs_of(draw, ep_size: int, on_gpu: bool) -> MoEConfig:
    """Both weight formats; plain SwiGLU mostly, or gpt-oss's gating, biases and shared experts in any combination."""
    widths, topk = st.sampled_from(range(128, 2049 if on_gpu else 385, 128)), draw(st.integers(1, 16))
    return MoEConfig(
        draw(widths), draw(widths), draw(st.integers(1, 16 if on_gpu else 4)) * ep_size, topk,
        draw(st.sampled_from(("fp8", "fp8", "mxfp4"))), draw(st.sampled_from((None, 0.5, 7.0))),
        draw(st.sampled_from(("swiglu", "swiglu", "swiglu_oai"))), draw(st.sampled_from((False, False, True))),
        min(draw(st.sampled_from((0, 0, 0, 1, 2))), 16 - topk),
    )  # fmt: skip


@st.composite
def sequences(draw, device: str) -> Sequence:
    """One or two layers on 1 to 4 ranks (GPU: up to 8), one to five calls of either in any order."""
    on_gpu = device == "cuda"
    ep_size = draw(st.sampled_from((1, 2, 3, 4, 8) if on_gpu else (1, 2, 3, 4)))
    configs = draw(st.lists(configs_of(ep_size, on_gpu), min_size=1, max_size=2, unique=True))
    capacity = draw(st.integers(1, 300 if on_gpu else 12))
    calls = st.builds(
        Call, st.integers(0, len(configs) - 1), st.integers(0, 2**20),
        st.tuples(*[st.integers(0, capacity)] * ep_size), st.sampled_from(ROUTINGS),
        st.booleans(), st.booleans(), st.booleans(), st.none() | st.integers(0, 4), st.booleans(), st.integers(0, 7),
        st.booleans(), st.booleans(),
    )  # fmt: skip
    return Sequence(tuple(configs), ep_size, capacity, tuple(draw(st.lists(calls, min_size=1, max_size=5))))


def build(sequence: Sequence, call: Call, device: str) -> Case:
    config = sequence.configs[call.layer]
    case = make_case(call.seed, config, sequence.ep_size, call.counts, call.routing, device,
                     prequantized=call.prequantized)  # fmt: skip
    r, inputs = random.Random(call.seed), []
    for i, count in zip(case.inputs, call.counts):
        idx, weights, num_tokens = i.topk_idx.clone(), i.topk_weights, None
        generator = torch.Generator().manual_seed(r.randrange(1 << 30))
        idx[(torch.rand(idx.shape, generator=generator) * 8 < call.drop).to(device)] = -1
        if call.used is not None:
            num_tokens = torch.tensor([count * call.used // 4], dtype=torch.int32, device=device)
        if call.poison and count and not call.prequantized:
            i.x[r.randrange(count), r.randrange(config.hidden)] = r.choice((float("nan"), float("inf")))
        idx = idx.long() if call.int64 else idx
        weights = weights.bfloat16() if call.bf16_weights else weights
        inputs.append(RankInput(i.x, i.x_sf, idx, weights, num_tokens))
    return case._replace(inputs=inputs)


def expected_of(case: Case) -> list[torch.Tensor]:
    if case.inputs[0].x.is_cuda:
        return moe_layer(case.config, LocalExchange(case.ep_size), case.weights, case.inputs)
    return moe_reference(case.config, case.weights, case.inputs)


def judge(config: MoEConfig, outs: list[torch.Tensor], expected: list[torch.Tensor]) -> Verdict:
    return verdict_ranks(outs, expected, max_row_rel_l2=row_limit(config.intermediate))


def run(sequence: Sequence, device: str, tally: dict) -> None:
    """AssertionError naming the call that came out wrong."""
    ep_config = EPConfig(sequence.capacity, sequence.ep_size, arrive_deadline_s=10.0, step_deadline_s=10.0)
    with Workspace(list(sequence.configs), ep_config, device=device) as workspace:
        layers = [MoELayer(config, workspace) for config in sequence.configs]
        loaded: list[Case | None] = [None] * len(layers)
        for number, call in enumerate(sequence.calls):
            case, layer = build(sequence, call, device), layers[call.layer]
            if loaded[call.layer] is None or call.reload:
                loaded[call.layer] = case
                w = case.weights
                layer.load_weights(*([getattr(rank, name) for rank in w]
                                     for name in ("linear1", "linear2", "linear1_sf", "linear2_sf")),
                                   **{name: [getattr(rank, name) for rank in w]
                                      for name in ("linear1_bias", "linear2_bias") if layer.config.bias})  # fmt: skip
            case = case._replace(weights=loaded[call.layer].weights)
            inputs, bound = case.inputs, max(call.counts) if call.bound else None
            results = []
            for _ in range(2):
                outs = [torch.full(i.x.shape, float("nan"), dtype=torch.bfloat16, device=device) for i in inputs]
                layer([i.x if i.x_sf is None else (i.x, i.x_sf) for i in inputs], [i.topk_idx for i in inputs],
                      [i.topk_weights for i in inputs], num_tokens=[i.num_tokens for i in inputs],
                      num_tokens_bound=bound, out=outs)  # fmt: skip
                if device == "cuda":
                    torch.cuda.synchronize()
                layer.check()
                results.append(outs)
            tally["calls"] += 2
            first, second = (torch.cat([out.view(torch.int16).flatten() for out in outs]) for outs in results)
            assert torch.equal(first, second), f"call {number} gave other bits the second time"
            found = judge(layer.config, results[1], expected_of(case))
            assert found.ok, f"call {number}: {found.text}"


def batch(seed: int, device: str, max_examples: int, tally: dict) -> None:
    """`max_examples` sequences drawn from one seed. What fails is shrunk and raised, with its sequence as a note."""

    @hypothesis.seed(seed)
    @settings(max_examples=max_examples, deadline=None, database=None, print_blob=False,
              suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink))  # fmt: skip
    @hypothesis.given(sequences(device))
    def meets_the_specification(sequence):
        tally["sequences"] += 1
        run(sequence, device, tally)

    meets_the_specification()


def fuzz(seed: int, minutes: float, device: str) -> dict:
    """Batches of seeds from `seed` on until the time is over or one fails. -> a report for JSON."""
    tally, failure, begin, first = {"sequences": 0, "calls": 0}, None, time.monotonic(), seed
    said = begin
    while time.monotonic() - begin < 60 * minutes and failure is None:
        if time.monotonic() - said > SAID_S:
            said = time.monotonic()
            print(f"{said - begin:6.0f} s  {tally['sequences']} sequences, {tally['calls']} calls, at seed {seed}",
                  file=sys.stderr, flush=True)  # fmt: skip
        try:
            batch(seed, device, BATCH, tally)
            seed += 1
        except Exception as error:
            notes = getattr(error, "__notes__", [])
            failure = {"seed": seed, "error": f"{type(error).__name__}: {error}", "notes": notes}
    return {"first_seed": first, "seeds": seed - first, "device": device, **tally,
            "seconds": time.monotonic() - begin, "failure": failure}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m megamoe.testing.fuzz",
                                     description=__doc__.partition(": ")[2])  # fmt: skip
    parser.add_argument("--minutes", type=float, default=1.0, help="default %(default)s")
    parser.add_argument("--seed", type=int, help="the first batch's; default: drawn, and printed")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    given = parser.parse_args(argv)
    if not given.minutes > 0:  # no sequence drawn is no sequence that failed
        parser.error(f"--minutes {given.minutes:g} must be above 0")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device; use --device cpu or install a CUDA build of torch")
    if given.json and not Path(given.json).resolve().parent.is_dir():
        parser.error(f"--json {given.json}: its folder is not there; make it first")
    seed = random.SystemRandom().randrange(1 << 31) if given.seed is None else given.seed
    print(f"first seed {seed}, {given.device}, {given.minutes:g} minutes", flush=True)
    report = fuzz(seed, given.minutes, given.device)
    print(json.dumps(report, indent=1))
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump(report, file)
            file.write("\n")
    return int(report["failure"] is not None)


if __name__ == "__main__":
    sys.exit(main())
