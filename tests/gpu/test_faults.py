"""What goes wrong on the device ends in time, says what it was, spoils the whole output, and leaves after reset()."""

import time

import pytest
import torch

from megamoe import EPConfig, MegaMoEError, MoEConfig, MoELayer, Workspace
from megamoe.testing.data import make_case
from tests.gpu import oracle

CONFIG = MoEConfig(hidden=512, intermediate=512, num_experts=16, topk=4)
DEADLINE_S = 1.0
EP_SIZE, STUCK = 4, 2


@pytest.fixture(params=[8, 300], ids=["few tokens", "many tokens"])
def opened(request):
    """(layer, case): warm, so that nothing but the fault takes time. 300 tokens: tokens on M, counted by the grid."""
    case = make_case(21, CONFIG, EP_SIZE, request.param, "uniform", "cuda")
    ep_config = EPConfig(request.param, EP_SIZE, arrive_deadline_s=DEADLINE_S, step_deadline_s=DEADLINE_S)
    with Workspace(CONFIG, ep_config, device="cuda") as workspace, MoELayer(CONFIG, workspace) as layer:
        oracle.load(layer, case)
        oracle.run_layer(layer, case)
        torch.cuda.synchronize()
        layer.check()
        yield layer, case


def region(layer: MoELayer, name: str, rank: int, dtype=torch.int32) -> torch.Tensor:
    """A region of one rank as words, in its shape."""
    fused = layer.workspace.fused
    placed = next(r for r in fused.regions if r.name == name)
    base = (fused.memory.local if placed.where == "symmetric" else fused.local)[rank]
    return base[placed.offset : placed.offset + placed.bytes].view(dtype).view(placed.shape)


def epoch_of(layer: MoELayer, rank: int) -> int:
    return int(region(layer, "control", rank)[0])


def fail(layer: MoELayer, case, limit_s: float = DEADLINE_S + 2) -> tuple[MegaMoEError, list[torch.Tensor]]:
    """A call that must end in an exception from check() within the limit. -> the exception, the outputs."""
    begin = time.monotonic()
    outs = oracle.run_layer(layer, case)
    torch.cuda.synchronize()
    with pytest.raises(MegaMoEError) as caught:
        layer.check()
    assert time.monotonic() - begin < limit_s
    return caught.value, outs


def assert_spoiled_then_mended(layer: MoELayer, case, outs) -> None:
    assert all(bool(out.isnan().all()) for out in outs)
    assert isinstance(layer.workspace.poisoned, MegaMoEError)
    for _ in range(2):
        with pytest.raises(MegaMoEError, match=r"an earlier call failed .*call workspace.reset\(\)"):
            oracle.run_layer(layer, case)
    layer.workspace.reset()
    layer.check()
    assert all(epoch_of(layer, rank) == 1 for rank in range(case.ep_size))
    for _ in range(3):  # both head banks, and the flags of the launches before
        outs = oracle.run_layer(layer, case)
        torch.cuda.synchronize()
        layer.check()
        result = oracle.compare(CONFIG, outs, oracle.spec(case))
        assert result.ok, result.text


def test_a_rank_that_does_not_arrive_is_named(opened):
    """Rank 2 stands at another launch: its flags never match. Its own waits are made to succeed, so that the others
    alone meet their deadline and must name it."""
    layer, case = opened
    epoch = epoch_of(layer, STUCK)
    region(layer, "control", STUCK)[0] = epoch + 1
    bank = (epoch + 1) % 2
    for src in set(range(EP_SIZE)) - {STUCK}:  # to rank 2 it looks as if the others came with no token
        region(layer, "head_num_tokens", STUCK)[bank, src] = 0
        region(layer, "head_ready", STUCK)[bank, src, 0] = epoch + 1
    torch.cuda.synchronize()
    error, outs = fail(layer, case)
    assert error.record.rank != STUCK
    assert (error.record.role, error.record.step, error.record.index) == ("plan", "dispatch", STUCK)
    assert error.record.want == epoch and error.record.have != epoch
    assert f"no routing table from rank {STUCK}" in str(error)
    assert_spoiled_then_mended(layer, case, outs)


def test_a_late_rank_has_the_whole_arrive_deadline():
    """Waits for rows and sums must not begin to count before every rank has come."""
    case = make_case(22, CONFIG, EP_SIZE, 8, "uniform", "cuda")
    ep_config = EPConfig(8, EP_SIZE, arrive_deadline_s=4.0, step_deadline_s=0.5)
    with Workspace(CONFIG, ep_config, device="cuda") as workspace, MoELayer(CONFIG, workspace) as layer:
        oracle.load(layer, case)
        region(layer, "control", STUCK)[0] += 2
        torch.cuda.synchronize()
        begin = time.monotonic()
        error, outs = fail(layer, case, limit_s=4.0 + 2)
        assert time.monotonic() - begin > 3.5
        assert (error.record.role, error.record.step) == ("plan", "dispatch")
        assert_spoiled_then_mended(layer, case, outs)


