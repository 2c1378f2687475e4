"""What goes with the package when it is installed: everything in ``pcdeq/``, and its licence."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def listed(key: str) -> list[str]:
    """A list of texts in pyproject.toml; its reader is in Python only from 3.11 on."""
    (entry,) = re.findall(rf"^{re.escape(key)} = \[([^\]]*)\]$", PYPROJECT, re.MULTILINE)
    return re.findall(r'"([^"]*)"', entry)


def test_every_file_of_the_package_is_installed():
    package = ROOT / "pcdeq"
    data = {path for pattern in listed("pcdeq") for path in package.glob(pattern)}
    modules = {path for path in package.rglob("*.py") if (path.parent / "__init__.py").exists()}
    files = {p for p in package.rglob("*") if p.is_file() and p.parent.name != "__pycache__"}
    assert files == data | modules
    assert sorted(path.name for path in data) == ["README.md", "mnist_sample.npz"]


def test_the_licence_is_named_and_there():
    assert 'license = "Apache-2.0 AND CC-BY-SA-3.0"' in PYPROJECT
    (name,) = listed("license-files")
    assert "Apache License" in (ROOT / name).read_text(encoding="utf-8")
    assert "license: Apache-2.0" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
