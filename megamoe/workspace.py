"""What layers share: the group of ranks, the device, and on CUDA the symmetric memory. Created once, by all ranks
together."""

import os
from collections.abc import Sequence
from dataclasses import asdict, replace

import torch
import torch.distributed as dist

from megamoe.call_order import call_order, next_workspace_index
from megamoe.config import EPConfig, MoEConfig
from megamoe.domains.places import Place, check_domains, domains_of, place_of
from megamoe.errors import MegaMoEError, absent_ranks_named
from megamoe.exchange import DistExchange, LocalExchange
from megamoe.rebalance import Staging
from megamoe.streams import StreamOwner, current_stream_handle
from megamoe.support import parse_device, support
from megamoe_cuda.compile import debug_level
from megamoe_cuda.gather import gather


class Workspace:
    """Shared by layers of one or several shapes; calls of different layers must be issued in the same order on every
    rank.

    moe_configs: one MoEConfig or several, the shapes of all layers that will use it.
    ep_config: capacity, deadlines, virtual ranks; equal on every rank.
    group: process group of the ep ranks; None = the default group if torch.distributed is initialised, else one rank.
    device: None = the current CUDA device if there is one, else CPU.

    Attributes: moe_configs, ep_config, ep_rank (0 with virtual ranks), ep_size, num_ranks_here, device, is_cuda, group,
    poisoned (None, or the error after which calls are refused until reset()), places (where each rank runs), and one of
    exchange (CPU), fused (CUDA), domains (several NVLink domains).

    Construction, reset() and close() are collective. Configurations are compared between ranks here, once: ValueError
    on every rank names the differing field. What one rank cannot do is raised on all ranks, so that none is left
    waiting; MegaMoEError names a rank that does not come within ep_config.arrive_deadline_s (a rank that compiles
    kernels meanwhile is waited for). Layers are made in the same order on every rank.
    """

    def __init__(
        self,
        moe_configs: MoEConfig | Sequence[MoEConfig],
        ep_config: EPConfig,
        *,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
    ):
        _check_types(moe_configs, ep_config, group)
        self.moe_configs = (moe_configs,) if isinstance(moe_configs, MoEConfig) else tuple(moe_configs)
        self.ep_config = ep_config
        self.device = _device(device)
        self.device_index, self.is_cuda = self.device.index, self.device.type == "cuda"
        self.poisoned: MegaMoEError | None = None
        self.closed = False
        self.num_layers = 0  # made so far: a layer's number, by which ranks know each other's calls
        self.fused = None
        self.exchange = None
        self.domains = None
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        self.group = group
        group_size = dist.get_world_size(group) if group is not None else 1
        self.ep_rank = dist.get_rank(group) if group is not None else 0
        self.streams, self.order = StreamOwner(), None
        self.index, self.layers = next_workspace_index(), []
        self.call_checks = {}  # of its layers, by MoEConfig
        self.staging = Staging()
        self.num_ranks_here = ep_config.virtual_ranks or 1
        self.ep_size = ep_config.virtual_ranks or group_size
        with absent_ranks_named():
            places = [place_of(self.ep_rank, self.device)]
            if group_size > 1:
                places = gather(group, "places", places[0], ep_config.arrive_deadline_s)
            self.places = [Place(*place) for place in places]
            self.ep_config, problem = self._with_domains()
            problem = problem or self._problem(group_size)
            _compare_ranks(group, group_size, self._facts(), problem, ep_config.arrive_deadline_s)
        self.order = call_order(group)
        if self.ep_config.num_domains(self.ep_size) > 1:
            from megamoe.domains.workspace import Domains

            self.domains = Domains(self, self.ep_config.ranks_per_domain)
        elif self.is_cuda:
            from megamoe.engine_fused import FusedWorkspace  # only here: the CPU path must not need CUDA packages
            from megamoe.warmup import compile_once_a_node

            with absent_ranks_named():
                compile_once_a_node(self)
                self.fused = FusedWorkspace(self)
        elif group_size > 1:
            self.exchange = DistExchange(group, ep_config.arrive_deadline_s, ep_config.step_deadline_s)
        else:
            self.exchange = LocalExchange(self.ep_size)

    def check_open(self) -> None:
        """Refuse a call on a closed or poisoned workspace: MegaMoEError with the remedy."""
        if self.closed:
            raise MegaMoEError("the workspace is closed; create a new one")
        if self.poisoned is not None:
            raise MegaMoEError(f"an earlier call failed ({self.poisoned}); call workspace.reset() on all ranks first")

    def use_stream(self, stream=None) -> None:
        """Hand the workspace to another CUDA stream (None: the current one), which waits for the last call on the old.

        Not needed where all calls come on one stream, or where the old stream is idle. No meaning on a CPU."""
        if self.is_cuda:
            self.streams.hand_over(stream or torch.cuda.current_stream(self.device))

    def before_call(self, layer_index: int) -> int | None:
        """What every call of a layer begins with: one stream at a time, the same order on all ranks (MEGAMOE_DEBUG).
        -> handle of the current stream, None on a CPU"""
        stream = current_stream_handle(self.device_index) if self.is_cuda else None
        if stream is not None and stream != self.streams.handle:
            self.streams.check(torch.cuda.current_stream(self.device), torch.cuda.is_current_stream_capturing)
        if self.order is not None:
            self.order.compare(f"layer {layer_index} of workspace {self.index}", self.ep_config.arrive_deadline_s)
        return stream

    def warmup(self) -> None:
        """Run every layer that has weights once, without tokens: what loads on first use is then loaded. Collective.

        Kernels are compiled before, by the constructor. Twice is harmless; a first call without it is only slower."""
        self.check_open()
        for layer in filter(None, (reference() for reference in self.layers)):
            layer.warmup()
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def compare(self, step: str, facts: dict, error: Exception | None, remedy: str) -> None:
        """Collective, on the host: `error`, if this rank has one; ValueError that names the rank where another has one,
        or where `facts` differ from rank 0's. MegaMoEError names a rank that does not come.

        facts: what JSON carries. step: as gather has it. remedy: where facts differ."""
        if self.ep_size > self.num_ranks_here:
            problem = None if error is None else str(error)
            with absent_ranks_named():
                everyone = gather(self.group, step, (facts, problem), self.ep_config.arrive_deadline_s)
            if error is None:
                _equal_on_ranks(everyone, remedy)
        if error is not None:
            raise error

    def poison(self, error: MegaMoEError) -> None:
        """Refuse every call from now on until reset(). The first error is kept."""
        self.poisoned = self.poisoned or error

    def reset(self) -> None:
        """Make a poisoned workspace usable again. Collective: every rank of the group must call it.

        MegaMoEError if a rank does not come within arrive_deadline_s + step_deadline_s, for which a peer may still wait
        in the call that this rank left or never made: the workspace then stays poisoned.
        """
        if self.closed:
            raise MegaMoEError("the workspace is closed; create a new one")
        if self.is_cuda:  # a launch that still waits for a peer does so before the ranks meet, not while
            torch.cuda.synchronize(self.device)
        with absent_ranks_named():
            if self.group is not None and self.ep_size > self.num_ranks_here:
                gather(self.group, "reset", None, self.ep_config.arrive_deadline_s + self.ep_config.step_deadline_s)
            if self.fused is not None:
                self.fused.reset()
            elif isinstance(self.exchange, DistExchange):
                self.exchange.reset()
            elif self.domains is not None:
                self.domains.reset()
        self.staging.clear()
        self.poisoned = None

    def close(self) -> None:
        """Give the memory back. Collective on CUDA. Twice is harmless; layers on it must not be called any more.

        MegaMoEError if a rank does not come: its memory may still be in use, so this process keeps its own until it
        ends.
        """
        if self.closed:
            return
        self.closed = True
        if self.fused is not None:
            fused, self.fused = self.fused, None
            with absent_ranks_named():
                fused.close()
        if isinstance(self.exchange, DistExchange):
            self.exchange.close()
        if self.domains is not None:
            self.domains.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is not None and self.is_cuda and self.ep_size > self.num_ranks_here:
            self.abandon()
        else:
            self.close()

    def abandon(self) -> None:
        """Let go on the way out of an exception: peers may be gone, and a collective close would hang and hide it."""
        self.closed = True
        if self.fused is not None:
            self.fused.abandon()
        if self.domains is not None:
            self.domains.abandon()

    def _with_domains(self) -> tuple[EPConfig, str | None]:
        """ep_config with ranks_per_domain as found, and what is wrong with the domains, or None."""
        try:
            if self.ep_config.ranks_per_domain is None and self.ep_config.virtual_ranks is None:
                size = check_domains(domains_of(self.places))
                return replace(self.ep_config, ranks_per_domain=size), None
            self.ep_config.num_domains(self.ep_size)
        except ValueError as error:
            return replace(self.ep_config, ranks_per_domain=None), str(error)
        return self.ep_config, None

    def _facts(self) -> dict:
        facts = {f"ep_config.{name}": value for name, value in asdict(self.ep_config).items()}
        facts["number of moe_configs"] = len(self.moe_configs)
        for i, config in enumerate(self.moe_configs):
            facts |= {f"moe_configs[{i}].{name}": value for name, value in asdict(config).items()}
        facts["device type"] = self.device.type
        facts["MEGAMOE_DEBUG"] = os.environ.get("MEGAMOE_DEBUG") or "0"
        return facts

    def _problem(self, group_size: int) -> str | None:
        virtual_ranks = self.ep_config.virtual_ranks
        if not self.moe_configs:
            return "moe_configs is empty; pass at least one MoEConfig"
        if virtual_ranks is not None and group_size > 1:
            return (
                f"virtual_ranks={virtual_ranks} needs a group of one process, this one has {group_size}; "
                "use virtual_ranks=None, or pass a one-rank group"
            )
        if self.ep_config.num_domains(self.ep_size) > 1 and 1 < group_size < dist.get_world_size():
            return (
                f"group has {group_size} of {dist.get_world_size()} ranks; several domains need a group of all, for "
                "torch makes their subgroups with all: start fewer ranks, or pass group=None"
            )
        try:
            debug_level()
        except ValueError as error:
            return str(error)
        for config in self.moe_configs:
            report = support(config, self.ep_config, self.device, ep_size=virtual_ranks or group_size)
            if not report.ok:
                return "; ".join(report.reasons)
        return None


