"""`to_onnx`: ONNX Runtime computes what forward computes."""

import sys

import numpy as np
import pytest

import nblora
from nblora.errors import MissingExtraError
from nblora.storage import onnx_graph
from tests import oracle
from tests.helpers import ADAPTERS, DTYPES, LAYOUTS, assert_close, make_adapter, make_layer, randomise

pytestmark = pytest.mark.small
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "layer.onnx"


def compute(path, x):
    """The file's output; a graph that the checker refuses is an error."""
    onnx.checker.check_model(str(path), full_check=True)
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def check(layer, path, rng):
    layer.to_onnx(path)
    layer.eval()
    for batch in (1, 6):
        x = rng.normal(size=(batch, layer.in_features)).astype(layer.dtype)
        y = compute(path, x)
        assert y.dtype == layer.dtype
        assert_close(y, layer.forward(x))


@pytest.mark.parametrize("kind", [None, *ADAPTERS])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
def test_layers_and_adapters(rng, path, kind, layout, dtype, activation):
    layer = make_layer(rng, (7, 5), layout, dtype, activation, bias=kind is not None)
    check(make_adapter(rng, kind, layer, lora_dropout=0.5) if kind else layer, path, rng)


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_rank_layer(rng, path, dtype):
    check(randomise(nblora.LoRALayer(7, 5, 3, 2.0, dtype=dtype, seed=1), rng), path, rng)


@pytest.mark.parametrize("dtype", DTYPES)
def test_model(rng, path, dtype):
    inner = nblora.Sequential(make_layer(rng, (6, 6), dtype=dtype, activation="tanh"))
    first = make_adapter(rng, base=make_layer(rng, (7, 6), dtype=dtype, activation="relu"))
    check(nblora.Sequential(first, inner, make_layer(rng, (6, 5), dtype=dtype)), path, rng)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_on_a_model(rng, path, kind):
    base = nblora.Sequential(make_layer(rng, (7, 6), activation="gelu"), make_layer(rng, (6, 5)))
    adapter = make_adapter(rng, kind, base)
    check(adapter, path, rng)
    with adapter.disable_adapter():
        check(adapter, path, rng)


def test_a_disabled_adapter_exports_its_base(rng, path):
    adapter = make_adapter(rng)
    with adapter.disable_adapter():
        adapter.to_onnx(path)
    x = rng.normal(size=(3, 7))
    assert_close(compute(path, x), adapter.base_layer.forward(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_on_the_whole_line(path, dtype):
    layer = nblora.Dense(np.eye(1, dtype=dtype), activation="gelu")
    layer.to_onnx(path)
    x = np.linspace(-6, 6, 2001, dtype=dtype)[:, None]
    assert_close(compute(path, x), layer.forward(x))
    exact = oracle.forward(x[x < 0][:, None], oracle.State(weight=np.eye(1), activation="gelu"))
    assert_close(compute(path, x[x < 0][:, None]), exact, dtype)


def test_gelu_is_an_erf(rng, path):
    make_layer(rng, dtype="float32", activation="gelu").to_onnx(path)
    assert "Erf" in {node.op_type for node in onnx.load(path).graph.node}


def test_a_missing_extra_names_itself(rng, path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r"nblora\[onnx\]"):
        make_layer(rng).to_onnx(path)
    assert not path.exists()


def test_more_than_one_file_can_hold(rng, path, monkeypatch):
    monkeypatch.setattr(onnx_graph, "LARGEST", 100)
    with pytest.raises(ValueError, match="at most 100 bytes"):
        make_layer(rng).to_onnx(path)
    assert not path.exists()


@pytest.mark.parametrize("kind", [None, *ADAPTERS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_convolutions_and_embeddings(rng, path, kind, dtype):
    """ONNX Runtime has convolutions in float32 only; in float64 ONNX's own evaluator computes them."""
    settings = {"stride": 2, "padding": 1, "dtype": dtype, "seed": 0}
    bases = {
        "images": (nblora.Conv2d.random(3, 5, (3, 2), activation="gelu", **settings), (2, 3, 7, 6)),
        "sequences": (nblora.Conv1d.random(3, 5, 3, bias=False, **settings), (2, 3, 9)),
        "integers": (nblora.Embedding.random(7, 5, dtype=dtype, seed=0), (6,)),
    }
    for base, shape in bases.values():
        layer = base if kind is None else make_adapter(rng, kind, base, lora_dropout=0.5)
        integers = isinstance(base, nblora.Embedding)
        x = rng.integers(0, 7, shape) if integers else rng.normal(size=shape).astype(dtype)
        for exported in (layer, nblora.Sequential(layer)):
            exported.to_onnx(path)
            if dtype == "float32" or integers:
                y = compute(path, x)
            else:
                from onnx.reference import ReferenceEvaluator

                onnx.checker.check_model(str(path), full_check=True)
                y = ReferenceEvaluator(str(path)).run(None, {"x": x})[0]
            assert y.dtype == dtype
            assert_close(y, layer.eval().forward(x))
