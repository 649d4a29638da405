"""The loop over cases, routings and token counts: make the data, judge, time, and fill one result Row each."""

import datetime
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from benchmarks.cases import Case
from benchmarks.gate import Verdict, judge, merge, spec_rows
from benchmarks.implementations import MegaMoE, Setup, make_baseline
from benchmarks.inputs import make_tokens, make_weights, pick_rows, rows_of
from benchmarks.links import count_calls, mean_sent, sent_bytes
from benchmarks.record import Row, sm_clock_mhz
from benchmarks.roofline import Work, count_work, floor_us, mean_work, rates_of
from benchmarks.timing import Timing, measure, num_routings, pick_protocol
from megamoe import EPConfig, MoEConfig, Workspace, plan_memory
from megamoe.exchange import LocalExchange
from megamoe.steps import moe_layer
from megamoe.support import support
from megamoe.testing import compare
from megamoe.testing.reference import moe_reference

# elements of weights that the float64 loop may touch: about two seconds on one core
REFERENCE_ELEMENTS = 1.5e8
# the spec in fp32 and the float64 loop differ by values that fall on the other side of a rounding step
SPEC_REL_L2, SPEC_ROW_REL_L2 = 3e-3, 1e-2


@dataclass(frozen=True)
class Plan:
    """What the command line asks for; see bench.py. baseline_tokens: token counts that baselines run at, None = all."""

    cases: list[Case]
    tokens: list[int]
    routings: list[str]
    inputs: list[str]
    baselines: list[str]
    protocol: str
    capacity: str
    idle_ranks: int
    check_rows: int
    check_only: bool
    num_sms: int | None
    baseline_tokens: list[int] | None = None


@dataclass
class Outcome:
    """rows: measured and judged; not_run: {'case', 'impl', 'reason'} of what was asked for and could not be; errors:
    what broke; seconds: of this process, by what took them.

    keep: called with each timed row as soon as it exists, so that a run that ends early leaves what it measured.
    """

    keep: Callable[[Row], object] | None = None
    rows: list[Row] = field(default_factory=list)
    not_run: list[dict] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def taking(self, what: str):
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - begin

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if self.keep and row.us is not None and row.ok:
            self.keep(row)


@dataclass(frozen=True)
class Cell:
    """One (case, routing, tokens) with its data: tokens[routing][rank here], the rows to check, the work of all ranks,
    and the bytes that each sends."""

    case: Case
    routing: str
    num_tokens: int
    tokens_per_rank: list[int]
    capacity: int
    protocol: str
    tokens: list
    rows: list
    work: Work
    sent: list[int]
    expected: dict

    def expect(self, setup: Setup, quantized: bool) -> list:
        """The spec's rows of the first routing, one tensor a rank here; computed once for all implementations."""
        if quantized not in self.expected:
            self.expected[quantized] = [
                spec_rows(self.case, tokens, rows, setup.seed, quantized=quantized)
                for tokens, rows in zip(self.tokens[0], self.rows)
            ]
        return self.expected[quantized]


def config_of(case: Case) -> MoEConfig:
    return MoEConfig(
        case.hidden, case.intermediate, case.num_experts, case.topk, case.weight_format, swiglu_limit=case.swiglu_limit
    )


def run_cases(setup: Setup, plan: Plan, facts: dict, table, outcome: Outcome) -> None:
    """Everything of the plan, into outcome. One workspace serves all cases and, unless capacity is 'cell', all token
    counts."""
    groups = (
        [(tokens, [tokens]) for tokens in plan.tokens]
        if plan.capacity == "cell"
        else [(max(plan.tokens) if plan.capacity == "max" else int(plan.capacity), plan.tokens)]
    )
    for capacity, tokens in groups:
        ep_config = EPConfig(
            max(capacity, 1), virtual_ranks=setup.virtual_ranks, num_sms=plan.num_sms,
            ranks_per_domain=setup.ranks_per_domain, domain_tokens=setup.domain_tokens,
        )  # fmt: skip
        cases = []
        for case in plan.cases:
            report = support(config_of(case), ep_config, setup.device, ep_size=setup.ep_size)
            if report.ok:
                cases.append(case)
            else:
                outcome.not_run.append({"case": case.name, "impl": "megamoe", "reason": "; ".join(report.reasons)})
        if not cases:
            continue
        # closed on success only: closing is collective, and after an exception the peers may be gone
        with outcome.taking("workspaces and kernels"):
            configs = [config_of(case) for case in cases]
            workspace = Workspace(configs, ep_config, group=setup.group, device=setup.device)
        for case in cases:
            memory = plan_memory(config_of(case), ep_config, setup.ep_size, device=setup.device)
            _run_case(setup, plan, facts, table, outcome, case, tokens, workspace, memory.symmetric_bytes or None)
        with outcome.taking("workspaces and kernels"):
            workspace.close()


