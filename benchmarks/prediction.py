"""What the planner's cost model expects of more ranks than there are: 1 to 512, in domains of 8, for one model.

For each number of ranks: a routing is sampled, limited to MAX_DOMAINS domains a token where there are more; experts are
placed by plan_experts; copies are chosen by choose_replicas. Then

    experts us   largest rank's row_us * rows + expert_us * activated experts (megamoe/plan/cost.py), with coefficients
                 at the roofline's rates
    exchange us  bytes that a rank sends to other domains and gets back, at NETWORK_BYTES one way; both directions of a
                 copy count, since each waits for the other
    layer us     their sum; overlapped: the larger, as two micro-batches can reach at best

It is a prediction from rates, not a measurement: latency, launches, NVLink inside a domain and the skew between ranks
are left out. What was measured at the same size stands beside it.
"""

from dataclasses import dataclass

import numpy as np

from benchmarks.cases import load_cases
from benchmarks.roofline import RATES, WEIGHT_BYTES
from megamoe.domains.traffic import bytes_per_token
from megamoe.plan import CostModel, balancedness, choose_replicas, count_load, plan_experts, popularity, sample_topk

RANKS_PER_DOMAIN = 8
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
MAX_DOMAINS = 4
NETWORK_BYTES = 45e9
"""Bytes/s that one GPU's 400 Gb/s port is assumed to carry one way (50e9 on paper). Not measured."""
SAMPLE_TOKENS = 8192
MOST_NODES = 48  # choose_replicas keeps an expert and a set of nodes in the bits of one int64
GPU = "H100"


@dataclass(frozen=True)
class Predicted:
    """One number of ranks. copies: of a token, in other domains than its own; bytes_between: a token's, both ways;
    balance: mean / largest rank's cost."""

    ranks: int
    domains: int
    slots_per_rank: int
    balance: float
    experts_us: float
    copies: float
    most_domains: int
    bytes_between: float
    exchange_us: float

    @property
    def layer_us(self) -> float:
        return self.experts_us + self.exchange_us

    @property
    def overlapped_us(self) -> float:
        return max(self.experts_us, self.exchange_us)


def cost_model(case, rows_per_step: float) -> CostModel:
    """The expert GEMMs of a rank at the roofline's rates."""
    rates, weights = RATES[GPU], 3 * case.hidden * case.intermediate
    flops_us, bytes_us = 2 * weights / rates.fp8_flops * 1e6, weights * WEIGHT_BYTES["fp8"] / rates.hbm_bytes * 1e6
    return CostModel(flops_us, bytes_us, rows_per_step)


