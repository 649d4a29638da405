"""python router_cases.py cpu|cuda: the Triton router against the torch router over random and hostile logits."""

import itertools
import sys

import torch

from megamoe.route import router, router_triton

SHAPES = ((1, 4, 1), (7, 64, 6), (33, 128, 8), (5, 257, 16), (9, 256, 8), (3, 8, 8))
INTERPRETED = ((1, 4, 1), (4, 64, 6), (2, 257, 8), (3, 8, 8))  # Triton's interpreter takes 20 ms a token
GROUPS = ((256, 8, 4, 8), (64, 8, 3, 6), (64, 4, 1, 4), (16, 16, 5, 5), (48, 4, 2, 6))
ULP = 2.0**-23


def hostile(n: int, experts: int) -> torch.Tensor:
    """Rows with ties, infinities, zeros, large values and a NaN."""
    logits = torch.randn(n, experts).mul(2).round()
    logits[:, ::3] = 0.0
    logits[n // 2] = -float("inf")
    logits[n // 2, 0] = 1.0
    logits[n - 1] = 200.0
    return logits


def agree(logits, topk, **options) -> None:
    expected, got = router.route(logits, topk, **options), router_triton.route(logits, topk, **options)
    assert got.topk_idx.dtype == torch.int32 and got.topk_idx.shape == expected.topk_idx.shape
    differ = got.topk_idx != expected.topk_idx
    if differ.any():
        _, picking = router.expert_scores(logits, topk, options.get("score", "softmax"), options.get("bias"))
        a, b = (picking.gather(1, one.topk_idx.long()) for one in (got, expected))
        # A group's score is a sum of two: its ties may differ by as many ulp of the larger
        close = (a - b).abs() <= 8 * ULP * picking.abs().amax(1, keepdim=True)
        assert bool(close[differ].all()) and options.get("num_groups", 1) == 1, (topk, options, differ.nonzero()[:4])
    same = ~differ.any(1)
    limit = 1e-6 * max(1.0, options.get("scale", 1.0))
    torch.testing.assert_close(got.topk_weights[same], expected.topk_weights[same], atol=limit, rtol=1e-6)


def main(device: str) -> None:
    torch.manual_seed(0)
    cases = 0
    for (n, experts, topk), score, normalize, biased, make in itertools.product(
        SHAPES if device == "cuda" else INTERPRETED,
        ("softmax", "sigmoid"), (True, False), (False, True), (torch.randn, hostile),
    ):  # fmt: skip
        bias = torch.randn(experts, device=device) if biased else None
        options = dict(score=score, normalize=normalize, bias=bias, scale=2.5 if biased else 1.0)
        agree(make(n, experts).to(device), topk, **options)
        cases += 1
    for (experts, groups, kept, topk), biased in itertools.product(GROUPS, (False, True)):
        # Negative biases too: experts that are out must not look better than those in
        bias = torch.randn(experts, device=device) - 1 if biased else None
        logits = torch.randn(11 if device == "cuda" else 3, experts, device=device)
        agree(logits, topk, score="sigmoid", bias=bias, num_groups=groups, topk_groups=kept, scale=2.5)
        agree(logits.round(), topk, score="sigmoid", num_groups=groups, topk_groups=kept)
        cases += 2
    for dtype in (torch.bfloat16, torch.float16):
        agree(torch.randn(6, 64, device=device).to(dtype), 6)
    strided = torch.randn(6, 128, device=device)[:, :64]
    agree(strided, 4)
    nan = torch.randn(4, 64, device=device)
    nan[2, 7] = float("nan")
    got, expected = router_triton.route(nan, 4, score="sigmoid"), router.route(nan, 4, score="sigmoid")
    assert torch.equal(got.topk_idx, expected.topk_idx) and got.topk_idx[2, 0] == 7
    assert router_triton.route(torch.empty(0, 64, device=device), 4).topk_idx.shape == (0, 4)
    for bad in (dict(topk=0), dict(topk=65), dict(topk=4, num_groups=3), dict(topk=4, score="max")):
        try:
            router_triton.route(torch.randn(2, 64, device=device), **bad)
        except ValueError:
            cases += 1
        else:
            raise AssertionError(f"{bad} was accepted")
    print(f"{cases + 5} cases agree")


if __name__ == "__main__":
    main(sys.argv[1])
