"""Where each rank runs, and which ranks form one domain: those whose GPUs load and store each other's memory."""

import socket
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from megamoe_cuda.gather import gather


class Place(NamedTuple):
    """One rank. device: "cpu" or "cuda:I NAME". gpu: its UUID, "" on CPU. seen, reached: UUIDs of the GPUs that this
    process sees, and of those that its own GPU has peer access to."""

    rank: int
    host: str
    device: str
    gpu: str
    seen: tuple[str, ...]
    reached: tuple[str, ...]


def gather_places(group: dist.ProcessGroup | None, device: torch.device) -> list[Place]:
    """Collective over the group (None: this process alone): every rank's Place, in rank order."""
    mine = place_of(0 if group is None else dist.get_rank(group), device)
    if group is None or dist.get_world_size(group) == 1:
        return [mine]
    return [Place(*place) for place in gather(group, "places", mine)]


def place_of(rank: int, device: torch.device) -> Place:
    """This process's Place; a CUDA device that does not exist has no GPU. Starts no context on GPUs other than its
    own."""
    host, count = _host(), torch.cuda.device_count() if torch.cuda.is_available() else 0
    mine = device.index if device.index is not None or not count else torch.cuda.current_device()
    if device.type != "cuda" or mine is None or mine >= count:
        return Place(rank, host, str(device), "", (), ())
    uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(count)]
    reached = [uuid for i, uuid in enumerate(uuids) if i == mine or torch.cuda.can_device_access_peer(mine, i)]
    name = f"cuda:{mine} {torch.cuda.get_device_name(mine)}"
    return Place(rank, host, name, uuids[mine], tuple(uuids), tuple(reached))


def _host() -> str:
    # Containers of one machine share the boot id, those of a cluster often the name
    boot = Path("/proc/sys/kernel/random/boot_id")
    return socket.gethostname() + (f" {boot.read_text()[:8]}" if boot.exists() else "")


def domains_of(places: list[Place]) -> list[int]:
    """Domain number of each rank, numbered in order of first appearance.

    CPU ranks are one domain: gloo reaches all alike. GPUs of one host are, unless a rank sees the other's GPU and has
    no peer access to it; where each process sees its own GPU only, NVSHMEM has the last word at its start.
    """
    numbers: list[int] = []
    for i, place in enumerate(places):
        same = (numbers[j] for j in range(i) if _joined(place, places[j]))
        numbers.append(next(same, max(numbers, default=-1) + 1))
    return numbers


def _joined(a: Place, b: Place) -> bool:
    if not a.gpu and not b.gpu:
        return True
    if not (a.gpu and b.gpu) or a.host != b.host:
        return False
    return (b.gpu not in a.seen or b.gpu in a.reached) and (a.gpu not in b.seen or a.gpu in b.reached)


def check_domains(numbers: list[int]) -> int:
    """Ranks per domain of a discovered map. ValueError unless domains are runs of equally many neighbouring ranks."""
    members = [[rank for rank, number in enumerate(numbers) if number == domain] for domain in range(max(numbers) + 1)]
    size = len(members[0])
    for domain, ranks in enumerate(members):
        if len(ranks) != size:
            raise ValueError(
                f"domain {domain} has {len(ranks)} ranks {ranks}, domain 0 has {size}: {members[0]}; start equally "
                "many ranks in each, or name a size that fits with EPConfig(ranks_per_domain=...)"
            )
        if ranks != list(range(domain * size, (domain + 1) * size)):
            raise ValueError(
                f"domain {domain} has ranks {ranks}, which are not {size} neighbours; number the ranks host by host"
            )
    return size


def explain(places: list[Place], numbers: list[int]) -> str:
    """The map as text, one line a rank."""
    return "\n".join(
        f"rank {place.rank}: domain {number}, host {place.host.partition(' ')[0]}, {place.device}"
        for place, number in zip(places, numbers, strict=True)
    )
