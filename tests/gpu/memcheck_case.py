"""One small case for compute-sanitizer, without pytest: exit status 1 on a mismatch or a device error.

    compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1 python tests/gpu/memcheck_case.py

Two virtual ranks, both orientations, the routing table counted by one CTA and by the grid, partial blocks, odd hidden,
a rank without tokens, capture and replay. Deadlines are long, since every access is instrumented.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def use_checkout() -> None:
    spec = importlib.util.spec_from_file_location("megamoe_launch_link", ROOT / "launch" / "link.py")
    link = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(link)
    sys.path[:0] = [str(link.link_packages()), str(ROOT)]


def main() -> int:
    use_checkout()
    import torch

    from megamoe import EPConfig, MoEConfig, MoELayer, Workspace
    from megamoe.testing.data import make_case
    from tests.gpu import oracle

    config = MoEConfig(hidden=384, intermediate=256, num_experts=6, topk=3)
    ep_config = EPConfig(70, virtual_ranks=2, arrive_deadline_s=300.0, step_deadline_s=300.0, num_sms=8)
    wrong = 0
    with Workspace(config, ep_config, device="cuda") as workspace, MoELayer(config, workspace) as layer:
        for num_tokens, bound, prequantized in (([5, 2], 5, True), ([70, 0], None, False), ([9, 66], None, True)):
            case = make_case(1, config, 2, num_tokens, "holes", "cuda", prequantized=prequantized)
            oracle.load(layer, case)
            for _ in range(2):
                outs = oracle.run_layer(layer, case, bound)
                torch.cuda.synchronize()
                layer.check()
                result = oracle.compare(config, outs, oracle.spec(case))
                wrong += not result.ok
                print(num_tokens, bound, result.text, flush=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            oracle.call(layer, case, None, outs)
        graph.replay()
        torch.cuda.synchronize()
        layer.check()
        result = oracle.compare(config, outs, oracle.spec(case))
        wrong += not result.ok
        print("replayed", result.text, flush=True)
        del graph
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
