"""The kernel's MXFP4 decoder, code by code: tokens with a single one read the decoded weights out of linear1."""

import pytest
import torch

from megamoe import MoEConfig
from megamoe.plan.tiles import TILES
from megamoe.quant.mxfp4 import dequantize, fit
from megamoe.steps import ExpertWeights, RankInput
from megamoe.testing.data import Case
from tests.gpu import stages

CONFIG = MoEConfig(hidden=512, intermediate=384, num_experts=2, topk=1, weight_format="mxfp4")


def random_codes(rows: int, columns: int, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every code, scale factors over 20 binades below `top`: those of the last five are re-rounded."""
    codes = torch.randint(256, (rows, columns // 2), dtype=torch.uint8)
    sf = torch.randint(top - 19, top + 1, (rows, columns // 32), dtype=torch.uint8)
    codes[::128, :16], sf[::128, 0] = 0x77, top  # a six under the top scale factor in every 128 rows
    fitted = fit(codes, sf)
    assert fitted.rerounded
    return fitted.codes, fitted.sf


@pytest.mark.parametrize("top", [40, 123, 200])
@pytest.mark.parametrize("block_tokens", TILES["mxfp4"])
def test_every_code_and_scale_factor_is_decoded_exactly(block_tokens, top):
    """Bit for bit, each pair of code and scale factor at every lane: all 16 x 15 occur in each expert."""
    shapes = (2 * CONFIG.intermediate, CONFIG.hidden), (CONFIG.hidden, CONFIG.intermediate)
    parts = [[random_codes(*shape, top - expert) for expert in range(2)] for shape in shapes]
    stacked = [torch.stack(column).cuda() for part in parts for column in zip(*part, strict=True)]
    weights = ExpertWeights(stacked[0], stacked[1], stacked[2], stacked[3])
    one = torch.eye(CONFIG.hidden, device="cuda").repeat(2, 1)
    topk_idx = torch.arange(2, dtype=torch.int32, device="cuda").repeat_interleave(CONFIG.hidden)[:, None]
    inputs = RankInput(one.to(torch.float8_e4m3fn), torch.ones(len(one), CONFIG.hidden // 128, device="cuda"), topk_idx,
                       torch.ones(len(one), 1, device="cuda"))  # fmt: skip
    case = Case(CONFIG, 1, (0,), [weights], [inputs])
    got = stages.run(case, [[CONFIG.hidden, CONFIG.hidden]], block_tokens).linear1[0].view(2, CONFIG.hidden, -1)
    for expert in range(2):
        codes, sf = weights.linear1[expert], weights.linear1_sf[expert]
        nibbles = torch.cat((codes & 15, codes >> 4)).int()
        pairs = nibbles * 256 + sf.repeat(2, 1).repeat_interleave(16, 1)
        assert len(pairs.unique()) == 16 * 15
        assert torch.equal(got[expert].t(), dequantize(codes, sf))
