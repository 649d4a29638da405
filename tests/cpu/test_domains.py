"""Several domains in one process: the layer against the specification, its pieces, buffers, and what it refuses."""

from dataclasses import replace

import pytest
import torch

from megamoe import EPConfig, MoEConfig, MoELayer, Workspace, plan_memory, support
from megamoe.domains import workspace as resources
from megamoe.domains.engine import in_order
from megamoe.domains.rows import ids_of, local_ids, pack, row_format, unpack
from megamoe.domains.traffic import domains_of_tokens, row_bytes
from megamoe.domains.workspace import domain_ep_config, pieces_of
from megamoe.exchange import LocalExchange
from megamoe.quant.fp8 import quantize_rows
from megamoe.route.node_limit import limit_nodes
from megamoe.route.router import route
from megamoe.steps import RankInput, add_domains, linear1, moe_layer
from megamoe.testing.cases import random_case
from megamoe.testing.data import make_case

TINY = MoEConfig(hidden=128, intermediate=128, num_experts=8, topk=3)


def bits(tensors):
    return [t.contiguous().view(torch.int16) for t in tensors]


def call(workspace, case, **more):
    layer = MoELayer(case.config, workspace)
    linear1, linear1_sf, linear2, linear2_sf = map(list, zip(*(w[:4] for w in case.weights), strict=True))
    if case.config.has_e4m3_activations:
        layer.load_weights(linear1, linear2, linear1_sf, linear2_sf)
    else:
        layer.load_weights(linear1, linear2)
    xs = [i.x if i.x_sf is None else (i.x, i.x_sf) for i in case.inputs]
    _, _, topk_idx, topk_weights, num_tokens = map(list, zip(*case.inputs, strict=True))
    return layer(xs, topk_idx, topk_weights, num_tokens=num_tokens, **more)


def same(y, case, num_domains):
    expected = moe_layer(case.config, LocalExchange(case.ep_size), case.weights, case.inputs, num_domains=num_domains)
    return all(map(torch.equal, bits(y), bits(expected)))


