"""Leaving a lost launch (csrc/pipeline/exit.cuh) in every interleaving of its steps: where a launch holds several
ranks, one of which gave up, no number is left in any output; a rank in a launch of its own leaves NaN and an error, or
neither.

Each CTA stores one word of its rank's y, or stops once it sees the rank's abort word set; some give up instead. Steps
are atomic and in order, which is what the fences and counters of exit.cuh are for; test_sync_lint.py looks at those.
"""

import re
from itertools import product
from typing import NamedTuple

import pytest

from megamoe_cuda.compile import read_sources

NUMBER, NAN = "number", "NaN"


class State(NamedTuple):
    """abort, left, failed: of each rank; y: [rank][CTA]; steps: what each CTA does next, first to last."""

    abort: tuple[int, ...]
    left: tuple[int, ...]
    failed: tuple[bool, ...]
    y: tuple[tuple[str, ...], ...]
    steps: tuple[tuple, ...]


class Exit(NamedTuple):
    """What the model can be told to do wrong: spoil only one's own output, spoil before the peers are told, or look at
    the abort word before being counted."""

    others: bool = True
    told_first: bool = True
    counted_first: bool = True


def put(values: tuple, i: int, value) -> tuple:
    return values[:i] + (value,) + values[i + 1 :]


def at_exit(me: int, aborted: int, num_ranks: int, num_ctas: int, one_launch: bool, how: Exit) -> tuple:
    """What the last CTA of a rank does after it has read the abort word."""
    if not aborted:
        return ()
    spoil = lambda ranks: tuple(("spoil", r, c) for r, c in product(ranks, range(num_ctas)))  # noqa: E731
    own = (*spoil([me]), ("report", me))
    if aborted != 1 + me:
        return own
    tell = tuple(("tell", r, aborted) for r in range(num_ranks))
    others = spoil(r for r in range(num_ranks) if r != me) if one_launch and how.others else ()
    return own + (tell + others if how.told_first else others + tell)


def following(state: State, which: int, num_ctas: int, one_launch: bool, how: Exit):
    """The states that one step of a CTA can lead to."""
    me, cta = divmod(which, num_ctas)
    (name, *where), rest = state.steps[which][0], state.steps[which][1:]
    after = state._replace(steps=put(state.steps, which, rest))
    if name == "store":
        yield after._replace(y=put(state.y, me, put(state.y[me], cta, NUMBER)))
        if state.abort[me]:
            yield after
    elif name == "give up" or name == "tell":
        rank, value = where or (me, 1 + me)
        yield after if state.abort[rank] else after._replace(abort=put(state.abort, rank, value))
    elif name == "count":
        counted = after._replace(left=put(state.left, me, state.left[me] + 1))
        last = counted.left[me] == num_ctas
        aborted = where[0] if where else None
        then = (("read",),) if aborted is None else at_exit(me, aborted, len(state.y), num_ctas, one_launch, how)
        yield counted._replace(steps=put(state.steps, which, then if last else ()))
    elif name == "look":
        yield state._replace(steps=put(state.steps, which, (("count", state.abort[me]),)))
    elif name == "read":
        then = at_exit(me, state.abort[me], len(state.y), num_ctas, one_launch, how)
        yield state._replace(steps=put(state.steps, which, then))
    elif name == "spoil":
        rank, word = where
        yield after._replace(y=put(state.y, rank, put(state.y[rank], word, NAN)))
    else:
        yield after._replace(failed=put(state.failed, me, True))


def ends(num_ranks: int, num_ctas: int, lost: set, one_launch: bool, how: Exit) -> set[State]:
    """Every state in which all CTAs have left. lost: (rank, CTA) of those that give up."""
    leave = (("count",),) if how.counted_first else (("look",),)
    ctas = product(range(num_ranks), range(num_ctas))
    begin = State((0,) * num_ranks, (0,) * num_ranks, (False,) * num_ranks, (("old",) * num_ctas,) * num_ranks,
                  tuple((("give up",) if cta in lost else ("store",), *leave) for cta in ctas))  # fmt: skip
    seen, open_, found = {begin}, [begin], set()
    while open_:
        state = open_.pop()
        for which, steps in enumerate(state.steps):
            for after in following(state, which, num_ctas, one_launch, how) if steps else ():
                if after not in seen:
                    seen.add(after)
                    open_.append(after)
        if not any(state.steps):
            found.add(state)
    return found


CASES = [(2, 2, {(1, 0)}), (2, 2, {(0, 1), (1, 0)}), (3, 1, {(2, 0)}), (3, 1, {(0, 0), (2, 0)}), (2, 3, {(0, 2)})]


def is_spoiled(state: State) -> bool:
    return all(word == NAN for y in state.y for word in y) and any(state.failed)


@pytest.mark.parametrize("num_ranks, num_ctas, lost", CASES)
def test_a_launch_of_several_ranks_leaves_no_number(num_ranks, num_ctas, lost):
    found = ends(num_ranks, num_ctas, lost, True, Exit())
    assert found and all(is_spoiled(state) for state in found)
    if num_ctas > 1 and len(lost) == 1:  # a rank had left without an error, and its output is spoiled all the same
        assert any(not all(state.failed) for state in found)


@pytest.mark.parametrize("num_ranks, num_ctas, lost", CASES)
def test_a_rank_alone_leaves_nan_and_an_error_or_neither(num_ranks, num_ctas, lost):
    found = ends(num_ranks, num_ctas, lost, False, Exit())
    for state in found:
        for rank, (failed, y) in enumerate(zip(state.failed, state.y, strict=True)):
            assert set(y) == ({NAN} if failed else {NUMBER})
            assert failed or not any(rank == lost_rank for lost_rank, _ in lost)
    assert len(found) > 1


@pytest.mark.parametrize("how", [Exit(others=False), Exit(told_first=False), Exit(counted_first=False)],
                         ids=["its own only", "spoiled before told", "abort word read before counted"])  # fmt: skip
def test_the_model_finds_what_is_wrong(how):
    assert any(not is_spoiled(state) for state in ends(2, 2, {(1, 0)}, True, how))


@pytest.mark.parametrize("aborted", [1, 2])
@pytest.mark.parametrize("one_launch", [True, False])
def test_no_output_is_filled_twice(one_launch, aborted):
    spoiled = [step for step in at_exit(0, aborted, 3, 2, one_launch, Exit()) if step[0] == "spoil"]
    assert spoiled and len(set(spoiled)) == len(spoiled)


def test_launches_that_lose_nothing_keep_their_numbers():
    (end,) = ends(2, 2, set(), True, Exit())
    assert {word for y in end.y for word in y} == {NUMBER} and not any(end.failed) and not any(end.abort)


def test_the_kernel_takes_these_steps_in_this_order():
    text = read_sources()["pipeline/exit.cuh"]
    for steps in (
        (r"void end_peers", r"atom_cas_relaxed_sys\(l\.abort_word\(r\)", r"atom_add_acq_rel_gpu\(.*exit_counter"),
        (r"void leave", r"atom_add_acq_rel_gpu\(l\.exit_counter", r"s\.aborted = ", r"fill_nan\(l\.me", r"report\(",
         r"end_peers\(l", r"__syncthreads", r"ep_rank != l\.me\.ep_rank\) fill_nan\(l\.p\.ranks",
         r"atom_add_relaxed_gpu\(l\.exit_counter"),
    ):  # fmt: skip
        assert re.search(".*?".join(steps), text, re.DOTALL), steps
