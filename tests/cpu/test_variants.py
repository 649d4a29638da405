"""megamoe/variants.py: the text form, replacements that must match, and what it says without a GPU."""

import pytest
import torch

from megamoe import variants

TEXT = """
== no gather
gemm/gather_tokens.cuh
--- for (u32 i = 0; i < kSteps; ++i) {
+++ for (u32 i = 0; i < 0; ++i) {

== two changes
sched/order.cuh
--- max_u32(lag, 1)
+++ lag
gemm/mainloop.cuh
--- k < 4; ++k
+++ k < 0; ++k
"""


def test_a_file_of_variants_is_read():
    parsed = variants.parse_variants(TEXT)
    assert list(parsed) == ["base", "no gather", "two changes"]
    assert parsed["base"] == [] and len(parsed["two changes"]) == 2
    assert parsed["no gather"] == [
        ("gemm/gather_tokens.cuh", "for (u32 i = 0; i < kSteps; ++i) {", "for (u32 i = 0; i < 0; ++i) {")
    ]


def test_a_replacement_changes_only_its_text():
    sources = variants.changed_sources(variants.parse_variants(TEXT)["no gather"])
    base = variants.changed_sources([])
    assert "i < 0; ++i" in sources["gemm/gather_tokens.cuh"]
    assert [file for file in base if base[file] != sources[file]] == ["gemm/gather_tokens.cuh"]


def test_a_text_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="sched/order.cuh does not hold 'no such text'"):
        variants.changed_sources([("sched/order.cuh", "no such text", "")])
    with pytest.raises(ValueError, match="line 1"):
        variants.parse_variants("--- stray")


def test_without_a_gpu_it_compiles_and_says_so(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("not run: this is for machines without a GPU")
    file = tmp_path / "variants.txt"
    file.write_text(TEXT)
    assert variants.main([str(file), "--block-tokens", "8"]) == 3
    said = capsys.readouterr().out
    assert "no gather" in said and "128 registers" in said and "times not run: no GPU" in said
