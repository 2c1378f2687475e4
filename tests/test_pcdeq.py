"""``import pcdeq``: what it gives and what it needs."""

import subprocess
import sys

import pcdeq


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
