"""What a person gets who installs megamoe: the wheel, the sdist and the editable install, each imported outside the
checkout. No network: the build runs in this environment."""

import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ("pyproject.toml", "README.md", "LICENSE", "NOTICE", "megamoe", "bindings", "csrc")
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]

# Where each package is, and whether the device sources are found. Needs the standard library only: -S keeps whatever
# is installed in this environment from answering. -c puts the working directory first on the path, as -m does.
LOOK = """
import json, site, sys
site.addsitedir(sys.argv[1])
import importlib.resources, megamoe, megamoe_cuda, megamoe_cuda.compile, megamoe.__main__
from megamoe import MoEConfig
data = importlib.resources.files("megamoe_csrc")
print(json.dumps({"megamoe": megamoe.__file__, "megamoe_cuda": megamoe_cuda.__file__, "version": megamoe.__version__,
                  "sources": sorted(megamoe_cuda.compile.read_sources()), "data": (data / "prelude.cuh").is_file(),
                  "hidden": MoEConfig(128, 128, 2, 1).hidden}))
"""


def device_sources() -> set[str]:
    csrc = ROOT / "csrc"
    return {path.relative_to(csrc).as_posix() for path in csrc.rglob("*") if path.suffix in (".cu", ".cuh")}


def run(*command, cwd) -> str:
    ran = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=300,
                         env={"PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"})
    assert ran.returncode == 0, f"{command}\n{ran.stdout[-3000:]}\n{ran.stderr[-3000:]}"
    return ran.stdout


def install(wheel: Path, target: Path) -> Path:
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel, cwd="/")
    return target


def look(target: Path, cwd) -> dict:
    return json.loads(run(sys.executable, "-S", "-c", LOOK, target, cwd=cwd))


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy to build in: a build leaves folders behind."""
    for module in ("build", "setuptools", "pip"):
        if not find_spec(module):
            pytest.skip(f"not run: {module} is not installed")
    copy = tmp_path_factory.mktemp("package") / "tree"
    copy.mkdir()
    for item in SHIPPED:
        source = ROOT / item
        if source.is_dir():
            shutil.copytree(source, copy / item, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / item)
    return copy


@pytest.fixture(scope="module")
def dist(tree) -> Path:
    """The sdist, and the wheel that is built from it."""
    out = tree.parent / "dist"
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, tree, cwd=tree)
    return out


def test_package_list_is_the_tree():
    folders = {path.parent for path in (ROOT / "megamoe").rglob("*.py")}
    in_tree = {".".join(folder.relative_to(ROOT).parts) for folder in folders} | {"megamoe_cuda", "megamoe_csrc"}
    assert set(SETUPTOOLS["packages"]) == in_tree
    assert not [path for path in (ROOT / "bindings").rglob("*.py") if path.parent != ROOT / "bindings"]


def test_version_is_one():
    import megamoe

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert megamoe.__version__ == project["version"]


def test_wheel_holds_the_three_packages(dist):
    (wheel,) = dist.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"megamoe_csrc/{source}" for source in device_sources()} <= names
    python = {f"megamoe/{path.relative_to(ROOT / 'megamoe').as_posix()}" for path in (ROOT / "megamoe").rglob("*.py")}
    python |= {f"megamoe_cuda/{path.name}" for path in (ROOT / "bindings").glob("*.py")}
    assert python <= names
    assert {Path(file).name for file in names if "/licenses/" in file} == {"LICENSE", "NOTICE"}
    assert {file.split("/")[0].split("-")[0] for file in names} == {"megamoe", "megamoe_cuda", "megamoe_csrc"}


def test_wheel_installs_and_finds_its_sources(dist, tmp_path):
    (wheel,) = dist.glob("*.whl")
    target = install(wheel, tmp_path / "target")
    seen = look(target, "/")
    assert seen["megamoe"] == str(target / "megamoe" / "__init__.py")
    assert seen["megamoe_cuda"] == str(target / "megamoe_cuda" / "__init__.py")
    assert set(seen["sources"]) == device_sources() and seen["data"] and seen["hidden"] == 128


def test_wheel_works_from_inside_a_checkout(dist, tmp_path):
    # There `megamoe` is the folder, and megamoe_cuda still has to be found: bindings/ would not be it.
    (wheel,) = dist.glob("*.whl")
    target = install(wheel, tmp_path / "target")
    seen = look(target, ROOT)
    assert seen["megamoe"] == str(ROOT / "megamoe" / "__init__.py")
    assert seen["megamoe_cuda"] == str(target / "megamoe_cuda" / "__init__.py")
    assert set(seen["sources"]) == device_sources() and seen["data"]


def test_sdist_is_enough_to_build_and_install(dist, tmp_path):
    (sdist,) = dist.glob("*.tar.gz")
    shutil.unpack_archive(sdist, tmp_path)
    (unpacked,) = tmp_path.glob("megamoe-*")
    names = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*")}
    assert {f"csrc/{source}" for source in device_sources()} <= names
    assert {"LICENSE", "NOTICE", "README.md", "pyproject.toml"} <= names
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path / "again", unpacked, cwd="/")
    (wheel,) = (tmp_path / "again").glob("*.whl")
    target = install(wheel, tmp_path / "target")
    seen = look(target, "/")
    assert seen["megamoe"] == str(target / "megamoe" / "__init__.py") and set(seen["sources"]) == device_sources()


@pytest.mark.parametrize("place", ["root", "checkout"])
def test_editable_install_uses_the_tree(tree, tmp_path, place):
    build = "import sys; from setuptools import build_meta; build_meta.build_editable(sys.argv[1])"
    out = tmp_path / "editable"
    out.mkdir()
    run(sys.executable, "-c", build, out, cwd=tree)
    (wheel,) = out.glob("*.whl")
    target = install(wheel, tmp_path / "target")
    seen = look(target, "/" if place == "root" else tree)
    assert seen["megamoe"] == str(tree / "megamoe" / "__init__.py")
    assert seen["megamoe_cuda"] == str(tree / "bindings" / "__init__.py")
    assert set(seen["sources"]) == device_sources() and seen["data"]
