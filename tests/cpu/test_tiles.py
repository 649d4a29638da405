"""megamoe/plan/tiles.py: what a workspace prepares is what its calls can choose."""

from dataclasses import replace

import pytest

from megamoe import MoEConfig
from megamoe.plan import tiles
from megamoe.testing.faults import device

SHAPES = [(4096, 2048, 64, 6), (4096, 2048, 256, 6), (2048, 768, 8, 2), (128, 128, 2, 16)]


@pytest.mark.parametrize("weight_format", tiles.TILES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_tile_that_a_call_can_choose_is_prepared(shape, weight_format):
    config = MoEConfig(*shape, weight_format=weight_format)
    chosen = [tiles.choose_block_tokens(config, 2, bound) for bound in range(1, 3001)]
    for capacity in (1, 2, 7, 64, 100, 511, 1024, 3000):
        prepared = tiles.reachable_tiles(config, 2, capacity)
        assert set(chosen[:capacity]) <= set(prepared) <= set(tiles.TILES[weight_format])
        assert [t for t in tiles.TILES[weight_format] if t in prepared] == list(prepared)
    assert tiles.reachable_tiles(config, 2, 1) == (chosen[0],)


def test_the_tile_holds_the_rows_where_one_can():
    config = MoEConfig(4096, 2048, 64, 6, weight_format="mxfp4")
    assert [tiles.choose_block_tokens(config, 2, tokens) for tokens in (1, 8, 64, 256, 400, 512, 8192)] == [
        8, 8, 32, 64, 96, 192, 128,
    ]  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 8, 100, 512, 8192])
def test_combine_items_cover_a_row_in_whole_steps(tokens):
    for hidden in (128, 896, 4096, 7168):
        columns = tiles.combine_columns(hidden, tokens, 1584)
        assert columns % tiles.COMBINE_STEP == 0 and 0 < columns < hidden + tiles.COMBINE_STEP


def test_the_table_of_faults_has_every_way_to_load_weights_and_rows():
    chosen = {}
    for weight_format, num_tokens in device.LABELS.values():
        config = replace(device.CONFIG, weight_format=weight_format)
        chosen.setdefault(weight_format, set()).add(tiles.choose_block_tokens(config, device.RANKS, num_tokens))
    assert tiles.TOKENS_ON_M in chosen["fp8"] and min(chosen["fp8"]) <= 64
    assert chosen["mxfp4"] == {tiles.SPLITS_WEIGHTS, tiles.TOKENS_ON_M}
