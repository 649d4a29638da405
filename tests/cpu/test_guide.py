"""What the guide shows runs, what it names exists, and the reference is the docstrings'."""

import re
from pathlib import Path

import pytest
import torch

import megamoe
import megamoe.__main__ as cli
from megamoe.reference import MODULES, reference

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "megamoe" / "integrations" / "GUIDE.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL))
def test_the_guides_programs_run(code):
    if "integrations" in code:
        pytest.importorskip("transformers", reason="not run: transformers is not installed")
    torch._dynamo.reset()
    names = {}
    exec(compile(code, "guide", "exec"), names)
    result = next(names[name] for name in ("y", "logits", "served") if name in names)
    assert result.isfinite().all() and result.any()


def test_verbs_files_and_names_of_the_guide_exist():
    for verb in re.findall(r"python -m megamoe (\w+)", GUIDE):
        assert verb in cli.VERBS
    for path in re.findall(r"`((?:megamoe|benchmarks|tests)/[\w./-]*)`", GUIDE):
        assert (ROOT / path).exists(), path


def test_reference_has_every_public_name_with_its_docstring(capsys):
    text = reference()
    for name in megamoe.__all__:
        assert f"\n### {name}\n" in text, name
    for module, names in MODULES.items():
        assert f"\n## {module}\n" in text and (all(f"\n### {name}\n" in text for name in names) or "Not shown" in text)
    assert "linear1_bias [num_local_experts, 2 * intermediate]" in text  # of a method
    assert cli.main(["reference", "Workspace", "route"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("### Workspace") and "### route" in shown and "### MoELayer" not in shown
    assert cli.main(["reference", "nothing"]) == 2
