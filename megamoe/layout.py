"""The symmetric arena, the local workspace and the kernel's parameter struct, described once.

Everything that host and device must agree on is a row of this file: `REGIONS` (what lies in memory, who writes and
who reads it), `RankParams` and `KernelParams` (the one by-value kernel parameter), `ROLES` and `STEPS` (the words of an
error record) and `KernelStatus` (that record). `layout_header.py` writes `csrc/params.gen.cuh` from them.

Offsets are the same for every layer that shares a workspace: each region is sized by its largest layer, and inside a
region each source rank's part starts at a fixed pitch. A rank that is one call ahead may therefore never write into
bytes that a slower rank still reads (ARCHITECTURE.md, "No exit barrier").
"""

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megamoe.plan import tiles
from megamoe.plan.tiles import BLOCK_TOKENS, SPLITS_WEIGHTS, in_expert_order

MAX_EP_SIZE = 32  # a bit of a 32-bit mask per destination rank
MAX_VIRTUAL_RANKS = 8
MAX_TOPK = 16  # four bits of a row's name
MAX_LOCAL_EXPERTS = 256  # shared-memory tables of the plan step
MAX_TOKENS = 1 << 20  # twenty bits of a row's name
MAX_ARRIVE_DEADLINE_S = 10**9  # nanoseconds in 64 bits
MAX_STEP_DEADLINE_S = 2000  # combine waits two of them, in 32 bits of microseconds: now_us in pipeline/5_combine.cuh
HEAD_SLICE_TOKENS = 16  # tokens whose routing travels behind one flag
HEAD_TOKENS_BITS, HEAD_LAYER_BITS = 21, 10  # of the word that says how many tokens a rank has; 31: its order of K

CHOICES = ("static", "balanced", "min_active")  # which copy of an expert serves a row: plan/choice.py
CHOICE_PASSES = 8  # rounds of water-filling at most: within 2 % of the optimum for 256 experts + 32 on 32 ranks
REPLICA_HEADER_WORDS = 4  # of the map that sched/replica.cuh reads
MAX_LOGICAL_EXPERTS = 512  # shared-memory tables of the plan step where copies are chosen by the batch's counts
MAX_COPIES = 1024  # the same

NUM_THREADS = 512  # of a CTA; csrc/roles.cuh says what each warp does
EXCHANGE_WARPS = 4  # of them; they combine, and at the end of a call the math warps help
MATH_WARPS = 8

K_BLOCK = 128  # columns of a scale factor, bytes of a swizzled row, K of a stage
N_BLOCK = 256  # weight rows of an image and of a tile
IMAGE_SF_OFFSET = N_BLOCK * K_BLOCK
IMAGE_COPY_BYTES = IMAGE_SF_OFFSET + 16  # what one bulk copy moves: e4m3 values, two fp32 scale factors, padding
IMAGE_PITCH_BYTES = IMAGE_SF_OFFSET + 128

# The same of an MXFP4 image: codes, then one scale byte per 32 codes, then two fp32 bases (quant/mxfp4_images.py).
MXFP4_GROUP = 32  # codes that share a UE8M0 scale
MXFP4_SCALES_OFFSET = N_BLOCK * K_BLOCK // 2
MXFP4_IMAGE_SF_OFFSET = MXFP4_SCALES_OFFSET + N_BLOCK * K_BLOCK // MXFP4_GROUP
MXFP4_IMAGE_COPY_BYTES = MXFP4_IMAGE_SF_OFFSET + 16
MXFP4_IMAGE_PITCH_BYTES = MXFP4_IMAGE_SF_OFFSET + 128

ROLES = ("none", "plan", "weights", "tokens", "math", "store", "exchange", "exit")
STEPS = ("none", "dispatch", "plan", "linear1", "swiglu", "linear2", "combine")
# Of trace builds (csrc/debug/trace.cuh): who writes a list of records, how long it is, what a record can say.
TRACE_ROLES = ("plan", "weights", "tokens", "math0", "math1", "store", "exchange")
TRACE_RECORDS = 2048
TRACE_EVENTS = (
    "start", "list", "pushed", "tile", "rows_named", "rows_here", "first_stage", "k_loop", "staging",
    "epilogue", "stored", "combined", "end",
)  # fmt: skip
CODES = ("ok", "timeout", "expert_out_of_range", "aborted_by_peer", "out_of_bounds", "unequal_bounds", "unequal_layers")
# Of test builds (csrc/debug/faults.cuh): what can be published late, wrong or not at all.
FAULT_POINTS = ("routing", "count", "head", "rows", "h", "combine", "decoded")


