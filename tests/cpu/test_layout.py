"""The memory table: nothing overlaps, everything is aligned, and the sizes are those the kernel addresses."""

import ctypes
import math
import re
from dataclasses import replace

import pytest

from megamoe import EPConfig, MoEConfig, layout, plan_memory
from megamoe.layout_header import render_header
from megamoe.plan import tiles
from megamoe.testing.cases import CONFIGS

FLASH64 = CONFIGS["flash64"]
TINY = MoEConfig(hidden=128, intermediate=128, num_experts=1, topk=1)
WIDE = MoEConfig(hidden=896, intermediate=384, num_experts=512, topk=16)
SHAPES = [
    ([TINY], EPConfig(1), 1),
    ([FLASH64], EPConfig(8192), 2),
    ([WIDE], EPConfig(129), 2),
    ([TINY, MoEConfig(128, 128, 8, 2), WIDE], EPConfig(65, virtual_ranks=1), 1),
    ([CONFIGS["flash256"], CONFIGS["v3_64"]], EPConfig(512), 8),
]


@pytest.mark.parametrize("configs, ep_config, ep_size", SHAPES)
def test_regions_do_not_overlap_and_are_aligned(configs, ep_config, ep_size):
    placed, symmetric_bytes, local_bytes = layout.place(layout.dims_of(configs, ep_config, ep_size))
    for where, total in (("symmetric", symmetric_bytes), ("local", local_bytes)):
        end = 0
        for region in sorted((r for r in placed if r.where == where), key=lambda r: r.offset):
            assert region.offset >= end and region.offset % layout.REGION_ALIGN == 0, region
            # Empty without num_staged_experts; for the 128-token tile only; for MXFP4 with that tile
            empty = ("staging", "x_image", "x_image_ready", "decode_done", "decoded_ready", "decoded")
            assert region.bytes > 0 or region.name in empty
            end = region.offset + region.bytes
        assert end <= total < end + layout.REGION_ALIGN
    assert len({region.name for region in placed}) == len(placed)


@pytest.mark.parametrize("configs, ep_config, ep_size", SHAPES)
def test_every_layer_fits_into_the_shared_regions(configs, ep_config, ep_size):
    """Each region holds what the kernel addresses in it, layer by layer (csrc/sync/launch.cuh)."""
    dims = layout.dims_of(configs, ep_config, ep_size)
    have = {region.name: region.bytes for region in layout.place(dims)[0]}
    tokens = ep_config.num_max_tokens_per_rank
    for c in configs:
        local_experts, k_blocks = c.num_experts // ep_size, c.intermediate // 128
        rows = ep_size * tokens * c.topk
        assert have["combine_y"] >= tokens * c.topk * c.hidden * 2
        assert have["recv_x"] >= ep_size * tokens * c.hidden
        assert have["recv_x_sf"] >= ep_size * tokens * c.hidden // 128 * 4
        assert have["head_idx"] >= 2 * ep_size * tokens * c.topk * 4
        assert have["row_list"] >= rows * 4
        for block in tiles.TILES[c.weight_format]:
            # Most blocks: every expert that has a row ends in a partial one
            busy = min(local_experts, rows)
            blocks = busy + (rows - busy) // block
            parts = 2 if block == tiles.SPLITS_WEIGHTS else 1  # of an h image, by the CTAs of a pair
            assert have["h_ready"] >= blocks * k_blocks * parts * 4
            assert have["block_done"] >= blocks * 4
            assert have["h"] >= blocks * k_blocks * block * (128 + 4)
            if block in tiles.reachable_tiles(c, ep_size, tokens) and tiles.in_expert_order(block):
                assert have["x_image"] >= blocks * block * c.hidden // 128 * (128 + 4)
                assert have["x_image_ready"] >= blocks * block * 4
    assert have["head_ready"] >= 2 * ep_size * math.ceil(tokens / layout.HEAD_SLICE_TOKENS) * 4
    assert have["x_ready"] >= ep_size * tokens * 4 and have["combine_ready"] >= tokens * 16 * 4


