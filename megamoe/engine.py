"""Which engine serves a layer on a given workspace."""

from megamoe.config import MoEConfig


def make_engine(config: MoEConfig, workspace):
    """TwoLevelEngine where the ranks are several domains, FusedEngine on CUDA, else TorchEngine.

    An engine has load_weights(weights), share_weights(engine), expert_tensors(), forward(inputs, num_tokens_bound,
    outs, kind, stream), check(), close(), wait_s and load_count; its lists have one entry per rank held here. It trusts
    what MoELayer has checked. kind: None, or layer_checks.Kind of the call; stream: None, or the current one's handle.
    repeat is None, or forward's short form for a call like the last (FusedEngine). Those of one domain also have what
    Rebalance calls.
    """
    # Imported only where used: the CPU path must not need CUDA packages
    if workspace.domains is not None:
        from megamoe.domains.engine import TwoLevelEngine

        return TwoLevelEngine(config, workspace)
    if workspace.is_cuda:
        from megamoe.engine_fused import FusedEngine

        return FusedEngine(config, workspace)
    from megamoe.engine_torch import TorchEngine

    return TorchEngine(config, workspace)
