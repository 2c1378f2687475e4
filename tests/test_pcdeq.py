"""``import pcdeq``: what it gives and what it needs; and the map of its files."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pcdeq

PACKAGE = Path(pcdeq.__file__).parent


def fresh(code: str) -> str:
    """The output of code run in an interpreter of its own."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_needs_torch_alone():
    code = """
import sys, torch
before = {name.partition(".")[0] for name in sys.modules}
import pcdeq
after = {name.partition(".")[0] for name in sys.modules} - before
print(sorted(after - set(sys.stdlib_module_names) - {"pcdeq"}))
print([m for m in ("torchvision", "scipy", "matplotlib") if m in sys.modules])
print([m for m in sys.modules if m.startswith("pcdeq.experiments")])
"""
    assert fresh(code).splitlines() == ["[]"] * 3


def test_star_gives_what_a_user_needs():
    names: dict = {}
    exec("from pcdeq import *", names)
    del names["__builtins__"]
    assert names.keys() == set(pcdeq.__all__)
    users = "NETWORKS PcDEQConv2d PcDEQLinear build_network load_network load_weights project"
    assert set(users.split()) <= names.keys()


def test_public_names_are_documented():
    for name in pcdeq.__all__:
        value = getattr(pcdeq, name)
        if callable(value):
            assert value.__doc__ and value.__doc__.strip(), name


def public(node: ast.AST) -> list[ast.AST]:
    """Public classes, functions and methods, whose code others may read first."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    found = [n for n in node.body if isinstance(n, kinds) and not n.name.startswith("_")]
    return found + [n for kind in found if isinstance(kind, ast.ClassDef) for n in public(kind)]


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: file.stem)
def test_whatever_is_public_is_documented(file):
    for node in public(ast.parse(file.read_text(encoding="utf-8"))):
        assert ast.get_docstring(node) or node.name == "extra_repr", node.name


def imported(file: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize(
    ("folder", "module"), [("", "pcdeq"), ("experiments", "pcdeq.experiments")]
)
def test_the_map_names_every_file_and_imports_lead_upwards(folder, module):
    text = (PACKAGE / "README.md").read_text(encoding="utf-8")
    rows = text.partition(f"| `{module.replace('.', '/')}/` |")[2].partition("\n\n")[0]
    first = "".join(row.split(" | ")[0] for row in rows.splitlines())
    order = re.findall(r"`(\w+)\.py`", first)
    files = {file.stem for file in (PACKAGE / folder).glob("*.py")} - {"__init__"}
    assert sorted(order) == sorted(files)
    for place, name in enumerate(order):
        below = {f"{module}.{other}" for other in order[place:]}
        reached = imported(PACKAGE / folder / f"{name}.py")
        assert not reached & below, name
        assert folder or not any(other.startswith("pcdeq.experiments") for other in reached), name