def _run_case(setup, plan, facts, table, outcome, case, token_counts, workspace, symmetric) -> None:
    with outcome.taking("weights"):
        implementations = [MegaMoE(setup, case, config_of(case), workspace)]
    for name in plan.baselines:
        try:
            with outcome.taking("weights"):
                baseline, reason = make_baseline(name, setup, case)
        except torch.OutOfMemoryError:
            baseline, reason = None, "its copy of the weights does not fit beside ours on this GPU"
        if baseline is None:
            outcome.not_run.append({"case": case.name, "impl": name, "reason": reason})
        else:
            implementations.append(baseline)
    capacity = workspace.ep_config.num_max_tokens_per_rank
    for routing in plan.routings:
        table.case(case, setup, routing, capacity)
        for num_tokens in token_counts:
            with outcome.taking("tokens"):
                cell = make_cell(setup, plan, case, routing, num_tokens, capacity)
            with_baselines = plan.baseline_tokens is None or num_tokens in plan.baseline_tokens
            for impl in list(implementations) if with_baselines else implementations[:1]:
                for kind in [kind for kind in plan.inputs if kind in impl.inputs] or impl.inputs[:1]:
                    try:
                        with outcome.taking("expected rows"):
                            cell.expect(setup, impl.quantized)
                        with outcome.taking(f"calls of {impl.name}"):
                            row = run_one(setup, plan, facts, cell, impl, kind, symmetric)
                    except Exception as error:
                        if isinstance(impl, MegaMoE):
                            raise
                        # a baseline that breaks must not cost the measurements of the layer itself; it still fails the
                        # run
                        outcome.errors.append(
                            f"{case.name}, {num_tokens} tokens, {impl.name}: {type(error).__name__}: {error}"
                        )
                        implementations.remove(impl)
                        break
                    outcome.add(row)
                    table.row(row)
    for impl in implementations:
        impl.close()
    if setup.device.type == "cuda":
        torch.cuda.empty_cache()


def make_cell(setup: Setup, plan: Plan, case: Case, routing: str, num_tokens: int, capacity: int) -> Cell:
    protocol = pick_protocol(plan.protocol, num_tokens, setup.device.type == "cuda")
    tokens_per_rank = [num_tokens if rank < setup.ep_size - plan.idle_ranks else 0 for rank in range(setup.ep_size)]
    tokens, works, sent = [], [], []
    for index in range(1 if plan.check_only else num_routings(protocol, num_tokens)):
        everyone = [
            make_tokens(case, rank, tokens_per_rank[rank], routing, index, setup.seed, setup.device)
            for rank in range(setup.ep_size)
        ]
        routed = [t.topk_idx.cpu() for t in everyone]
        works.append(count_work(case, routed, setup.num_units))
        sent.append(sent_bytes(case, routed))
        tokens.append([everyone[rank] for rank in setup.ranks_here])
    rows = [pick_rows(tokens_per_rank[rank], plan.check_rows, setup.seed, setup.device) for rank in setup.ranks_here]
    return Cell(
        case, routing, num_tokens, tokens_per_rank, capacity, protocol, tokens, rows, mean_work(works),
        mean_sent(sent), {},
    )  # fmt: skip


def run_one(setup: Setup, plan: Plan, facts: dict, cell: Cell, impl, kind: str, symmetric: int | None) -> Row:
    case = cell.case
    outs = [
        [torch.empty(len(t.x), case.hidden, dtype=torch.bfloat16, device=setup.device) for t in tokens]
        for tokens in cell.tokens
    ]
    flat = [out for rank_outs in outs for out in rank_outs]

    def poison():
        for out in flat:
            out.fill_(float("nan"))

    calls = impl.calls(cell.tokens, cell.num_tokens, kind, outs)
    poison()
    setup.meet.barrier()
    for call in calls:
        call()
    setup.meet.barrier()
    impl.check()
    verdict = _judge_all(setup, cell, impl, outs)
    timing, reproducible, clock, counted = None, None, None, None
    if verdict.ok and not plan.check_only:
        first = [out.clone() for out in flat]
        timing = measure(cell.protocol, calls, poison, setup.meet)
        clock = sm_clock_mhz(setup.device)
        impl.check()
        reproducible = all(setup.meet.gather(all(torch.equal(out, before) for out, before in zip(flat, first))))
        if not reproducible:
            verdict = merge([verdict, _judge_all(setup, cell, impl, outs)])
            if isinstance(impl, MegaMoE):
                verdict = Verdict(
                    False,
                    verdict.rel_l2,
                    verdict.row_rel_l2,
                    verdict.rows,
                    verdict.num_tokens,
                    verdict.reason or "the timed path's output is not bitwise that of the first call",
                )
        if setup.counter is not None:  # after the timed path's output was looked at: these calls write it again
            counted = count_calls(setup.counter, calls, setup.meet)
    return _fill_row(setup, plan, facts, cell, impl, kind, verdict, timing, reproducible, clock, counted, symmetric)


