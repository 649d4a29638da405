"""The Triton router, compiled, against the torch router."""

import pytest


def test_ids_and_weights_are_those_of_torch(capsys):
    pytest.importorskip("triton", reason="not run: triton is missing")
    from tests import router_cases

    router_cases.main("cuda")
    assert capsys.readouterr().out.strip().endswith("cases agree")
