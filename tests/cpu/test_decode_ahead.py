"""Weights decoded ahead by the exchange warps, as the host's compiler builds them (decode_library.py): whose turn which
image and row is, when blocks are published, and what an image becomes."""

import ctypes
import random
from itertools import chain

import numpy as np
import pytest
import torch

from megamoe.layout import EXCHANGE_WARPS, IMAGE_SF_OFFSET, MXFP4_IMAGE_PITCH_BYTES, MXFP4_IMAGE_SF_OFFSET
from megamoe.quant.mxfp4 import dequantize, fit
from megamoe.quant.mxfp4_images import image_shape, pack_expert
from megamoe.quant.weights import order_rows
from tests.cpu import decode_library
from tests.cpu.decode_library import DECODED, PUBLISHED, RAISED, ROWS

EPOCH = 7


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    built = decode_library.build(tmp_path_factory.mktemp("decode"))
    if built is None:
        pytest.skip("not run: no g++")
    return built


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


class Run:
    """Every exchange warp of a launch, in any order: they meet in counters alone. rows: of each expert. polls: how
    often each warp finds the plan unfinished."""

    def __init__(self, library, r: random.Random, rows: list[int], polls):
        self.rows, self.experts, self.num_ctas = rows, len(rows), r.choice((1, 2, 5, 8))
        hidden, intermediate = 128 * r.randint(1, 4), 128 * r.randint(1, 3)
        self.k_blocks = hidden // 128, intermediate // 128
        self.n_blocks = intermediate // 128, -(-hidden // 256)
        self.images = [n * k for n, k in zip(self.n_blocks, self.k_blocks, strict=True)]
        self.num_images = self.experts * sum(self.images)
        self.lag = r.choice((1, 2, 3, 50))
        self.stride = EXCHANGE_WARPS * self.num_ctas
        blocks, room = self.experts * sum(self.n_blocks), 4 * self.num_images + 100
        offsets = np.cumsum([0, *rows]).astype(np.uint32)
        weights = np.zeros(self.experts * max(self.images) * MXFP4_IMAGE_PITCH_BYTES, np.uint8)
        memory, self.done, self.ready = np.zeros(40000, np.uint8), *np.zeros((2, blocks), np.uint32)
        sizes = np.array([self.experts, hidden, intermediate, self.lag, self.num_ctas], np.uint32)
        self.logs, out = {}, np.zeros((room, 4), np.uint32)
        for first in r.sample(range(self.stride), self.stride):  # first_item: warp by warp, CTA by CTA
            warp, cta = divmod(first, self.num_ctas)
            count = library.permute(
                pointer(sizes), pointer(offsets), warp, cta, polls(), pointer(weights), pointer(memory),
                pointer(self.done), pointer(self.ready), EPOCH, room, pointer(out),
            )  # fmt: skip
            assert count <= room
            self.logs[first] = [tuple(map(int, event)) for event in out[:count]]

    def image(self, is_linear2: int, expert: int, i: int) -> int:
        return is_linear2 * self.experts * self.images[0] + expert * self.images[is_linear2] + i

    def wanted(self) -> list[tuple[int, int, int]]:
        """(image, weight block, expert) in the order in which tiles first want them."""
        lag, order = min(self.lag, self.experts), []
        for wave in range(self.experts + lag):
            for is_linear2, expert in ((0, wave), (1, wave - lag)):
                if 0 <= expert < self.experts:
                    before = self.experts * self.n_blocks[0] if is_linear2 else 0
                    block = before + expert * self.n_blocks[is_linear2]
                    k_blocks = self.k_blocks[is_linear2]
                    images = range(self.images[is_linear2])
                    order += [(self.image(is_linear2, expert, i), block + i // k_blocks, expert) for i in images]
        return order


def runs(library):
    for seed in range(40):
        r = random.Random(seed)
        rows = [r.choice((0, 1, 40, r.randint(0, 300))) for _ in range(r.randint(1, 7))]
        polls = (lambda r=r: r.choice((0, 1, 3, 9))) if seed % 3 else (lambda r=r, late=seed % 2 * 1000: late)
        yield r, Run(library, r, rows, polls)


def test_each_image_is_decoded_and_counted_once_in_the_order_of_the_tiles(library):
    for _, run in runs(library):
        order = run.wanted()
        assert len(order) == run.num_images
        for first, log in run.logs.items():
            mine = order[first :: run.stride]
            decoded = [a for event, a, *_ in log if event == DECODED]
            assert decoded == [image for image, _, _ in mine if image in set(decoded)]  # each once, in order
            assert {image for image, _, expert in mine if run.rows[expert]} <= set(decoded)
            assert [a for event, a, *_ in log if event == PUBLISHED] == [block for _, block, _ in mine]
        raised = sorted(a for event, a, *_ in chain(*run.logs.values()) if event == RAISED)
        assert raised == list(range(len(run.ready)))
        assert (run.ready == EPOCH).all() and not run.done.any()  # as the next launch wants them


def test_an_image_is_published_after_it_is_decoded_and_the_last_before_the_last_rows(library):
    for _, run in runs(library):
        block_of = {image: block for image, block, _ in run.wanted()}
        for log in run.logs.values():
            open_ = []  # decoded and not yet published
            for event, a, *_ in log:
                if event == DECODED:
                    open_.append(block_of[a])
                    assert len(open_) <= 2  # the turn before's is published while this one's codes are on their way
                elif event == PUBLISHED and open_ and open_[0] == a:
                    open_.pop(0)
            assert not open_
            kinds = [event for event, *_ in log if event in (PUBLISHED, ROWS)]
            last = max((i for i, kind in enumerate(kinds) if kind == PUBLISHED), default=0)
            assert last == 0 or kinds[last - 1] == PUBLISHED, "the last image waits for rows, which may be late"


def test_each_row_is_copied_once_and_in_step_with_the_images(library):
    for _, run in runs(library):
        total, copied = sum(run.rows), []
        for first, log in run.logs.items():
            mine, published = [], 0
            items = len(range(first, run.num_images, run.stride))
            for event, begin, end, stride in log:
                published += event == PUBLISHED
                if event != ROWS:
                    continue
                mine += range(begin, end, stride)
                begun = published + (published < items)  # the newest is published a turn later
                share = min(1, (first + begun * run.stride) / run.num_images)
                assert end <= total and abs(end - share * total) < 1
            assert mine == list(range(first, total, run.stride))
            copied += mine
        assert sorted(copied) == list(range(total))


def test_without_a_plan_only_images_are_decoded_and_with_one_empty_experts_are_left_out(library):
    for polls, decoded_experts in ((0, {1}), (1000, {0, 1, 2})):
        run = Run(library, random.Random(1), [0, 50, 0], lambda polls=polls: polls)
        first_images = min(run.stride, run.num_images)  # each warp's first comes before it asks for the plan
        expert_of = {image: expert for image, _, expert in run.wanted()[first_images if polls == 0 else 0 :]}
        decoded = {a for event, a, *_ in chain(*run.logs.values()) if event == DECODED}
        assert {expert_of[image] for image in decoded & set(expert_of)} <= decoded_experts
        if polls:
            assert len(decoded) == run.num_images
            assert all([event for event, *_ in log].index(ROWS) > max(
                [i for i, (event, *_) in enumerate(log) if event == DECODED], default=-1
            ) for log in run.logs.values() if any(event == ROWS for event, *_ in log))  # fmt: skip


@pytest.mark.parametrize("linear, hidden, intermediate", [(1, 256, 128), (2, 384, 256)])
def test_an_image_becomes_the_fp8_image_of_its_values(library, linear, hidden, intermediate):
    n, k = (2 * intermediate, hidden) if linear == 1 else (hidden, intermediate)
    fitted = fit(torch.randint(256, (n, k // 2), dtype=torch.uint8), torch.randint(113, 128, (n, k // 32)).byte())
    images = torch.zeros(image_shape(linear, 1, hidden, intermediate)[1:], dtype=torch.uint8)
    pack_expert(linear, fitted.codes, fitted.sf, images)
    dense = order_rows(linear, dequantize(fitted.codes, fitted.sf, torch.float64))
    row, column = np.meshgrid(np.arange(256), np.arange(128), indexing="ij")
    place = row * 128 + (column ^ row % 8 * 16)
    for n_block, k_block in np.ndindex(*images.shape[:2]):
        image = np.ascontiguousarray(images[n_block, k_block].numpy())
        out = np.full(IMAGE_SF_OFFSET + 16, 0xEE, np.uint8)
        library.decode_image(pointer(image), pointer(out))
        base = image[MXFP4_IMAGE_SF_OFFSET:][:16].view(np.float32)
        assert np.array_equal(out[IMAGE_SF_OFFSET:].view(np.float32), base)
        values = torch.from_numpy(out[place]).view(torch.float8_e4m3fn).double().numpy()
        scale = base[row // 8 % 2 if linear == 1 else row // 128]
        expected = dense[n_block].reshape(256, -1)[:, 128 * k_block : 128 * (k_block + 1)].numpy()
        assert np.array_equal(values * scale, expected)
