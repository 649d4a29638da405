"""The house rules that a machine can check. A limit is raised only in a change that says why."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("megamoe", "csrc", "bindings", "tests", "launch", "benchmarks")
MAX_FILE_LINES, MAX_LINE_CHARS, MAX_ARCHITECTURE_LINES, MAX_PUBLIC_NAMES = 400, 120, 200, 12
ENV_NAMES = {"MEGAMOE_CACHE_DIR", "MEGAMOE_DEBUG"}
ENV_MARKS = {"MEGAMOE_COMPILER"}  # set for a process of our own; nobody's to set

# Who may import whom, by top-level name: nothing is named by what lies below it. bindings knows nothing of MoE.
PROJECT = {"megamoe", "megamoe_cuda", "megamoe_csrc", "benchmarks", "tests", "launch", "bindings", "csrc"}
MAY_IMPORT = {
    "csrc": set(),
    "bindings": {"megamoe_cuda", "megamoe_csrc"},
    "megamoe": {"megamoe", "megamoe_cuda"},
    "benchmarks": {"megamoe", "megamoe_cuda", "benchmarks"},
    "launch": {"megamoe", "megamoe_cuda"},
    "tests": PROJECT,
}
# Where a header of csrc/sched is built by the host's compiler.
HOST_HEADERS = {"cstdint"}
# Only what hands out memory as tensors, or speaks to a process group, needs torch there.
BINDINGS_WITH_TORCH = {"symmetric.py", "nvshmem.py", "gather.py"}

# One word for one thing: the word to use instead.
AVOID = {
    "max_num_tokens": "num_max_tokens_per_rank", "bound_m": "num_tokens_bound", "seq_len": "num_tokens",
    "num_phy": "num_physical_experts", "phy2log": "physical_to_logical", "log2phy": "logical_to_physical",
    "pphy2mlog": "physical_to_logical", "nLx": "num_local_experts", "E_local": "num_local_experts",
    "experts_per_dev": "num_local_experts", "experts_per_token": "topk", "top_k": "topk", "hidden_dim": "hidden",
    "ffn_dim": "intermediate", "w13": "linear1", "fc1": "linear1", "fc2": "linear2",
    "gemm0": "linear1", "gemm1": "linear2", "ROW_BLOCK": "block_m", "doorbell": "signal",
}
ENGINE_TESTS = {f"tests/cpu/{file}.py" for file in ("engine_stubs", "test_engine_vllm", "test_engine_sglang")}
# Text that tells how the text came to be, or of one machine.
TALK = re.compile(
    r"this session|as requested|the user asked|previous attempt|\b(T[O]DO|F[I]XME|X[X]X)\b", re.IGNORECASE
)
MACHINE_PATH = re.compile(r"(?<![\w.:/<>$}~])/(?:work|root|home|opt|mnt|Users)/\w")
URL_HOST = re.compile(r"https?://([\w.-]+)")
HOSTS = {"arxiv.org", "github.com", "www.apache.org", "docs.nvidia.com", "docs.pytorch.org"}


def files(*suffixes: str, folders: tuple[str, ...] = FOLDERS) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*")) if path.is_file()]
    return [path for path in found if path.suffix in suffixes and "__pycache__" not in path.parts]


def code() -> list[Path]:
    return [*files(".py", ".cu", ".cuh", ".sh"), ROOT / "launch" / "do", ROOT / ".ci" / "run"]


def texts() -> list[Path]:
    return [*code(), *files(".md", ".toml", ".txt", ".example"), *sorted(ROOT.glob("*.md")),
            ROOT / "pyproject.toml", ROOT / "NOTICE"]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def words_of_python(path: Path) -> set[str]:
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    return {token.string for token in tokens if token.type == tokenize.NAME}


def without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


def imports(path: Path) -> set[str]:
    """Top-level names imported anywhere in the file, relative ones by their own package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def test_tree_is_what_these_rules_read():
    assert len(code()) > 20 and all(path.is_file() for path in texts())
    missing = [folder for folder in FOLDERS if not files(".py", ".cu", ".cuh", ".sh", folders=(folder,))]
    assert not missing


def test_files_are_short():
    lengths = {name(path): len(path.read_text().splitlines()) for path in code()}
    long = {file: f"{lines} lines (limit {MAX_FILE_LINES}): split by role or step"
            for file, lines in lengths.items() if lines > MAX_FILE_LINES}
    assert not long
    assert len((ROOT / "ARCHITECTURE.md").read_text().splitlines()) <= MAX_ARCHITECTURE_LINES


