"""Small cases reach every tile, also the one whose weights are decoded ahead."""

import pytest

from megamoe.plan import tiles


@pytest.fixture(autouse=True)
def _decode_ahead_of_few_rows(monkeypatch):
    monkeypatch.setattr(tiles, "DECODE_AHEAD_ROWS", 128)
