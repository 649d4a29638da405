"""The CUDA engine: weights as images, one kernel launch a call. The workspace half holds what layers share on a GPU."""

import contextlib
import ctypes
import math
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch import Tensor

from megamoe import canaries, layout
from megamoe.builds import builds_of, check_blocks, kernel_build, needs_extras
from megamoe.config import MoEConfig
from megamoe.device_error import device_error
from megamoe.errors import ErrorRecord, MegaMoEError
from megamoe.layer_checks import equal_dtypes
from megamoe.plan import tiles
from megamoe.quant import mxfp4_images
from megamoe.quant import weights as fp8_images
from megamoe.replicas import DeviceReplicas
from megamoe.steps import OAI_ALPHA, ExpertWeights, RankInput
from megamoe.streams import current_stream_handle
from megamoe_cuda.compile import CompiledKernel, compile_kernel, debug_level
from megamoe_cuda.device import device_info
from megamoe_cuda.gather import busy, gather
from megamoe_cuda.launch import BoundLaunch, LoadedKernel, read_symbol_u32
from megamoe_cuda.symmetric import HostStatus, NvshmemMemory, OneGpuMemory

write_addresses = struct.Struct("=6Q").pack_into
"""The first six fields of layout.RankParams, x to y, with one call."""
IMAGES = {"fp8": fp8_images, "mxfp4": mxfp4_images}
"""How a weight format is packed: image_shape and pack_expert."""


@contextlib.contextmanager
def together(group, deadline_s: float):
    """What each rank does alone, and may fail at alone: MegaMoEError on the others, naming it. Time spent inside counts
    for nobody's deadline. group: None for one process."""
    if group is None:
        yield
        return
    failure = None
    with busy(group, deadline_s):
        try:
            yield
        except Exception as error:
            failure = error
    words = None if failure is None else f"{type(failure).__name__}: {failure}"
    everyone = gather(group, "preparation", words, deadline_s)
    if failure is not None:
        raise failure
    for rank, theirs in enumerate(everyone):
        if theirs is not None:
            record = ErrorRecord(dist.get_rank(group), -1, "host", "preparation", rank, 0, 1)
            raise MegaMoEError(f"rank {rank} could not prepare its workspace: {theirs}", record)


