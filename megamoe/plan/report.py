"""Figures of a plan beside its rival: rows of plain numbers, and their tables."""


import numpy as np

from .load import GENERATED_GROUPS, count_load, drift, popularity, sample_topk
from .plan import ExpertPlan, invert
from .predict import error_by_kind
from .split import even_split

# (logical experts, redundant experts, ranks) of the published comparisons; topk 8, 16384 tokens a layer.
CASES = ((256, 32, 8), (256, 32, 32), (256, 64, 32), (384, 48, 72), (128, 16, 16))


def even_rank_load(physical_to_logical, num_ranks, load):
    """Rank loads when every copy takes the same part: float64 [layers, num_ranks]."""
    mapping = np.asarray(physical_to_logical, np.int64)
    count = np.stack([np.bincount(one, minlength=load.shape[1]) for one in mapping])
    copy = np.take_along_axis(load / count, mapping, 1)
    return copy.reshape(len(load), num_ranks, -1).sum(2)


def even_plan(physical_to_logical, like):
    """An ExpertPlan of this mapping with even shares and the load, ranks and cost of the plan `like`."""
    mapping = np.asarray(physical_to_logical, np.int32)
    share = even_split(*invert(mapping, like.num_logical_experts), mapping.shape[1])
    return ExpertPlan(mapping, like.load, share, like.num_ranks, like.num_nodes, phase=like.phase, cost=like.cost)


def make_load(kind, num_layers, num_experts, seed, *, drift_sigma=0.0, num_tokens=16384, topk=8):
    """Rows per expert of sampled tokens, float64 [layers, experts]; with drift_sigma, of the popularity drifted.

    "bursts": the tokens are eight prompts, each with a taste of its own.
    """
    if num_experts < topk:
        raise ValueError(f"num_experts={num_experts}: each token of a generated load chooses {topk}; take as many")
    if kind == "group" and num_experts % GENERATED_GROUPS:
        raise ValueError(f"num_experts={num_experts}: a 'group' load has {GENERATED_GROUPS} groups of equal size; take "
                         f"a multiple of {GENERATED_GROUPS}")
    base = popularity(kind, num_layers, num_experts, seed)
    if drift_sigma:
        base = drift(base, drift_sigma, seed + 1000)
    sample_seed = seed + (3000 if drift_sigma else 2000)
    bursts = dict(burst_tokens=num_tokens // 8, burst_sigma=1.0) if kind == "bursts" else {}
    return count_load(sample_topk(base, num_tokens, topk, sample_seed, **bursts), num_experts).astype(np.float64)


def table(rows):
    """The rows (dicts) as text, columns in the order of first appearance, floats with four digits, "-" where absent."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = [names] + [[_cell(row.get(name, "-")) for name in names] for row in rows]
    width = [max(len(line[i]) for line in text) for i in range(len(names))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, width, strict=True)) for line in text)


def fit_text(model, fitted, checked=()):
    """The fitted LayerTime and its error by kind of call (predict.error_by_kind), as text."""
    return (f"fit: {model.overhead_us:.1f} us + ((bytes / {model.weight_tbs:.2f} TB/s)^p + (FLOP / {model.tflops:.0f} "
            f"TFLOPS)^p)^(1/p), p = {model.p:.2f}; predicted / measured - 1:\n"
            + table(error_by_kind(model, fitted, checked)))


def picture(before, after, *, width=40):
    """Load per rank as bars, before and after, scaled to the largest of both; each float [num_ranks]."""
    largest = max(float(np.max(before)), float(np.max(after)), 1e-300)
    lines = [f"{'rank':>4}  {'before':<{width}}  after"]
    for rank, (a, b) in enumerate(zip(before, after, strict=True)):
        lines.append(f"{rank:>4}  {'#' * round(width * a / largest):<{width}}  {'#' * round(width * b / largest)}")
    return "\n".join(lines)


def draw(path, before, after, title):
    """The same as an image file; each float [num_ranks]. ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    rank = np.arange(len(before))
    axes.bar(rank - 0.2, before, 0.4, label="greedy")
    axes.bar(rank + 0.2, after, 0.4, label="plan")
    axes.axhline(np.mean(after), color="black", linewidth=0.8, label="mean")
    axes.set(xlabel="rank", ylabel="cost", title=title)
    axes.legend()
    figure.savefig(path)


def _cell(value):
    return f"{value:.4f}" if isinstance(value, float) else str(value)
