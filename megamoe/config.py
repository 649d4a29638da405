"""What the model is (MoEConfig) and how it is spread over ranks (EPConfig). Sizes are checked here and nowhere else."""

import math
from dataclasses import dataclass

from megamoe.layout import MAX_ARRIVE_DEADLINE_S, MAX_STEP_DEADLINE_S, MAX_TOPK

BLOCK = 128
"""Elements that share one scale factor along K, and both sides of a weight block (DeepSeek-V3 checkpoint
convention)."""

WEIGHT_FORMATS = ("fp8", "mxfp4", "bf16")
ACTIVATIONS = ("swiglu", "swiglu_oai")


def _check_int(name: str, value, low: int, high: int | None = None, multiple: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} has type {type(value).__name__}; pass an int")
    if value < low or (high is not None and value > high):
        wanted = f"at least {low}" if high is None else f"between {low} and {high}"
        nearest = -(-low // multiple) * multiple if value < low else high
        raise ValueError(f"{name}={value} must be {wanted}; nearest legal value {nearest}")


def _check_multiple(name: str, value, multiple: int) -> None:
    _check_int(name, value, 1, multiple=multiple)
    if value % multiple:
        below, above = value // multiple * multiple, (value // multiple + 1) * multiple
        nearest = f"{below}, {above}" if below else f"{above}"
        raise ValueError(f"{name}={value} must be a multiple of {multiple}; nearest {nearest}")


def _check_positive(name: str, value, high: float | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}={value!r} has type {type(value).__name__}; pass a number")
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name}={value} must be a finite number above 0")
    if high is not None and value > high:
        raise ValueError(f"{name}={value} must be at most {high}")


@dataclass(frozen=True)
class MoEConfig:
    """The model side of one MoE layer.

    hidden: model width, a multiple of 128.
    intermediate: expert width per SwiGLU half (linear1 has 2 * intermediate outputs), a multiple of 128.
    num_experts: experts the router sees, over all ranks.
    topk: slots per token, 1 to 16; a slot may be unused (id -1), and may repeat an expert.
    weight_format: "fp8" (e4m3 operands with fp32 scale factors), "mxfp4" (weights in e2m1 with a power-of-two scale
        factor for each 32 along K, activations as in "fp8"), or "bf16" (no quantizers; CPU only; also serves fp32
        models).
    swiglu_limit: None, or the clamp of the SwiGLU inputs: gate <= limit, |up| <= limit.
    activation: "swiglu", or "swiglu_oai", gpt-oss's variant: steps.swiglu has both formulas.
    bias: whether both linears add one: steps.ExpertWeights has shapes and dtypes.
    num_shared_experts: experts beside those, of the same intermediate size, that every token goes to with weight 1:
        each rank holds all of them and serves its own tokens. One of k times the size is the sum of k of these. With
        topk at most 16.
    ValueError or TypeError names the field, its value and the nearest legal ones.
    """

    hidden: int
    intermediate: int
    num_experts: int
    topk: int
    weight_format: str = "fp8"
    swiglu_limit: float | None = None
    activation: str = "swiglu"
    bias: bool = False
    num_shared_experts: int = 0

    def __post_init__(self):
        _check_multiple("hidden", self.hidden, BLOCK)
        _check_multiple("intermediate", self.intermediate, BLOCK)
        _check_int("num_experts", self.num_experts, 1)
        _check_int("topk", self.topk, 1, MAX_TOPK)
        if self.weight_format not in WEIGHT_FORMATS:
            raise ValueError(
                f"weight_format={self.weight_format!r} must be one of {', '.join(map(repr, WEIGHT_FORMATS))}"
            )
        if self.swiglu_limit is not None:
            _check_positive("swiglu_limit", self.swiglu_limit)
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} must be one of {', '.join(map(repr, ACTIVATIONS))}")
        if not isinstance(self.bias, bool):
            raise TypeError(f"bias={self.bias!r} has type {type(self.bias).__name__}; pass True or False")
        _check_int("num_shared_experts", self.num_shared_experts, 0, MAX_TOPK - self.topk)

    @property
    def has_e4m3_activations(self) -> bool:
        """Tokens and SwiGLU outputs are quantized to e4m3; the layer takes and returns bf16."""
        return self.weight_format != "bf16"

    @property
    def token_slots(self) -> int:
        """Slots of a token: the caller's topk, then one for each shared expert."""
        return self.topk + self.num_shared_experts

    def num_local_experts(self, ep_size: int) -> int:
        """Experts on each of ``ep_size`` ranks; expert e lives on rank e // num_local_experts. ValueError if uneven."""
        _check_int("ep_size", ep_size, 1)
        if self.num_experts % ep_size:
            sizes = [size for size in range(1, self.num_experts + 1) if self.num_experts % size == 0]
            below, above = (
                max(s for s in sizes if s < ep_size or s == 1),
                min((s for s in sizes if s > ep_size), default=None),
            )
            nearest = f"{below}, {above}" if above else f"{below}"
            raise ValueError(
                f"num_experts={self.num_experts} cannot be spread evenly over ep_size={ep_size} ranks; "
                f"nearest ep_size {nearest}"
            )
        return self.num_experts // ep_size