@pytest.mark.parametrize("limit", [None, 1, 7])
@pytest.mark.parametrize("seed, weight_format", [*((s, "fp8") for s in range(6)), (9, "mxfp4"), (11, "mxfp4")])
def test_random_cases_are_the_specification_bit_for_bit(seed, weight_format, limit):
    """NaN tokens, num_tokens, prequantized x, int64 ids, bf16 weights, idle ranks and clamps, as random_case draws
    them."""
    drawn = random_case(
        seed, ep_sizes=(4, 8), sizes=(128,), max_tokens=12, max_local_experts=3, weight_format=weight_format
    )
    case = drawn.case
    inputs = [
        i._replace(num_tokens=torch.tensor([len(i.x)], dtype=torch.int32)) if i.num_tokens is None else i
        for i in case.inputs
    ]
    case = case._replace(inputs=inputs)
    for size in (1, 2, 4):
        if case.ep_size % size == 0 and size < case.ep_size:
            chosen = None if limit is None else min(limit, drawn.capacity)
            ep_config = EPConfig(drawn.capacity, case.ep_size, ranks_per_domain=size, domain_tokens=chosen)
            with Workspace(case.config, ep_config, device="cpu") as workspace:
                assert same(call(workspace, case), case, case.ep_size // size), f"{drawn.text} ranks_per_domain={size}"


def test_one_domain_is_the_layer_as_it_was():
    with Workspace(TINY, EPConfig(8, 4, ranks_per_domain=4), device="cpu") as workspace:
        assert workspace.domains is None
        case = make_case(0, TINY, 4, [8, 0, 3, 5])
        assert same(call(workspace, case), case, 1)


@pytest.mark.parametrize("bound", [1, 7, 8, 9, 16])
def test_two_micro_batches_give_the_bits_of_one(bound, monkeypatch):
    monkeypatch.setattr(resources, "OVERLAP_MIN_TOKENS", 8)
    ep_config = EPConfig(16, 4, ranks_per_domain=2)
    assert pieces_of(ep_config) == resources.Pieces(8, 2)
    case = make_case(3, TINY, 4, [bound, 0, max(bound - 2, 0), 1], "holes")
    with Workspace(TINY, ep_config, device="cpu") as workspace:
        y = call(workspace, case, num_tokens_bound=bound)
        assert same(y, case, 2) and (bound < 16 or not same(y, case, 1))  # the order of sums can be told apart
        rows = 4 * (2 * -(-bound // 2) if bound >= 8 else bound)  # each rank to one other domain, whatever the routing
        assert workspace.domains.transport.bytes_sent == rows * (row_bytes(128, 3) + 2 * 128)


@pytest.mark.parametrize("limit", [None, 3])
def test_rows_of_mxfp4_layers_travel_in_e4m3_with_their_scale_factors(limit):
    case = make_case(2, replace(TINY, weight_format="mxfp4"), 4, [4, 0, 3, 4])
    pairs = case._replace(inputs=[i._replace(x=q.values, x_sf=q.sf) for i in case.inputs for q in [quantize_rows(i.x)]])
    with Workspace(case.config, EPConfig(4, 4, ranks_per_domain=2, domain_tokens=limit), device="cpu") as workspace:
        assert same(call(workspace, case, num_tokens_bound=4), case, 2)
        sent = workspace.domains.transport.bytes_sent
        assert same(call(workspace, pairs, num_tokens_bound=4), case, 2)
        assert workspace.domains.transport.bytes_sent == 2 * sent
        assert limit or sent == 4 * 4 * (row_bytes(128, 3) + 2 * 128)


def test_layers_with_the_weights_of_another_serve_every_domain():
    case, ep_config = make_case(1, TINY, 4, [4, 0, 3, 2]), EPConfig(4, 4, ranks_per_domain=2)
    with Workspace(TINY, ep_config, device="cpu") as workspace, Workspace(TINY, ep_config, device="cpu") as other:
        first = MoELayer(TINY, workspace)
        second = MoELayer(TINY, other, weights_of=first)
        first.load_weights(*([w[i] for w in case.weights] for i in (0, 2, 1, 3)))
        x, _, topk_idx, topk_weights, _ = map(list, zip(*case.inputs, strict=True))
        assert same(second(x, topk_idx, topk_weights), case, 2)


def test_no_tokens_anywhere_sends_nothing():
    for limit in (None, 2):
        with Workspace(TINY, EPConfig(4, 2, ranks_per_domain=1, domain_tokens=limit), device="cpu") as workspace:
            y = call(workspace, make_case(0, TINY, 2, 0), num_tokens_bound=0)
            assert [list(one.shape) for one in y] == [[0, 128]] * 2
            assert workspace.domains.transport.bytes_sent == 0


def test_out_is_written_in_place():
    case = make_case(1, TINY, 2, [4, 3])
    for limit in (None, 2):
        with Workspace(TINY, EPConfig(4, 2, ranks_per_domain=1, domain_tokens=limit), device="cpu") as workspace:
            out = [torch.full_like(i.x, float("nan")) for i in case.inputs]
            y = call(workspace, case, out=out)
            assert all(a is b for a, b in zip(y, out, strict=True)) and same(y, case, 2)


def test_pieces_overlap_and_free_their_buffers_in_order():
    done = []
    in_order(4, *((lambda k, step=step: done.append(f"{step}{k}")) for step in "DSB"))
    assert " ".join(done) == "D0 D1 S0 B0 D2 S1 B1 D3 S2 B2 S3 B3"
    assert all(done.index(f"B{k}") < done.index(f"D{k + 2}") for k in range(2))  # two buffers are enough
    done.clear()
    in_order(1, *((lambda k, step=step: done.append(f"{step}{k}")) for step in "DSB"))
    assert done == ["D0", "S0", "B0"]


def test_room_is_for_the_worst_case_or_for_what_was_chosen():
    assert pieces_of(EPConfig(512)) == resources.Pieces(512, 1)
    assert pieces_of(EPConfig(8192)) == resources.Pieces(4096, 2)
    assert pieces_of(EPConfig(1500)) == resources.Pieces(1023, 2)  # a call of 1023 tokens is not cut
    assert pieces_of(EPConfig(8192, domain_tokens=700)) == resources.Pieces(700, 2)
    inner = domain_ep_config(EPConfig(8192, ranks_per_domain=8), 4, 8, 132)
    assert (inner.num_max_tokens_per_rank, inner.num_sms, inner.ranks_per_domain) == (4 * 4096, 124, 8)
    assert domain_ep_config(EPConfig(512, ranks_per_domain=8), 4, 8, 132).num_sms is None  # nothing overlaps


def test_memory_plan_explains_the_exchange():
    config = MoEConfig(4096, 2048, 64, 6)
    one = plan_memory(config, EPConfig(512), 16)
    two = plan_memory(config, EPConfig(512, ranks_per_domain=8), 16)
    own = {row.name: row.bytes for row in two.rows if row.name.startswith("domain_")}
    assert own["domain_send"] == own["domain_recv"] == 2 * 512 * row_bytes(4096, 6)
    assert own["domain_y"] == own["domain_back"] == 2 * 512 * 4096 * 2
    mxfp4 = plan_memory(replace(config, weight_format="mxfp4"), EPConfig(512, ranks_per_domain=8), 16)
    assert own == {row.name: row.bytes for row in mxfp4.rows if row.name.startswith("domain_")}
    of_kernel = {row.name: row.bytes for row in two.rows}
    assert of_kernel["recv_x"] == next(row.bytes for row in one.rows if row.name == "recv_x")  # 8 ranks x 2 x 512
    assert two.local_bytes - sum(row.bytes for row in two.rows if row.where == "local") >= 0
    assert "domain_send" in two.explain() and "domain_send" not in one.explain()
    fewer = plan_memory(config, EPConfig(512, ranks_per_domain=8, domain_tokens=64), 16)
    assert fewer.local_bytes < two.local_bytes and fewer.symmetric_bytes < two.symmetric_bytes


@pytest.mark.parametrize("weight_format", ["fp8", "mxfp4"])
def test_a_token_takes_its_place_in_every_buffer(weight_format):
    """Buffers are sized from the configuration, before a token is seen: what any call packs must fit."""
    config, ep_config = replace(TINY, weight_format=weight_format), EPConfig(5, ranks_per_domain=1)
    room = {buffer.name: buffer.bytes for buffer in resources.buffers_of([config], ep_config, 2)}
    x = torch.randn(5, 128).bfloat16()
    routing = torch.zeros(5, 3, dtype=torch.int64), torch.ones(5, 3, dtype=torch.bfloat16)
    for given in (x, None), quantize_rows(x):
        rows, form = pack(config, RankInput(*given, *routing))
        assert 2 * rows.nbytes == room["domain_send"] == room["domain_recv"]
        taken = {}

        def take(name, shape, dtype, taken=taken):
            taken[name] = torch.empty(shape, dtype=dtype)
            return taken[name]

        unpack(config, rows.repeat(2, 1), form, 2, 1, take)
        assert {f"domain_{name}": part.nbytes for name, part in taken.items()}.items() <= room.items()
        assert set(taken) == {"x", "x_sf", "topk_idx", "topk_weights"}


def test_buffers_hold_the_widest_row_of_any_layer():
    layers = [MoEConfig(2048, 256, 64, 2), MoEConfig(1024, 256, 64, 6)]
    for order in (layers, layers[::-1]):
        rows = {buffer.name: buffer.bytes // (2 * 8) for buffer in resources.buffers_of(order, EPConfig(8), 2)}
        assert rows == {
            "domain_send": row_bytes(2048, 2), "domain_recv": row_bytes(2048, 2),
            "domain_x": 2048, "domain_x_sf": 4 * 16, "domain_topk_idx": 4 * 6, "domain_topk_weights": 4 * 6,
            "domain_y": 2 * 2048, "domain_back": 2 * 2048,
        }  # fmt: skip


def test_sizes_that_cannot_be_are_named():
    with pytest.raises(ValueError, match="ranks_per_domain=0 must be at least 1"):
        EPConfig(8, ranks_per_domain=0)
    with pytest.raises(ValueError, match="domain_tokens=9 must be between 1 and 8"):
        EPConfig(8, domain_tokens=9)
    with pytest.raises(ValueError, match="ranks_per_domain=3 leaves 2 of ep_size=8 ranks.*nearest 2, 4"):
        Workspace(TINY, EPConfig(8, 8, ranks_per_domain=3), device="cpu")
    report = support(TINY, EPConfig(8, ranks_per_domain=3), ep_size=8)
    assert not report.ok and "in no whole domain" in report.reasons[0]
    many = MoEConfig(128, 128, 512, 8)
    assert support(many, EPConfig(8, ranks_per_domain=8), "cpu", ep_size=512).ok


def test_rows_travel_as_they_are():
    config = replace(TINY, num_experts=12)
    x = torch.randn(5, 128).bfloat16()
    topk_idx = torch.tensor([[0, 5, 11], [3, -1, 4], [-1, -1, -1], [8, 8, 7], [1, 2, 3]])
    weights = torch.rand(5, 3)
    rank_input = RankInput(x, None, topk_idx, weights, torch.tensor([4], dtype=torch.int32))
    rows, form = pack(config, rank_input)
    assert rows.shape == (5, row_format(config).words) and rows.shape[1] * 4 == row_bytes(128, 3)
    assert ids_of(rows, form).tolist() == [*topk_idx[:4].tolist(), [-1, -1, -1]]  # from num_tokens on: nothing
    empty = torch.empty
    arrived = unpack(config, rows, form, 3, 1, lambda name, shape, dtype: empty(shape, dtype=dtype))
    q = quantize_rows(x)
    assert torch.equal(arrived.x.view(torch.uint8), q.values.view(torch.uint8)) and torch.equal(arrived.x_sf, q.sf)
    assert torch.equal(arrived.topk_weights, weights)
    assert arrived.topk_idx.tolist() == [[-1, 1, -1], [-1, -1, 0], [-1, -1, -1], [-1, -1, 3], [-1, -1, -1]]


def test_an_id_of_no_domain_stays_illegal_in_every_domain():
    for domain in range(2):
        assert local_ids(torch.tensor([[-2, 8, 100, -1]]), 8, 2, domain).tolist() == [[4, 4, 4, -1]]


@pytest.mark.parametrize("max_nodes", [1, 2, 3])
def test_node_limited_routing_bounds_the_copies(max_nodes):
    logits = torch.randn(200, 32)
    home_node = torch.arange(32) // 8
    by_node = limit_nodes(logits, 6, home_node, max_nodes).topk_idx
    by_group = route(logits, 6, num_groups=4, topk_groups=max_nodes).topk_idx
    for topk_idx in (by_node, by_group):
        copies = domains_of_tokens(topk_idx, 32, 4).sum(1)
        assert int(copies.max()) == max_nodes
    assert int(domains_of_tokens(route(logits, 6).topk_idx, 32, 4).sum(1).max()) == 4


def test_domains_are_added_in_order_and_rounded_once():
    partial = torch.tensor([[[256.0]], [[1.0]], [[1.0]]]).bfloat16()
    assert add_domains(partial).item() == 258.0  # in bf16 at every step it would stay 256
    assert add_domains(partial[:1]).data_ptr() == partial.data_ptr()


def test_a_rows_bits_depend_on_the_row_alone():
    """What lets a batch be cut anywhere: the same row among 1 to 100 others."""
    case = make_case(2, TINY, 1, 100, "one_expert")
    (weights,), (rank_input,) = case.weights, case.inputs
    x, x_sf = quantize_rows(rank_input.x)

    class Rows:
        pass

    rows = Rows()
    rows.x, rows.x_sf, rows.num_rows = x, x_sf, [100] + [0] * 7
    whole = linear1(TINY, weights, rows)
    for count in (1, 2, 5, 31, 32, 33, 64):
        rows.x, rows.x_sf, rows.num_rows = x[100 - count :], x_sf[100 - count :], [count] + [0] * 7
        assert torch.equal(linear1(TINY, weights, rows), whole[100 - count :])
