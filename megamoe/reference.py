"""python -m megamoe reference: the public API as Markdown, from the docstrings and signatures of what is installed."""

import argparse
import importlib
import inspect

import megamoe

MODULES = {
    "megamoe.ranks": ("init_process_group",),
    "megamoe.steps": ("ExpertWeights", "swiglu"),
    "megamoe.layer": ("Load",),
    "megamoe.rebalance": ("Rebalance",),
    "megamoe.stats": ("Stats", "prometheus"),
    "megamoe.errors": ("ErrorRecord",),
    "megamoe.checkpoint": ("Checkpoint", "CheckpointError", "load_experts", "find_problems"),
    "megamoe.checkpoint_mxfp4": ("checkpoint_tensors",),
    "megamoe.convert": ("convert",),
    "megamoe.verify": ("verify",),
    "megamoe.micro_batch": ("MicroBatches",),
    "megamoe.hf_config": ("moe_config_of",),
    "megamoe.integrations.transformers": ("enable", "disable", "Serving"),
    "megamoe.integrations.dense": ("load_without_experts",),
    "megamoe.integrations.dequantized": ("load_dequantized", "round_experts"),
    "megamoe.integrations.verify_model": ("verify_model",),
    "megamoe.integrations.vllm": ("refusals", "MegaMoEPrepareAndFinalize", "MegaMoEExperts"),
    "megamoe.integrations.sglang": ("refusals", "install", "run_mega_routed_experts", "get_moe_weights"),
}
"""Beside the names of `megamoe.__all__`: what else is meant to be called, by module."""


def reference() -> str:
    """The whole text. A module that needs a package which is not installed has a line that says so."""
    parts = ["# megamoe: API reference", f"Version {megamoe.__version__}. Written by `python -m megamoe reference`.",
             "## megamoe", *(_entry(getattr(megamoe, name), name) for name in megamoe.__all__)]  # fmt: skip
    for module_name, names in MODULES.items():
        parts.append(f"## {module_name}")
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            parts.append(f"Not shown: {error}")
            continue
        parts += [inspect.getdoc(module) or "", *(_entry(getattr(module, name), name) for name in names)]
    return "\n\n".join(parts) + "\n"


def _entry(thing, name: str) -> str:
    lines = [f"### {name}{_signature(thing)}", _text(thing)]
    if inspect.isclass(thing):
        for method_name, method in vars(thing).items():
            function = getattr(method, "__func__", method)
            own = inspect.isfunction(function) and not method_name.startswith("_")
            if own and function.__doc__:  # not what it inherits: torch's of extra_repr, for one
                lines += [f"#### {name}.{method_name}{_signature(function)}", _text(function)]
    return "\n\n".join(lines)


def _signature(thing) -> str:
    try:
        text = str(inspect.signature(thing))
    except (TypeError, ValueError):
        return ""
    return f"\n\n    {getattr(thing, '__name__', '')}{text}"


def _text(thing) -> str:
    # As it is written: its columns are meant for a fixed-width font
    return "\n".join(f"    {line}".rstrip() for line in (inspect.getdoc(thing) or "").splitlines())


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m megamoe reference", description=__doc__.partition(": ")[2])
    parser.add_argument("names", nargs="*", help="only the entries with these names")
    given = parser.parse_args(argv)
    text = reference()
    if given.names:
        entries = text.split("\n### ")[1:]
        found = [entry for entry in entries if entry.split("\n", 1)[0] in given.names]
        if len(found) < len(set(given.names)):
            print(f"no entry for one of {', '.join(given.names)}; there are "
                  f"{', '.join(entry.split(chr(10), 1)[0] for entry in entries)}")  # fmt: skip
            return 2
        text = "\n".join(f"### {entry.split(chr(10) + '## ', 1)[0]}" for entry in found)
    print(text, end="")
    return 0
