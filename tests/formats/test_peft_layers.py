"""PEFT adapters as nblora's own layers, and back."""

import json
import math

import numpy as np
import pytest

import nblora
from nblora.errors import FormatError
from nblora.formats import PeftAdapter, load_peft, save_peft
from tests.weights.support import FIXTURES, linear_factors, read_file, write_adapter, write_file

MODELS = FIXTURES.parent / "models"

LINEAR = [
    "linear_r4",
    "linear_r4_bf16_adapter",
    "linear_r4_dora",
    "linear_r4_fp16_adapter",
    "linear_r4_rslora",
    "gpt2_conv1d_r4",
]


def outputs(name):
    with np.load(FIXTURES / name / "io.npz") as arrays:
        return arrays["x"].astype(np.float64), arrays["y_adapter64"]


@pytest.mark.parametrize("name", LINEAR)
def test_imported_layer_computes_what_peft_does(name):
    x, y = outputs(name)
    (adapter,) = load_peft(FIXTURES / name, FIXTURES / name / "base.safetensors", dtype="float64").values()
    assert type(adapter.base_layer) is (nblora.Dense if name.startswith("gpt2") else nblora.FullyConnected)
    np.testing.assert_allclose(adapter.eval()(x), y, rtol=0, atol=1e-12)


def test_imported_network_computes_what_peft_does():
    x, y = outputs("mlp_r4")
    layers = load_peft(FIXTURES / "mlp_r4", FIXTURES / "mlp_r4" / "base.safetensors", dtype="float64")
    hidden = np.maximum(layers["fc2"](np.maximum(layers["fc1"](x), 0)), 0)
    np.testing.assert_allclose(layers["head"](hidden), y, rtol=0, atol=1e-12)
    activated = load_peft(
        FIXTURES / "mlp_r4", FIXTURES / "mlp_r4" / "base.safetensors", dtype="float64", activation="relu"
    )
    np.testing.assert_allclose(layers["head"](activated["fc2"](activated["fc1"](x))), y, rtol=0, atol=1e-12)


def test_imported_lora_bias_and_odd_strengths(tmp_path, rng):
    W, b = rng.standard_normal((6, 5)), rng.standard_normal(6)
    base = write_file(tmp_path / "base.safetensors", {"lin.weight": W, "lin.bias": b})
    tensors = {**linear_factors(rng, "lin", 6, 5, dtype=np.float64), "lin.lora_B.bias": rng.standard_normal(6)}
    A, B = tensors["lin.lora_A.weight"], tensors["lin.lora_B.weight"]
    x = rng.standard_normal((3, 5))
    for alpha in (8, 0, -3):
        path = write_adapter(tmp_path / "a", tensors, lora_bias=True, lora_alpha=alpha)
        adapter = load_peft(path, base, dtype="float64")["lin"]
        exact = x @ W.T + b + alpha / 4 * (x @ A.T @ B.T + tensors["lin.lora_B.bias"])
        np.testing.assert_allclose(adapter(x), exact, rtol=0, atol=1e-12)


def test_modules_are_chosen_by_name_and_others_refused(tmp_path):
    path = FIXTURES / "made_embedding"
    assert list(load_peft(path, path / "base.safetensors", modules=["mid"])) == ["mid"]
    with pytest.raises(ValueError, match="'tail' is not in"):
        load_peft(path, path / "base.safetensors", modules=["tail"])
    with pytest.raises(FormatError, match=r"holds no fc1\.weight"):
        load_peft(FIXTURES / "mlp_r4", path / "base.safetensors")
    misfit = write_file(tmp_path / "misfit.safetensors", {"proj.weight": np.ones((3, 3))})
    with pytest.raises(FormatError, match=r"proj\.weight has shape"):
        load_peft(FIXTURES / "linear_r4", misfit)


