"""python -m megamoe VERB: what a person asks of an installed megamoe. Each verb has its own --help."""

import os
import sys
from importlib import import_module

# verb -> (module, its function of (argv) -> exit status, one line of help). Imported when asked for: `doctor` must be
# able to say that torch is missing.
VERBS = {
    "doctor": ("megamoe.doctor", "main", "what this machine has, what is missing, and the remedy [--json]"),
    "compile": ("megamoe.verbs", "compile_main", "compile the kernels into the cache; needs no GPU [--json]"),
    "layout": ("megamoe.verbs", "layout_main", "what lies where in a rank's memory, for given sizes [--json]"),
    "trace": ("megamoe.trace", "main", "one call's times per CTA and role, for Perfetto; needs a GPU [--json]"),
    "verify": (
        "megamoe.verbs",
        "verify_main",
        "a layer's numbers against exact and unquantized ones, or a model's: --model DIR [--json]",
    ),
    "reference": ("megamoe.reference", "main", "every public function, from its docstring, as Markdown [NAME ...]"),
    "convert": (
        "megamoe.convert",
        "main",
        "a checkpoint's experts in another number format: SRC DST --format fp8|bf16|mxfp4",
    ),
    "plan": ("megamoe.plan.cli", "main", "where experts go, for a recorded or generated load [--json]"),
    "record": ("megamoe.record", "main", "a model's expert load, step by step, as npz for plan"),
}

USAGE = """python -m megamoe VERB [arguments]

{verbs}

The layer in a model, with no distributed set-up (one rank, CPU or GPU):

    import torch
    from megamoe import EPConfig, MoEConfig, MoELayer, Workspace, route

    config = MoEConfig(hidden=256, intermediate=128, num_experts=8, topk=2)
    with Workspace(config, EPConfig(num_max_tokens_per_rank=64)) as workspace, workspace.device:
        layer = MoELayer(config, workspace)
        layer.load_weights(torch.randn(8, 256, 256) / 16, torch.randn(8, 256, 128) / 11)  # quantized to FP8
        hidden_states = torch.randn(5, 256, dtype=torch.bfloat16)
        routed = route(torch.randn(5, 8), topk=2)
        y = layer(hidden_states, routed.topk_idx, routed.topk_weights)  # bf16 [5, 256]

Several ranks: the same program under torchrun, mpirun or srun; `load_weights` then takes the rank's own experts.
Benchmarks and tests live in a checkout: ./launch/do lists its verbs."""


def usage() -> str:
    width = max(map(len, VERBS))
    return USAGE.format(verbs="\n".join(f"  {verb:<{width}}  {text}" for verb, (_, _, text) in VERBS.items()))


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    verb, *arguments = argv
    if verb not in VERBS:
        pointer = "; benchmarks run from a checkout: ./launch/do bench" if verb == "bench" else ""
        print(f"megamoe has no verb {verb!r}; it has {', '.join(VERBS)}{pointer}", file=sys.stderr)
        return 2
    module, function, _ = VERBS[verb]
    return getattr(import_module(module), function)(arguments)


def run() -> int:
    """main(), of which a reader such as `head` may have read enough."""
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its end
        return 1


if __name__ == "__main__":
    sys.exit(run())
