"""The benchmark's shapes (cases.toml), its suites (suites.toml) and the small parsers of its command line."""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path

CASES_FILE = Path(__file__).with_name("cases.toml")
SUITES_FILE = Path(__file__).with_name("suites.toml")
BY_TOKENS = ("bar_us", "goal_us", "goal_mxfp4_us", "older_us", "bar_h200_us", "published_us")


@dataclass(frozen=True)
class Case:
    """One model shape. intermediate is per half; the *_us map tokens per rank to us (see cases.toml). weight_format:
    "fp8" or "mxfp4", chosen on the command line; goal_mxfp4_us is then the goal."""

    name: str
    hidden: int
    intermediate: int
    num_experts: int
    topk: int
    swiglu_limit: float | None = None
    note: str = ""
    weight_format: str = "fp8"
    bar_us: dict[int, float] = field(default_factory=dict, hash=False)
    goal_us: dict[int, float] = field(default_factory=dict, hash=False)
    goal_mxfp4_us: dict[int, float] = field(default_factory=dict, hash=False)
    older_us: dict[int, float] = field(default_factory=dict, hash=False)
    bar_h200_us: dict[int, float] = field(default_factory=dict, hash=False)
    published_us: dict[int, float] = field(default_factory=dict, hash=False)
    published_from: str = ""

    def __post_init__(self):
        for name in ("hidden", "intermediate"):
            value = getattr(self, name)
            if value <= 0 or value % 128:
                low = max(128, value // 128 * 128)
                raise ValueError(
                    f"case {self.name}: {name}={value} must be a positive multiple of 128; nearest {low}, {low + 128}"
                )
        if not 1 <= self.topk <= min(16, self.num_experts):
            raise ValueError(f"case {self.name}: topk={self.topk} must lie in 1..{min(16, self.num_experts)}")


def load_cases(path: Path = CASES_FILE) -> dict[str, Case]:
    """All cases of the file by name. ValueError names the case and the field that is wrong."""
    cases = {}
    for name, table in tomllib.loads(Path(path).read_text()).items():
        by_tokens = {
            key: {int(tokens): float(us) for tokens, us in table.pop(key, {}).items()}
            for key in BY_TOKENS
        }
        try:
            cases[name] = Case(name=name, **table, **by_tokens)
        except TypeError as error:
            raise ValueError(f"case {name} in {path}: {error}") from error
    return cases


def load_suites(path: Path = SUITES_FILE) -> dict[str, list[dict]]:
    """Suite name -> its sets in order; a set maps options of bench.py, '_' for '-', to their text or number."""
    return tomllib.loads(Path(path).read_text())


def parse_cases(text: str, cases: dict[str, Case]) -> list[Case]:
    """'tiny,flash64' -> the cases, in the order given. ValueError names the unknown one and lists those that exist."""
    chosen = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        if name not in cases:
            raise ValueError(f"--case {name!r} is not in cases.toml; choose from {', '.join(cases)}")
        chosen.append(cases[name])
    if not chosen:
        raise ValueError(f"--case {text!r} names no case; choose from {', '.join(cases)}")
    return chosen


def parse_tokens(text: str, flag: str = "--tokens") -> list[int]:
    """'0,1,8' -> [0, 1, 8]. ValueError for what is not a list of integers >= 0."""
    try:
        tokens = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        tokens = []
    if not tokens or min(tokens) < 0:
        raise ValueError(f"{flag} {text!r} must be integers >= 0 separated by commas, such as 1,8,512")
    return tokens


def parse_choices(flag: str, text: str, allowed: tuple[str, ...]) -> list[str]:
    """'torch,sgl' -> ['torch', 'sgl']; 'none' alone is the empty list where it is allowed."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    wrong = [name for name in names if name not in allowed]
    if wrong or not names or ("none" in names and len(names) > 1):
        raise ValueError(
            f"{flag} {text!r} must be some of {','.join(allowed)} separated by commas"
            + (f"; unknown: {wrong[0]}" if wrong else "")
        )
    return [name for name in names if name != "none"]
