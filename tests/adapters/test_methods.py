"""What every registered method does, whichever it is: a new one is tested here by its line in the registry."""

import pickle

import numpy as np
import pytest
from click.testing import CliRunner

import nblora
from nblora.adapters import ADAPTERS
from nblora.backends.reference import ReferenceBackend
from nblora.cli import main
from nblora.compare import compare
from nblora.estimators import LoRAClassifier
from nblora.results import read_result_file, values_by_seed
from nblora.storage.safetensors_writer import write_safetensors
from nblora.sweep import Data, Sweep
from tests.adapters.support import KINDS, base_of, taught
from tests.helpers import assert_close, snapshot

pytestmark = pytest.mark.small


@pytest.fixture(params=ADAPTERS)
def method(request):
    return ADAPTERS[request.param]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def as_gradient(adapter, x, rng):
    return rng.normal(size=adapter.forward(x).shape)


def test_a_new_adapter_computes_what_its_base_computes(method, kind):
    base, x = base_of(kind)
    adapter = method(base, 3, seed=1)
    assert adapter.base_layer is base
    np.testing.assert_allclose(adapter(x), base(x), rtol=0, atol=1e-14)


def test_merging_keeps_what_was_learnt(method, kind, rng):
    base, x = base_of(kind)
    before, plain = snapshot(base), base(x)
    settings = {"alpha": 5.0} if "alpha" in method.settings() else {}
    adapter = taught(method(base, 3, seed=1, **settings), x, rng)
    merged = adapter.merge_to_original_layer()
    assert type(merged) is type(base)
    assert_close(merged(x), adapter(x))
    assert np.max(np.abs(adapter(x) - plain)) > 0.01
    for name, value in before.items():
        np.testing.assert_array_equal(base.get_parameter(name), value)
    with adapter.disable_adapter():
        np.testing.assert_array_equal(adapter(x), plain)
        adapter.backward(as_gradient(adapter, x, rng))
    figures = adapter.diagnostics()
    assert figures["stable_rank"] > 0
    assert figures["non_finite_count"] == 0


@pytest.mark.parametrize("freeze", [True, False])
def test_one_sweep_is_backward_and_update(method, kind, freeze, rng):
    base, x = base_of(kind)
    one = taught(method(base, 2, freeze_base_layer=freeze, seed=1), x, rng)
    two, g = one.clone(), as_gradient(one, x, rng)
    two.forward(x)
    one.backward(g)
    one.update_parameters(0.1)
    two.backward_update(g, 0.1)
    for name in one.parameter_names():
        assert_close(two.get_parameter(name), one.get_parameter(name))
    assert_close(two(x), one(x))


def test_the_reference_backend_computes_the_same(method, kind, rng):
    base, x = base_of(kind)
    fast = taught(method(base, 3, seed=1), x, rng)
    plain = fast.clone()
    plain._move(ReferenceBackend())
    g = as_gradient(fast, x, rng)
    found, wanted = [(one(x), one.backward(g), one.get_parameter_gradients()) for one in (fast, plain)]
    for ours, exact in zip(found, wanted, strict=True):
        if exact is not None:
            assert_close(ours, exact)


def test_copies_and_files_go_on_alike(method, kind, tmp_path, rng):
    base, x = base_of(kind)
    settings = {"lora_dropout": 0.25} if "lora_dropout" in method.settings() else {}
    adapter = taught(method(base, 3, seed=1, **settings), x, rng)
    adapter.save(tmp_path / "one.safetensors")
    copies = [nblora.load(tmp_path / "one.safetensors"), adapter.clone(), pickle.loads(pickle.dumps(adapter))]
    g = rng.normal(size=adapter(x).shape)
    for copy in copies:
        copy(x)
    for one in (adapter, *copies):
        for _ in range(2):
            one(x)
            one.backward_update(g, 0.05)
    for copy in copies:
        assert type(copy) is type(adapter)
        np.testing.assert_array_equal(copy.get_parameters(), adapter.get_parameters())


