"""Configurations, support, plan_memory and the public names."""

import subprocess
import sys

import pytest
import torch

import megamoe
from megamoe import EPConfig, MoEConfig, layout, plan_memory, support

GOOD = {"hidden": 256, "intermediate": 128, "num_experts": 8, "topk": 2}


@pytest.mark.parametrize(
    ("field", "value", "error", "text"),
    [
        ("hidden", 7100, ValueError, "hidden=7100 must be a multiple of 128; nearest 7040, 7168"),
        ("hidden", 100, ValueError, "hidden=100 must be a multiple of 128; nearest 128"),
        ("hidden", 0, ValueError, "hidden=0 must be at least 1; nearest legal value 128"),
        ("hidden", -256, ValueError, "hidden=-256 must be at least 1; nearest legal value 128"),
        ("intermediate", 200, ValueError, "intermediate=200 must be a multiple of 128; nearest 128, 256"),
        ("intermediate", 128.0, TypeError, "intermediate=128.0 has type float; pass an int"),
        ("num_experts", 0, ValueError, "num_experts=0 must be at least 1; nearest legal value 1"),
        ("num_experts", True, TypeError, "num_experts=True has type bool"),
        ("topk", 0, ValueError, "topk=0 must be between 1 and 16; nearest legal value 1"),
        ("num_shared_experts", -1, ValueError, "num_shared_experts=-1 must be between 0 and 14; nearest legal value 0"),
        ("topk", 17, ValueError, "topk=17 must be between 1 and 16; nearest legal value 16"),
        ("weight_format", "int4", ValueError, "weight_format='int4' must be one of 'fp8', 'mxfp4', 'bf16'"),
        ("swiglu_limit", 0.0, ValueError, "swiglu_limit=0.0 must be a finite number above 0"),
        ("swiglu_limit", float("nan"), ValueError, "swiglu_limit=nan must be a finite number above 0"),
        ("swiglu_limit", "7", TypeError, "swiglu_limit='7' has type str; pass a number"),
        ("activation", "gelu", ValueError, "activation='gelu' must be one of 'swiglu', 'swiglu_oai'"),
        ("bias", 1, TypeError, "bias=1 has type int; pass True or False"),
    ],
)
def test_moe_config_names_the_field_its_value_and_the_remedy(field, value, error, text):
    with pytest.raises(error) as raised:
        MoEConfig(**(GOOD | {field: value}))
    assert str(raised.value).startswith(text)


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("num_max_tokens_per_rank", 0, "num_max_tokens_per_rank=0 must be at least 1"),
        ("virtual_ranks", 0, "virtual_ranks=0 must be at least 1"),
        ("arrive_deadline_s", -1.0, "arrive_deadline_s=-1.0 must be a finite number above 0"),
        ("step_deadline_s", float("inf"), "step_deadline_s=inf must be a finite number above 0"),
        ("arrive_deadline_s", 1e10, "arrive_deadline_s=10000000000.0 must be at most 1000000000"),
        ("step_deadline_s", 2001, "step_deadline_s=2001 must be at most 2000"),
        ("num_sms", 0, "num_sms=0 must be at least 1"),
    ],
)
def test_ep_config_names_the_field_its_value_and_the_remedy(field, value, text):
    with pytest.raises(ValueError) as raised:
        EPConfig(**({"num_max_tokens_per_rank": 8} | {field: value}))
    assert str(raised.value).startswith(text)


def test_the_longest_deadlines_fit_the_kernels_clocks():
    """Of 32-bit microseconds (5_combine.cuh) two step deadlines take part, of 64-bit nanoseconds twice any."""
    ep_config = EPConfig(8, arrive_deadline_s=layout.MAX_ARRIVE_DEADLINE_S, step_deadline_s=layout.MAX_STEP_DEADLINE_S)
    assert 2 * ep_config.step_deadline_s * 10**6 < 2**32
    assert 2 * ep_config.arrive_deadline_s * 10**9 < 2**63


def test_configs_are_frozen_and_hashable():
    assert len({MoEConfig(**GOOD), MoEConfig(**GOOD)}) == 1
    with pytest.raises(AttributeError):
        MoEConfig(**GOOD).hidden = 128


def test_experts_must_spread_evenly():
    assert MoEConfig(**GOOD).num_local_experts(4) == 2
    with pytest.raises(ValueError, match=r"num_experts=8 cannot be spread evenly over ep_size=3 ranks; nearest .*2, 4"):
        MoEConfig(**GOOD).num_local_experts(3)