@dataclass(frozen=True)
class Dims:
    """Sizes that fix a workspace: the largest of every layer that shares it."""

    ep_size: int
    capacity: int
    hidden: int
    intermediate: int
    num_local_experts: int
    topk: int
    num_ctas: int
    max_block_tokens: int  # largest tile that any call can choose
    expert_bytes: int = 0
    num_staged_experts: int = 0
    token_slots: int = 0  # topk, and one for each shared expert
    num_shared_experts: int = 0  # the last of num_local_experts
    decoded_blocks: int = 0  # weight blocks of MXFP4 layers whose calls may decode them ahead
    decoded_images: int = 0  # their images

    @property
    def rows(self) -> int:
        """Most (token, slot) rows that one rank can receive; those of shared experts are its own tokens'."""
        return self.capacity * (self.ep_size * self.topk + self.num_shared_experts)

    def m_blocks(self, block_tokens: int) -> int:
        """Most token blocks of one rank: every local expert can end in one partial block."""
        return self.rows // block_tokens + self.num_local_experts

    @property
    def image_rows(self) -> int:
        """Rows of x_image: those received, each expert rounded up to whole blocks; 0 where no call needs them."""
        needed = in_expert_order(self.max_block_tokens)
        return self.rows + self.max_block_tokens * self.num_local_experts if needed else 0

    @property
    def max_m_blocks(self) -> int:
        return max(self.m_blocks(b) for b in BLOCK_TOKENS)

    @property
    def max_h_parts(self) -> int:
        """Most token blocks, counted by the CTAs that write a part of their h images."""
        return max(self.max_m_blocks, 2 * self.m_blocks(SPLITS_WEIGHTS))

    @property
    def slices(self) -> int:
        return max(1, math.ceil(self.capacity / HEAD_SLICE_TOKENS))


@dataclass(frozen=True)
class Region:
    """One row of the memory table. `shape` gives elements of `dtype`; peers address only `where='symmetric'`."""

    name: str
    where: str
    dtype: str
    shape: Callable[[Dims], tuple[int, ...]]
    writer: str
    reader: str
    meaning: str

    def nbytes(self, dims: Dims) -> int:
        return math.prod(self.shape(dims)) * DTYPE_BYTES[self.dtype]


DTYPE_BYTES = {"u8": 1, "e4m3": 1, "bf16": 2, "u32": 4, "i32": 4, "f32": 4}