def predict(
    case, ranks: int, tokens_per_rank: int, kind: str = "uniform", *, redundant: int = 0, seed: int = 1
) -> Predicted:
    """kind: of load, plan.load.GENERATORS. Every rank has equally many slots, as few as hold all experts and
    `redundant` more."""
    domains = max(1, ranks // RANKS_PER_DOMAIN)
    slots = (-(-case.num_experts // ranks) + redundant) * ranks
    groups, kept = _groups(case, domains)
    base = popularity(kind, 1, case.num_experts, seed)
    draw = dict(num_groups=groups, topk_groups=kept)
    load = count_load(sample_topk(base, SAMPLE_TOKENS, case.topk, seed + 1, **draw), case.num_experts)
    cost = cost_model(case, ranks * tokens_per_rank * case.topk)
    plan = plan_experts(
        load, num_ranks=ranks, num_nodes=domains, num_redundant_experts=slots - case.num_experts, num_groups=groups,
        phase="decode", cost=cost, max_nodes_per_token=kept if groups > 1 else None,
    )  # fmt: skip
    idx = sample_topk(base, SAMPLE_TOKENS, case.topk, seed + 2, **draw)[0]  # the next batch, not the one planned for
    physical = _choose(idx, plan)
    rows = np.bincount(physical.ravel(), minlength=slots).astype(float)
    rank_cost = cost.copy_cost(rows, rows.sum()).reshape(ranks, -1).sum(1)
    touched = np.zeros((len(physical), domains), bool)
    np.put_along_axis(touched, physical // (slots // domains), True, 1)
    own = np.arange(len(physical)) % domains  # tokens come from every domain alike
    copies = float(touched.sum(1).mean() - np.take_along_axis(touched, own[:, None], 1).mean())
    between = bytes_per_token(copies, case.hidden, case.topk)
    return Predicted(
        ranks, domains, slots // ranks, float(balancedness(rank_cost)), float(rank_cost.max()), copies,
        int(touched.sum(1).max()), between, tokens_per_rank * between / NETWORK_BYTES * 1e6,
    )  # fmt: skip


def _choose(idx: np.ndarray, plan) -> np.ndarray:
    """Slots that serve the rows of a batch: [num_tokens, topk]."""
    home = None if plan.home_node is None else plan.home_node[0]
    if plan.num_nodes <= MOST_NODES:
        return choose_replicas(idx, plan.physical_to_logical[0], num_ranks=plan.num_ranks, num_nodes=plan.num_nodes,
                               home_node=home, max_nodes=plan.max_nodes_per_token)  # fmt: skip
    # The copies on an expert's home node take turns
    copies = plan.logical_to_physical[0][idx]
    at_home = (copies >= 0) & (copies // (plan.num_physical_experts // plan.num_nodes) == home[idx][..., None])
    turn = np.arange(len(idx))[:, None] % at_home.sum(-1)
    nth = np.argsort(~at_home, axis=-1, kind="stable")
    return np.take_along_axis(copies, np.take_along_axis(nth, turn[..., None], -1), -1)[..., 0]


def _groups(case, domains: int) -> tuple[int, int]:
    """(expert groups, groups a token keeps): a group a domain, MAX_DOMAINS of them kept."""
    return (domains, min(MAX_DOMAINS, domains)) if domains > 1 else (1, 1)


PREDICTED = {"impl": "megamoe", "weight_format": "fp8", "routing": "uniform", "input": "prequantized"}


def measured_us(rows: list[dict], case_name: str, ranks: int, tokens_per_rank: int) -> float | None:
    """The last time of megamoe with FP8 experts and uniform routing for this size on GPUs of their own, or None."""
    found = [
        row for row in rows
        if row["case"] == case_name and row["ep_size"] == row.get("num_units", ranks) == ranks and row["ok"]
        and row["virtual_ranks"] is None and row["num_gpus"] and row["num_tokens"] == tokens_per_rank and row["us"]
        and all(row.get(name, wanted) == wanted for name, wanted in PREDICTED.items())
    ]  # fmt: skip
    return max(found, key=lambda row: row.get("date", ""))["us"] if found else None


def markdown(rows: list[dict], case_name: str = "v3", tokens: tuple[int, ...] = (128, 4096)) -> str:
    """One table a number of tokens a rank; rows: scaling.py's and bench.py's, for what was measured."""
    case = load_cases()[case_name]
    out = [
        f"**Predicted: {case.name}** ({case.hidden}/{case.intermediate}/{case.num_experts}/{case.topk}), {GPU}, "
        f"domains of {RANKS_PER_DOMAIN}, at most {MAX_DOMAINS} domains a token, network {NETWORK_BYTES / 1e9:.0f} GB/s "
        "a GPU\n"
    ]
    for count in tokens:
        out.append(f"{count} tokens a rank:\n")
        out.append(
            "| ranks | domains | slots a rank | experts us | copies to other domains | KB between domains a token "
            "| exchange us | layer us | overlapped us | balance | lognormal load: balance | with one more slot a rank "
            "| measured us |"
        )
        out.append("|--" * 13 + "|")
        for ranks in SIZES:
            at = predict(case, ranks, count)
            # One rank has no use for a second copy
            uneven = [predict(case, ranks, count, "lognormal", redundant=n and ranks > 1).balance for n in (0, 1)]
            measured = measured_us(rows, case.name, ranks, count)
            cells = (
                ranks, at.domains, at.slots_per_rank, f"{at.experts_us:.0f}", f"{at.copies:.2f}",
                f"{at.bytes_between / 1e3:.1f}", f"{at.exchange_us:.0f}", f"{at.layer_us:.0f}",
                f"{at.overlapped_us:.0f}", f"{at.balance:.3f}", f"{uneven[0]:.3f}", f"{uneven[1]:.3f}",
                "-" if measured is None else f"{measured:.0f}",
            )  # fmt: skip
            out.append("| " + " | ".join(map(str, cells)) + " |")
        out.append("")
    return "\n".join(out)