@dataclass(frozen=True)
class EPConfig:
    """The rank side: capacity, deadlines and the device's budget.

    num_max_tokens_per_rank: capacity; no call may bring more tokens on any rank.
    virtual_ranks: None (one rank a process), or R: this one process plays R ranks and every per-rank tensor argument
        of the layer is a list of R tensors, as is the result.
    arrive_deadline_s: seconds until every rank must have entered a call, or the workspace's construction or close();
        kernel compilation does not count. Raise it where ranks load models at different speeds.
    step_deadline_s: seconds any later wait of that call may take, at most 2000. reset() waits for both.
    num_sms: SMs the kernel may use, all ranks of this process together; None = all. No meaning on CPU.
    ranks_per_domain: neighbouring ranks that form one NVLink domain; None = found from the GPUs' peer access (ranks on
        CPU are one domain).
    domain_tokens: with several domains, most rows a rank sends to one domain at once. None = the capacity: shapes never
        depend on the routing, as a CUDA graph needs. A number: less memory and only the rows that the routing asks for,
        in as many rounds as it takes, with counts that meet on the host.
    num_redundant_slots_per_rank: expert slots on each rank beyond num_experts / ep_size, for further copies of experts
        (MoELayer.load_plan). Each takes the memory of an expert's weights.
    num_staged_experts: experts whose weights a rank can receive between two calls of a rebalance; on CUDA each takes
        symmetric memory for twice its weights. 0: plans cannot be loaded on CUDA.
    """

    num_max_tokens_per_rank: int
    virtual_ranks: int | None = None
    arrive_deadline_s: float = 60.0
    step_deadline_s: float = 10.0
    num_sms: int | None = None
    ranks_per_domain: int | None = None
    domain_tokens: int | None = None
    num_redundant_slots_per_rank: int = 0
    num_staged_experts: int = 0

    def __post_init__(self):
        _check_int("num_redundant_slots_per_rank", self.num_redundant_slots_per_rank, 0)
        _check_int("num_staged_experts", self.num_staged_experts, 0)
        _check_int("num_max_tokens_per_rank", self.num_max_tokens_per_rank, 1)
        if self.virtual_ranks is not None:
            _check_int("virtual_ranks", self.virtual_ranks, 1)
        _check_positive("arrive_deadline_s", self.arrive_deadline_s, MAX_ARRIVE_DEADLINE_S)
        _check_positive("step_deadline_s", self.step_deadline_s, MAX_STEP_DEADLINE_S)
        if self.num_sms is not None:
            _check_int("num_sms", self.num_sms, 1)
        if self.ranks_per_domain is not None:
            _check_int("ranks_per_domain", self.ranks_per_domain, 1)
        if self.domain_tokens is not None:
            _check_int("domain_tokens", self.domain_tokens, 1, self.num_max_tokens_per_rank)

    def num_domains(self, ep_size: int) -> int:
        """Domains of ``ep_size`` ranks by ranks_per_domain, 1 where that is None. ValueError if one would be smaller
        than the others."""
        size = self.ranks_per_domain or ep_size
        if ep_size % size:
            legal = [one for one in range(1, ep_size + 1) if ep_size % one == 0]
            nearest = sorted(legal, key=lambda one: (abs(one - size), one))[:2]
            raise ValueError(
                f"ranks_per_domain={size} leaves {ep_size % size} of ep_size={ep_size} ranks in no whole domain; "
                f"domains are equally large: nearest {', '.join(map(str, sorted(nearest)))}"
            )
        return ep_size // size

    @property
    def takes_plans(self) -> bool:
        """Layers can be given an expert plan, or count the load of each expert."""
        return bool(self.num_redundant_slots_per_rank or self.num_staged_experts)

    def num_slots(self, config: MoEConfig, ep_size: int) -> int:
        """Slots on each rank for the experts that a router of ``config`` sees; ValueError where they do not divide."""
        return config.num_local_experts(ep_size) + self.num_redundant_slots_per_rank
