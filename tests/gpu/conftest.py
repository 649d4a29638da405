"""Small cases reach every tile. Of MXFP4 calls with many rows an expert half the tests decode their weights ahead, the
other half split weight blocks in pairs of CTAs, also where an expert has several token blocks."""

from zlib import crc32

import pytest

from megamoe.plan import tiles

DECODES_AHEAD, NEVER_DECODES_AHEAD = 128, 1 << 30


@pytest.fixture(autouse=True)
def _way_of_many_rows(monkeypatch, request):
    rows = (DECODES_AHEAD, NEVER_DECODES_AHEAD)[crc32(request.node.name.encode()) % 2]
    monkeypatch.setattr(tiles, "DECODE_AHEAD_ROWS", rows)