def test_support_gives_reasons():
    assert support(MoEConfig(**GOOD)).ok and support(MoEConfig(**GOOD)).reasons == ()
    assert support(MoEConfig(**GOOD), EPConfig(8, virtual_ranks=4), "cpu").ok
    uneven = support(MoEConfig(**GOOD), EPConfig(8, virtual_ranks=3))
    assert not uneven.ok and "num_experts=8 cannot be spread evenly" in uneven.reasons[0]
    many = MoEConfig(128, 128, 1024, 1)
    assert "use at least 4 ranks" in support(many, ep_size=2).reasons[0]
    assert support(many, ep_size=4).ok
    assert (
        "weight_format='bf16' runs on CPU only"
        in support(MoEConfig(**GOOD, weight_format="bf16"), None, "cuda").reasons[0]
    )
    reasons = support(MoEConfig(**GOOD, weight_format="mxfp4"), None, "cuda").reasons
    assert not any("weight_format" in reason for reason in reasons)
    assert "has no implementation" in support(MoEConfig(**GOOD), None, "meta").reasons[0]
    gpt_oss = MoEConfig(**GOOD, activation="swiglu_oai", bias=True)
    assert support(gpt_oss, None, "cpu").ok
    told = " ".join(support(gpt_oss, None, "cuda").reasons)
    assert "activation" not in told and "bias" not in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="not run: this machine has a CUDA device")
def test_support_knows_what_plans_ask_of_the_kernel():
    config = MoEConfig(256, 128, 256, 2)
    assert support(config, EPConfig(8), ep_size=1).ok
    (reason,) = support(config, EPConfig(8, num_redundant_slots_per_rank=8), ep_size=1).reasons
    assert "num_redundant_slots_per_rank=8" in reason and "use at most 0" in reason
    assert support(config, EPConfig(8, num_redundant_slots_per_rank=8), ep_size=2).ok
    mxfp4 = MoEConfig(256, 128, 8, 2, weight_format="mxfp4")
    assert support(mxfp4, EPConfig(8, num_staged_experts=1), "cpu").ok
    assert not any("no kernel yet" in why for why in support(mxfp4, EPConfig(8, num_staged_experts=1), "cuda").reasons)


def test_support_says_that_there_is_no_cuda_device():
    assert "finds no CUDA device; use device='cpu'" in support(MoEConfig(**GOOD), None, "cuda").reasons[0]


def test_a_device_that_torch_does_not_know_is_named():
    for make in (lambda: support(MoEConfig(**GOOD), None, "gpu"),
                 lambda: megamoe.Workspace(MoEConfig(**GOOD), EPConfig(8), device="gpu")):  # fmt: skip
        with pytest.raises(ValueError, match="device='gpu' is no device of torch; use 'cuda' or 'cpu'"):
            make()


def test_the_cpu_path_needs_no_workspace_memory():
    plan = plan_memory(MoEConfig(**GOOD), EPConfig(8), 2, device="cpu")
    assert (plan.symmetric_bytes, plan.local_bytes, plan.rows) == (0, 0, ())
    assert "0 bytes symmetric" in plan.explain()


def test_plan_memory_explains_every_byte_of_the_kernel_path():
    configs = [MoEConfig(**GOOD), MoEConfig(512, 256, 16, 4)]
    plan = plan_memory(configs, EPConfig(64), 2)
    for where, total in (("symmetric", plan.symmetric_bytes), ("local", plan.local_bytes)):
        regions = [row.bytes for row in plan.rows if row.where == where]
        assert 0 < sum(regions) <= total < sum(regions) + 1024 * len(regions)  # what is left over is alignment
        assert f"{total:,}" in plan.explain() and f"{total - sum(regions):,}" in plan.explain()
    assert {row.where for row in plan.rows} <= {"symmetric", "local"}
    text = plan.explain()
    assert all(row.name in text and f"{row.bytes:,}" in text for row in plan.rows)
    larger = plan_memory(configs, EPConfig(128), 2)
    assert larger.symmetric_bytes > plan.symmetric_bytes
    with pytest.raises(ValueError, match="cannot be spread evenly"):
        plan_memory(configs, EPConfig(64), 3)


def test_public_names_are_at_most_twelve_and_all_resolve():
    assert len(megamoe.__all__) <= 12
    for name in megamoe.__all__:
        assert callable(getattr(megamoe, name))
    with pytest.raises(AttributeError, match="public names: MoEConfig"):
        _ = megamoe.no_such_name


@pytest.mark.parametrize("before", ["", "import megamoe.steps, megamoe.workspace, megamoe.route, megamoe.support"])
def test_a_public_function_is_never_its_module_of_the_same_name(before):
    code = f"{before}\nimport sys, megamoe; sys.exit(not all(map(callable, (megamoe.route, megamoe.support))))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_importing_loads_neither_torch_nor_cuda():
    code = "import sys, megamoe; sys.exit(sum(name in sys.modules for name in ('torch', 'cuda', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "ep_config, ep_size, named",
    [
        (EPConfig(64, virtual_ranks=16), None, "virtual_ranks=16"),
        (EPConfig(64), 64, "ep_size=64"),
        (EPConfig((1 << 20) + 1), 1, "num_max_tokens_per_rank=1048577"),
    ],
)
def test_support_names_the_kernels_limits(ep_config, ep_size, named):
    report = support(MoEConfig(256, 128, 64, 2), ep_config, "cuda", ep_size=ep_size)
    assert any(named in reason and "at most" in reason for reason in report.reasons), report.reasons
    assert not any(named in reason for reason in support(MoEConfig(256, 128, 64, 2), EPConfig(64), "cuda").reasons)