class FusedWorkspace:
    """Symmetric arena, local workspace, status record and loaded kernels of one process.

    Every kernel that the workspace's layers can choose is compiled here, before any launch: a rank that compiles while
    its peers wait would eat their deadline. All that a rank does alone comes first, and what fails on one is raised on
    all: none goes on into a collective call that the others never make.
    """

    def __init__(self, workspace):
        group, deadline_s = workspace.group, workspace.ep_config.arrive_deadline_s
        with contextlib.ExitStack() as taken:  # given back where another rank, or a later step, fails
            with together(group if workspace.ep_size > workspace.num_ranks_here else None, deadline_s):
                arena_bytes = self._prepare(workspace, taken)
            with torch.cuda.device(self.device):
                if self.num_ranks == self.ep_size:
                    self.memory = OneGpuMemory(arena_bytes, self.ep_size, self.device)
                else:
                    self.memory = NvshmemMemory(arena_bytes, group, self.device, deadline_s)
                self._clear()
            taken.pop_all()

    def _prepare(self, workspace, taken: contextlib.ExitStack) -> int:
        """Kernels, local memory and the status record; nothing here waits for a peer. -> bytes of the arena"""
        self.device, self.device_index = workspace.device, workspace.device.index
        self.ep_size, self.num_ranks = workspace.ep_size, workspace.num_ranks_here
        self.first_rank = 0 if workspace.ep_config.virtual_ranks else workspace.ep_rank
        self.ep_config = workspace.ep_config
        shared = any(config.num_shared_experts for config in workspace.moe_configs)
        self.ids_are_mapped = shared or self.ep_config.takes_plans
        self.cuts: dict[MoEConfig, dict[int, tiles.Cut]] = {}  # made so far, by num_tokens_bound
        with torch.cuda.device(self.device):
            torch.cuda.current_stream().synchronize()  # makes the context current for the driver calls below
            num_sms = min(workspace.ep_config.num_sms or 10**6, device_info(self.device.index).num_sms)
            self.ctas_per_rank = layout.ctas_per_rank(num_sms, self.num_ranks)
            if self.ctas_per_rank < 2:
                raise ValueError(f"num_sms={num_sms} is less than two for each of virtual_ranks={self.num_ranks}; "
                                 "raise it, or use fewer ranks")  # fmt: skip
            self.dims = layout.dims_of(workspace.moe_configs, self.ep_config, self.ep_size, self.ctas_per_rank)
            check_blocks(workspace.moe_configs, self.ep_size, self.ep_config)
            self.debug = debug_level() > 0
            self.regions, arena_bytes, local_bytes = layout.place(self.dims, canaries.GAP if self.debug else 0)
            self.kernels = self._load_kernels(workspace.moe_configs, taken)
            self.local = [torch.zeros(local_bytes, dtype=torch.uint8, device=self.device)
                          for _ in range(self.num_ranks)]  # fmt: skip
            self.status = HostStatus(self.num_ranks * ctypes.sizeof(layout.KernelStatus))
            taken.callback(self.status.close)
            self.records = list((layout.KernelStatus * self.num_ranks).from_buffer(self.status.host))
            words = memoryview(self.status.host).cast("B").cast("I")
            self.codes = words[:: len(words) // self.num_ranks]  # of the records, for a look at each call
        return arena_bytes

    def _load_kernels(self, configs, taken: contextlib.ExitStack) -> dict[tuple[str, int, bool], LoadedKernel]:
        wanted = builds_of(configs, self.ep_size, self.ep_config.num_max_tokens_per_rank)
        with ThreadPoolExecutor(max_workers=4) as pool:  # into the compiler's memory; loading is not for threads
            list(pool.map(lambda key: _compiled(*key, self.ep_config.takes_plans), wanted))
        return {key: taken.enter_context(contextlib.closing(self.load_kernel(*key))) for key in wanted}

    def load_kernel(self, weight_format: str, block: int, extras: bool, **defines: int) -> LoadedKernel:
        """The kernel of that kernel_key, with further defines a test or trace build of it."""
        kernel = _compiled(weight_format, block, extras, self.ep_config.takes_plans, **defines)
        shared_bytes = read_symbol_u32(kernel.cubin, "mega_moe_shared_bytes")
        loaded = LoadedKernel(kernel.cubin, kernel.entry, shared_bytes)
        if self.debug:
            sizes = [region.bytes for region in self.regions]
            loaded.write_symbol("mega_moe_region_bytes", struct.pack(f"<{len(sizes)}Q", *sizes))
        return loaded

    def _clear(self) -> None:
        """Flags and counters to zero, epoch to 1, on all ranks between two barriers."""
        self.memory.barrier()
        for region in self.regions:
            if region.name in layout.ZEROED:
                for base in self.memory.local if region.where == "symmetric" else self.local:
                    base[region.offset : region.offset + region.bytes].zero_()
        control = next(r for r in self.regions if r.name == "control")
        for base in self.local:
            base[control.offset : control.offset + 4].view(torch.int32).fill_(1)
        self.status.host[:] = 0
        if self.debug:
            for where, memories in (("symmetric", self.memory.local), ("local", self.local)):
                for memory in memories:
                    canaries.fill(memory, self.regions, where)
        self.memory.barrier()

    def base_params(self) -> layout.KernelParams:
        """The fields that no layer and no call changes."""
        p = layout.KernelParams()
        p.arena[: self.ep_size] = self.memory.base_ptrs
        for region in self.regions:
            setattr(p, f"off_{region.name}", region.offset)
        d = self.dims
        p.recv_x_pitch = d.capacity * d.hidden
        p.recv_x_sf_pitch = d.capacity * (d.hidden // layout.K_BLOCK) * 4
        p.head_pitch = d.capacity * d.token_slots
        p.arrive_deadline_ns = int(self.ep_config.arrive_deadline_s * 1e9)
        p.step_deadline_ns = int(self.ep_config.step_deadline_s * 1e9)
        p.ep_size, p.ctas_per_rank = self.ep_size, self.ctas_per_rank
        p.capacity, p.slices = d.capacity, d.slices
        record_bytes = ctypes.sizeof(layout.KernelStatus)
        for i in range(self.num_ranks):
            p.ranks[i].local = self.local[i].data_ptr()
            p.ranks[i].status = self.status.device_ptr + i * record_bytes
            p.ranks[i].ep_rank = self.first_rank + i
        return p

    def check(self) -> None:
        """Raise the device's record, if any. Reads pinned memory and does not wait for the GPU. A debug build
        waits, and looks at the canaries too."""
        if self.debug and not torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize(self.device)
            self._check_canaries()
        if any(self.codes):
            raise device_error(self.records, self.ids_are_mapped)

    def _check_canaries(self) -> None:
        for where, memories in (("symmetric", self.memory.local), ("local", self.local)):
            for i, memory in enumerate(memories):
                found = canaries.find(memory, self.regions, where)
                if found is not None:
                    name, past, value = found
                    index = [region.name for region in layout.REGIONS].index(name)
                    record = ErrorRecord(self.first_rank + i, -1, "none", "none", index, value, canaries.VALUE)
                    raise MegaMoEError(f"byte {past} past the end of region {name} was overwritten", record)

    def reset(self) -> None:
        """Collective. Waits for the GPU, clears flags, counters, epoch and the record."""
        self._clear()

    def abandon(self) -> None:
        """Let go without a word to the peers, who may be gone: on the way out of an exception a collective call would
        hang and hide it. The process should end; its memory goes with it."""
        self.memory.abandon()
        self.kernels, self.local = {}, []

    def close(self) -> None:
        """Collective: gives the symmetric memory back after all ranks' work is done."""
        torch.cuda.synchronize(self.device)
        self.memory.close()
        self.records, self.codes = [], ()  # views of what the next line frees
        self.status.close()
        for kernel in self.kernels.values():
            kernel.close()
        self.kernels, self.local = {}, []


def _compiled(weight_format: str, block: int, extras: bool, plans: bool, **defines: int) -> CompiledKernel:
    build = kernel_build(block, weight_format, extras, plans=plans)
    return compile_kernel(build.source, build.entry, build.defines | defines)


class FusedEngine:
    """Holds one layer's weight images, its biases and its prepared parameters. For one thread at a time, like the
    layer."""

    wait_s = None  # the device waits, not the host

    def __init__(self, config: MoEConfig, workspace):
        self.config, self.shared = config, workspace.fused
        self.extras = needs_extras(config)
        self.images: list[tuple[Tensor, ...]] = []  # linear1, linear2, then the bytes of their biases if there are any
        shared = self.shared
        self.slots = shared.ep_config.num_slots(config, shared.ep_size)
        sizes = (self.slots + config.num_shared_experts, config.hidden, config.intermediate)
        self.packing = IMAGES[config.weight_format]
        self.shapes = [self.packing.image_shape(1, *sizes), self.packing.image_shape(2, *sizes)]
        if config.bias:
            self.shapes += [(sizes[0], 4 * 2 * config.intermediate), (sizes[0], 4 * config.hidden)]
        self.params = shared.base_params()
        p = self.params
        p.hidden, p.intermediate, p.topk = config.hidden, config.intermediate, config.token_slots
        p.num_local_experts, p.num_shared_experts = sizes[0], config.num_shared_experts
        p.swiglu_limit = math.inf if config.swiglu_limit is None else config.swiglu_limit
        slope, p.up_shift = (OAI_ALPHA, 1.0) if config.activation == "swiglu_oai" else (1.0, 0.0)
        p.gate_exponent = -slope * math.log2(math.e)
        self.ep_size = shared.ep_size
        self.cuts = shared.cuts.setdefault(config, {})
        self.launches: dict[LoadedKernel, BoundLaunch] = {}  # of self.params
        self.kind = self.cut = self.key = self.kernel = self.launch = None  # of the last call: what self.params hold
        self.ranks = [p.ranks[i] for i in range(shared.num_ranks)]
        self.address_fields = [memoryview(rank).cast("B") for rank in self.ranks]
        # Without slots or staging memory for plans ids are slots, and the kernel does nothing for them
        self.replicas: DeviceReplicas | None = None
        if shared.ep_config.takes_plans:
            self.replicas = DeviceReplicas(config, shared, self.slots, workspace.staging)
            for rank, counts in zip(p.ranks, self.replicas.counts, strict=False):
                rank.replica_map, rank.load_count = self.replicas.map.data_ptr(), counts.data_ptr()
        p.layer = workspace.num_layers % (1 << layout.HEAD_LAYER_BITS)
        workspace.num_layers += 1  # behind what can fail on one rank alone

    def load_weights(self, weights: list[ExpertWeights]) -> None:
        """weights: one per rank held here. Packed expert by expert; in place from the second time on. The placement
        is the default one again."""
        if not self.images:
            self.images = [
                tuple(torch.empty(s, dtype=torch.uint8, device=self.shared.device) for s in self.shapes)
                for _ in weights
            ]
            self._point_at_images()
        for (linear1, linear2, *biases), w in zip(self.images, weights, strict=True):
            for e in range(len(w.linear1)):
                self.packing.pack_expert(1, w.linear1[e], w.linear1_sf[e], linear1[e])
                self.packing.pack_expert(2, w.linear2[e], w.linear2_sf[e], linear2[e])
            for kept, given in zip(biases, (w.linear1_bias, w.linear2_bias), strict=False):
                kept.view(torch.float32)[: len(given)] = given
        if self.replicas is not None and self.replicas.placement_version > 1:  # also one that is only staged so far
            self.replicas.reset()

    def _point_at_images(self) -> None:
        for rank, biases, images in zip(self.params.ranks, self.params.biases, self.images, strict=False):
            rank.linear1, rank.linear2 = (image.data_ptr() for image in images[:2])
            if self.config.bias:
                biases.linear1, biases.linear2 = (bias.data_ptr() for bias in images[2:])

    @property
    def placement(self):
        return self._planned().placement

    @property
    def placement_version(self) -> int:
        return self._planned().placement_version

    @property
    def expert_bytes(self) -> int:
        return layout.expert_bytes(self.config)

    @property
    def load_count(self) -> list[tuple[Tensor, Tensor]]:
        experts = self.config.num_experts
        return [(counts[:experts], counts[experts:]) for counts in self._planned().counts]

    def check_fits(self, replicas) -> None:
        self._planned().check_fits(replicas)

    def stage(self, moves) -> None:
        self.shared.check()
        self._planned().stage(moves, self.images)

    def apply(self, moves, placement, replicas) -> None:
        """Between two launches on the current stream: weights into their slots, then the map."""
        self._planned().apply(moves, self.images)
        self._planned().put_in_force(placement, replicas)

    def settle(self) -> None:
        """Collective: every rank's copies have arrived."""
        self.shared.memory.barrier()

    def _planned(self) -> DeviceReplicas:
        if self.replicas is None:
            raise ValueError(
                "the workspace was made without room for plans; set EPConfig.num_staged_experts (and "
                "num_redundant_slots_per_rank for redundant experts)"
            )
        return self.replicas

    def expert_tensors(self) -> list[list[Tensor]]:
        """Per rank its images and biases, tensors with slots along the first dimension."""
        return [list(rank) for rank in self.images]

    def share_weights(self, other: "FusedEngine") -> None:
        """Use what `other` has loaded, now and later, where it is placed; rows served are counted for each."""
        self.images = other.images
        self._point_at_images()
        for mine, theirs in zip(self.params.ranks, other.params.ranks, strict=True):
            mine.replica_map = theirs.replica_map

    def forward(
        self, inputs: Sequence[RankInput], num_tokens_bound: int, outs: Sequence[Tensor | None], kind=None, stream=None
    ) -> list[Tensor]:
        # Host time of every call: of one whose kind the last one had, only addresses are written
        shared = self.shared
        if torch.accelerator.current_device_index() != shared.device_index:
            with torch.cuda.device(shared.device):
                return self.forward(inputs, num_tokens_bound, outs, kind, stream)
        if shared.debug or any(shared.codes):
            shared.check()
        if kind is None or kind is not self.kind or self.cuts.get(num_tokens_bound) is not self.cut:
            self._prepare(inputs, num_tokens_bound, kind)
        results = []
        for i, (x, x_sf, topk_idx, topk_weights, num_tokens) in enumerate(inputs):
            out = outs[i]
            if out is None:
                out = torch.empty_like(x, dtype=torch.bfloat16)
            write_addresses(
                self.address_fields[i], 0, x.data_ptr(), 0 if x_sf is None else x_sf.data_ptr(), topk_idx.data_ptr(),
                topk_weights.data_ptr(), 0 if num_tokens is None else num_tokens.data_ptr(), out.data_ptr(),
            )  # fmt: skip
            results.append(out)
        kernel = shared.kernels[self.key]  # builds for traces and tests take a kernel's place
        if kernel is not self.kernel:
            self.kernel, self.launch = kernel, self.launches.get(kernel) or self._new_launch(kernel)
        self.launch(current_stream_handle(shared.device_index) if stream is None else stream)
        return results

    def repeat(self, kind, num_tokens_bound: int, addresses: tuple[int, ...], stream: int) -> bool:
        """forward for one rank and a kind that the last call had, with the addresses of its tensors; False: nothing was
        done, since something else is not as it was then."""
        shared = self.shared
        if (
            kind is not self.kind
            or self.cuts.get(num_tokens_bound) is not self.cut
            or shared.kernels.get(self.key) is not self.kernel
            or shared.debug
            or any(shared.codes)
            or torch.accelerator.current_device_index() != shared.device_index
        ):
            return False
        write_addresses(self.address_fields[0], 0, *addresses)
        self.launch(stream)
        return True

    def _prepare(self, inputs: Sequence[RankInput], num_tokens_bound: int, kind) -> None:
        """All that calls of one kind share: sizes, dtypes, how the launch is cut, which kernel."""
        self.kind, p = None, self.params  # what fails below is prepared anew
        if len(inputs) > 1:
            equal_dtypes(inputs)
        for rank, rank_input in zip(self.ranks, inputs, strict=True):
            rank.num_tokens = rank_input.x.shape[0]
        p.x_is_fp8 = rank_input.x_sf is not None
        p.idx_is_int64 = rank_input.topk_idx.dtype is torch.int64
        p.weights_are_bf16 = rank_input.topk_weights.dtype is torch.bfloat16
        cut = self.cuts.get(num_tokens_bound) or self._new_cut(num_tokens_bound)
        (block, p.order_group, p.order_lag, p.prefetch_stages, p.decode_lag,
         p.combine_columns, p.combine_chunks) = cut  # fmt: skip
        self.cut, self.key, self.kind = cut, (self.config.weight_format, block, self.extras), kind

    def _new_cut(self, bound: int) -> tiles.Cut:
        warps = self.shared.ctas_per_rank * (layout.EXCHANGE_WARPS + layout.MATH_WARPS)
        return self.cuts.setdefault(bound, tiles.cut_launch(self.config, self.ep_size, bound, warps))

    def _new_launch(self, kernel: LoadedKernel) -> BoundLaunch:
        ctas = self.shared.ctas_per_rank * self.shared.num_ranks
        return self.launches.setdefault(kernel, kernel.bind(ctas, layout.NUM_THREADS, self.params))

    def check(self) -> None:
        self.shared.check()

    def close(self) -> None:
        self.images, self.launches, self.kernel, self.launch = [], {}, None, None
        if self.replicas is not None:
            self.replicas.drop_staged()
