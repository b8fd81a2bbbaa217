"""What one process saves, another loads: every kind of object, each in a process that has imported nothing but nblora.

`import nblora` imports no room before it is asked for one, so a kind of object that only its own room knows is unknown
in a process that begins with a file. One interpreter starts for all of them, and a fork of it loads each.
"""

import json
import pickle

import numpy as np
import pytest

import nblora
from tests.helpers import make_adapter, make_layer
from tests.processes import run

# Reads a list of {name, code, folder}; each code runs in a fork in which `load` has never been called.
LOADER = """
import json, os, pickle, sys, traceback
import numba, numpy as np  # of nblora nothing but its root
import nblora
sys.path.insert(0, sys.argv[2])
failed = []
for job in json.load(open(sys.argv[1])):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.chdir(job["folder"])
            exec(job["code"])
            status = 0
        except BaseException:
            print(job["name"], traceback.format_exc(), file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    if os.waitpid(child, 0)[1]:
        failed.append(job["name"])
print(json.dumps(failed))
"""
SAME = "\nnp.testing.assert_array_equal(loaded(np.load('x.npy')), np.load('y.npy'))\n"


def layers(rng):
    """Every kind of layer, and of what stands around one."""

    def network():
        hidden, head = make_layer(rng, (7, 6), activation="tanh"), make_layer(rng, (6, 5))
        return nblora.Sequential({"hidden": hidden, "head": head})

    adapted = network()
    adapted.adapt("hidden", "delta", rank=2, seed=1, modules_to_save="head")
    nested = nblora.Sequential({"first": network(), "second": make_adapter(rng, base=make_layer(rng, (5, 4)))})
    return {
        "Dense": make_layer(rng),
        "FullyConnected": make_layer(rng, layout=nblora.FullyConnected),
        "LoRALayer": nblora.LoRALayer(7, 5, 2, seed=0),
        "LoRAAdapter": make_adapter(rng, nblora.LoRAAdapter),
        "DeltaLoRAAdapter": make_adapter(rng),
        "adapter around an adapter": make_adapter(rng, nblora.LoRAAdapter, make_adapter(rng)),
        "adapter around a model": make_adapter(rng, base=network()),
        "Sequential": network(),
        "adapted Sequential": adapted,
        "nested Sequential": nested,
    }


def in_folder(tmp_path, name):
    folder = tmp_path / name.replace(" ", "-")
    folder.mkdir()
    return folder


def keep(folder, model, rng):
    """An input and what `model` makes of it, for the other process to compare."""
    x = rng.normal(size=(3, model.in_features)).astype(model.dtype)
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", model.eval()(x))


def save_layers(tmp_path, rng):
    for name, layer in layers(rng).items():
        folder = in_folder(tmp_path, name)
        keep(folder, layer, rng)
        layer.save(folder / "saved")
        yield {"name": name, "folder": str(folder), "code": "loaded = nblora.load('saved')" + SAME}


def save_checkpoint(tmp_path, rng):
    folder = in_folder(tmp_path, "checkpoint")
    model = nblora.Sequential(make_layer(rng), make_layer(rng, (5, 3)))
    model.adapt("0", "delta", rank=2, modules_to_save="1", seed=0)
    x, y = rng.normal(size=(8, 7)), rng.normal(size=(8, 3))
    np.savez(folder / "data.npz", x=x, y=y)
    settings = {"loss": "mse", "seed": 0, "progress": False}
    model.clone().save(folder / "start")
    whole = model.clone()
    nblora.fit(whole, x, y, epochs=3, **settings)
    nblora.fit(model, x, y, epochs=2, checkpoint=folder / "state", **settings)
    keep(folder, model, rng)
    base = "nblora.load('start')"
    code = f"loaded = nblora.load('state', base={base}).eval()" + SAME
    yield {"name": "checkpoint", "folder": str(folder), "code": code}
    np.save(folder / "whole.npy", whole.get_parameters())
    resume = f"""
loaded, data = nblora.load('start'), np.load('data.npz')
nblora.fit(loaded, data['x'], data['y'], epochs=3, resume='state', **{settings})
np.testing.assert_array_equal(loaded.get_parameters(), np.load('whole.npy'))
"""
    yield {"name": "resumed run", "folder": str(folder), "code": resume}


def save_pickles(tmp_path, rng):
    for name in ("LoRAAdapter", "nested Sequential"):
        folder = in_folder(tmp_path, f"pickled {name}")
        layer = layers(rng)[name]
        keep(folder, layer, rng)
        (folder / "pickle").write_bytes(pickle.dumps(layer))
        code = "loaded = pickle.load(open('pickle', 'rb'))" + SAME
        yield {"name": f"pickled {name}", "folder": str(folder), "code": code}


