"""The house: imports point one way, importing is cheap, everything public is documented, backends match."""

import ast
import importlib
import inspect
import pkgutil

import pytest

import nblora
from nblora.backends import protocol
from nblora.backends.blocks import ReferenceBlocks
from nblora.backends.cpu import CPUBackend
from nblora.backends.cuda import CUDABackend
from nblora.backends.reference import ReferenceBackend
from tests.processes import ROOT, run

# A module may import rooms of a lower number, its own room, and the leaves.
ROOMS = {
    "kernels": 1,
    "backends": 2,
    "layers": 3,
    "adapters": 4,
    "models": 5,
    "formats": 6,
    "pretrained": 8,
    "text": 9,
    "training": 7,
    "weights": 7,
}
DOORS = {"nblora", "cli", "demo", "estimators", "sweep", "plots", "bench", "info", "compare", "results", "finetuning"}
LEAVES = {"errors", "checks", "linalg", "storage", "_version"}
HEAVY = {"scipy", "click", "tqdm", "matplotlib", "sklearn", "torch", "onnx", "safetensors.torch", "dask", "pandas"}
HEAVY |= {"tokenizers", "jinja2", "gguf"}

PACKAGE = ROOT / "nblora"
SOURCES = sorted(PACKAGE.rglob("*.py"))


def imported(path):
    """The dotted names that a file imports, relative ones made absolute."""
    package = ["nblora", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *filter(None, [node.module])])
            # `from nblora import errors` means the room, not the root.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def room(name):
    """The room of a dotted name inside nblora; "nblora" for a name that the root itself offers."""
    parts = name.split(".")
    known = ROOMS.keys() | DOORS | LEAVES
    return parts[1] if len(parts) > 1 and parts[1] in known else "nblora"


def arrow_is_allowed(source, target):
    if source == target or source in DOORS:
        return True
    if target in LEAVES:
        return True
    return source not in LEAVES and target in ROOMS and ROOMS[target] < ROOMS[source]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    inside = path.relative_to(PACKAGE).with_suffix("").parts
    source = "nblora" if inside == ("__init__",) else inside[0]
    assert source in ROOMS.keys() | DOORS | LEAVES, f"{source} has no place in the order of rooms"
    back = [n for n in imported(path) if n.split(".")[0] == "nblora" and not arrow_is_allowed(source, room(n))]
    assert back == []


@pytest.mark.parametrize(
    ("source", "target", "allowed"),
    [
        ("layers", "nblora.adapters.base", False),
        ("kernels", "nblora.backends", False),
        ("formats", "nblora.weights.merge", False),
        ("checks", "nblora.layers", False),
        ("storage", "nblora.kernels.common.jit", False),
        ("adapters", "nblora.load", False),
        ("training", "nblora.weights", False),
        ("adapters", "nblora.errors", True),
        ("cli", "nblora.load", True),
        ("training", "nblora.formats.peft", True),
    ],
)
def test_the_rule_itself(source, target, allowed):
    assert arrow_is_allowed(source, room(target)) == allowed


# --- importing ---------------------------------------------------------------------------------------------------


def test_import_brings_nothing_heavy():
    code = "import sys, nblora; print(*sorted(m for m in sys.modules if m in set(sys.argv[1:])))"
    numba_alone = run("import sys, numba; print(*sys.modules)").stdout.split()
    assert set(run(code, *HEAVY).stdout.split()) <= set(numba_alone)


def test_import_compiles_nothing():
    code = """
import numba.core.event as event
compiled = []
class Listener(event.Listener):
    def on_start(self, e): compiled.append(e)
    def on_end(self, e): pass
event.register("numba:compile", Listener())
import nblora
print(len(compiled))
"""
    assert run(code).stdout == "0\n"


def test_import_costs_a_quarter_of_a_second_at_most():
    code = "import time, numba; t = time.process_time(); import nblora; print(time.process_time() - t)"
    assert min(float(run(code).stdout) for _ in range(3)) <= 0.25


