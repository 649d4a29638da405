"""The judge must be able to say no."""

import pytest
import torch

from megamoe.testing.compare import rel_l2, row_rel_l2, verdict, verdict_ranks

NAN, INF = float("nan"), float("inf")


def test_rel_l2_by_hand():
    expected = torch.tensor([[3.0, 4.0]])
    assert rel_l2(torch.tensor([[3.0, 4.5]]), expected) == pytest.approx(0.1)
    assert rel_l2(expected, expected) == 0


@pytest.mark.parametrize(
    ("actual", "expected", "row"),
    [
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([1e-30, 0.0], [0.0, 0.0], INF),  # a zero row is exactly zero
        ([NAN, 1.0], [1.0, 1.0], INF),
        ([1.0, 1.0], [NAN, 1.0], INF),
        ([INF, NAN], [NAN, 1.0], 0.0),  # both bad: which kind is not specified
    ],
)
def test_special_rows(actual, expected, row):
    assert row_rel_l2(torch.tensor([actual]), torch.tensor([expected])).item() == row


def test_one_wrong_row_of_many_fails_the_verdict():
    expected = torch.randn(1000, 64)
    actual = expected.clone()
    assert verdict(actual, expected).ok
    actual[17] *= 1.04
    judged = verdict(actual, expected)
    assert judged.rel_l2 < 1e-2 and not judged.ok and judged.worst_row_idx == 17


def test_small_error_everywhere_fails_the_verdict():
    expected = torch.randn(100, 64)
    assert not verdict(expected * 1.011, expected).ok
    assert verdict(expected * 1.009, expected).ok


def test_shapes_and_empty():
    assert not verdict(torch.zeros(3, 4), torch.zeros(2, 4)).ok
    assert not verdict_ranks([torch.zeros(3, 4)], [torch.zeros(2, 4)]).ok
    assert verdict(torch.zeros(0, 4), torch.zeros(0, 4)).ok
