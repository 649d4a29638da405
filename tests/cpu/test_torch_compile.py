"""The layer under torch.compile: one graph, the same numbers; and what keeps calls of ranks and streams apart."""

import json

import pytest
import torch
from torch import nn

from megamoe import EPConfig, MoEConfig, MoELayer, Workspace, route, torch_op
from megamoe.__main__ import main
from megamoe.call_order import call_order, next_workspace_index
from megamoe.hf_config import moe_config_of
from megamoe.micro_batch import MicroBatches, sm_budgets
from megamoe.streams import StreamOwner
from megamoe.testing.data import make_weights
from megamoe.testing.spawn import spawn_ranks

CONFIG = MoEConfig(256, 128, 8, 2)
BACKENDS = ["eager", "aot_eager"]


class Block(nn.Module):
    """Norm, router, experts and residual, as a model has them."""

    def __init__(self, layer: MoELayer):
        super().__init__()
        self.norm, self.router, self.layer = nn.RMSNorm(256), nn.Linear(256, 8, bias=False), layer

    def forward(self, x, num_tokens=None, out=None):
        h = self.norm(x)
        routed = route(self.router(h), topk=2)
        return x + self.layer(h, routed.topk_idx, routed.topk_weights, num_tokens=num_tokens, out=out)


def load(layer: MoELayer, config: MoEConfig = CONFIG, seed: int = 0) -> MoELayer:
    weights = make_weights(seed, config, 1, 0)
    layer.load_weights(*weights[::2][:2], *weights[1:4:2])
    return layer


@pytest.fixture
def block():
    torch._dynamo.reset()
    torch.manual_seed(0)
    with Workspace(CONFIG, EPConfig(64), device="cpu") as workspace:
        yield Block(load(MoELayer(CONFIG, workspace))).eval().bfloat16().requires_grad_(False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_compiles_to_one_graph_with_the_same_bits(block, backend):
    graphs = []

    def counting(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    compiled = torch.compile(block, fullgraph=True, backend=counting if backend == "eager" else backend)
    for num_tokens in (5, 9, 0, 40):
        x = torch.randn(num_tokens, 256).bfloat16()
        assert torch.equal(compiled(x), block(x)), num_tokens
    if backend == "eager":
        assert all(torch.ops.megamoe.moe_layer in graph for graph in graphs) and len(graphs) <= 3
    x, out, count = torch.randn(6, 256).bfloat16(), torch.empty(6, 256).bfloat16(), torch.tensor([4], dtype=torch.int32)
    assert torch.equal(compiled(x, count, out), block(x, count)) and not out[4:].any() and out[:4].any()


@torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True)
def test_blocks_compiled_one_by_one_share_two_graphs_where_handles_are_arguments():
    torch._dynamo.reset()
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    with Workspace(CONFIG, EPConfig(64), device="cpu") as workspace, torch.no_grad():
        blocks = [Block(load(MoELayer(CONFIG, workspace), seed=seed)).eval().bfloat16() for seed in range(10)]
        x = torch.randn(5, 256).bfloat16()
        expected = [block(x) for block in blocks]
        for block in blocks:
            block.compile(fullgraph=True, backend=counting)
        for block, y in zip(blocks, expected, strict=True):
            assert torch.equal(block(x), y)
    assert len(graphs) == 2


def test_the_operators_keep_their_promises_to_torch(block):
    layer, x = block.layer, torch.randn(5, 256).bfloat16()
    routed = route(torch.randn(5, 8), topk=2)
    arguments = x, None, routed.topk_idx, routed.topk_weights, None, layer.handle, -1
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.megamoe.moe_layer.default, arguments, test_utils=checks)
    out = torch.empty_like(x)
    torch.library.opcheck(torch.ops.megamoe.moe_layer_out.default, (*arguments, out), test_utils=checks[:2])
    with pytest.raises(RuntimeError, match="names no living MoELayer"):
        torch.ops.megamoe.moe_layer(*arguments[:5], 10**9, -1)


def test_errors_of_a_call_come_through_the_compiled_graph(block):
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    with pytest.raises(ValueError, match=r"hidden_states has 65 tokens, above num_max_tokens_per_rank=64"):
        compiled(torch.randn(65, 256).bfloat16())
    assert torch.is_grad_enabled()
    assert not compiled(torch.randn(5, 256).bfloat16().requires_grad_(False)).requires_grad