def _check_types(moe_configs, ep_config, group) -> None:
    configs = moe_configs if isinstance(moe_configs, list | tuple) else [moe_configs]
    for config in configs:
        if not isinstance(config, MoEConfig):
            raise TypeError(
                f"moe_configs holds a value of type {type(config).__name__}; pass a MoEConfig or a list of them"
            )
    if not isinstance(ep_config, EPConfig):
        raise TypeError(f"ep_config has type {type(ep_config).__name__}; pass an EPConfig")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group={group!r} has type {type(group).__name__}; pass a process group that this rank is a member of "
            "(dist.new_group gives the other ranks something else), or None"
        )


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = parse_device(device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def _compare_ranks(group, group_size: int, facts: dict, problem: str | None, deadline_s: float) -> None:
    everyone = [(facts, problem)]
    if group_size > 1:
        everyone = gather(group, "workspace", (facts, problem), deadline_s)
    if group_size == 1 and problem is not None:
        raise ValueError(problem)
    _equal_on_ranks(everyone, "give every rank the same configuration")


def _equal_on_ranks(everyone: list[tuple[dict, str | None]], remedy: str) -> None:
    for ep_rank, (_, their_problem) in enumerate(everyone):
        if their_problem is not None:
            raise ValueError(f"rank {ep_rank}: {their_problem}")
    reference = everyone[0][0]
    for ep_rank, (theirs, _) in enumerate(everyone):
        for name in reference | theirs:
            if reference.get(name) != theirs.get(name):
                raise ValueError(
                    f"{name} differs between ranks: {reference.get(name)!r} on rank 0, {theirs.get(name)!r} on rank "
                    f"{ep_rank}; {remedy}"
                )
