"""What the kernel does with an MXFP4 image, in its own arithmetic: csrc/gemm/mxfp4_decode.cuh and split_rows.cuh by the
host's compiler.

Every code and scale byte is decoded; then a whole tile is: image bytes to registers as a lane reads them, registers to
the A operand by the PTX fragment layout, times tokens in the permuted order, against the dequantized product. Then the
halves of a block that a pair of CTAs splits: the bytes each loads, the rows its warps have, the columns they write.
"""

import ctypes
import re

import numpy as np
import pytest
import torch

from megamoe.layout import MXFP4_IMAGE_PITCH_BYTES, MXFP4_IMAGE_SF_OFFSET, MXFP4_SCALES_OFFSET
from megamoe.quant.mxfp4 import dequantize, fit, quantize
from megamoe.quant.mxfp4_images import image_shape, pack_expert, unpack_expert
from tests.cpu.host_library import CSRC, build_library

SOURCE = """
#include "gemm/mxfp4_decode.cuh"
#include "gemm/split_rows.cuh"
#include "sched/order.cuh"
using namespace moe;
extern "C" {
u32 swizzled(u32 row, u32 byte) { return swizzle_128b(row, byte); }
u32 piece_bytes() { return kPieceBytes; }
u32 piece_begin(bool second, u32 half, u32 i) { return SplitRows::piece_begin(second, half, i); }
void split_rows(bool second, u32 half, u32 warp, u32 lane, u32* out) {
    const SplitRows rows(second, half, warp);
    out[0] = rows.image_warp, out[1] = rows.part, out[2] = rows.column(second);
    out[3] = rows.codes(lane), out[4] = rows.scales(lane);
}
void table(u64* rows) { for (u32 i = 0; i < kDecodeRows; ++i) rows[i] = decode_row(i); }
u32 permuted(u32 column) { return permute_k(column); }
void decode(const u32* words, const u64* rows, u32 count, u32* out) {
    for (u32 i = 0; i < count; ++i)
        decode_word(words[i], static_cast<u32>(rows[i]), static_cast<u32>(rows[i] >> 32), out[2 * i], out[2 * i + 1]);
}
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    built = build_library(tmp_path_factory.mktemp("mxfp4"), SOURCE)
    if built is None:
        pytest.skip("not run: no g++")
    return built


def table(library) -> np.ndarray:
    rows = np.zeros(15, np.uint64)
    library.table(rows.ctypes.data_as(ctypes.c_void_p))
    return rows


def decode(library, words: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Words and table rows, one each -> e4m3 bytes [count, 8]: a first register, then a second."""
    words, rows = np.ascontiguousarray(words, np.uint32), np.ascontiguousarray(rows, np.uint64)
    out = np.zeros((len(words), 2), np.uint32)
    library.decode(*(a.ctypes.data_as(ctypes.c_void_p) for a in (words, rows)), len(words),
                   out.ctypes.data_as(ctypes.c_void_p))  # fmt: skip
    return out.view(np.uint8)


def as_float(e4m3: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(e4m3)).view(torch.float8_e4m3fn).double().numpy()


def test_the_table_holds_every_magnitude_in_every_binade(library):
    rows = table(library)
    values = as_float(rows.view(np.uint8).reshape(15, 8))
    assert np.array_equal(values, np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6]) * np.ldexp(1.0, np.arange(15) - 8)[:, None])


def test_every_code_at_every_place_of_a_word_in_every_binade(library):
    """Through the packing: code c at place e of a word, all 16 x 8 x 15."""
    codes = torch.zeros(15 * 16 * 8, 8, dtype=torch.uint8)
    step, code, place = (t.flatten() for t in torch.meshgrid(*(torch.arange(n) for n in (15, 16, 8)), indexing="ij"))
    codes[torch.arange(len(codes)), place] = code.to(torch.uint8)
    from megamoe.quant.mxfp4_images import _collect_signs, _place_signs

    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).contiguous().view(torch.int32)
    words = _place_signs(packed)
    assert torch.equal(_collect_signs(words), packed)
    got = as_float(decode(library, words.flatten().numpy().view(np.uint32), table(library)[step]))
    magnitude = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]).double()[code % 8] * torch.exp2(step.double() - 8)
    expected = torch.zeros(len(codes), 8, dtype=torch.float64)
    expected[torch.arange(len(codes)), place] = torch.where(code < 8, magnitude, -magnitude)
    assert np.array_equal(got, expected.numpy())


