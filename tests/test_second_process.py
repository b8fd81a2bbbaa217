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


def failures(jobs, tmp_path):
    (tmp_path / "jobs.json").write_text(json.dumps(list(jobs)))
    done = run(LOADER, tmp_path / "jobs.json", tmp_path)
    return json.loads(done.stdout), done.stderr


@pytest.mark.parametrize("save", [save_layers, save_checkpoint, save_pickles])
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