# Flag words hold the number of the launch (epoch) that wrote them, so nothing clears them between launches.
# fmt: off
REGIONS = (
    Region("abort", "symmetric", "u32", lambda d: (1,),
           "any rank that gives up", "every wait", "1 + rank that gave up; 0 = healthy"),
    Region("head_ready", "symmetric", "u32", lambda d: (2, d.ep_size, d.slices),
           "source's exchange warps", "plan warps", "epoch of 16 tokens' routing; two banks by epoch parity"),
    Region("head_num_tokens", "symmetric", "u32", lambda d: (2, d.ep_size),
           "source's exchange warps", "plan warps", "tokens of a source rank, its layer, its order of K"),
    Region("x_ready", "symmetric", "u32", lambda d: (d.ep_size, d.capacity),
           "source's exchange warps", "tokens or exchange warps", "epoch of a received row"),
    Region("combine_ready", "symmetric", "u32", lambda d: (d.capacity, MAX_TOPK),
           "expert rank's store warp", "owner's exchange warps", "epoch of a combine_y row"),
    Region("head_idx", "symmetric", "i32", lambda d: (2, d.ep_size, d.capacity, d.token_slots),
           "source's exchange warps", "plan warps", "expert of each slot, -1 = unused"),
    Region("head_weights", "symmetric", "f32", lambda d: (2, d.ep_size, d.capacity, d.token_slots),
           "source's exchange warps", "tokens warps", "top-k weights"),
    Region("recv_x", "symmetric", "e4m3", lambda d: (d.ep_size, d.capacity, d.hidden),
           "source's exchange warps", "tokens or exchange warps", "token rows, once per (token, rank)"),
    Region("recv_x_sf", "symmetric", "f32", lambda d: (d.ep_size, d.capacity, d.hidden // K_BLOCK),
           "source's exchange warps", "tokens or exchange warps", "their scale factors"),
    Region("combine_y", "symmetric", "bf16", lambda d: (d.capacity, d.token_slots, d.hidden),
           "expert rank's store or math warps", "owner's exchange warps", "linear2 rows, one per slot"),
    Region("staging", "symmetric", "u8", lambda d: (2, d.num_staged_experts, d.expert_bytes),
           "sender of a rebalance", "receiver, after the next call", "weight images on the move; two banks by step"),
    Region("control", "local", "u32", lambda d: (4,),
           "last CTA of a launch", "all CTAs", "epoch, exit counter, ticket counter"),
    Region("record", "local", "u32", lambda d: (8,),
           "first wait to give up", "last CTA of the launch", "code, CTA, role, step, index, have, want, epoch"),
    Region("range_ready", "local", "u32", lambda d: (d.num_ctas,),
           "plan warps", "plan warps", "epoch of a CTA's counts"),
    Region("list_ready", "local", "u32", lambda d: (d.num_ctas,),
           "plan warps", "plan warps", "epoch of a CTA's part of row_list"),
    Region("h_ready", "local", "u32", lambda d: (d.max_h_parts, d.intermediate // K_BLOCK),
           "store warp (linear1)", "tokens warp (linear2)", "epoch of an h image, or of each half"),
    Region("block_done", "local", "u32", lambda d: (d.max_m_blocks,),
           "store warp (linear2)", "its last arriver, which zeroes it", "linear2 tiles done"),
    Region("range_count", "local", "u32", lambda d: (d.num_ctas, MAX_LOGICAL_EXPERTS),
           "plan warps", "plan warps", "rows per CTA range and expert"),
    Region("chosen", "local", "i32", lambda d: (d.capacity, d.token_slots),
           "plan warps", "exchange warps", "slot over all ranks of each of the rank's own rows, if counts choose it"),
    Region("row_list", "local", "u32", lambda d: (d.rows,),
           "plan warps", "tokens warps", "packed (source, token, slot), sorted by expert"),
    Region("decode_done", "local", "u32", lambda d: (d.decoded_blocks,),
           "exchange warps", "their last arriver, which zeroes it", "decoded images of a weight block"),
    Region("decoded_ready", "local", "u32", lambda d: (d.decoded_blocks,),
           "exchange warps", "weights warp", "epoch of a decoded weight block"),
    Region("decoded", "local", "u8", lambda d: (d.decoded_images, IMAGE_PITCH_BYTES),
           "exchange warps", "weights warp", "MXFP4 weights as FP8 images, linear1's first"),
    Region("x_image_ready", "local", "u32", lambda d: (d.image_rows,),
           "exchange warps", "tokens warp (linear1)", "epoch of a row of x_image"),
    Region("x_image", "local", "u8", lambda d: (d.image_rows, d.hidden // K_BLOCK, K_BLOCK + 4),
           "exchange warps", "tokens warp (linear1)", "received rows in expert order, as stage images"),
    Region("h", "local", "u8",
           lambda d: (d.rows + max(BLOCK_TOKENS) * d.num_local_experts, d.intermediate // K_BLOCK, K_BLOCK + 4),
           "store warp (linear1)", "tokens warp (linear2)", "SwiGLU output: e4m3 rows and their scale factors"),
)
# fmt: on
REGION_ALIGN = 1024
# Words that must be zero before the first launch and after a failed one; the rest may hold anything.
ZEROED = (
    "abort",
    "head_ready",
    "x_ready",
    "combine_ready",
    "control",
    "range_ready",
    "list_ready",
    "decode_done",
    "decoded_ready",
    "x_image_ready",
    "h_ready",
    "block_done",
)


class RankParams(ctypes.Structure):
    """What one rank's CTAs see: the caller's tensors of this call, the weight images, the rank's own workspace."""

    _fields_ = (
        ("x", ctypes.c_uint64),  # bf16 or e4m3 [num_tokens, hidden]
        ("x_sf", ctypes.c_uint64),  # fp32 [num_tokens, hidden / 128]; 0 with bf16 input
        ("topk_idx", ctypes.c_uint64),  # int32 or int64 [num_tokens, topk]
        ("topk_weights", ctypes.c_uint64),  # fp32 or bf16 [num_tokens, topk]
        ("num_tokens_ptr", ctypes.c_uint64),  # device int32, or 0
        ("y", ctypes.c_uint64),  # bf16 [num_tokens, hidden]
        ("linear1", ctypes.c_uint64),  # weight images
        ("linear2", ctypes.c_uint64),
        ("local", ctypes.c_uint64),  # base of the local workspace
        ("status", ctypes.c_uint64),  # KernelStatus in pinned host memory
        ("trace", ctypes.c_uint64),  # TraceRecord [CTAs, trace roles, TRACE_RECORDS], in trace builds; 0 otherwise
        ("replica_map", ctypes.c_uint64),  # words of sched/replica.cuh, read by every launch; 0: expert ids are slots
        ("load_count", ctypes.c_uint64),  # u64 [num_logical_experts + slots], rows served, with replica_map
        ("linear1_dump", ctypes.c_uint64),  # fp32 sums of linear1, in test builds; 0 otherwise
        ("num_tokens", ctypes.c_uint32),  # rows of the caller's tensors
        ("ep_rank", ctypes.c_uint32),
    )


class RankBiases(ctypes.Structure):
    """The biases of one rank's expert slots; both 0 in layers without."""

    _fields_ = (
        ("linear1", ctypes.c_uint64),  # fp32 [slots, 2 * intermediate], gate, then up
        ("linear2", ctypes.c_uint64),  # fp32 [slots, hidden]
    )


class KernelParams(ctypes.Structure):
    """The kernel's only parameter, passed by value. Last what only -DEXTRAS reads: the others' code holds offsets."""

    _fields_ = (
        ("arena", ctypes.c_uint64 * MAX_EP_SIZE),  # every rank's symmetric arena, as addressed from here
        ("ranks", RankParams * MAX_VIRTUAL_RANKS),
        *((f"off_{region.name}", ctypes.c_uint64) for region in REGIONS),
        ("recv_x_pitch", ctypes.c_uint64),  # bytes between two source ranks
        ("recv_x_sf_pitch", ctypes.c_uint64),
        ("head_pitch", ctypes.c_uint64),  # elements between two source ranks of head_idx and head_weights
        ("prefetch_stages", ctypes.c_uint64),  # of its likely first tile, that a CTA asks the L2 cache for at entry
        ("layer", ctypes.c_uint64),  # which of the workspace's, mod 2^HEAD_LAYER_BITS: ranks must call the same one
        ("decode_lag", ctypes.c_uint64),  # experts whose linear1 is decoded ahead of the first one's linear2
        ("arrive_deadline_ns", ctypes.c_uint64),  # until every rank has sent its routing
        ("step_deadline_ns", ctypes.c_uint64),  # any later wait
        ("ep_size", ctypes.c_uint32),
        ("ctas_per_rank", ctypes.c_uint32),
        ("hidden", ctypes.c_uint32),
        ("intermediate", ctypes.c_uint32),
        ("num_local_experts", ctypes.c_uint32),  # slots for experts, the shared ones' last
        ("topk", ctypes.c_uint32),  # slots of a token, the shared experts' included
        ("capacity", ctypes.c_uint32),
        ("slices", ctypes.c_uint32),  # head slices of the workspace's capacity
        ("order_group", ctypes.c_uint32),
        ("order_lag", ctypes.c_uint32),
        ("combine_columns", ctypes.c_uint32),  # columns of one combine item
        ("combine_chunks", ctypes.c_uint32),  # items a token
        ("x_is_fp8", ctypes.c_uint32),
        ("idx_is_int64", ctypes.c_uint32),
        ("weights_are_bf16", ctypes.c_uint32),
        ("swiglu_limit", ctypes.c_float),  # +inf: no clamp
        ("biases", RankBiases * MAX_VIRTUAL_RANKS),
        ("num_shared_experts", ctypes.c_uint64),
        ("gate_exponent", ctypes.c_float),  # sigmoid(slope * gate) = 1 / (1 + 2^(gate_exponent * gate))
        ("up_shift", ctypes.c_float),  # added to up
    )


class KernelStatus(ctypes.Structure):
    """A device error, written once by the rank that met it. `code` is stored last, with release."""

    _fields_ = tuple(
        (name, ctypes.c_uint32)
        for name in ("code", "rank", "cta", "role", "step", "index", "have", "want", "epoch", "origin")
    )


@dataclass(frozen=True)
class Placed:
    """A region with its size for given dimensions and its byte offset in the arena or the local workspace."""

    name: str
    where: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    offset: int
    writer: str
    reader: str
    meaning: str


def place(dims: Dims, gap: int = 0) -> tuple[list[Placed], int, int]:
    """Returns the placed regions, the bytes of the symmetric arena and the bytes of the local workspace. gap: bytes
    left behind each region, a multiple of REGION_ALIGN (canaries of debug builds)."""
    ends = {"symmetric": 0, "local": 0}
    placed = []
    for r in REGIONS:
        nbytes = r.nbytes(dims)
        placed.append(
            Placed(r.name, r.where, r.dtype, r.shape(dims), nbytes, ends[r.where], r.writer, r.reader, r.meaning)
        )
        ends[r.where] += math.ceil(nbytes / REGION_ALIGN) * REGION_ALIGN + gap
    return placed, ends["symmetric"], ends["local"]


def ctas_per_rank(num_sms: int, num_ranks: int) -> int:
    """CTAs of each of `num_ranks` ranks that share a GPU: even, since CTAs work in pairs in the largest tiles."""
    return num_sms // num_ranks // 2 * 2


def image_blocks(linear: int, hidden: int, intermediate: int) -> tuple[int, int]:
    """Weight images of one expert's linear1 or linear2 (`linear` = 1 or 2): blocks of 256 weight rows, of 128 of K."""
    n, k = (2 * intermediate, hidden) if linear == 1 else (hidden, intermediate)
    return -(-n // N_BLOCK), k // K_BLOCK


def expert_bytes(config) -> int:
    """Bytes of one expert's weight images and biases."""
    pitch = MXFP4_IMAGE_PITCH_BYTES if config.weight_format == "mxfp4" else IMAGE_PITCH_BYTES
    images = sum(math.prod(image_blocks(i, config.hidden, config.intermediate)) for i in (1, 2)) * pitch
    return images + 4 * (2 * config.intermediate + config.hidden if config.bias else 0)


def dims_of(moe_configs: Sequence, ep_config, ep_size: int, num_ctas: int = 132) -> Dims:
    """The dimensions of a workspace that serves all of `moe_configs`."""
    capacity = ep_config.num_max_tokens_per_rank
    staged = ep_config.num_staged_experts
    return Dims(
        ep_size=ep_size,
        capacity=capacity,
        hidden=max(c.hidden for c in moe_configs),
        intermediate=max(c.intermediate for c in moe_configs),
        num_local_experts=max(ep_config.num_slots(c, ep_size) + c.num_shared_experts for c in moe_configs),
        num_shared_experts=max(c.num_shared_experts for c in moe_configs),
        token_slots=max(c.token_slots for c in moe_configs),
        expert_bytes=max(map(expert_bytes, moe_configs)) if staged else 0,
        num_staged_experts=staged,
        topk=max(c.topk for c in moe_configs),
        num_ctas=num_ctas,
        max_block_tokens=max(max(tiles.reachable_tiles(c, ep_size, capacity)) for c in moe_configs),
        **_decoded(moe_configs, ep_config, ep_size),
    )


def _decoded(moe_configs: Sequence, ep_config, ep_size: int) -> dict[str, int]:
    blocks = images = 0
    for c in moe_configs:
        if tiles.decodes_ahead(
            c.weight_format, tiles.choose_block_tokens(c, ep_size, ep_config.num_max_tokens_per_rank)
        ):
            slots = ep_config.num_slots(c, ep_size) + c.num_shared_experts
            shapes = [image_blocks(i, c.hidden, c.intermediate) for i in (1, 2)]
            blocks = max(blocks, slots * sum(n for n, _ in shapes))
            images = max(images, slots * sum(n * k for n, k in shapes))
    return {"decoded_blocks": blocks, "decoded_images": images}


def regions(moe_configs: Sequence, ep_config, ep_size: int) -> list[Placed]:
    """Every region of one rank, sized for all of `moe_configs`: what `plan_memory` explains."""
    return place(dims_of(moe_configs, ep_config, ep_size))[0]
