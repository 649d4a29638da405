"""The fused layer is right for every legal input: 200 random cases, and the edge cases by name, in both weight formats.

Limits: oracle.compare. Exact stage by stage: test_stages.py.
"""

import contextlib
import dataclasses

import pytest
import torch

from megamoe import EPConfig, MoEConfig, MoELayer, Workspace
from megamoe.testing.data import Case, make_case
from tests.gpu import oracle

DEFAULTS = {"hidden": 512, "intermediate": 1024, "num_experts": 8, "topk": 4}  # of edge(); with a weight_format each


@pytest.fixture(autouse=True, params=("fp8", "mxfp4"))
def weight_format(request, monkeypatch) -> str:
    monkeypatch.setitem(DEFAULTS, "weight_format", request.param)
    return request.param


@pytest.mark.parametrize("seed", range(200))
def test_random_case_matches_the_specification(seed, weight_format):
    plan = oracle.draw(seed, weight_format=weight_format)
    result = oracle.judge(plan)
    assert result.ok, f"{result.text}\n{plan}"


@contextlib.contextmanager
def opened(case: Case, capacity: int, **options):
    """A layer with the case's weights on a workspace of its own."""
    ep_config = EPConfig(capacity, case.ep_size, arrive_deadline_s=5.0, step_deadline_s=5.0, **options)
    with Workspace(case.config, ep_config, device="cuda") as workspace, MoELayer(case.config, workspace) as layer:
        oracle.load(layer, case)
        yield layer


def check(case: Case, capacity: int | None = None, bound: int | None = None, **options) -> list[torch.Tensor]:
    """Runs the case twice; compares with the specification, and the second run with the first bit for bit."""
    capacity = capacity or max(1, *(i.x.shape[0] for i in case.inputs))
    with opened(case, capacity, **options) as layer:
        first = [y.clone() for y in oracle.run_layer(layer, case, bound)]
        second = oracle.run_layer(layer, case, bound)
        torch.cuda.synchronize()
        layer.check()
        assert torch.equal(oracle.bits(first), oracle.bits(second))
        result = oracle.compare(case.config, second, oracle.spec(case))
        assert result.ok, result.text
        return second


def edge(num_tokens, ep_size=2, routing="uniform", seed=7, prequantized=False, **sizes) -> Case:
    config = MoEConfig(**(DEFAULTS | sizes))
    return make_case(seed, config, ep_size, num_tokens, routing, "cuda", prequantized=prequantized)


def test_capacity_tokens_on_every_rank():
    check(edge(300, ep_size=4, prequantized=True), capacity=300)


def test_more_than_one_range_of_the_routing_table():
    """8 ranks x 1000 tokens x 4 slots: counted by all CTAs together, several ranges a CTA."""
    check(edge(1000, ep_size=8, hidden=256), capacity=1000)


def test_no_token_on_one_rank():
    outs = check(edge([0, 33]), capacity=40)
    assert outs[0].shape == (0, 512)


def test_no_token_on_any_rank():
    check(edge([0, 0, 0, 0], ep_size=4))


@pytest.mark.parametrize("num_tokens", [3, 150])
def test_topk_16(num_tokens):
    check(edge(num_tokens, num_experts=64, topk=16))


def test_topk_above_the_number_of_experts():
    case = edge(20, num_experts=4, topk=6)  # two slots of every token stay -1
    assert bool((case.inputs[0].topk_idx == -1).any())
    check(case)


@pytest.mark.parametrize("num_tokens", [5, 200])
def test_the_same_expert_in_every_slot_counts_as_often(num_tokens):
    case = edge(num_tokens)
    for i in case.inputs:
        i.topk_idx[:] = i.topk_idx[:, :1].clone()
    check(case)


def test_all_ids_minus_one_give_exact_zeros():
    for out in check(edge(50, routing="none")):
        assert not oracle.bits([out]).any()


def test_some_tokens_without_any_expert_give_exact_zeros():
    case = edge(50, routing="holes")
    for i, out in zip(case.inputs, check(case)):
        unused = (i.topk_idx == -1).all(1)
        assert bool(unused.any()) and not oracle.bits([out[unused]]).any()


@pytest.mark.parametrize("num_tokens", [4, 64, 400])
def test_every_token_to_one_expert(num_tokens):
    check(edge(num_tokens, routing="one_expert"))


def test_one_expert_in_all():
    check(edge(40, ep_size=1, num_experts=1, topk=1))