def test_a_served_model_compiles_to_one_graph():
    pytest.importorskip("transformers", reason="not run: transformers is not installed")
    from megamoe.integrations.tiny import tiny_model
    from megamoe.integrations.transformers import disable, enable

    ids = torch.arange(12)[None]
    for family in ("qwen3_moe", "gpt_oss"):
        torch._dynamo.reset()
        model = tiny_model(family, num_hidden_layers=2)
        enable(model, weight_format="bf16")
        forward = lambda ids: model(input_ids=ids, use_cache=False).logits  # noqa: B023, E731
        compiled = torch.compile(forward, fullgraph=True, backend="eager")
        with torch.no_grad():
            assert torch.equal(compiled(ids), forward(ids))
            disable(model)
            again = compiled(ids)  # traced again: the implementation is a guard of the graph
        assert (again - forward(ids)).abs().max() < 1e-5


class FakeStream:
    def __init__(self, number: int, idle: bool):
        self.cuda_stream, self.idle, self.waited_for = number, idle, []

    def query(self) -> bool:
        return self.idle

    def wait_stream(self, other) -> None:
        self.waited_for.append(other.cuda_stream)


def test_a_workspace_refuses_a_second_stream_while_the_first_runs():
    owner, eager = StreamOwner(), lambda: False
    busy, second = FakeStream(0x10, idle=False), FakeStream(0x20, idle=False)
    owner.check(busy, eager)
    owner.check(busy, eager)
    with pytest.raises(RuntimeError, match=r"stream 0x20 calls a layer while a call on stream 0x10 .*may still run"):
        owner.check(second, eager)
    owner.check(second, lambda: True)  # captured, not run
    with pytest.raises(RuntimeError, match="0x10"):
        owner.check(second, eager)
    owner.hand_over(second)
    assert second.waited_for == [0x10]
    owner.check(second, eager)
    second.idle = True
    owner.check(busy, eager)  # nothing can be running any more


def test_micro_batches_share_weights_and_give_what_one_call_gives():
    weights = make_weights(3, CONFIG, 1, 0)
    x, routed = torch.randn(20, 256).bfloat16(), route(torch.randn(20, 8), topk=2)
    with MicroBatches(CONFIG, EPConfig(16, num_sms=132), device="cpu") as batches:
        assert [w.ep_config.num_sms for w in batches.workspaces] == [66, 66]
        layers = batches.layers(CONFIG)
        with pytest.raises(RuntimeError, match="no weights"):
            layers[1](x[:1], routed.topk_idx[:1], routed.topk_weights[:1])
        for seed in (3, 4):  # also after the weights have changed
            load(layers[0], seed=seed)
            halves = [slice(0, 12), slice(12, 20)]
            steps = [
                lambda layer=layer, half=half: layer(x[half], routed.topk_idx[half], routed.topk_weights[half])
                for layer, half in zip(layers, halves, strict=True)
            ]
            y = torch.cat(batches.run(steps))
            with Workspace(CONFIG, EPConfig(32), device="cpu") as workspace:
                assert torch.equal(y, load(MoELayer(CONFIG, workspace), seed=seed)(x, *routed))
        with pytest.raises(RuntimeError, match="weights of another"):
            load(layers[1])
        with pytest.raises(ValueError, match="3 entries; there are 2 micro-batches"):
            batches.run([*steps, steps[0]])
    assert all(w.closed for w in batches.workspaces)
    assert sm_budgets(132, 3) == [44] * 3 and sm_budgets(114, 2) == [56] * 2
    with pytest.raises(ValueError, match="count=0 must be at least 1"):
        MicroBatches(CONFIG, EPConfig(8), count=0, device="cpu")
    with pytest.raises(ValueError, match="count=70 micro-batches do not fit on 132 SMs"):
        sm_budgets(132, 70)
    assert weights.linear1.shape[0] == 8


def test_warmup_is_idempotent_and_calls_each_loaded_layer_once(monkeypatch):
    with Workspace(CONFIG, EPConfig(8), device="cpu") as workspace:
        loaded, _empty = load(MoELayer(CONFIG, workspace)), MoELayer(CONFIG, workspace)
        calls = []

        def forward(inputs, *_):
            calls.append(len(inputs[0].x))
            return [inputs[0].x]

        monkeypatch.setattr(loaded._engine, "forward", forward)
        workspace.warmup()
        workspace.warmup()
        assert calls == [0, 0]


def test_a_handle_keeps_no_layer_alive():
    with Workspace(CONFIG, EPConfig(8), device="cpu") as workspace:
        handle = load(MoELayer(CONFIG, workspace)).handle
        assert handle not in torch_op._layers