def test_the_order_of_k_is_a_permutation_that_gives_a_lane_one_group(library):
    order = np.array([library.permuted(c) for c in range(128)])
    assert sorted(order) == list(range(128))
    lane = order // 4 % 4  # of a wgmma fragment: 4-byte word w belongs to lane w % 4 of a quad
    assert np.array_equal(lane, np.arange(128) // 32)


def fragments(library, image: np.ndarray) -> np.ndarray:
    """The image's weights as the tensor cores see them: float64 [256, 128], K in the permuted order, without the base.

    As csrc/gemm/mxfp4.cuh: thread = 32 * warp + lane reads its scale bytes and 4 x 16 bytes; register a[slice][i] of
    slab p is of its warpgroup's row 64 p + 16 (warp % 4) + lane / 4 + 8 (i % 2) the four bytes from
    32 slice + 16 (i / 2) + 4 (lane % 4) on.
    """
    out = np.full((256, 128), np.nan)
    thread, part, half, i = (a.flatten() for a in np.meshgrid(*map(np.arange, (256, 2, 2, 4)), indexing="ij"))
    warp, lane = thread // 32, thread % 32
    scales = image[MXFP4_SCALES_OFFSET + 4 * thread + 2 * part + i % 2]
    words = image[:MXFP4_SCALES_OFFSET].view(np.uint32)[4 * (warp * 128 + lane + part * 64 + half * 32) + i]
    values = as_float(decode(library, words, table(library)[scales // 8]))
    m = warp // 4 * 128 + part * 64 + warp % 4 * 16 + lane // 4 + 8 * (i % 2)
    k = 32 * (2 * half + i // 2) + 4 * (lane % 4)
    for byte in range(4):
        out[m, k + byte], out[m, k + 16 + byte] = values[:, byte], values[:, 4 + byte]
    return out


@pytest.mark.parametrize("linear, hidden, intermediate", [(1, 256, 128), (2, 384, 256)])
def test_a_tile_multiplied_as_the_kernel_does_is_the_dequantized_product(library, linear, hidden, intermediate):
    n, k = (2 * intermediate, hidden) if linear == 1 else (hidden, intermediate)
    torch.manual_seed(linear)
    spread = torch.exp2(torch.randint(-10, 1, (n, k // 32)).float()).repeat_interleave(32, 1)
    weights = fit(*quantize(torch.randn(n, k) * spread))
    assert weights.rerounded == 0
    images = torch.zeros(image_shape(linear, 1, hidden, intermediate)[1:], dtype=torch.uint8)
    pack_expert(linear, weights.codes, weights.sf, images)
    dense = dequantize(weights.codes, weights.sf, torch.float64)
    tokens = torch.randn(k, 5, dtype=torch.float64).numpy()
    order = np.array([library.permuted(c) for c in range(128)])
    for n_block in range(images.shape[0]):
        total = np.zeros((256, 5))
        for k_block in range(images.shape[1]):
            image = images[n_block, k_block].numpy()
            permuted = np.empty((128, 5))
            permuted[order] = tokens[128 * k_block : 128 * (k_block + 1)]
            total += fragments(library, image) @ permuted
        low, high = images[n_block, 0, MXFP4_IMAGE_SF_OFFSET:][:8].clone().view(torch.float32).tolist()
        row = np.arange(256)
        if linear == 1:
            base = np.where(row // 8 % 2, high, low)
            source = row // 8 % 2 * intermediate + 128 * n_block + row // 16 * 8 + row % 8
        else:
            base, source = np.where(row < 128, low, high), 256 * n_block + row
        here = source < n
        expected = dense.numpy()[source[here]] @ tokens
        np.testing.assert_allclose((total * base[:, None])[here], expected, rtol=1e-12, atol=1e-12)
        assert not total[~here].any()


def split_rows(library, linear: int, half: int) -> np.ndarray:
    """What csrc/gemm/split_rows.cuh gives the lanes of a CTA: [8 warps, 32 lanes, (image_warp, part, column, codes,
    scales)]."""
    out = np.zeros((8, 32, 5), np.uint32)
    for warp, lane in np.ndindex(8, 32):
        library.split_rows(linear == 2, half, warp, lane, out[warp, lane].ctypes.data_as(ctypes.c_void_p))
    return out.astype(int)


def half_stage(library, image: np.ndarray, linear: int, half: int) -> np.ndarray:
    """A stage's weights as load_half_image in csrc/gemm/load_weights.cuh fills them: two pieces, then all scales."""
    begins = [library.piece_begin(linear == 2, half, i) for i in range(2)]
    pieces = [image[begin : begin + library.piece_bytes()] for begin in begins]
    return np.concatenate([*pieces, image[MXFP4_SCALES_OFFSET:MXFP4_IMAGE_SF_OFFSET]])


@pytest.mark.parametrize("linear", [1, 2])
def test_a_pair_has_every_weight_row_once(library, linear):
    image_warp, part, *_ = np.stack([split_rows(library, linear, half) for half in range(2)]).transpose(3, 0, 1, 2)
    low = image_warp // 4 * 128 + part * 64 + image_warp % 4 * 16 + np.arange(32) // 4
    for q in range(4):  # lane % 4: the quarters of K, every row in each
        rows = np.stack([low[..., q::4], low[..., q::4] + 8])
        assert sorted(rows.flatten()) == list(range(256))
    begins = [library.piece_begin(linear == 2, half, i) for half in range(2) for i in range(2)]
    assert sorted(begins) == list(range(0, MXFP4_SCALES_OFFSET, library.piece_bytes()))


@pytest.mark.parametrize("linear, hidden, intermediate", [(1, 256, 384), (2, 640, 256)])
def test_half_a_block_is_read_from_its_stage_as_the_weights_of_its_columns(library, linear, hidden, intermediate):
    """Through the packing: what each lane of each CTA decodes, against the unpacked weights of the columns that it
    writes. linear1: row r is gate, row r + 8 up of one h column; linear2: y columns r and r + 8."""
    n, k = (2 * intermediate, hidden) if linear == 1 else (hidden, intermediate)
    fitted = fit(torch.randint(256, (n, k // 2), dtype=torch.uint8), torch.randint(113, 128, (n, k // 32)).byte())
    images = torch.zeros(image_shape(linear, 1, hidden, intermediate)[1:], dtype=torch.uint8)
    pack_expert(linear, fitted.codes, fitted.sf, images)
    dense = dequantize(*unpack_expert(linear, images, n), torch.float64).numpy()
    order = np.array([library.permuted(c) for c in range(128)])
    rows, seen = table(library), np.zeros((n, k), int)
    warp, lane, part, i = (a.flatten() for a in np.meshgrid(*map(np.arange, (8, 32, 2, 4)), indexing="ij"))
    for n_block, k_block, half in np.ndindex(*images.shape[:2], 2):
        stage = half_stage(library, images[n_block, k_block].numpy(), linear, half)
        *_, column, codes, scales = split_rows(library, linear, half)[warp, lane].T
        first = codes + 512 * part + 4 * i  # read_codes in csrc/gemm/mxfp4_split.cuh: two times 16 bytes
        assert first.max() + 4 <= 2 * library.piece_bytes() <= scales.min() and scales.max() + 2 <= len(stage)
        words = stage[first[:, None] + np.arange(4)].view(np.uint32)[:, 0]
        values = as_float(decode(library, words, rows[stage[scales + i % 2] // 8]))
        base = images[n_block, 0, MXFP4_IMAGE_SF_OFFSET:][:8].clone().view(torch.float32).numpy()
        upper, r = i % 2, lane // 4
        if linear == 1:
            source, scale = upper * intermediate + 128 * n_block + column + r, base[upper]
        else:
            source, scale = 256 * n_block + column + r + 8 * upper, np.full(len(r), base[half])
        here = source < n
        assert not values[~here].any()
        for byte in range(4):
            for which in range(2):  # of the word's two registers
                place = 32 * (2 * part + i // 2) + 4 * (lane % 4) + 16 * which + byte
                at = source[here], 128 * k_block + np.argsort(order)[place[here]]
                assert np.array_equal(values[here, 4 * which + byte] * scale[here], dense[at])
                np.add.at(seen, at, 1)
    assert (seen == 1).all()


@pytest.mark.parametrize("half", [0, 1])
def test_the_h_columns_of_a_cta_are_64_bytes_of_a_row_and_stay_together(library, half):
    """As store_h_half in csrc/pipeline/store.cuh sends them. linear2: 128 columns of y, one run of a row."""
    columns = (split_rows(library, 1, half)[:, 0, 2, None] + np.arange(8)).flatten()
    places = sorted(library.permuted(int(c)) for c in columns)
    assert places == list(range(64 * half, 64 * half + 64))
    for row in range(16):
        begin = row * 128 + (half ^ row // 4 % 2) * 64
        assert sorted(library.swizzled(row, place) for place in places) == list(range(begin, begin + 64))
    columns = split_rows(library, 2, half)[:, 0, 2, None] + np.arange(16)
    assert sorted(columns.flatten()) == list(range(128 * half, 128 * half + 128))


SHAPES = [(256, 128), (384, 256), (128, 384), (896, 640)]


@pytest.mark.parametrize("linear", [1, 2])
@pytest.mark.parametrize("hidden, intermediate", SHAPES)
def test_unpack_is_the_exact_inverse(linear, hidden, intermediate):
    n, k = (2 * intermediate, hidden) if linear == 1 else (hidden, intermediate)
    codes = torch.randint(256, (n, k // 2), dtype=torch.uint8)
    sf = torch.randint(113, 128, (n, k // 32), dtype=torch.uint8)
    sf[::128, 0], codes[::128, 0] = 127, 0x37  # the top of every 128 rows
    images = torch.full(image_shape(linear, 1, hidden, intermediate)[1:], 0xEE, dtype=torch.uint8)
    pack_expert(linear, codes, sf, images)
    back, sf_back = unpack_expert(linear, images, n)
    assert torch.equal(back, codes) and torch.equal(sf_back, sf)
    pack_expert(linear, codes.flip(0), sf.flip(0), images)  # nothing of the first is left
    back, sf_back = unpack_expert(linear, images, n)
    assert torch.equal(back, codes.flip(0)) and torch.equal(sf_back, sf.flip(0))


def test_an_all_zero_group_comes_back_with_its_values():
    codes, sf = quantize(torch.randn(256, 256) / 16)
    codes[:, :16], sf[:, 0] = 0, 3
    images = torch.zeros(image_shape(2, 1, 256, 256)[1:], dtype=torch.uint8)
    pack_expert(2, codes, sf, images)
    back, sf_back = unpack_expert(2, images, 256)
    assert torch.equal(back, codes) and torch.equal(sf_back[:, 1:], sf[:, 1:])
    assert torch.equal(dequantize(back, sf_back), dequantize(codes, sf))


def test_an_image_is_0533_of_an_fp8_image_and_starts_where_a_bulk_copy_may():
    assert image_shape(1, 3, 384, 256) == (3, 2, 3, MXFP4_IMAGE_PITCH_BYTES) and MXFP4_IMAGE_PITCH_BYTES % 128 == 0
    source = (CSRC / "params.gen.cuh").read_text()
    fp8 = int(re.search(r"kFp8ImagePitchBytes = (\d+)", source)[1])
    assert abs(MXFP4_IMAGE_PITCH_BYTES / fp8 - 0.533) < 1e-3