def _judge_all(setup: Setup, cell: Cell, impl, outs) -> Verdict:
    here = merge(
        [
            judge(out, rows, expected, **impl.limits)
            for out, rows, expected in zip(outs[0], cell.rows, cell.expect(setup, impl.quantized))
        ]
    )
    return merge(setup.meet.gather(here))


def _fill_row(
    setup: Setup, plan: Plan, facts: dict, cell: Cell, impl, kind: str, verdict: Verdict, timing: Timing | None,
    reproducible: bool | None, clock: int | None, counted: list[int] | None, symmetric: int | None,
) -> Row:  # fmt: skip
    case, work, us = cell.case, cell.work, timing.us if timing else None
    rates = rates_of(facts["device"])
    roofline_us, bound = floor_us(work, rates) if rates else (None, None)
    return Row(
        impl=impl.name,
        case=case.name,
        hidden=case.hidden,
        intermediate=case.intermediate,
        num_experts=case.num_experts,
        topk=case.topk,
        num_tokens=cell.num_tokens,
        tokens_per_rank=cell.tokens_per_rank,
        capacity=cell.capacity,
        own_capacity=plan.capacity == "cell",
        ep_size=setup.ep_size,
        virtual_ranks=setup.virtual_ranks,
        weight_format=impl.weight_format,
        routing=cell.routing,
        protocol=cell.protocol,
        input=kind,
        us=us,
        us_min=timing.us_min if timing else None,
        tflops=work.flops / us / 1e6 if us else None,
        weight_tbs=work.weight_bytes / us / 1e6 if us else None,
        roofline_us=roofline_us,
        roofline_bound=bound,
        roofline_fraction=roofline_us / us if us and roofline_us is not None else None,
        active_experts_max=work.active_experts_max,
        flops=work.flops,
        bytes_weights=work.weight_bytes,
        bytes_activations=work.activation_bytes,
        bytes_nvlink=work.nvlink_bytes,
        nvlink_sent=cell.sent if isinstance(impl, MegaMoE) and setup.one_rank_a_gpu else None,
        nvlink_counted=counted,
        rel_l2=verdict.rel_l2,
        row_rel_l2=verdict.row_rel_l2,
        rows_checked=verdict.rows,
        reproducible=reproducible,
        ok=verdict.ok,
        reason=verdict.reason,
        config=impl.note(cell.num_tokens),
        num_sms=plan.num_sms if isinstance(impl, MegaMoE) else None,
        symmetric_bytes=symmetric if isinstance(impl, MegaMoE) else None,
        seed=setup.seed,
        run=facts["date"],
        clocks_mhz=clock,
        **{**facts, "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")},
    )


def spec_against_float64(setup: Setup, case: Case) -> tuple[bool, str] | None:
    """The specification against the independent float64 loop, on CPU: (ok, what was compared). None on ranks other than
    the first.

    A small case is compared whole, over all ranks; of a large one, one rank's first tokens with the experts they use.
    """
    if not setup.is_first:
        return None
    small = case.num_experts * 3 * case.hidden * case.intermediate <= REFERENCE_ELEMENTS / 4
    if small:
        num_tokens, what = 16, f"16 tokens on each of {setup.ep_size} ranks"
        everyone = [
            make_tokens(case, rank, num_tokens, "uniform", 0, setup.seed, "cpu") for rank in range(setup.ep_size)
        ]
        config, same = config_of(case), torch.arange(case.num_experts)
        weights = [make_weights(case, setup.experts_of(case, rank), setup.seed, "cpu") for rank in range(setup.ep_size)]
        inputs = [rows_of(tokens, torch.arange(num_tokens), same, "bf16") for tokens in everyone]
    else:
        num_tokens = max(1, int(REFERENCE_ELEMENTS / (3 * case.hidden * case.intermediate) / case.topk))
        what = f"{num_tokens} token{'s' * (num_tokens > 1)} of rank 0 with their experts"
        tokens = make_tokens(case, 0, num_tokens, "uniform", 0, setup.seed, "cpu")
        used = tokens.topk_idx.unique().tolist()
        remap = torch.full((case.num_experts,), -1)
        remap[used] = torch.arange(len(used))
        config = MoEConfig(case.hidden, case.intermediate, len(used), case.topk, swiglu_limit=case.swiglu_limit)
        weights, inputs = (
            [make_weights(case, used, setup.seed, "cpu")],
            [rows_of(tokens, torch.arange(num_tokens), remap, "bf16")],
        )
    spec = moe_layer(config, LocalExchange(len(inputs)), weights, inputs)
    verdict = compare.verdict_ranks(
        spec, moe_reference(config, weights, inputs), max_rel_l2=SPEC_REL_L2, max_row_rel_l2=SPEC_ROW_REL_L2
    )
    return verdict.ok, f"{case.name}, {what}: {verdict.text}"