CONFIGS = {
    "deepseek": ({"hidden_size": 7168, "moe_intermediate_size": 2048, "n_routed_experts": 256,
                  "num_experts_per_tok": 8}, MoEConfig(7168, 2048, 256, 8)),
    "mixtral": ({"hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2},
                MoEConfig(4096, 14336, 8, 2)),
    "gpt_oss": ({"model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 128,
                 "num_experts_per_tok": 4},
                MoEConfig(2944, 2944, 128, 4, swiglu_limit=7.0, activation="swiglu_oai", bias=True)),
}  # fmt: skip


@pytest.mark.parametrize("model", CONFIGS)
def test_sizes_come_from_a_models_config_json(tmp_path, model):
    fields, expected = CONFIGS[model]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert moe_config_of(tmp_path) == moe_config_of(tmp_path / "config.json") == expected


def test_what_is_no_moe_models_config_is_refused_by_name(tmp_path, capsys):
    path = tmp_path / "config.json"
    for text, ep_size, said in (
        (None, "1", "config.json does not exist; give a model's config.json"), ("{", "1", "config.json is damaged"),
        ("[]", "1", "describes no mixture-of-experts model"), ('{"hidden_size": 64}', "1", "has none of moe_inter"),
        ('{"hidden_size": 256, "moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2}', "0",
         "ep_size=0 must be at least 1"),
    ):  # fmt: skip
        if text is not None:
            path.write_text(text)
        assert main(["compile", "--config", str(path), "--ep-size", ep_size]) == 2, text
        assert said in capsys.readouterr().err


def test_compile_builds_only_what_a_model_can_choose(tmp_path, capsys, monkeypatch):
    from megamoe import verbs

    built = []
    report = verbs.BuildReport("", 0, 0, (), 0, True, "")
    monkeypatch.setattr(verbs, "build_report", lambda build: built.append(build.name) or report)
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["deepseek"][0]))
    assert main(["compile", "--config", str(tmp_path), "--ep-size", "8", "--tokens", "8"]) == 0
    assert sorted(built) == ["mega_moe, 8 tokens"], "8 ranks x 8 tokens x 8 / 256 experts: 2 rows an expert"
    assert main(["compile", "--config", str(tmp_path), "--ep-size", "8", "--tokens", "8", "--plans"]) == 0
    assert built[1:] == ["mega_moe, 8 tokens, with plans"]
    (tmp_path / "config.json").write_text('{"hidden_size": 4096, "intermediate_size": 11008}')
    assert main(["compile", "--config", str(tmp_path)]) == 2
    assert "describes no mixture-of-experts model" in capsys.readouterr().err


def test_calls_are_compared_where_asked_for_and_workspaces_told_apart(monkeypatch):
    monkeypatch.setattr("torch.distributed.get_world_size", lambda size: size)
    for level, compared in ((None, False), ("1", False), ("2", True), ("3", True)):
        monkeypatch.delenv("MEGAMOE_DEBUG", raising=False)
        if level:
            monkeypatch.setenv("MEGAMOE_DEBUG", level)
        assert [call_order(group) is not None for group in (2, 1, None)] == [compared, False, False]
    assert next_workspace_index() + 1 == next_workspace_index()


def test_ranks_that_call_layers_in_another_order_are_told_before_the_call():
    results = spawn_ranks([__file__], 2, env={"MEGAMOE_DEBUG": "2"})
    for result in results:
        assert result.returncode == 0, result.output
        assert (
            "call 2 differs between ranks: rank 0 calls layer 1 of workspace 0; rank 1 calls layer 0" in result.output
        )


def rank_main() -> None:
    """Two layers, called in the same order, then not."""
    from megamoe.ranks import init_process_group

    torch.set_num_threads(1)
    rank = init_process_group()
    with Workspace(CONFIG, EPConfig(8), device="cpu") as workspace:
        layers = [MoELayer(CONFIG, workspace) for _ in range(2)]
        weights = make_weights(0, CONFIG, 2, rank.ep_rank)
        for layer in layers:
            layer.load_weights(weights.linear1, weights.linear2, weights.linear1_sf, weights.linear2_sf)
        x, routed = torch.randn(3, 256).bfloat16(), route(torch.randn(3, 8), topk=2)
        for layer in layers:
            layer(x, *routed)
        try:
            layers[1 - rank.ep_rank](x, *routed)
        except RuntimeError as error:
            print(error)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    rank_main()