@pytest.mark.parametrize("ep_size", [1, 2])
def test_256_experts_on_a_rank(ep_size):
    check(edge(70, ep_size=ep_size, hidden=256, intermediate=512, num_experts=256 * ep_size, topk=8))


def test_experts_without_tokens():
    check(edge(60, routing="few_experts", num_experts=64))


@pytest.mark.parametrize("hidden", [128, 384, 1152, 7168])
@pytest.mark.parametrize("num_tokens", [5, 150])
def test_hidden_of_any_multiple_of_128(hidden, num_tokens):
    check(edge(num_tokens, hidden=hidden, intermediate=256))


@pytest.mark.parametrize("intermediate", [128, 384, 640, 2048])
@pytest.mark.parametrize("num_tokens", [5, 150])
def test_intermediate_of_any_multiple_of_128(intermediate, num_tokens):
    check(edge(num_tokens, hidden=256, intermediate=intermediate))


def test_swiglu_limit_that_bites():
    case = edge(40, swiglu_limit=0.25)
    unclamped = case._replace(config=dataclasses.replace(case.config, swiglu_limit=None))
    assert not oracle.compare(case.config, oracle.spec(unclamped), oracle.spec(case)).ok
    check(case)


@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1e4])
def test_scales_of_every_size(scale):
    """1e-30: below the amax floor, where everything quantizes to zero."""
    case = edge(20)
    for i in case.inputs:
        i.x.mul_(scale)
    check(case)


def test_device_counts_below_zero_and_above_the_rows_are_clamped():
    case = edge([20, 20])
    counts = [torch.tensor(n, dtype=torch.int32, device="cuda") for n in (-5, 99)]
    inputs = [i._replace(num_tokens=n) for i, n in zip(case.inputs, counts)]
    expected = [i._replace(num_tokens=torch.tensor([n], device="cuda")) for i, n in zip(case.inputs, (0, 20))]
    with opened(case, 20) as layer:
        outs = oracle.run_layer(layer, case._replace(inputs=inputs))
        result = oracle.compare(case.config, outs, oracle.spec(case._replace(inputs=expected)))
        layer.check()
        assert result.ok, result.text


def test_fewer_sms_than_the_gpu_has():
    check(edge(100, ep_size=4), num_sms=20)
    check(edge(10, ep_size=2), num_sms=4)  # two CTAs a rank, the fewest
    check(edge(200, ep_size=2), num_sms=4)
    with pytest.raises(ValueError, match="num_sms=3"):
        check(edge(10, ep_size=2), num_sms=3)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("num_tokens", [6, 300])
def test_nan_and_inf_change_no_other_token(poison, num_tokens):
    """Other tokens are bitwise those of a run without the poison, with every token on every expert's rank."""
    case = edge(num_tokens, routing="duplicates")
    bad = {0: [0, num_tokens // 2], 1: [num_tokens - 1]}
    for rank, tokens in bad.items():
        case.inputs[rank].topk_idx[tokens, 0] = 1  # used at least once
    with opened(case, num_tokens) as layer:
        clean = [y.clone() for y in oracle.run_layer(layer, case)]
        for rank, tokens in bad.items():
            for place, token in enumerate(tokens):
                case.inputs[rank].x[token, 77 * place] = poison
        outs = oracle.run_layer(layer, case)
        torch.cuda.synchronize()
        layer.check()
    for rank, (before, after) in enumerate(zip(clean, outs)):
        others = [token for token in range(num_tokens) if token not in bad[rank]]
        assert torch.equal(oracle.bits([before[others]]), oracle.bits([after[others]]))
        assert bool(before.isfinite().all()) and not bool(after[bad[rank]].isfinite().any())


def test_nan_in_a_topk_weight_changes_no_other_token():
    case = edge(30)
    with opened(case, 30) as layer:
        clean = [y.clone() for y in oracle.run_layer(layer, case)]
        case.inputs[1].topk_weights[4, 2] = float("nan")
        outs = oracle.run_layer(layer, case)
        torch.cuda.synchronize()
        layer.check()
    assert bool(outs[1][4].isnan().all())
    assert torch.equal(oracle.bits([clean[0]]), oracle.bits([outs[0]]))
    others = [token for token in range(30) if token != 4]
    assert torch.equal(oracle.bits([clean[1][others]]), oracle.bits([outs[1][others]]))
