"""Makes the checkout importable without installing it: a folder of links, one per package of pyproject.toml.

`python launch/link.py` prints the folder; put it on PYTHONPATH. The packages lie under other names than their folders
(megamoe_cuda is bindings/), so the root itself on PYTHONPATH would not do.
"""

import os
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def package_dirs() -> dict[str, str]:
    """Package name -> folder under the root, as pyproject.toml has them."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]


def link_packages(site: Path = ROOT / ".site") -> Path:
    """Makes the links under `site` and returns it; in a read-only checkout a temporary folder takes its place."""
    try:
        site.mkdir(exist_ok=True)
        _link_all(site)
    except OSError:
        site = Path(tempfile.mkdtemp(prefix="megamoe-site-"))
        _link_all(site)
    return site


def _link_all(site: Path) -> None:
    for package, folder in package_dirs().items():
        link, target = site / package, ROOT / folder
        if link.is_symlink() and link.resolve() == target:
            continue
        # Made beside and renamed: two processes may do this at once.
        fresh = site / f".{package}.{os.getpid()}"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(target)
        fresh.replace(link)


if __name__ == "__main__":
    print(link_packages())