def save_for_peft(tmp_path, rng):
    folder = in_folder(tmp_path, "peft folder")

    def network():
        hidden = nblora.Dense.random(7, 6, activation="tanh", dtype="float64", seed=1)
        return nblora.Sequential({"hidden": hidden, "head": nblora.Dense.random(6, 5, dtype="float64", seed=2)})

    model = network().adapt("hidden", rank=2, modules_to_save="head", seed=0)
    model.set_parameter("hidden.lora_B", rng.normal(size=(2, 6)))
    model.set_parameter("head.bias", rng.normal(size=5))
    nblora.save_peft(model, folder / "adapter")
    network().save(folder / "base")
    x = rng.normal(size=(3, 7))
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", model.eval()(x))
    code = "loaded = nblora.load_peft('adapter', nblora.load('base')).eval()" + SAME
    yield {"name": "PEFT folder onto a model", "folder": str(folder), "code": code}

    folder = in_folder(tmp_path, "merged folder")
    layer = nblora.FullyConnected(rng.normal(size=(6, 7)), rng.normal(size=6))
    adapter = make_adapter(rng, nblora.LoRAAdapter, layer)
    keep(folder, adapter, rng)
    nblora.save_peft(adapter, folder / "adapter", name="proj")
    (folder / "base" / "1_Pooling").mkdir(parents=True)
    (folder / "base" / "1_Pooling" / "config.json").write_text("{}")
    weights = {"proj.weight": layer.weight, "proj.bias": layer.bias}
    nblora.formats.write_safetensors(folder / "base" / "model.safetensors", weights)
    nblora.merge(folder / "base", folder / "adapter", folder / "merged")
    code = """
from nblora.formats import SafetensorsFile
assert os.path.exists('merged/1_Pooling/config.json')
assert nblora.verify('merged', 'adapter', 'base').exit_code == 0
with SafetensorsFile('merged/model.safetensors') as file:
    loaded = nblora.FullyConnected(file.read('proj.weight'), file.read('proj.bias')).eval()
np.testing.assert_allclose(loaded(np.load('x.npy')), np.load('y.npy'), rtol=0, atol=1e-12)
"""
    yield {"name": "merged folder", "folder": str(folder), "code": code}
    code = "loaded = nblora.load_peft('adapter', 'base', dtype='float64')['proj'].eval()" + SAME
    yield {"name": "PEFT folder with its checkpoint", "folder": str(folder), "code": code}


def save_estimators_and_results(tmp_path, rng):
    pytest.importorskip("sklearn")
    from nblora.estimators import LoRAClassifier, LoRARegressor
    from nblora.sweep import Sweep, split_data

    X = rng.normal(size=(40, 6)).astype("float32")
    for kind, y in ((LoRAClassifier, X[:, 0] > 0), (LoRARegressor, X[:, 0])):
        folder = in_folder(tmp_path, kind.__name__)
        fitted = kind(rank=2, max_iter=2, random_state=0).fit(X, y)
        (folder / "pickle").write_bytes(pickle.dumps(fitted))
        fitted.model_.save(folder / "model")
        np.save(folder / "x.npy", X)
        np.save(folder / "y.npy", fitted.predict(X))
        code = "loaded = pickle.load(open('pickle', 'rb')).predict" + SAME
        code += "assert type(nblora.load('model')).__name__ == 'Sequential'"
        yield {"name": kind.__name__, "folder": str(folder), "code": code}
    pytest.importorskip("matplotlib")
    folder = in_folder(tmp_path, "results")
    data = split_data(X, (X[:, 0] > 0).astype(int))
    Sweep.grid(data, {"rank": [1], "seed": [0, 1]}, {"epochs": 1}).run(folder / "sweep.jsonl", workers=1)
    make_adapter(rng).save(folder / "adapter.safetensors")
    code = "from nblora.plots import draw_file\ndraw_file('{}')"
    for name in ("sweep.jsonl", "adapter.safetensors"):
        yield {"name": f"figure of {name}", "folder": str(folder), "code": code.format(name)}


def failures(jobs, tmp_path):
    (tmp_path / "jobs.json").write_text(json.dumps(list(jobs)))
    done = run(LOADER, tmp_path / "jobs.json", tmp_path)
    return json.loads(done.stdout), done.stderr


@pytest.mark.parametrize(
    "save", [save_layers, save_checkpoint, save_pickles, save_for_peft, save_estimators_and_results]
)
def test_another_process_loads_what_this_one_saved(save, tmp_path, rng):
    failed, text = failures(save(tmp_path, rng), tmp_path)
    assert failed == [], text


def test_a_kind_that_nobody_knows(tmp_path):
    class Odd(nblora.Dense):
        pass

    Odd.random(3, 2).save(tmp_path / "odd")
    nblora.layers.Layer.kinds.pop("Odd")
    with pytest.raises(nblora.errors.FormatError, match="'Odd' is missing or unknown"):
        nblora.load(tmp_path / "odd")