def test_decoded_weights_have_room_where_a_call_decodes_ahead():
    """32 experts of 16 x 32 and 16 x 16 images, 771 MiB; the largest layer's where several share the workspace."""
    config = replace(FLASH64, weight_format="mxfp4")
    small = MoEConfig(1024, 512, 64, 6, weight_format="mxfp4")
    for configs, tokens, images in (
        ([config], 2048, 0), ([FLASH64], 8192, 0), ([config], 8192, 32 * 16 * (32 + 16)),
        ([small, config], 8192, 32 * 16 * (32 + 16)), ([small], 8192, 32 * 4 * (8 + 4)),
    ):  # fmt: skip
        placed, _, _ = layout.place(layout.dims_of(configs, EPConfig(tokens), 2))
        sizes = {region.name: region.bytes for region in placed}
        assert sizes["decoded"] == images * layout.IMAGE_PITCH_BYTES
        assert (sizes["decoded_ready"] > 0) == (sizes["decode_done"] > 0) == (images > 0)
        assert sizes["decoded_ready"] in (0, 32 * 32 * 4, 32 * (4 + 4) * 4)


def test_flash64_at_two_ranks_stays_small():
    placed, symmetric_bytes, _ = layout.place(layout.dims_of([FLASH64], EPConfig(8192), 2))
    assert symmetric_bytes < 0.6 * 2**30
    sizes = {region.name: region.bytes for region in placed}
    assert sizes["recv_x"] == 2 * 8192 * 4096 and sizes["combine_y"] == 8192 * 6 * 4096 * 2


def test_limits_agree_with_the_bits_of_a_row_name():
    assert layout.MAX_TOPK == 1 << 4 and layout.MAX_TOKENS == 1 << 20 and layout.MAX_EP_SIZE <= 1 << 8
    assert layout.MAX_EP_SIZE <= 32  # a lane of a warp, and a bit of a mask, for each rank
    assert set(layout.ZEROED) <= {region.name for region in layout.REGIONS}


@pytest.mark.parametrize("where", ["symmetric", "local"])
def test_every_flag_and_counter_is_cleared_by_reset(where):
    flags = {r.name for r in layout.REGIONS if r.where == where and re.search("ready|done|control|abort", r.name)}
    assert flags <= set(layout.ZEROED)


@pytest.mark.parametrize("struct", [layout.RankParams, layout.KernelParams, layout.KernelStatus])
def test_structs_have_no_padding_and_stand_in_the_header(struct):
    """Without padding C++ and ctypes cannot lay them out differently; the header asserts every offset as well."""
    header, end = render_header(), 0
    for name, ctype in struct._fields_:
        assert getattr(struct, name).offset == end, name
        assert f"MOE_OFFSETOF({struct.__name__}, {name}) == {end})" in header
        end += ctypes.sizeof(ctype)
    assert ctypes.sizeof(struct) == end
    assert f"static_assert(sizeof({struct.__name__}) == {end});" in header


def test_every_region_has_its_offset_in_the_parameters():
    names = {name for name, _ in layout.KernelParams._fields_ if name.startswith("off_")}
    assert names == {f"off_{region.name}" for region in layout.REGIONS}
    assert ctypes.sizeof(layout.KernelParams) <= 4096  # fits the classic parameter space, a quarter of a KB a rank


@pytest.mark.parametrize("configs, ep_config, ep_size", SHAPES)
def test_plan_memory_explains_every_byte(configs, ep_config, ep_size):
    plan = plan_memory(configs, ep_config, ep_size)
    placed, symmetric_bytes, local_bytes = layout.place(layout.dims_of(configs, ep_config, ep_size))
    assert (plan.symmetric_bytes, plan.local_bytes) == (symmetric_bytes, local_bytes)
    assert [(row.name, row.bytes) for row in plan.rows] == [(region.name, region.bytes) for region in placed]
    for total in (symmetric_bytes, local_bytes):
        assert f"{total:,}" in plan.explain()