def test_lines_fit():
    long = [f"{name(path)}:{number}: {len(line)} characters" for path in code()
            for number, line in enumerate(path.read_text().splitlines(), 1) if len(line) > MAX_LINE_CHARS]
    assert not long


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_follow_the_arrows(folder):
    wrong = {}
    for path in files(".py", folders=(folder,)):
        refused = imports(path) & PROJECT - MAY_IMPORT[folder]
        if folder == "bindings" and path.name not in BINDINGS_WITH_TORCH:
            refused |= imports(path) & {"torch"}
        if folder == "csrc":
            refused |= imports(path)
        if refused:
            wrong[name(path)] = sorted(refused)
    assert not wrong


def test_device_code_includes_only_itself():
    wrong = []
    for path in files(".cu", ".cuh", folders=("csrc",)):
        included = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', without_comments(path.read_text()), re.MULTILINE)
        for header in included:
            if header not in HOST_HEADERS and not (ROOT / "csrc" / header).is_file():
                wrong.append(f"{name(path)} includes {header}")
    assert not wrong


def test_public_api_is_small():
    import megamoe

    assert 0 < len(megamoe.__all__) <= MAX_PUBLIC_NAMES
    assert len(set(megamoe.__all__)) == len(megamoe.__all__)


def test_environment_names_are_frozen():
    found = {}
    for path in (path for path in code() if path.suffix not in (".cu", ".cuh") and path != Path(__file__)):
        for word in re.findall(r"\bMEGAMOE_[A-Z0-9_]+\b", path.read_text()):
            found.setdefault(word, set()).add(name(path))
    assert {word: where for word, where in found.items() if word not in ENV_NAMES | ENV_MARKS} == {}
    assert set(found) == ENV_NAMES | ENV_MARKS


def test_one_module_reads_the_launchers_variables():
    launcher = re.compile(r"RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|(OMPI_COMM_WORLD|PMI|PMIX|SLURM)_\w+")
    # doctor shows them, spawn sets them.
    allowed = {"megamoe/ranks.py", "megamoe/doctor.py", "megamoe/testing/spawn.py"}
    wrong = {}
    for path in files(".py", folders=("megamoe", "bindings", "benchmarks")):
        if name(path) in allowed:
            continue
        read = {node.value for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and launcher.fullmatch(node.value)}
        if read:
            wrong[name(path)] = read
    assert not wrong


def test_nothing_is_read_that_runs_code():
    """Pickles do: neither ranks, by collectives of objects, nor files are read so."""
    found = []
    for path in files(".py", folders=("megamoe", "bindings")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.search(r"import pickle|torch\.load\(|_object(_list)?\(|allow_pickle=True", line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found, "\n".join(found)


def test_no_bare_volatile():
    # asm volatile keeps an instruction; a volatile variable promises nothing between threads.
    wrong = [name(path) for path in files(".cu", ".cuh", folders=("csrc",))
             if re.search(r"(?<!asm )(?<!__asm__ )\bvolatile\b", without_comments(path.read_text()))]
    assert not wrong


def test_one_word_for_one_thing():
    wrong = []
    for path in code():
        spoken = path.is_relative_to(ROOT / "megamoe" / "integrations") or name(path) in ENGINE_TESTS
        if path == Path(__file__) or spoken:
            continue  # integrations, and stubs of other engines, speak the other project's words
        if path.suffix == ".py":
            words = words_of_python(path)
        elif path.suffix in (".cu", ".cuh"):
            words = set(re.findall(r"\w+", without_comments(path.read_text())))
        else:
            continue
        wrong += [f"{name(path)}: {word}, say {AVOID[word]}" for word in sorted(words & AVOID.keys())]
    assert not wrong


def test_text_speaks_of_the_code_only():
    wrong = []
    for path in texts():
        if path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            found = TALK.search(line) or MACHINE_PATH.search(line)
            hosts = set(URL_HOST.findall(line)) - HOSTS
            if found or hosts:
                wrong.append(f"{name(path)}:{number}: {found[0] if found else sorted(hosts)}")
    assert not wrong


def test_shell_scripts_parse():
    for path in [path for path in code() if path.suffix not in (".py", ".cu", ".cuh")]:
        ran = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        assert path.stat().st_mode & 0o100, f"{name(path)} is not executable"


def test_ruff():
    if not find_spec("ruff"):
        pytest.skip("not run: ruff is not installed")
    ran = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", *FOLDERS],
                         cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
