"""The device's faults, with kernels built with -DFAULTS (csrc/debug/faults.cuh). One GPU: three virtual ranks, of which
rank 2 publishes something late, wrong or not at all. Two GPUs: device_ranks.py."""

import re
import struct
import time
from dataclasses import replace
from typing import NamedTuple

import torch

from megamoe import EPConfig, MegaMoEError, MoEConfig, MoELayer, Workspace
from megamoe.layout import FAULT_POINTS
from megamoe.plan import tiles
from megamoe.steps import moe_layer
from megamoe.testing.compare import verdict_ranks
from megamoe.testing.data import make_case
from megamoe.testing.faults import table
from megamoe.testing.faults.held import held, not_given_back

KINDS = ("none", "delay", "drop", "corrupt")
CONFIG = MoEConfig(hidden=512, intermediate=512, num_experts=12, topk=4)
RANKS, FAULTY = 3, 2
DEADLINE_S = 1.0
# Weights on M; tokens on M, pairs of CTAs, rows counted by the grid; pairs that split weight blocks; weights decoded
# ahead.
LABELS = {
    "8 tokens": ("fp8", 8), "300 tokens": ("fp8", 300), "300 tokens, MXFP4": ("mxfp4", 300),
    "800 tokens, MXFP4": ("mxfp4", 800),
}  # fmt: skip


class DeviceFault(NamedTuple):
    """kind: of KINDS; point: of layout.FAULT_POINTS; argument: microseconds of a delay, mask of a corruption. said:
    what the error must say, None: no error, and the right output."""

    name: str
    step: str
    kind: str
    point: str
    argument: int
    said: str | None

FAULTS = (
    *(DeviceFault(f"{point}: late, within the deadline", "dispatch", "delay", point, 20_000, None)
      for point in ("head", "rows", "h", "combine")),
    DeviceFault("head: never raised", "dispatch", "drop", "head", 0, "step dispatch: .*no routing table from rank 2"),
    DeviceFault("head: of another launch", "dispatch", "corrupt", "head", 1 << 30,
                "step dispatch: .*no routing table from rank 2"),
    DeviceFault("rows: never raised", "dispatch", "drop", "rows", 0, "step dispatch: .*rows from rank 2"),
    DeviceFault("count: three too many", "dispatch", "corrupt", "count", 3, "rows from rank 2|expert rows of token"),
    DeviceFault("count: half of it", "combine", "corrupt", "count", 8, "expert rows of token|rows from rank 2"),
    DeviceFault("routing: ids out of range", "plan", "corrupt", "routing", 1 << 14, "of rank 2 names expert"),
    DeviceFault("h: never raised", "swiglu", "drop", "h", 0, "SwiGLU output of token block|expert rows of token"),
    DeviceFault("combine: never raised", "combine", "drop", "combine", 0, "step combine: .*expert rows of token"),
    DeviceFault("decoded: late, within the deadline", "linear1", "delay", "decoded", 20_000, None),
    DeviceFault("decoded: never raised", "linear1", "drop", "decoded", 0, "were not decoded|expert rows of token"),
)  # fmt: skip
# What is loaded or built at its first use is so after one fault, found at once, whose row nobody sees.
REHEARSED = next(fault for fault in FAULTS if fault.point == "routing")


def decodes_ahead(weight_format: str, num_tokens: int) -> bool:
    block = tiles.choose_block_tokens(replace(CONFIG, weight_format=weight_format), RANKS, num_tokens)
    return tiles.decodes_ahead(weight_format, block)


