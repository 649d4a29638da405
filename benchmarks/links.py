"""NVLink bytes of a call, rank by rank: what the kernel's steps write into other ranks' memory, by the routing, and
what the GPU's own counters say. The roofline counts less: one returned row a token and rank, where the kernel returns
one a slot, and no routing tables and flags.
"""

import torch

from megamoe.layout import HEAD_SLICE_TOKENS, K_BLOCK

FLAG_BYTES = 4
COUNTED_CALLS = 20
# NVML's field "data payload sent over NVLink, KiB"; of all links together, or, where that is refused, link by link
NVLINK_DATA_SENT, SCOPES = 138, ([0xFFFFFFFF], range(18))


def sent_bytes(case, topk_idx: list[torch.Tensor]) -> list[int]:
    """Bytes that each rank writes into the others' memory in one call; the regions are those of megamoe/layout.py.

    dispatch: to every rank num_tokens, 8 bytes a slot (id and weight) and a flag for each 16 tokens; to each other rank
    that holds one of a token's experts its e4m3 row, a scale factor for each 128 and a flag. linear2: for each row
    served for another rank, hidden bf16 and a flag.
    topk_idx: one int tensor [num_tokens, topk] a rank, -1 = unused.
    """
    ep_size, experts = len(topk_idx), case.num_experts // len(topk_idx)
    row = case.hidden + case.hidden // K_BLOCK * 4 + FLAG_BYTES
    sent = [0] * ep_size
    for src, idx in enumerate(topk_idx):
        num_tokens, slots = idx.shape[0], idx.numel()
        slices = max(1, -(-num_tokens // HEAD_SLICE_TOKENS))
        sent[src] += (ep_size - 1) * (4 + slices * FLAG_BYTES + 8 * slots)
        owner = torch.where(idx >= 0, idx.long() // experts, -1)
        for dst in range(ep_size):
            if dst != src:
                here = owner == dst
                sent[src] += int(here.any(dim=1).sum()) * row
                sent[dst] += int(here.sum()) * (case.hidden * 2 + FLAG_BYTES)
    return sent


def mean_sent(everyone: list[list[int]]) -> list[int]:
    """Rank by rank, the mean over the routings that a measurement cycles through."""
    return [round(sum(column) / len(column)) for column in zip(*everyone, strict=True)]


class Counter:
    """A GPU's NVLink counter. reason: why it cannot be read, or None."""

    def __init__(self, device: torch.device):
        self.reason, self._handle = None, None
        try:
            import pynvml

            pynvml.nvmlInit()
            self._library = pynvml
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            self._fields = next(filter(self._told, [[(NVLINK_DATA_SENT, link) for link in links] for links in SCOPES]))
        except StopIteration:
            self.reason = f"NVML does not tell field {NVLINK_DATA_SENT} of this GPU"
        except Exception as error:  # whatever keeps a counter from being read must not end a measurement
            self.reason = f"{type(error).__name__}: {error}"

    def _told(self, fields: list[tuple[int, int]]) -> bool:
        return not any(f.nvmlReturn for f in self._library.nvmlDeviceGetFieldValues(self._handle, fields))

    def read(self) -> int:
        """Bytes sent so far."""
        values = self._library.nvmlDeviceGetFieldValues(self._handle, self._fields)
        return sum(int(field.value.ullVal) for field in values) << 10


def count_calls(counter: Counter, calls: list, meet) -> list[int] | None:
    """Collective: bytes a call that each rank's links sent, mean over COUNTED_CALLS; None where one has no counter."""
    if not all(meet.gather(counter.reason is None)):
        return None
    meet.barrier()
    before = counter.read()
    meet.barrier()
    for index in range(COUNTED_CALLS):
        calls[index % len(calls)]()
    meet.barrier()
    return meet.gather(round((counter.read() - before) / COUNTED_CALLS))
