"""What the adapters of serving engines share: a workspace for all layers of a shape, weights as engines hold them."""

import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.config import BLOCK, EPConfig, MoEConfig
from megamoe.errors import absent_ranks_named
from megamoe.integrations.alike import alike
from megamoe.layer import MoELayer
from megamoe.quant.fp8 import E4M3
from megamoe.workspace import Workspace
from megamoe_cuda.gather import gather

LOADING_S = 600.0
"""How much later than the first rank the last may come from the engine's own loading of files: as long as torch lets
NCCL wait, by which engines meet. A rank that ends there is the engine's to notice."""

_workspaces: dict[tuple, Workspace] = {}


def shared_workspace(config: MoEConfig, capacity: int, group: dist.ProcessGroup | None, device) -> Workspace:
    """The workspace of all layers of this shape, of a draft model's too. Collective when it is made.

    capacity: num_max_tokens_per_rank. close_workspaces() ends them."""
    key = config, capacity, id(group), torch.device(device)
    if key not in _workspaces or _workspaces[key].closed:
        _workspaces[key] = Workspace(config, EPConfig(capacity), group=group, device=device)
    return _workspaces[key]


def close_workspaces() -> None:
    """Give all of it back. Collective, in the order in which they were made."""
    for workspace in _workspaces.values():
        workspace.close()
    _workspaces.clear()


def refuse_alike(what: str, reasons: list[str], group: dist.ProcessGroup | None) -> None:
    """ValueError with all reasons on every rank of `group` where any rank has one: its peers would wait for it in the
    workspace's constructor. Collective."""
    texts = [reasons]
    if group is not None and dist.get_world_size(group) > 1:
        with absent_ranks_named():
            texts = gather(group, "refusals", reasons, LOADING_S)
    if any(texts):
        told = "; ".join(dict.fromkeys(reason for of_rank in texts for reason in of_rank))
        raise ValueError(f"megamoe cannot serve {what}: {told}")


def block_fp8_reasons(linear1: Tensor, linear1_sf, linear2: Tensor, linear2_sf) -> list[str]:
    """Why load_block_fp8 cannot take these, by the engines' names."""
    return [
        f"{name} is {weight.dtype}, its scale {sf if sf is None else sf.dtype}; megamoe serves e4m3 weights with one "
        f"scale a {BLOCK} x {BLOCK} block: load a block-FP8 checkpoint"
        for name, weight, sf in (("w13_weight", linear1, linear1_sf), ("w2_weight", linear2, linear2_sf))
        if weight.dtype != E4M3 or sf is None
    ]


def load_block_fp8(layer: MoELayer, linear1: Tensor, linear1_sf: Tensor, linear2: Tensor, linear2_sf: Tensor) -> None:
    """Weights as vLLM and SGLang hold block-FP8 experts: gate rows then up rows, fp32 scale factors that multiply.

    Collective: what fails on one rank, such as for want of memory, is raised on all. ValueError names what is not so,
    in block_fp8_reasons' words."""
    with alike(layer.workspace.group, LOADING_S):
        if reasons := block_fp8_reasons(linear1, linear1_sf, linear2, linear2_sf):
            raise ValueError("; ".join(reasons))
        layer.load_weights(linear1, linear2, linear1_sf.float().contiguous(), linear2_sf.float().contiguous())


def check_linear_map(expert_map: Tensor | None, num_experts: int, ep_rank: int, ep_size: int) -> None:
    """ValueError unless global expert e is local expert e - ep_rank * E: megamoe finds experts by that rule.

    expert_map: int [num_experts], local index or -1; None: no map. Reads the map on the host: call it once a map."""
    if expert_map is None:
        return
    num_local = num_experts // ep_size
    expected = torch.full((num_experts,), -1, dtype=torch.int64)
    expected[ep_rank * num_local : (ep_rank + 1) * num_local] = torch.arange(num_local)
    found = expert_map.detach().cpu().long()
    if found.shape != expected.shape or not torch.equal(found, expected):
        wrong = 0 if found.shape != expected.shape else int((found != expected).nonzero()[0])
        raise ValueError(
            f"expert_map is not linear: expert {wrong} is local {int(found[wrong]) if len(found) > wrong else None} on "
            f"rank {ep_rank} of {ep_size}, megamoe wants {int(expected[wrong])}; use expert placement 'linear'"
        )