def test_a_rank_out_of_step_ends_too(opened):
    """The same without help: rank 2 waits for the others as they wait for it, and every rank ends."""
    layer, case = opened
    region(layer, "control", STUCK)[0] += 2  # the same bank, another number
    torch.cuda.synchronize()
    error, outs = fail(layer, case)
    record = error.record
    assert (record.role, record.step) == ("plan", "dispatch")
    assert record.index == STUCK if record.rank != STUCK else record.index != STUCK
    assert_spoiled_then_mended(layer, case, outs)


def test_calls_queued_behind_a_lost_one_end_at_once(opened):
    """They were launched before the host could know: no further deadline each, no plausible output."""
    layer, case = opened
    region(layer, "control", STUCK)[0] += 2
    torch.cuda.synchronize()
    many = [oracle.empty_outs(case) for _ in range(20)]
    begin = time.monotonic()
    for outs in many:
        oracle.call(layer, case, None, outs)
    torch.cuda.synchronize()
    assert time.monotonic() - begin < DEADLINE_S + 2
    with pytest.raises(MegaMoEError, match="plan"):
        oracle.call(layer, case, None, None)  # the next call raises it as well, without check()
    for outs in many[1:]:
        assert all(bool(out.isnan().all()) for out in outs)
    assert_spoiled_then_mended(layer, case, many[0])


@pytest.mark.parametrize("wrong", [CONFIG.num_experts, -2])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_an_id_out_of_range_is_named(opened, wrong, dtype):
    layer, case = opened
    bad = make_case(21, CONFIG, EP_SIZE, [0, 7, 0, 3], "uniform", "cuda")
    inputs = [i._replace(topk_idx=i.topk_idx.to(dtype)) for i in bad.inputs]
    inputs[1].topk_idx[5, 2] = wrong
    error, outs = fail(layer, bad._replace(inputs=inputs), limit_s=0.5)  # found, not waited for
    legal = f"legal are -1 and 0 to {CONFIG.num_experts - 1}"
    assert f"topk_idx of token 5 of rank 1 names expert {wrong}; {legal}" in str(error)
    assert error.record.step == "plan"
    assert_spoiled_then_mended(layer, case, outs)


def test_an_id_far_out_of_range_ends_the_same(opened):
    """2^40 + 3 must not be taken for expert 3."""
    layer, case = opened
    bad = make_case(21, CONFIG, EP_SIZE, 6, "uniform", "cuda")
    inputs = [i._replace(topk_idx=i.topk_idx.long()) for i in bad.inputs]
    inputs[3].topk_idx[1, 0] = 2**40 + 3
    error, outs = fail(layer, bad._replace(inputs=inputs), limit_s=0.5)
    assert "topk_idx of token 1 of rank 3 names expert" in str(error)
    assert_spoiled_then_mended(layer, case, outs)


def test_an_id_beyond_num_tokens_is_not_looked_at(opened):
    layer, case = opened
    counts = [torch.tensor([4], dtype=torch.int32, device="cuda") for _ in case.inputs]
    inputs = [i._replace(num_tokens=n) for i, n in zip(case.inputs, counts)]
    before = case.inputs[0].topk_idx[5, 0].clone()
    inputs[0].topk_idx[5, 0] = 12345
    outs = oracle.run_layer(layer, case._replace(inputs=inputs))
    torch.cuda.synchronize()
    layer.check()
    assert bool(outs[0].isfinite().all()) and not oracle.bits([outs[0][4:]]).any()
    inputs[0].topk_idx[5, 0] = before


def test_what_the_host_refuses_leaves_the_workspace_usable(opened):
    layer, case = opened
    x, idx, weights = ([i[field] for i in case.inputs] for field in (0, 2, 3))
    refused = [
        (lambda: layer([t.float() for t in x], idx, weights), TypeError, "bfloat16"),
        (lambda: layer(x, [t[:, :3] for t in idx], weights), ValueError, "shape"),
        (lambda: layer(x, idx, [t.cpu() for t in weights]), ValueError, "on cpu"),
        (lambda: layer(x, [t.t().contiguous().t() for t in idx], weights), ValueError, "contiguous"),
        (lambda: layer([torch.cat([t, t]) for t in x], [torch.cat([t, t]) for t in idx],
                       [torch.cat([t, t]) for t in weights]), ValueError, "num_max_tokens_per_rank"),
        (lambda: layer(x, idx, weights, num_tokens_bound=-1), ValueError, "num_tokens_bound=-1"),
        (lambda: layer(x[:3], idx, weights), TypeError, "list of 3"),
        (lambda: layer([x[0], *x[1:]], [idx[0].long(), *idx[1:]], weights), TypeError, "same on all virtual ranks"),
    ]  # fmt: skip
    for call, kind, words in refused:
        with pytest.raises(kind, match=words):
            call()
        layer.check()
        assert layer.workspace.poisoned is None
    outs = oracle.run_layer(layer, case)
    torch.cuda.synchronize()
    layer.check()
    result = oracle.compare(CONFIG, outs, oracle.spec(case))
    assert result.ok, result.text
