"""verify on a GPU: the kernel against exact results of its formats; bf16 is reported as not run."""

import json

from megamoe.__main__ import main


def test_fp8_and_mxfp4_are_judged_and_bf16_has_its_reason(capsys):
    assert main(["verify", "--device", "cuda", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "runs on CPU only" in next(row["not_run"] for row in rows if row["format"] == "bf16")
    exact = {row["format"]: row["rel_l2"] for row in rows if row.get("reference") == "exact"}
    assert exact.keys() == {"fp8", "mxfp4"} and all(0 < error < 1e-2 for error in exact.values())
