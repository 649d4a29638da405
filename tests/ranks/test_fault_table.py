"""Every fault of the host side ends in words, in time, and leaves nothing behind: the rows of the fault table."""

import os

import pytest
import torch

from megamoe.testing.faults import device, device_ranks, host, host_ranks, table

NAMES = [fault.name for fault in host.FAULTS]


@pytest.fixture(scope="module")
def rows() -> dict[str, table.Row]:
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("OMPI_", "PMI", "SLURM_"))]:
            patch.delenv(name)
        return {row.fault: row for row in table.run_module(host.__name__, "host", None)}


@pytest.mark.parametrize("name", NAMES)
def test_fault_ends_in_words(name, rows):
    row = rows[name]
    if row.ok is None:
        pytest.skip(f"not run: {row.problem}")
    assert row.ok, table.render([row])


def test_what_is_not_given_back_is_found(monkeypatch):
    monkeypatch.setattr(host_ranks, "group", lambda: None)
    monkeypatch.setattr(host_ranks, "meet", lambda group: None)
    kept = []
    for take in (lambda: os.fdopen(os.dup(1)), lambda: torch.zeros(1), lambda: None):
        body = host_ranks.all_live(lambda rank, group, take=take: kept.append(take()) or table.Said("no error", 0.0))
        assert ("descriptors and tensors" in body(0).problem) == (kept[-1] is not None)
    kept[0].close()


def test_a_pattern_that_names_no_fault_is_refused(capsys):
    with pytest.raises(SystemExit) as left:
        table.main(["--side", "host", "--only", "no such fault"])
    assert left.value.code == 2 and "'no such fault' is in no fault's name" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="not run: of a machine without a GPU")
def test_every_device_fault_is_listed_where_it_cannot_run():
    rows = device.rows()
    assert len(rows) == len(device.FAULTS) + len(device_ranks.FAULTS)
    assert all(row.ok is None and "GPU" in row.problem for row in rows)


def test_the_judge_can_fail():
    fault = table.Fault("x", "dispatch", None, "rank 2 did not come", None, 0.5, own_ranks=True)
    good = {0: table.Said("rank 2 did not come", 0.6), 1: table.Said("rank 2 did not come", 0.6)}
    exits = {0: 1, 1: 1, 2: 9}
    assert table.judge(fault, "host", good, exits).ok
    for answers, codes, said in (
        ({0: good[0]}, exits, "rank 1 said nothing"),
        (good | {1: table.Said("something else", 0.6)}, exits, "rank 1 did not say"),
        (good | {1: table.Said("rank 2 did not come", 6.0)}, exits, "rank 1 took 6.0 s"),
        (good | {1: table.Said("rank 2 did not come", 0.6, "a failed call left numbers")}, exits, "left numbers"),
        (good, exits | {0: 0}, "rank 0 left with status 0"),
    ):
        row = table.judge(fault, "host", answers, codes)
        assert not row.ok and said in row.problem
    assert table.judge(fault, "host", {0: "no NVRTC"}, exits).ok is None
