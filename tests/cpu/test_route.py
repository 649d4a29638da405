"""Router scores to experts and weights."""

import pytest
import torch

from megamoe import route


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_a_loop_over_tokens(score, normalize, dtype):
    logits = torch.randn(50, 32).to(dtype)
    topk_idx, topk_weights = route(logits, 6, score=score, normalize=normalize)
    assert topk_idx.dtype == torch.int32 and topk_weights.dtype == torch.float32
    for token, row in enumerate(logits.double()):
        scores = row.exp() / row.exp().sum() if score == "softmax" else 1 / (1 + (-row).exp())
        best = sorted(range(32), key=lambda e: (-row[e].item(), e))[:6]
        assert topk_idx[token].tolist() == best
        expected = scores[best] / scores[best].sum() if normalize else scores[best]
        assert torch.allclose(topk_weights[token].double(), expected, rtol=1e-5)


def test_ties_go_to_the_lower_index():
    topk_idx, topk_weights = route(torch.zeros(3, 64), 5)
    assert topk_idx.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert torch.allclose(topk_weights, torch.full((3, 5), 0.2))
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0]])
    assert route(logits, 4).topk_idx.tolist() == [[1, 3, 2, 4]]


def test_bias_picks_but_does_not_weigh():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    topk_idx, topk_weights = route(logits, 2, score="sigmoid", normalize=False, bias=torch.tensor([0.0, 0.0, 5.0]))
    assert topk_idx.tolist() == [[2, 0]]
    assert torch.allclose(topk_weights, torch.sigmoid(torch.tensor([[0.0, 2.0]])))


def test_scale_multiplies_the_weights():
    logits = torch.randn(4, 8)
    assert torch.allclose(route(logits, 2, scale=2.5).topk_weights.sum(1), torch.full((4,), 2.5))


def test_nan_stays_in_its_token_and_its_ids_stay_legal():
    logits = torch.randn(4, 8)
    clean = route(logits, 3)
    logits[2, 5] = float("nan")
    topk_idx, topk_weights = route(logits, 3)
    others = torch.tensor([0, 1, 3])
    assert torch.equal(topk_idx[others], clean.topk_idx[others])
    assert torch.equal(topk_weights[others], clean.topk_weights[others])
    assert ((topk_idx >= 0) & (topk_idx < 8)).all()


def test_hopeless_sigmoid_scores_do_not_divide_by_zero():
    assert route(torch.full((1, 4), -1e4), 2, score="sigmoid").topk_weights.tolist() == [[0.0, 0.0]]


def test_no_tokens():
    assert route(torch.empty(0, 8), 2).topk_idx.shape == (0, 2)


@pytest.mark.parametrize(
    ("logits", "topk", "options", "text"),
    [
        (torch.zeros(2, 4), 5, {}, "topk=5 must be between 1 and the 4 experts"),
        (torch.zeros(2, 4), 0, {}, "topk=0 must be between 1 and the 4 experts"),
        (torch.zeros(4), 1, {}, "logits has shape (4,)"),
        (torch.zeros(2, 4, dtype=torch.int32), 1, {}, "dtype torch.int32; pass floating"),
        (torch.zeros(2, 4), 1, {"score": "tanh"}, "score='tanh' must be 'softmax' or 'sigmoid'"),
        (torch.zeros(2, 4), 1, {"bias": torch.zeros(3)}, "bias has shape (3,); pass [num_experts] = [4]"),
    ],
)
def test_bad_input(logits, topk, options, text):
    with pytest.raises(ValueError) as raised:
        route(logits, topk, **options)
    assert text in str(raised.value)
