"""The layer as engines use it on a GPU: compiled, in a graph with neighbours, on streams, under transformers."""

import pytest
import torch
from torch import nn

from megamoe import EPConfig, MoEConfig, MoELayer, Workspace, route
from megamoe.micro_batch import MicroBatches
from megamoe.testing.data import make_case, make_weights

CONFIG = MoEConfig(hidden=512, intermediate=256, num_experts=8, topk=2)
EP_CONFIG = EPConfig(64, arrive_deadline_s=5.0, step_deadline_s=5.0)


class Block(nn.Module):
    def __init__(self, layer: MoELayer):
        super().__init__()
        self.router, self.layer = nn.Linear(512, 8, bias=False, dtype=torch.bfloat16, device="cuda"), layer

    def forward(self, x, num_tokens=None):
        routed = route(self.router(x), topk=2)
        return x + self.layer(x, routed.topk_idx, routed.topk_weights, num_tokens=num_tokens)


def load(layer: MoELayer, seed: int = 0) -> MoELayer:
    w = make_weights(seed, CONFIG, 1, 0, "cuda")
    layer.load_weights(w.linear1, w.linear2, w.linear1_sf, w.linear2_sf)
    return layer


@pytest.fixture
def layer():
    torch.manual_seed(0)
    with Workspace(CONFIG, EP_CONFIG, device="cuda") as workspace:
        yield load(MoELayer(CONFIG, workspace))
        torch.cuda.synchronize()


@torch.no_grad()
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_block_compiles_to_one_graph(layer, backend):
    torch._dynamo.reset()
    block = Block(layer)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for num_tokens in (1, 33, 0, 64):
        x = torch.randn(num_tokens, 512, device="cuda", dtype=torch.bfloat16)
        expected = block(x)
        assert (compiled(x) - expected).norm() <= 2e-2 * expected.norm(), num_tokens
    layer.check()


@torch.no_grad()
def test_a_graph_with_neighbours_replays_other_token_counts(layer):
    block, x = Block(layer), torch.randn(64, 512, device="cuda", dtype=torch.bfloat16)
    count = torch.tensor([64], dtype=torch.int32, device="cuda")
    block(x, count)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = block(x, count)
    for num_tokens in (64, 5, 0, 17):
        x.normal_()
        count.fill_(num_tokens)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, block(x, count)), num_tokens
    layer.check()


def test_a_second_stream_is_refused_while_the_first_runs(layer):
    case = make_case(1, CONFIG, 1, 16, "uniform", "cuda").inputs[0]
    arguments = case.x, case.topk_idx, case.topk_weights
    first = layer(*arguments)
    torch.cuda._sleep(2_000_000_000)  # about a second on the first stream
    second = torch.cuda.Stream()
    with torch.cuda.stream(second):
        with pytest.raises(RuntimeError, match="may still run; use one stream a workspace"):
            layer(*arguments)
        layer.workspace.use_stream()
        again = layer(*arguments)
    assert not second.query()  # it waits for the first
    torch.cuda.synchronize()
    assert torch.equal(first, again)
    layer(*arguments)  # nothing runs any more: any stream will do
    layer.check()


@torch.no_grad()
def test_micro_batches_on_two_streams_give_what_one_call_gives(layer):
    case = make_case(2, CONFIG, 1, 64, "uniform", "cuda").inputs[0]
    expected = layer(case.x, case.topk_idx, case.topk_weights)
    with MicroBatches(CONFIG, EP_CONFIG, device="cuda") as batches:
        layers = batches.layers(CONFIG)
        load(layers[0])
        halves = [slice(0, 40), slice(40, 64)]
        arguments = [tuple(t[half].contiguous() for t in (case.x, case.topk_idx, case.topk_weights)) for half in halves]
        for _ in range(50):
            steps = [lambda mine=mine, a=a: mine(*a) for mine, a in zip(layers, arguments, strict=True)]
            y = torch.cat(batches.run(steps))
        torch.cuda.synchronize()
        for mine in layers:
            mine.check()
        assert torch.equal(y, expected)


def test_warmup_launches_and_is_idempotent(layer):
    layer.workspace.warmup()
    layer.workspace.warmup()
    layer.check()


def test_moved_rows_are_moved_experts(layer):
    case = make_case(3, CONFIG, 1, 32, "uniform", "cuda").inputs[0]
    expected = layer(case.x, case.topk_idx, case.topk_weights)
    order = torch.tensor([3, 1, 0, 7, 2, 6, 5, 4], device="cuda")
    torch.cuda.synchronize()
    for rows in layer.expert_rows():
        rows.copy_(rows[order])
    moved = layer(case.x, order.argsort()[case.topk_idx.long()], case.topk_weights)
    assert torch.equal(moved, expected)


@pytest.mark.parametrize(
    "family, weight_format, fold",
    [("qwen3_moe", "fp8", False), ("mixtral", "fp8", False), ("deepseek_v3", "fp8", False), ("gpt_oss", "fp8", False),
     ("gpt_oss", "mxfp4", False), ("deepseek_v3", "fp8", True), ("deepseek_v3", "mxfp4", True)],
)  # fmt: skip
def test_a_served_model_is_within_the_formats_floor(family, weight_format, fold):
    pytest.importorskip("transformers", reason="not run: transformers is not installed")
    from megamoe.integrations.dequantized import round_experts
    from megamoe.integrations.logits import eager_logits, logits_error, served_logits
    from megamoe.integrations.tiny import tiny_model

    model = tiny_model(family).to("cuda", torch.bfloat16)
    round_experts(model, weight_format)
    ids = [torch.randint(256, (1, 60), device="cuda") for _ in range(4)]
    eager = eager_logits(model, ids)
    how = {"weight_format": weight_format, "fold_shared_experts": fold}
    floor = logits_error(served_logits(model, ids, spec=True, **how), eager)
    served = logits_error(served_logits(model, ids, ep_config=EPConfig(64), **how), eager)
    assert served.kl <= 2 * floor.kl + 1e-5, f"served {served}, floor {floor}"
