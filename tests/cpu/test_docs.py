"""What README.md, ARCHITECTURE.md and --help show is run here, so that it stays true."""

import itertools
import re
import subprocess
from pathlib import Path

import pytest
import torch

import megamoe.__main__ as cli
from megamoe import layout
from megamoe.config import EPConfig, MoEConfig
from megamoe.exchange import LocalExchange
from megamoe.plan.tiles import choose_block_tokens, combine_columns
from megamoe.steps import ExpertWeights, RankInput, moe_layer

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def help_example() -> str:
    block = re.search(r"\n\n((?: {4}.*\n|\n)+)", cli.usage())
    return re.sub(r"^ {4}", "", block[1], flags=re.MULTILINE)


@pytest.mark.parametrize("code", [*re.findall(r"```python\n(.*?)```", README, re.DOTALL), help_example()])
def test_examples_run(code):
    names = {}
    exec(compile(code, "example", "exec"), names)
    assert names["y"].shape == (5, 256) and names["y"].isfinite().all() and names["y"].any()


def test_verbs_and_files_that_the_readme_names_exist():
    listed = subprocess.run([ROOT / "launch" / "do"], capture_output=True, text=True, check=True).stdout
    for verb in re.findall(r"\./launch/do (\w[\w-]*)", README):
        assert re.search(rf"^  {verb} ", listed, re.MULTILINE), verb
    for module_verb in re.findall(r"python -m megamoe (\w+)", README):
        assert module_verb in cli.VERBS
    for text in (README, (ROOT / "ARCHITECTURE.md").read_text()):
        for path in re.findall(r"`((?:megamoe|csrc|launch|benchmarks|bindings|tests)/[\w./-]*)`", text):
            assert (ROOT / path).exists() or path in ("launch/hosts",), path


def test_results_have_their_markers():
    assert re.search(r"<!-- results:begin -->\n.*<!-- results:end -->", README, re.DOTALL)


def test_architecture_follows_a_real_token():
    config = MoEConfig(hidden=256, intermediate=128, num_experts=16, topk=2)
    table = re.findall(r"^\| rank \d \|(.*)\|$", (ROOT / "ARCHITECTURE.md").read_text(), re.MULTILINE)
    cells = [[cell.strip(" *").split(",") for cell in row.split("|")] for row in table]
    topk_idx = [torch.tensor([[int(i) for i in cell] for cell in row]) for row in cells]
    assert [tuple(idx.shape) for idx in topk_idx] == [(4, 2), (4, 2)]
    e4m3 = torch.float8_e4m3fn
    weights = [ExpertWeights(torch.randn(8, 256, 256).to(e4m3), torch.full((8, 2, 2), 0.05),
                             torch.randn(8, 256, 128).to(e4m3), torch.full((8, 2, 1), 0.05)) for _ in range(2)]
    inputs = [RankInput(torch.randn(4, 256).bfloat16(), None, idx, torch.rand(4, 2)) for idx in topk_idx]
    trace = {}
    outputs = moe_layer(config, LocalExchange(2), weights, inputs, trace=trace)

    rows = [trace[rank]["rows"] for rank in range(2)]
    assert [len(r.token) for r in rows] == [9, 6]
    here = [[(r.src_rank[i], r.token[i]) == (1, 2) for i in range(len(r.token))].index(True) for r in rows]
    assert here == [8, 3]
    assert (rows[0].local_expert[4:9] == 3).all() and rows[0].num_rows[3] == 5
    assert rows[1].local_expert[3] == 1 and int((rows[1].local_expert[:4] == 1).sum()) == 3
    assert [int(r.slot[i]) for r, i in zip(rows, here)] == [0, 1]
    row_bytes = rows[0].x[8].nbytes + rows[0].x_sf[8].nbytes
    assert row_bytes == 264 and trace[0]["linear2"][8].nbytes == 512
    assert trace[0]["h"].shape[1] == 128 and trace[0]["h_sf"].shape[1] == 1
    slots = [trace[rank]["linear2"][i].float() for rank, i in zip((0, 1), here)]
    assert torch.equal(outputs[1][2], (slots[0] + slots[1]).bfloat16())


def test_architecture_follows_a_real_token_through_the_kernel():
    """Each number of "One token in numbers", from the sizes and the routing rule given there."""
    text = " ".join((ROOT / "ARCHITECTURE.md").read_text().split("### One token in numbers")[1].split("###")[0].split())
    config, ranks, tokens, ctas = MoEConfig(4096, 2048, 64, 6), 2, 64, 132
    place = {r.name: r.shape for r in layout.place(layout.dims_of([config], EPConfig(tokens), ranks, ctas))[0]}
    block, local = choose_block_tokens(config, ranks, tokens), config.num_local_experts(ranks)
    lists = [[], []]
    for src, token, slot in itertools.product(range(ranks), range(tokens), range(config.topk)):
        expert = (5 * token + 37 * slot + 42 * src) % 64
        lists[expert // local].append((expert, src, token, slot))
    lists = [sorted(rows) for rows in lists]
    assert all(sum(row[0] == e for row in lists[e // local]) == 12 for e in range(64))
    experts = [(25 + 37 * slot + 42) % 64 for slot in range(config.topk)]
    rows = lists[0].index((3, 1, 5, 0)), lists[1].index((40, 1, 5, 1))
    first = [next(i for i, row in enumerate(lists[r]) if row[0] == e) for r, e in ((0, 3), (1, 40))]
    n1, n2 = config.intermediate // 128, config.hidden // 256
    k1, k2 = config.hidden // 128, config.intermediate // 128
    block_of_3, head = 3, local * n1  # every expert has one token block; linear1 of all comes first
    head_slice = layout.HEAD_SLICE_TOKENS
    warps = ctas * (layout.EXCHANGE_WARPS + layout.MATH_WARPS)
    columns = combine_columns(config.hidden, tokens, warps)
    assert place["recv_x"] == (2, 64, 4096) and place["combine_y"] == (64, 6, 4096)
    for said in (
        f"the engine takes tiles of {block}", f"experts {', '.join(map(str, experts))}",
        f"the {head_slice * config.topk} ids and weights of {head_slice} tokens", "ranks {0, 1}",
        f"{config.hidden} e4m3 bytes and {k1} scale",
        f"byte {tokens * config.hidden + 5 * config.hidden} of", f"slot 0 is row {rows[0]}",
        f"holds rows {first[0]} to {first[0] + 11}", f"local {40 - local}) is row {rows[1]}",
        f"of rows {first[1]} to {first[1] + 11}",
        f"{n1} tiles, tickets {block_of_3 * n1} to {block_of_3 * n1 + n1 - 1}",
        f"= {k1} stages", f"32 x (128 + 4) = {block * (layout.K_BLOCK + 4)} bytes",
        f"Tickets {head + block_of_3 * n2} to {head + block_of_3 * n2 + n2 - 1}: 4096 / 256 = {n2} tiles",
        f"= {k2} stages. Each sends 512", f"{config.hidden * 2} = {5 * 6 * config.hidden * 2};",
        f"With {warps} warps to share it, a token is {config.hidden // columns} items of {columns} columns",
    ):  # fmt: skip
        assert said in text, said
    assert rows[0] - first[0] == 8 == rows[1] - first[1]  # "its ninth"
