"""doctor --ranks on two CPU ranks: equal environments are told equal, what differs is named, links are timed."""

import json

from megamoe.doctor_ranks import differences
from megamoe.testing.spawn import spawn_ranks


def test_two_ranks_compare_and_time_their_links():
    results = spawn_ranks(["-m", "megamoe", "doctor", "--ranks", "--no-compile", "--json"], 2, timeout_s=120)
    for result in results:
        found = json.loads(result.output[result.output.index("{") :])
        rows = {row["name"]: row for row in found["rows"] if row["section"] == "between ranks"}
        assert rows["environment"]["state"] == "ok" and "the same on 2 ranks" in rows["environment"]["value"], rows
        assert "us for all ranks to meet" in rows["meeting"]["value"]
        bandwidth = next(row["value"] for name, row in rows.items() if name.endswith("GB/s"))
        assert "0->1" in bandwidth and "1->0" in bandwidth


def test_what_differs_is_named():
    ranks = [{"torch": "2.11", "NCCL_X": "1"}, {"torch": "2.13", "NCCL_X": "1", "NVSHMEM_Y": "2"}]
    assert differences(ranks) == [
        "NVSHMEM_Y: unset on rank 0, 2 on rank 1", "torch: 2.11 on rank 0, 2.13 on rank 1",
    ]  # fmt: skip
    assert differences(ranks[:1] * 3) == []
