"""What PyTorch and PEFT computed when they trained tiny models: logits, loss, gradients, and three steps of AdamW."""

import numpy as np
import pytest

import nblora
from nblora.training import AdamW
from tests.pretrained.support import CASES, FIXTURES, of_file, outputs, relative_to_largest, targets

TOLERANCE = {"float64": 1e-9, "float32": 2e-4}
OPTIMIZER = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


@pytest.fixture(params=[(case, dtype) for case in CASES for dtype in TOLERANCE], ids="-".join)
def case(request):
    name, dtype = request.param
    held = dict(np.load(FIXTURES / name / "io.npz"))
    return name, dtype, held, {k: held[k] for k in ("input_ids", "attention_mask", "pixel_values") if k in held}


def adapted(name, dtype, held):
    model = nblora.load_pretrained(FIXTURES / name / "base", dtype=dtype)
    model.load_adapter(FIXTURES / name / "adapter")
    if "c" not in held:
        return model
    return with_deltas(model, held)


def with_deltas(model, held):
    """The same adapters, each with a dense delta beside its factors."""
    adapters = {name: layer for name, layer in model.named_layers() if isinstance(layer, nblora.LoRAAdapter)}
    whole = [name for name, layer in model.named_layers() if name not in adapters and layer.trainable]
    plain = nblora.load_pretrained(FIXTURES / "bert_delta" / "base", dtype=model.dtype)
    settings = {"delta_scaling": float(held["c"]), "momentum_factor": float(held["m"])}
    plain.adapt(list(adapters), "delta", rank=4, alpha=8, modules_to_save=whole, **settings)
    for name in model.parameter_names():
        plain.set_parameter(name, model.get_parameter(name))
    for name in adapters:
        plain.set_parameter(f"{name}.delta", held[f"delta/{name}"])
    return plain


def test_logits_loss_and_gradients(case):
    name, dtype, held, inputs = case
    model = nblora.load_pretrained(FIXTURES / name / "base", dtype=dtype)
    assert relative_to_largest(model(**inputs), outputs(held, "logits0")) < TOLERANCE[dtype]
    model = adapted(name, dtype, held)
    assert relative_to_largest(model(**inputs), outputs(held, "logits")) < TOLERANCE[dtype]
    x, y = next(iter(inputs.values())), held["labels"]
    x = inputs if "input_ids" in inputs else x
    assert nblora.training.evaluate(model, x, y)["loss"] == pytest.approx(float(held["loss"]), rel=TOLERANCE[dtype])
    logits = model.train()(**inputs)
    loss = nblora.training.CrossEntropy()
    _, grad = loss.value_and_gradient(logits, targets(held, logits))
    back = model.backward(grad)
    assert (back is None) == ("input_ids" in inputs)
    found = {n: p.logical(p.gradient) for n, p, _ in model._trainable()}
    for key, own, exact in of_file(held, "grad/"):
        assert relative_to_largest(found.pop(own), exact) < TOLERANCE[dtype], key
    for key in [key for key in held if key.startswith("grad_delta/")]:
        own = f"{key.removeprefix('grad_delta/')}.delta"
        assert relative_to_largest(found.pop(own), held[key]) < TOLERANCE[dtype], key
    assert found == {}


def test_three_steps_of_adamw(case):
    name, dtype, held, inputs = case
    model = adapted(name, dtype, held)
    x = inputs if "input_ids" in inputs else inputs["pixel_values"]
    rate = {"delta_lr": float(held["delta_lr"])} if "delta_lr" in held else {}
    history = nblora.fit(
        model, x, held["labels"], optimizer=AdamW(0.01, **OPTIMIZER), epochs=3, batch_size=5, shuffle=False, **rate
    )
    assert history["loss"] == pytest.approx(held["losses"], rel=TOLERANCE[dtype])
    for key, own, exact in of_file(held, "after/"):
        assert relative_to_largest(model.get_parameter(own), exact) < TOLERANCE[dtype], key
    for kind in ("delta", "velocity"):
        for key in [key for key in held if key.startswith(f"after_{kind}/")]:
            own = f"{key.removeprefix(f'after_{kind}/')}.{kind}"
            assert relative_to_largest(model.get_parameter(own), held[key]) < TOLERANCE[dtype], key


@pytest.mark.parametrize("name", CASES)
def test_the_saved_adapter_is_what_peft_wrote(tmp_path, name):
    from nblora.storage.safetensors_reader import SafetensorsFile

    model = nblora.load_pretrained(FIXTURES / name / "base")
    model.load_adapter(FIXTURES / name / "adapter")
    model.save_adapter(tmp_path / "adapter")
    paths = FIXTURES / name / "adapter", tmp_path / "adapter"
    with (
        SafetensorsFile(paths[0] / "adapter_model.safetensors") as theirs,
        SafetensorsFile(paths[1] / "adapter_model.safetensors") as ours,
    ):
        assert set(ours.tensors) == set(theirs.tensors)
        for tensor in theirs.tensors:
            np.testing.assert_array_equal(ours.read(tensor), theirs.read(tensor))