@pytest.mark.parametrize(
    "name",
    [
        "linear_r4",
        "linear_r4_rslora",
        "mlp_r4",
        "gpt2_conv1d_r4",
        "linear_r4_bf16_adapter",
        "conv1d_r2",
        "conv2d_r4",
        "made_embedding",
        "resnet_conv",
        "bert_embedding_all",
    ],
)
def test_there_and_back_keeps_bits_and_keys(name, tmp_path):
    folder, base = FIXTURES / name, FIXTURES / name / "base.safetensors"
    if not folder.exists():
        folder, base = MODELS / name / "adapter", MODELS / name / "base"
    layers = load_peft(folder, base)
    config = json.loads((folder / "adapter_config.json").read_text())
    dtype = "bfloat16" if "bf16" in name else "float32"
    save_peft(layers, tmp_path / "back", config=config, dtype=dtype)
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text()) == config
    before, after = (read_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    for key, array in before.items():
        assert (after[key].dtype, after[key].shape, after[key].tobytes()) == (array.dtype, array.shape, array.tobytes())


@pytest.mark.parametrize(
    "name",
    [
        "conv1d_r2",
        "conv2d_r4",
        "conv2d_r4_dora",
        "made_conv1d_dora",
        "made_convs_lora_bias",
        "made_embedding",
        "made_embedding_dora",
    ],
)
def test_convolutions_and_embeddings_merge_as_in_peft(name):
    """Through nblora's layers: the merged weight of each, in PyTorch's shape, is PEFT's."""
    layers = load_peft(FIXTURES / name, FIXTURES / name / "base.safetensors", dtype="float64")
    with np.load(FIXTURES / name / "io.npz") as arrays:
        merged = {key.removeprefix("merged/"): arrays[key] for key in arrays.files if key.startswith("merged/")}
    kinds = {type(adapter.base_layer) for adapter in layers.values()}
    assert kinds & {nblora.Conv1d, nblora.Conv2d, nblora.Embedding}
    for module, adapter in layers.items():
        plain = adapter.merge_to_original_layer()
        np.testing.assert_allclose(plain.weight, merged[f"{module}.weight"], rtol=0, atol=1e-12)
        if plain.bias is not None and f"{module}.bias" in merged:
            np.testing.assert_allclose(plain.bias, merged[f"{module}.bias"], rtol=0, atol=1e-12)


def test_imported_convolutions_compute_what_peft_does():
    x, y = outputs("conv1d_r2")
    path = FIXTURES / "conv1d_r2"
    settings = {"conv": {"padding": 1}}
    layers = load_peft(path, path / "base.safetensors", dtype="float64", settings=settings)
    np.testing.assert_allclose(layers["conv"](x), y, rtol=0, atol=1e-12)
    x, y = outputs("made_convs_lora_bias")
    path = FIXTURES / "made_convs_lora_bias"
    layers, base = load_peft(path, path / "base.safetensors", dtype="float64"), read_file(path / "base.safetensors")
    means = layers["two"](layers["one"](x)[:, None]).mean((2, 3))
    np.testing.assert_allclose(means @ base["end.weight"].T.astype(float) + base["end.bias"], y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["made_embedding", "made_embedding_dora"])
def test_an_imported_embedding_computes_what_peft_does(name):
    path = FIXTURES / name
    with np.load(path / "io.npz") as arrays:
        x, y = arrays["x"], arrays["y_adapter64"]
    layers = load_peft(path, path / "base.safetensors", dtype="float64")
    base = {key: array.astype(float) for key, array in read_file(path / "base.safetensors").items()}
    hidden = np.tanh(layers["mid"](layers["embed"](x)))
    normed = (hidden - hidden.mean(-1, keepdims=True)) / np.sqrt(hidden.var(-1, keepdims=True) + 1e-5)
    normed = normed * base["norm.weight"] + base["norm.bias"]
    np.testing.assert_allclose(normed @ base["head.weight"].T + base["head.bias"], y, rtol=0, atol=1e-12)


def test_settings_and_layers_that_do_not_fit(tmp_path, rng):
    path = FIXTURES / "conv1d_r2"
    base = path / "base.safetensors"
    with pytest.raises(ValueError, match="settings: 'conv9' is not in"):
        load_peft(path, base, settings={"conv9": {"stride": 2}})
    with pytest.raises(TypeError, match="settings must map"):
        load_peft(path, base, settings={"conv": 2})
    with pytest.raises(FormatError, match="conv is a convolution in 2 groups"):
        load_peft(FIXTURES / "conv2d_grouped", FIXTURES / "conv2d_grouped" / "base.safetensors")
    cube = {"c.lora_A.weight": np.ones((2, 3, 1, 1, 1)), "c.lora_B.weight": np.ones((4, 2, 1, 1, 1))}
    of_three = write_adapter(tmp_path / "cube", cube, r=2)
    deep = write_file(tmp_path / "cube.safetensors", {"c.weight": np.ones((4, 3, 1, 1, 1))})
    with pytest.raises(FormatError, match="c is a convolution along 3 axes"):
        load_peft(of_three, deep)
    misfit = write_file(tmp_path / "misfit.safetensors", {"conv.weight": np.ones((7, 5, 2))})
    with pytest.raises(FormatError, match=r"conv\.weight has shape \(7, 5, 2\)"):
        load_peft(path, misfit)
    model = nblora.Sequential({"conv": nblora.FullyConnected.random(15, 7, seed=0)})
    with pytest.raises(FormatError, match="adapts 'conv' as a convolution, and the model has a FullyConnected"):
        load_peft(path, model)


@pytest.mark.parametrize("kind", ["lora", "delta"])
def test_a_model_of_convolutions_goes_and_comes_back(kind, tmp_path, rng):
    def network(seed):
        return nblora.Sequential(
            {
                "first": nblora.Conv2d.random(2, 4, 3, padding=1, activation="relu", seed=seed),
                "second": nblora.Conv2d.random(4, 3, (1, 2), stride=2, seed=seed + 1),
                "last": nblora.Conv2d.random(3, 2, 1, seed=seed + 2),
            }
        )

    model = network(0).adapt(["first", "second"], kind, rank=2, modules_to_save="last", seed=0)
    for named in list(model._parameters()):
        if "lora_B" in named.name:
            model.set_parameter(named.name, rng.normal(size=named.shape))
    save_peft(model, tmp_path / "out", fold_delta=1 if kind == "delta" else None)
    read = load_peft(tmp_path / "out", network(0))
    x = rng.normal(size=(2, 2, 5, 6)).astype("float32")
    np.testing.assert_allclose(read(x), model(x), rtol=0, atol=1e-6)
    assert type(read["last"]) is nblora.Conv2d
    assert read["last"].trainable


@pytest.fixture
def delta(rng):
    """A DeltaLoRAAdapter that has learned something everywhere."""

    def make(use_rslora=False, base=nblora.FullyConnected):
        shape = (7, 11) if base is nblora.FullyConnected else (11, 7)
        layer = base(rng.standard_normal(shape), rng.standard_normal(7))
        adapter = nblora.DeltaLoRAAdapter(layer, 3, alpha=5, delta_scaling=0.3, use_rslora=use_rslora)
        adapter.set_parameter("lora_B", rng.standard_normal((3, 7)))
        adapter.set_parameter("delta", rng.standard_normal((11, 7)))
        return adapter

    return make


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("base", [nblora.FullyConnected, nblora.Dense])
def test_delta_is_folded_as_well_as_a_rank_can(use_rslora, base, delta, tmp_path, rng):
    adapter = delta(use_rslora, base)
    A, B, D = (adapter.get_parameter(name) for name in ("lora_A", "lora_B", "delta"))
    values = np.linalg.svd(D, compute_uv=False)
    for rank in (1, 4, 7):
        (report,) = save_peft(adapter, tmp_path / "out", name="net.lin", fold_delta=rank)
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert (config["r"], report.rank) == (3 + rank, 3 + rank)
        root = math.sqrt(3 + rank) if use_rslora else 3 + rank
        np.testing.assert_allclose(config["lora_alpha"], adapter.scaling * root, rtol=1e-15)
        np.testing.assert_allclose(
            report.delta_error, np.sqrt((values[rank:] ** 2).sum()) / np.linalg.norm(D), atol=1e-12
        )
        np.testing.assert_allclose(report.delta_norm, 0.3 * np.linalg.norm(D), rtol=1e-12)
        with PeftAdapter(tmp_path / "out") as written:
            module = written.modules["net.lin"]
            A2, B2 = written.file.read_wide(module.A.name), written.file.read_wide(module.B.name)
            np.testing.assert_allclose(module.scaling, adapter.scaling, rtol=1e-15)
        assert A2[:3].tobytes() == np.ascontiguousarray(A.T).tobytes()
        assert np.ascontiguousarray(B2[:, :3]).tobytes() == np.ascontiguousarray(B.T).tobytes()
        folded = module.scaling * B2[:, 3:] @ A2[3:]
        np.testing.assert_allclose(
            np.linalg.norm(folded.T - 0.3 * D), report.delta_error * report.delta_norm, atol=1e-12
        )
    x = rng.standard_normal((4, 11))
    reread = nblora.LoRAAdapter.from_factors(
        adapter.base_layer, A2.T, B2.T, config["lora_alpha"], use_rslora=use_rslora
    )
    np.testing.assert_allclose(reread(x), adapter(x), rtol=0, atol=1e-12)


def test_delta_left_out_is_reported(delta, tmp_path):
    adapter = delta()
    change = adapter.scaling * adapter.get_parameter("lora_A") @ adapter.get_parameter("lora_B")
    lost = 0.3 * np.linalg.norm(adapter.get_parameter("delta"))
    share = 100 * lost / (lost + np.linalg.norm(change))
    with pytest.warns(UserWarning, match=rf"that of layer is left out, {share:.1f} % of the change.*fold_delta=RANK"):
        (report,) = save_peft(adapter, tmp_path / "out")
    assert (report.rank, report.delta_error) == (3, 1.0)
    adapter.reset_state(include_delta=True)
    (report,) = save_peft(adapter, tmp_path / "out")
    assert (report.delta_norm, report.delta_error) == (0.0, 0.0)


def test_large_deltas_go_through_lanczos_to_the_same_end(rng):
    from nblora import linalg

    U, V = (np.linalg.qr(rng.standard_normal((1100, 12)))[0] for _ in range(2))
    matrix = U * np.geomspace(10, 0.1, 12) @ V.T
    P, Q, error = linalg.best_product(matrix, 5)
    values = np.geomspace(10, 0.1, 12)
    assert min(matrix.shape) > linalg._DENSE_SVD
    np.testing.assert_allclose(error, np.linalg.norm(values[5:]) / np.linalg.norm(values), rtol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(matrix - P @ Q), np.linalg.norm(values[5:]), rtol=1e-9)


def test_what_cannot_be_exported_is_refused(delta, tmp_path):
    adapter = delta()
    for rank in (0, 8):
        with pytest.raises(ValueError, match="fold_delta"):
            save_peft(adapter, tmp_path / "out", fold_delta=rank)
    with pytest.raises(ValueError, match="rsLoRA"):
        save_peft({"a": adapter, "b": delta(True)}, tmp_path / "out")
    with pytest.raises(TypeError, match="LoRAAdapter"):
        save_peft({"a": 3}, tmp_path / "out")
    with pytest.raises(ValueError, match="no adapter"):
        save_peft({}, tmp_path / "out")
    with pytest.raises(FormatError, match="use_qalora"):
        save_peft(adapter, tmp_path / "out", config={"peft_type": "LORA", "use_qalora": True})
    broken = adapter.get_parameter("delta")
    broken[0, 0] = np.inf
    adapter.set_parameter("delta", broken)
    with pytest.raises(ValueError, match="not finite"):
        save_peft(adapter, tmp_path / "out", fold_delta=2)
    assert not (tmp_path / "out").exists()


def test_ranks_and_strengths_of_their_own_are_written_as_patterns(tmp_path, rng):
    adapters = {}
    for name, rank, alpha in (("a.b", 2, 4), ("b", 3, 4), ("a.c", 2, 7)):
        layer = nblora.Dense(rng.standard_normal((6, 5)))
        adapters[name] = nblora.LoRAAdapter(layer, rank, alpha)
    save_peft(adapters, tmp_path / "out", dtype="float16")
    with PeftAdapter(tmp_path / "out") as written:
        for name, adapter in adapters.items():
            module = written.modules[name]
            assert (module.rank, module.alpha, module.scaling) == (adapter.rank, adapter.alpha, adapter.scaling)
            assert module.A.dtype == "F16"


# --- models ------------------------------------------------------------------------------------------------------


def network(rng, **activations):
    """Two layouts, a nested model and a head, in float64."""
    inner = nblora.Sequential({"up": nblora.Dense.random(6, 7, activation="gelu", dtype="float64", seed=1)})
    return nblora.Sequential(
        {
            "first": nblora.FullyConnected.random(5, 6, activation="tanh", dtype="float64", seed=2),
            "block": inner,
            "head": nblora.Dense.random(7, 3, dtype="float64", seed=3),
        }
    )


def trained(rng, adapter="delta"):
    """A model with a learned adapter in every kind of place, and a learned head."""
    model = network(rng).adapt(["first", "block.up"], adapter, rank=2, modules_to_save="head", seed=0)
    for name in model.parameter_names():
        if name.endswith(("lora_B", "delta")) or name.startswith("head."):
            model.set_parameter(name, rng.normal(size=model.parameter_shape(name)))
    return model


def test_a_model_goes_to_peft_and_comes_back_onto_its_base(tmp_path, rng):
    model, x = trained(rng, "lora"), rng.normal(size=(4, 5))
    reports = save_peft(model, tmp_path / "out")
    assert [report.name for report in reports] == ["first", "block.up"]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["head"]
    written = read_file(tmp_path / "out" / "adapter_model.safetensors")
    head = written["base_model.model.head.weight"]  # as PyTorch's Linear has it: (out, in)
    np.testing.assert_array_equal(head, model.get_parameter("head.weight").T)
    base = network(rng)
    layers = {name: base[name] for name in ("first", "head")}
    assert load_peft(tmp_path / "out", base) is base
    np.testing.assert_allclose(base(x), model(x), rtol=0, atol=1e-12)
    assert base["first"].base_layer is layers["first"]
    assert [base["first"].base_layer.activation, base["block"]["up"].base_layer.activation] == ["tanh", "gelu"]
    assert base.parameter_count == model.parameter_count
    nblora.fit(base, x, rng.normal(size=(4, 3)), loss="mse", epochs=1, seed=0)  # it goes on being trained


def test_a_model_with_deltas_folds_them(tmp_path, rng):
    model, x = trained(rng), rng.normal(size=(4, 5))
    save_peft(model, tmp_path / "out", fold_delta=5)
    whole = load_peft(tmp_path / "out", network(rng))
    assert np.abs(whole(x) - model(x)).max() > 1e-3  # block.up maps 6 to 7: five of six directions
    nested = trained(rng)
    nested["block"]["up"].reset_state(include_delta=True)
    save_peft(nested, tmp_path / "out", fold_delta=5)
    np.testing.assert_allclose(load_peft(tmp_path / "out", network(rng))(x), nested(x), rtol=0, atol=1e-12)
    with pytest.warns(UserWarning, match=r"that of first, block\.up is left out"):
        save_peft(model, tmp_path / "out")


def test_a_trained_base_is_not_forgotten_in_silence(tmp_path, rng):
    model = network(rng).adapt("head", rank=2, freeze_base_layer=False)
    with pytest.warns(UserWarning, match="the base of head was trained too"):
        save_peft(model, tmp_path / "out")


def test_models_that_an_adapter_does_not_fit(tmp_path, rng):
    save_peft(trained(rng, "lora"), tmp_path / "out")
    x = rng.normal(size=(4, 5))
    small = nblora.Sequential({"first": nblora.Dense.random(5, 4, seed=0), "block": nblora.Dense.random(4, 3, seed=0)})
    for model, kind, message in (
        (network(rng).adapt("first", rank=1), ValueError, "layer 'first' has an adapter already"),
        (small, FormatError, r"first.weight has shape \(4, 5\)"),
        (nblora.Sequential(nblora.Dense.random(5, 4)), FormatError, "adapts 'first', but the model has the layers '0'"),
    ):
        before, layers, flags = model(x.astype(model.dtype)), list(model), [layer.trainable for layer in model]
        with pytest.raises(kind, match=message):
            load_peft(tmp_path / "out", model)
        assert list(model) == layers
        assert [layer.trainable for layer in model] == flags
        np.testing.assert_array_equal(model(x.astype(model.dtype)), before)
    with pytest.raises(ValueError, match="dtype, activation and settings are for a checkpoint"):
        load_peft(tmp_path / "out", network(rng), dtype="float64")
    with pytest.raises(ValueError, match="no adapter"):
        save_peft(network(rng), tmp_path / "other")
    around = nblora.LoRAAdapter(network(rng), 2)
    with pytest.raises(ValueError, match=r"base of adapters\['layer'\] must be a layer with a weight"):
        save_peft(around, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["mlp_r4", "mlp_bf16_all", "made_bias_all", "linear_r4_dora", "made_lora_bias"])
def test_a_model_with_peft_on_it_computes_what_the_layers_of_its_checkpoint_do(name, rng):
    """DoRA, lora_bias and biases of all layers reach a model as they reach layers from a file."""
    folder = FIXTURES / name
    layers = load_peft(folder, folder / "base.safetensors", dtype="float64")
    base = read_file(folder / "base.safetensors")
    for module, layer in layers.items():
        shape = (layer.out_features, layer.in_features)
        weight = base[f"{module}.weight"]
        plain = nblora.FullyConnected(widened(weight).reshape(shape), widened(base.get(f"{module}.bias")))
        model = nested({module: plain})
        x = rng.normal(size=(3, layer.in_features))
        loaded = load_peft(folder, model, modules=[module])
        np.testing.assert_allclose(loaded(x), layer(x), rtol=0, atol=1e-12)


def test_biases_that_came_along_reach_the_other_layers(tmp_path, rng):
    tensors = linear_factors(rng, "first", 6, 5, dtype=np.float64) | {
        "first.base_layer.bias": rng.normal(size=6),
        "head.bias": rng.normal(size=3),
    }
    folder = write_adapter(tmp_path / "a", tensors, bias="all")
    model = load_peft(folder, network(rng))
    for name, parameter in (("first.base_layer", "first.base.bias"), ("head", "head.bias")):
        np.testing.assert_array_equal(model.get_parameter(parameter), tensors[f"{name}.bias"])
    assert not model["head"].trainable
    assert (model["first"].base_layer.activation, model["head"].activation) == ("tanh", "identity")
    strange = write_adapter(tmp_path / "b", tensors | {"norm.weight": rng.normal(size=6)}, bias="all")
    with pytest.raises(FormatError, match=r"brings norm\.weight, which is no layer's that nblora has"):
        load_peft(strange, network(rng))


def widened(array):
    if array is None:
        return None
    if array.dtype == np.uint16:  # the bits of bfloat16
        return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return array.astype(np.float64)


def nested(layers):
    """A model whose layer has a dotted name."""
    ((name, layer),) = layers.items()
    for part in reversed(name.split(".")):
        layer = nblora.Sequential({part: layer})
    return layer
