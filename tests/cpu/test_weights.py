"""Weight images: an exact inverse, and byte for byte what csrc/gemm reads."""

import pytest
import torch

from megamoe.layout import IMAGE_PITCH_BYTES, IMAGE_SF_OFFSET, N_BLOCK
from megamoe.quant.weights import image_shape, pack_expert, unpack_expert

SHAPES = [(256, 128), (384, 256), (128, 384), (896, 640)]


def random_expert(linear: int, hidden: int, intermediate: int):
    """e4m3 values of all 256 bit patterns (NaN too: only bytes move) and distinct scale factors."""
    n, k = (2 * intermediate, hidden) if linear == 1 else (hidden, intermediate)
    values = torch.randint(256, (n, k), dtype=torch.uint8)
    sf = torch.rand(n // 128, k // 128) + 0.5
    images = torch.full(image_shape(linear, 1, hidden, intermediate)[1:], 0xEE, dtype=torch.uint8)
    pack_expert(linear, values.view(torch.float8_e4m3fn), sf, images)
    return values, sf, images


@pytest.mark.parametrize("linear", [1, 2])
@pytest.mark.parametrize("hidden, intermediate", SHAPES)
def test_unpack_is_the_exact_inverse(linear, hidden, intermediate):
    values, sf, images = random_expert(linear, hidden, intermediate)
    back, sf_back = unpack_expert(linear, images, values.shape[0])
    assert torch.equal(back.view(torch.uint8), values) and torch.equal(sf_back, sf)


@pytest.mark.parametrize("hidden, intermediate", SHAPES)
def test_image_bytes_by_the_definition(hidden, intermediate):
    """Row 16 a + b of a linear1 image is gate row 8 a + b (b < 8) or up row 8 a + b - 8 of the image's 128 h columns;
    row r of a linear2 image is weight row 256 n + r. Chunk c of a row lies at c ^ (r % 8)."""
    generator = torch.Generator().manual_seed(1)
    for linear in (1, 2):
        values, sf, images = random_expert(linear, hidden, intermediate)
        n_blocks, k_blocks = images.shape[:2]
        for _ in range(400):
            n, k, r, byte = (int(torch.randint(top, (), generator=generator)) for top in (n_blocks, k_blocks, 256, 128))
            if linear == 1:
                row = r % 16 // 8 * intermediate + 128 * n + r // 16 * 8 + r % 8
            else:
                row = N_BLOCK * n + r
            at = r * 128 + (byte // 16 ^ r % 8) * 16 + byte % 16
            expected = int(values[row, 128 * k + byte]) if row < values.shape[0] else 0
            assert int(images[n, k, at]) == expected, (linear, n, k, r, byte)
        for n in range(n_blocks):
            for k in range(k_blocks):
                tail = images[n, k, IMAGE_SF_OFFSET:].clone().view(torch.float32)
                rows = (n, n + intermediate // 128) if linear == 1 else (2 * n, 2 * n + 1)
                expected = [float(sf[i, k]) if i < sf.shape[0] else 0.0 for i in rows]
                assert tail[:2].tolist() == expected and not tail[2:].any()


def test_shapes_cover_every_row():
    assert image_shape(1, 3, 384, 256) == (3, 2, 3, IMAGE_PITCH_BYTES)
    assert image_shape(2, 3, 384, 256) == (3, 2, 2, IMAGE_PITCH_BYTES)  # hidden 384: a full image and a half one
    assert IMAGE_PITCH_BYTES % 128 == 0  # every image starts where a bulk copy may


def test_packing_twice_leaves_nothing_of_the_first():
    values, sf, images = random_expert(2, 384, 256)
    other = values.flip(0).contiguous()
    pack_expert(2, other.view(torch.float8_e4m3fn), sf * 2, images)
    back, sf_back = unpack_expert(2, images, 384)
    assert torch.equal(back.view(torch.uint8), other) and torch.equal(sf_back, sf * 2)