def test_public_names_are_explicit():
    assert sorted(nblora.__all__) == nblora.__all__
    assert all(hasattr(nblora, name) for name in nblora.__all__)
    tasks = {"load_peft", "save_peft", "merge", "unmerge", "verify", "inspect", "combine"}
    assert tasks <= set(nblora.__all__)
    assert set(nblora.__all__) <= set(run("import nblora; print(*dir(nblora))").stdout.split())


# --- docstrings --------------------------------------------------------------------------------------------------


def public_modules():
    """Every module of nblora whose path has no leading underscore."""
    yield nblora
    for module in pkgutil.walk_packages(nblora.__path__, "nblora."):
        if not any(part.startswith("_") for part in module.name.split(".")):
            try:
                yield importlib.import_module(module.name)
            except ModuleNotFoundError as error:  # a peer of the benchmarks that is not installed
                if error.name is None or error.name.startswith("nblora"):
                    raise


def undocumented(owner, name, value):
    """Names without a docstring, their own or inherited, of one class, function or module's member."""
    if inspect.isclass(value):
        if not value.__doc__:
            yield f"{owner}.{name}"
        for member, raw in vars(value).items():
            function = raw.__func__ if isinstance(raw, classmethod | staticmethod) else raw
            documented = inspect.isfunction(function) or isinstance(function, property)
            if not member.startswith("_") and documented and not inspect.getdoc(getattr(value, member)):
                yield f"{owner}.{name}.{member}"
    elif inspect.isfunction(value) and not inspect.getdoc(value):
        yield f"{owner}.{name}"


def test_everything_public_has_a_docstring():
    missing = []
    for module in public_modules():
        if not module.__doc__:
            missing.append(module.__name__)
        for name, value in vars(module).items():
            if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__:
                missing.extend(undocumented(module.__name__, name, value))
    assert missing == []


# --- arguments ---------------------------------------------------------------------------------------------------


MOST_ARGUMENTS = 10


def is_public(path, name):
    """Public API: what users call by keyword. Kernels and backends are nobody's API but the layers'."""
    inside = path.relative_to(PACKAGE).parts
    return not name.startswith("_") and inside[0] not in ("kernels", "backends")


def test_nothing_private_takes_more_than_ten_arguments():
    """Constructors and public functions with options by keyword may; what is launched on a GPU gets its operands one by
    one, and lies in rooms called cuda."""
    long = []
    for path in SOURCES:
        if "cuda" in path.relative_to(PACKAGE).with_suffix("").parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name != "__init__" and not is_public(path, node.name):
                names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                if len(set(names) - {"self", "cls"}) > MOST_ARGUMENTS:
                    long.append(f"{path.relative_to(PACKAGE)}: {node.name} takes {len(names)}")
    assert long == []


# --- backends ----------------------------------------------------------------------------------------------------


def operations(cls):
    return {name: value for name, value in inspect.getmembers(cls, inspect.isfunction) if name[0] != "_"}


@pytest.mark.parametrize("backend", [CPUBackend, ReferenceBackend, CUDABackend])
def test_the_backend_offers_the_protocol(backend):
    """The same operations, with the same arguments in the same order."""
    wanted = operations(protocol.Backend) | operations(ReferenceBlocks)
    expected = {name: list(inspect.signature(f).parameters) for name, f in wanted.items()}
    offered = {name: list(inspect.signature(f).parameters) for name, f in operations(backend).items()}
    assert offered == expected


def test_no_two_parts_of_the_backend_of_a_gpu_have_a_name_in_common():
    """One would stand in for the other, which its own callers mean."""
    owners = {}
    for part in CUDABackend.__mro__[1:-1]:
        for name in vars(part):
            owners.setdefault(name, []).append(part.__name__)
    twice = {name: parts for name, parts in owners.items() if len(parts) > 1 and not name.startswith("__")}
    better = {name: ["Deferred", "Launching"] for name in ("_before_reading", "_before_writing")}
    assert twice == better


def test_no_pickle_but_the_kernel_caches():
    """Compiled kernels hold what only Numba can read, in a folder that nobody else writes to."""
    risky = {"pickle", "shelve", "marshal", "dill", "joblib"}
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in SOURCES
        for name in imported(path)
        if name.split(".")[0] in risky
    }
    assert found == {"kernels/common/cache.py"}
