"""One measurement as one JSON object, and what is known about the machine it was taken on."""

import datetime
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Row:
    """One line of results/*.jsonl. us is the time of one layer call (see timing.py); None where a thing is not known or
    has no meaning.

    impl: what ran. capacity: tokens per rank the workspace was built for. virtual_ranks: ranks one process played, or
    None.
    tokens_per_rank: of every rank. tflops: operations per GPU (mean over GPUs) / us. weight_tbs: weight bytes of the
    busiest GPU / us.
    active_experts_max: experts with a row on the busiest GPU, mean over the routings cycled through. bytes_*: of the
    busiest GPU. bytes_nvlink: the roofline's. nvlink_sent, nvlink_counted: bytes a call that each rank sent, by what
    the kernel's steps write and by the GPU's own counters (links.py).
    own_capacity: the workspace was built for this token count alone. symmetric_bytes: of one for this case alone.
    roofline_us, roofline_bound: roofline.py. rel_l2, row_rel_l2, rows_checked: gate.py. reproducible: timed path
    bitwise equal to a first call.
    config: kernel configuration or mode, if the implementation names one. num_sms: SMs it was
    held to, None = all. clocks_mhz: SM clock just after timing.
    """

    impl: str
    case: str
    hidden: int
    intermediate: int
    num_experts: int
    topk: int
    num_tokens: int
    tokens_per_rank: list[int]
    capacity: int
    own_capacity: bool
    ep_size: int
    virtual_ranks: int | None
    weight_format: str
    routing: str
    protocol: str
    input: str
    us: float | None
    us_min: float | None
    tflops: float | None
    weight_tbs: float | None
    roofline_us: float | None
    roofline_bound: str | None
    roofline_fraction: float | None
    active_experts_max: float
    flops: float
    bytes_weights: float
    bytes_activations: float
    bytes_nvlink: float
    nvlink_sent: list[int] | None
    nvlink_counted: list[int] | None
    rel_l2: float
    row_rel_l2: float
    rows_checked: int
    reproducible: bool | None
    ok: bool
    reason: str
    config: str | None
    num_sms: int | None
    symmetric_bytes: int | None
    seed: int
    run: str
    device: str
    num_gpus: int
    driver: str | None
    clocks_mhz: int | None
    torch: str
    commit: str
    dirty: bool | None
    date: str


@dataclass(kw_only=True)
class ScalingRow(Row):
    """One point of scaling.py: results/scaling/*.jsonl. num_tokens is that of each rank, num_experts that of this size.

    mode: "strong" or "weak". base_tokens: what --tokens said. base_experts: the model's experts at the largest size;
    experts: "held" or "scaled". num_units: GPUs, or processes on CPU, that share the work. ranks_per_domain: equal to
    ep_size in one domain, and with several roofline_us is None: what lies between them has no known rate.
    series_per_domain: what --ranks-per-domain said. domain_tokens: as in EPConfig. max_domains: of a token's experts,
    None = any. copies_between: mean copies of a token in domains other than its own, from the routing.
    """

    mode: str
    base_tokens: int
    base_experts: int
    experts: str
    num_units: int
    ranks_per_domain: int
    series_per_domain: int | None
    domain_tokens: int | None
    max_domains: int | None
    copies_between: float


def machine(device: torch.device, num_gpus: int, commit: str | None) -> dict:
    """The fields of a Row that describe where and from what it was measured."""
    commit, dirty = commit_of(commit)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {_cpu_name()} x{os.cpu_count()}"
    return {
        "device": name,
        "num_gpus": num_gpus,
        "driver": _driver() if device.type == "cuda" else None,
        "torch": torch.__version__,
        "commit": commit,
        "dirty": dirty,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def commit_of(given: str | None = None) -> tuple[str, bool | None]:
    """(hash, dirty). A given hash is taken as it is, '-dirty' at its end said apart; otherwise git is asked, results/
    left out of account. ('unknown', None) where there is no git, no repository or no commit."""
    if given:
        return given.removesuffix("-dirty"), given.endswith("-dirty")
    head = _run("git", "-C", str(ROOT), "rev-parse", "--verify", "-q", "HEAD")
    if not head:
        return "unknown", None
    changed = _run("git", "-C", str(ROOT), "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return head, None if changed is None else bool(changed)


def sm_clock_mhz(device: torch.device) -> int | None:
    """The SM clock now, through NVML where nvidia-ml-py is installed; None otherwise."""
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        return pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)
    except Exception:  # a clock is a note beside the time: whatever keeps it from being read must not end a measurement
        return None


def _driver() -> str | None:
    out = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return out.splitlines()[0].strip() if out else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
