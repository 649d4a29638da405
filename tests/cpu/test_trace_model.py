"""The script that makes the shipped routing trace, at a size that a CPU does in seconds."""

import numpy as np

from benchmarks.trace_model import KINDS, main, read_texts


def test_a_tiny_model_trains_and_its_routing_is_recorded(tmp_path):
    out = tmp_path / "trace.npz"
    main(["--seconds", "2", "--out", str(out), "--layers", "2", "--width", "32", "--inner", "16", "--experts", "8",
          "--topk", "2", "--context", "32", "--batch", "8", "--tokens", "256", "--sequences", "3", "--steps", "5",
          "--text-bytes", "20000"])  # fmt: skip
    data = np.load(out)
    for kind in KINDS:
        assert data[f"prefill_{kind}"].shape == (2, 256, 2) and data[f"decode_{kind}"].shape == (4, 2, 3, 2)
        one = data[f"prefill_{kind}"]
        assert (one[..., 0] != one[..., 1]).all() and one.max() < 8
    assert data["drift"].shape == (17, 2, 64, 2)
    assert data["load"].shape == (4 * 5 + 17, 2, 8) and len(data["kind"]) == 37
    first = [np.bincount(one.ravel(), minlength=8) for one in data["prefill_source"]]
    assert (data["load"][0] == first).all() and data["kind"][0] == "prefill source"
    assert data["losses"][-1] < data["losses"][0]


def test_every_kind_of_text_is_there():
    texts = read_texts(300_000)
    assert all(100_000 < len(text) <= 300_000 for text in texts.values())
    assert b"def " in texts["source"] and b"def " not in texts["topics"][:2000] and b"statement" in texts["topics"]