class FaultyLayer:
    """A layer on virtual ranks whose kernel misbehaves as told."""

    def __init__(self, weight_format: str, num_tokens: int):
        config = replace(CONFIG, weight_format=weight_format)
        self.case = make_case(5, config, RANKS, num_tokens, "uniform", "cuda")
        capacity = num_tokens + 8  # a count that is a little too large must not be cut to the right one
        ep_config = EPConfig(capacity, RANKS, arrive_deadline_s=DEADLINE_S, step_deadline_s=DEADLINE_S)
        self.workspace = Workspace(config, ep_config, device="cuda")
        self.layer = MoELayer(config, self.workspace)
        w = self.case.weights
        names = ("linear1", "linear2", "linear1_sf", "linear2_sf")
        self.layer.load_weights(*([getattr(rank, name) for rank in w] for name in names))
        fused = self.workspace.fused
        self.kernels = fused.kernels = {key: fused.load_kernel(*key, FAULTS=1) for key in fused.kernels}
        self.outs = [torch.empty(i.x.shape, dtype=torch.bfloat16, device="cuda") for i in self.case.inputs]
        self.expected = moe_layer(config, _local(), w, self.case.inputs)

    def misbehave(self, kind: str, point: str, argument: int) -> None:
        if kind == "delay":
            argument = argument * 1000 // 1024
        words = struct.pack("<4I", KINDS.index(kind), FAULT_POINTS.index(point), FAULTY, argument)
        torch.cuda.synchronize()
        for kernel in self.kernels.values():
            kernel.write_symbol("mega_moe_fault", words)

    def call(self) -> None:
        inputs = self.case.inputs
        for out in self.outs:
            out.fill_(1.0)
        self.layer([i.x for i in inputs], [i.topk_idx for i in inputs], [i.topk_weights for i in inputs], out=self.outs)
        torch.cuda.synchronize()
        self.layer.check()

    def wrong(self) -> str:
        found = verdict_ranks(self.outs, self.expected, max_row_rel_l2=6e-2)
        return "" if found.ok else found.text

    def close(self) -> None:
        self.layer.close()
        self.workspace.close()


def _local():
    from megamoe.exchange import LocalExchange

    return LocalExchange(RANKS)


def try_fault(faulty: FaultyLayer, fault: DeviceFault, label: str) -> table.Row:
    problems, before = [], held()
    faulty.misbehave(fault.kind, fault.point, fault.argument)
    _, error, seconds = table.timed(faulty.call, MegaMoEError)
    faulty.misbehave("none", fault.point, 0)
    if fault.said is None:
        problems += [table.words(error)] if error else [faulty.wrong()]
    elif error is None or not re.search(fault.said, str(error), re.DOTALL):
        problems.append(f"it did not say {fault.said!r}")
    if error is not None:
        if not all(bool(out.isnan().all()) for out in faulty.outs):
            problems.append("a failed call left numbers in an output")
        if table.timed(faulty.call, MegaMoEError)[1] is None:
            problems.append("the poisoned workspace took a call")
        faulty.workspace.reset()
    limit_s = 2 * DEADLINE_S + table.GRACE_S  # h and combine wait for two deadlines
    if seconds > limit_s:
        problems.append(f"took {seconds:.1f} s, more than {limit_s} s")
    for _ in range(3):  # both head banks
        again = table.timed(faulty.call, MegaMoEError)[1]
        problems.append(table.words(again) if again else faulty.wrong())
    said = dict.fromkeys(range(RANKS), table.words(error))
    error = again = None  # their tracebacks hold what the calls did
    problems.append(not_given_back(before, held()).removesuffix("; "))
    problem = "; ".join(filter(None, problems))
    return table.Row("device", f"{fault.name}, {label}", fault.step, said, seconds, not problem, problem)


def rows(only: str | None = None) -> list[table.Row]:
    """All device rows; those that this machine lacks the means for say so."""
    picked = [fault for fault in FAULTS if only is None or re.search(only, fault.name)]
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return [*(_not_run(fault, "no sm_90 GPU") for fault in picked), *rank_rows(only)]
    found = []
    for label, (weight_format, num_tokens) in LABELS.items():
        tried = [fault for fault in picked if (fault.point == "decoded") == decodes_ahead(weight_format, num_tokens)]
        if not tried:
            continue
        table.tell(f"device: {len(tried)} faults with {label}")
        faulty = FaultyLayer(weight_format, num_tokens)
        faulty.call()
        try_fault(faulty, REHEARSED, label)
        for fault in tried:
            begin = time.monotonic()
            try:
                found.append(try_fault(faulty, fault, label))
            except Exception as error:  # the table must reach the reader
                seconds = time.monotonic() - begin
                name = f"{fault.name}, {label}"
                found.append(table.Row("device", name, fault.step, {}, seconds, False, table.words(error)))
                break
        faulty.close()
    return found + rank_rows(only)


def rank_rows(only: str | None) -> list[table.Row]:
    from megamoe.testing.faults import device_ranks

    picked = [fault for fault in device_ranks.FAULTS if only is None or re.search(only, fault.name)]
    count = torch.cuda.device_count()
    if not picked or count < 2:
        return [_not_run(fault, f"needs 2 GPUs, found {count}") for fault in picked]
    return table.run_module("megamoe.testing.faults.device_ranks", "device", only)


def _not_run(fault, reason: str) -> table.Row:
    return table.Row("device", fault.name, fault.step, {}, 0.0, None, reason)