def test_onnx_computes_the_same(method, kind, tmp_path, rng):
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    base, x = base_of(kind, "float32")  # ONNX Runtime has no convolution in float64
    x = x.reshape(-1, 7) if kind == "fully_connected" else x.reshape(-1) if kind == "embedding" else x
    adapter = taught(method(base, 3, seed=1), x, rng).eval()
    adapter.to_onnx(tmp_path / "a.onnx")
    onnx.checker.check_model(str(tmp_path / "a.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    assert_close(session.run(None, {"x": x})[0], adapter(x))


def network(seed=1):
    return nblora.Sequential(
        {
            "hidden": nblora.FullyConnected.random(6, 9, activation="tanh", dtype="float64", seed=seed),
            "head": nblora.FullyConnected.random(9, 3, dtype="float64", seed=seed + 1),
        }
    )


def trained(method, rng, **settings):
    """A model whose hidden layer has learnt by a method, and its data."""
    x, y = rng.normal(size=(40, 6)), rng.integers(0, 3, 40)
    model = network().adapt("hidden", method.method, rank=2, seed=3, **settings)
    return model, x, y


def test_peft_files_there_and_back_and_the_merge_tool(method, tmp_path, rng):
    """What is written is read as what was there; `nblora merge` makes of it what the model merges to."""
    if method.method == "delta":
        pytest.skip("its files lack the dense delta, or hold an approximation: tests/formats")
    model, x, y = trained(method, rng)
    nblora.fit(model, x, y, loss="cross_entropy", epochs=2, lr=0.05, seed=1, progress=False)
    nblora.save_peft(model, tmp_path / "adapter", dtype="float64")
    back = nblora.load_peft(tmp_path / "adapter", network())
    assert_close(back(x), model(x))
    assert type(back["hidden"]).reads_peft
    nblora.fit(back, x, y, loss="cross_entropy", epochs=1, progress=False)
    base = network()
    tensors = {f"{n}.{part}": getattr(base[n], part) for n in ("hidden", "head") for part in ("weight", "bias")}
    write_safetensors(tmp_path / "base.safetensors", tensors, {})
    files = [str(tmp_path / name) for name in ("base.safetensors", "adapter", "merged.safetensors")]
    done = CliRunner().invoke(main, ["merge", files[0], "--adapter", files[1], "--output", files[2]])
    assert done.exit_code == 0, done.output
    from nblora.formats import SafetensorsFile

    with SafetensorsFile(tmp_path / "merged.safetensors") as file:
        assert_close(file.read("hidden.weight"), model.merge()["hidden"].weight)


def test_sweeps_comparisons_and_estimators_take_it_by_name(method, tmp_path, rng):
    x = rng.normal(size=(90, 6)).astype(np.float32)
    y = (x[:, 0] * x[:, 1] > 0).astype(int)
    data = Data(x[:60], y[:60], x[60:], y[60:])
    grid = {"method": ["head", method.method], "seed": [0, 1]}
    sweep = Sweep.grid(data, grid, {"rank": 2, "epochs": 1, "lora_dropout": 0.1, "alpha": 4.0}, hidden=(8,))
    records = sweep.run(tmp_path / "sweep.jsonl", workers=1, progress=False)
    assert [record.get("error") for record in records] == [None] * 4
    _, values, _ = values_by_seed(read_result_file(tmp_path / "sweep.jsonl"), None)
    assert [one.name for one in compare(values).methods] == ["head", method.method]
    found = LoRAClassifier(method=method.method, rank=2, max_iter=2, random_state=0).fit(x, y)
    assert type(found.model_[0]).method == method.method
    assert found.predict(x).shape == y.shape


def test_around_a_model_it_works_or_says_why_not(method, rng):
    x = rng.normal(size=(4, 6))
    if not method.around_models:
        with pytest.raises(ValueError, match=r"base_layer must be a layer with a weight of its own"):
            method(network(), 2)
        return
    model = network()
    adapter = method(model, 2, seed=1)
    np.testing.assert_allclose(adapter(x), model(x), rtol=0, atol=1e-14)
    before = adapter.get_parameters()
    adapter.backward_update(rng.normal(size=(4, 3)), 0.1)
    assert not np.array_equal(adapter.get_parameters(), before)


def test_no_room_above_knows_a_method_by_name():
    """Formats, tools and doors ask the registry."""
    import ast

    from tests.test_structure import PACKAGE, SOURCES

    here = {"adapters", "__init__.py", "demo", "bench"}  # a demo and a benchmark of two of them
    classes = {cls.__name__ for cls in ADAPTERS.values()} - {"LoRAAdapter", "DeltaLoRAAdapter"}
    for path in SOURCES:
        if path.relative_to(PACKAGE).parts[0] in here:
            continue
        nodes = list(ast.walk(ast.parse(path.read_text())))
        named = {node.id for node in nodes if isinstance(node, ast.Name)} | {
            node.attr for node in nodes if isinstance(node, ast.Attribute)
        }
        assert not named & classes, path
