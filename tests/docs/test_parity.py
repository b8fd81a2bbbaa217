"""`docs/parity.md`: every member is there, every name resolves, every test exists."""

import ast
import re

import pytest

import nblora
from tests.processes import ROOT

MEMBERS = [
    "Alpha",
    "BaseLayer",
    "IsBaseLayerFrozen",
    "LoRALayer",
    "Rank",
    "MergeToOriginalLayer",
    "ILayer",
    "IJitCompilable",
    "IDiagnosticsProvider",
    "IWeightLoadable",
    "DeltaLoRAAdapter",
    "DeltaScaling",
    "MomentumFactor",
    "ParameterCount",
    "Backward",
    "Forward",
    "GetCurrentDelta",
    "GetParameterGradients",
    "GetParameters",
    "ResetState",
    "SetParameters",
    "UpdateParameters",
    "IDisposable",
    "ArgumentNullException",
    "ArgumentException",
    "InvalidOperationException",
]

ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in (ROOT / "docs" / "parity.md").read_text().splitlines()
    if line.startswith("|") and not re.match(r"\|( (member|rule) \||---)", line)
]

# Attributes of objects are looked up on an object.
BASE = nblora.Dense([[1.0, 2.0], [3.0, 4.0]])
OBJECTS = {
    "Dense": BASE,
    "FullyConnected": nblora.FullyConnected([[1.0]]),
    "LoRALayer": nblora.LoRALayer(2, 2, 1),
    "LoRAAdapter": nblora.LoRAAdapter(BASE, 1),
    "DeltaLoRAAdapter": nblora.DeltaLoRAAdapter(BASE, 1),
    "Sequential": nblora.Sequential(BASE),
}


def test_every_member_has_a_row():
    named = " ".join(row[0] for row in ROWS)
    assert [member for member in MEMBERS if not re.search(rf"\b{member}\b", named)] == []


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_names_what_exists(row):
    _, names, test = row
    found = [name for name in re.findall(r"`([\w.]+)`", names) if not name.endswith("Error") or "." in name]
    assert found
    for name in found:
        owner, _, member = name.partition(".")
        value = OBJECTS[owner] if member and owner in OBJECTS else getattr(nblora, owner)
        assert not member or hasattr(value, member), name
    file, _, function = test.strip("` ").partition("::")
    tree = ast.parse((ROOT / "tests" / file).read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
