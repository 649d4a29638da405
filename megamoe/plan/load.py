"""Expert load: its generators (token level, so that a token never counts an expert twice) and its one statistic.

Every generator is seeded and returns popularity or token-level choices; loads are counted from the choices.
"""

import numpy as np

GENERATED_GROUPS = 8
GENERATORS = ("lognormal", "zipf", "hot", "group", "bursts", "uniform")


def balancedness(rank_load):
    """Mean over ranks / largest rank, float64 [...] for rank_load [..., num_ranks]; 1.0 where nothing was routed."""
    rank_load = np.asarray(rank_load, np.float64)
    largest = rank_load.max(-1)
    return np.where(largest > 0, rank_load.mean(-1) / np.where(largest > 0, largest, 1.0), 1.0)


def popularity(kind, num_layers, num_logical_experts, seed, *, sigma=1.0, exponent=1.0, hot=4, hot_share=0.5,
               num_groups=GENERATED_GROUPS):
    """Relative popularity of each expert, float64 [num_layers, num_logical_experts], each layer with mean 1.

    kind: "lognormal" (exp(sigma * normal)), "zipf" (rank ** -exponent in a random order), "hot" (`hot` experts carry
    `hot_share` of everything), "group" (lognormal whose spread is half common to an expert group, half its own),
    "uniform" and "bursts" (all alike; the bursts come with the tokens, sample_topk's burst_tokens).
    """
    if kind not in GENERATORS:
        raise ValueError(f"kind={kind!r}: choose one of {', '.join(GENERATORS)}")
    rng = np.random.default_rng(seed)
    shape = (num_layers, num_logical_experts)
    if kind == "lognormal":
        p = np.exp(sigma * rng.standard_normal(shape))
    elif kind == "zipf":
        p = rng.permuted(np.tile(np.arange(1.0, num_logical_experts + 1) ** -exponent, (num_layers, 1)), axis=1)
    elif kind == "hot":
        p = np.full(shape, (1 - hot_share) / (num_logical_experts - hot))
        p[:, :hot] = hot_share / hot
        p = rng.permuted(p, axis=1)
    elif kind == "group":
        common = np.repeat(rng.standard_normal((num_layers, num_groups)), num_logical_experts // num_groups, axis=1)
        p = np.exp(sigma * (common + rng.standard_normal(shape)) / np.sqrt(2))
    else:
        p = np.ones(shape)
    return p / p.mean(1, keepdims=True)


def drift(base, sigma, seed):
    """The popularity some time later: each expert times exp(sigma * normal), then mean 1 again; shape of base."""
    base = np.asarray(base, np.float64)
    later = base * np.exp(sigma * np.random.default_rng(seed).standard_normal(base.shape))
    return later / later.mean(1, keepdims=True)


def sample_topk(base, num_tokens, topk, seed, *, num_groups=1, topk_groups=None, burst_tokens=0, burst_sigma=0.5):
    """Token choices, int32 [layers, num_tokens, topk], distinct experts within a token, best first.

    Each token draws topk experts without replacement in proportion to base [layers, num_logical_experts] (perturbed
    log-popularity, the Gumbel top-k construction). With topk_groups < num_groups the token first keeps the expert
    groups whose two best scores sum highest, DeepSeek-V3's rule. burst_tokens > 0 gives every run of that many
    consecutive tokens (a prompt) a lognormal taste of its own of width burst_sigma.
    """
    base = np.asarray(base, np.float64)
    num_layers, num_logical = base.shape
    rng = np.random.default_rng(seed)
    chosen = np.empty((num_layers, num_tokens, topk), np.int32)
    with np.errstate(divide="ignore"):
        log_base = np.log(base)
    for layer in range(num_layers):
        score = log_base[layer] + rng.gumbel(size=(num_tokens, num_logical))
        if burst_tokens:
            num_bursts = -(-num_tokens // burst_tokens)
            taste = burst_sigma * rng.standard_normal((num_bursts, num_logical))
            score += np.repeat(taste, burst_tokens, axis=0)[:num_tokens]
        if topk_groups is not None and topk_groups < num_groups:
            by_group = score.reshape(num_tokens, num_groups, -1)
            best_two = np.partition(by_group, -2, axis=-1)[..., -2:].sum(-1)
            dropped = np.argsort(-best_two, axis=1, kind="stable")[:, topk_groups:]
            np.put_along_axis(by_group, dropped[..., None], -np.inf, axis=1)
        best = np.argpartition(-score, topk - 1, axis=1)[:, :topk]
        order = np.argsort(-np.take_along_axis(score, best, 1), axis=1, kind="stable")
        chosen[layer] = np.take_along_axis(best, order, 1)
    return chosen


def count_load(topk_idx, num_logical_experts):
    """Rows per expert, int64 [layers, num_logical_experts]; topk_idx int [layers, num_tokens, topk], -1 = unused."""
    topk_idx = np.asarray(topk_idx)
    return np.stack([np.bincount(one[one >= 0].ravel(), minlength=num_logical_experts) for one in topk_idx])
