"""Wrote `tests/data/v0.1` with nblora 0.1.0, before layers were one tree: `python make_older_files.py FOLDER`."""

import sys
from pathlib import Path

import numpy as np

import nblora


def dense(outputs=4, inputs=6, layout=nblora.Dense, **settings):
    return layout.random(inputs, outputs, dtype="float64", seed=1, **settings)


def objects():
    turned = dense(layout=nblora.FullyConnected, activation="sigmoid")
    inner = nblora.Sequential(dense(5, 5), dense(5, 5, nblora.FullyConnected))
    model = nblora.Sequential({"first": dense(5, activation="relu"), "inner": inner, "head": dense(4, 5)})
    model.adapt(["first", "inner.1"], "delta", rank=2, modules_to_save="head", lora_dropout=0.2, seed=6)
    around = nblora.Sequential(dense(5), dense(4, 5))
    return {
        "dense": dense(activation="gelu"),
        "fully_connected": dense(layout=nblora.FullyConnected, activation="tanh", bias=False),
        "lora_layer": nblora.LoRALayer(6, 4, 2, 3.0, dtype="float64", seed=2),
        "lora": nblora.LoRAAdapter(dense(), 2, 4.0, use_rslora=True, seed=3),
        "delta": nblora.DeltaLoRAAdapter(turned, 2, lora_dropout=0.25, freeze_base_layer=False, seed=4),
        "around": nblora.DeltaLoRAAdapter(around, 2, seed=5),
        "model": model,
    }


def main(folder):
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(7)
    x, target = rng.normal(size=(5, 6)), rng.normal(size=(5, 4))
    outputs = {"x": x, "target": target}
    made = objects()
    for name, layer in made.items():
        for parameter in layer.parameter_names():
            layer.set_parameter(parameter, rng.normal(0, 0.5, layer.parameter_shape(parameter)))
        layer.save(folder / f"{name}.safetensors")
        outputs[name] = layer.eval()(x)
    run, whole = (made["model"].clone().train() for _ in range(2))
    settings = {"loss": "mse", "batch_size": 2, "seed": 8, "delta_lr": 0.3, "progress": False}
    nblora.fit(run, x, target, epochs=2, checkpoint=folder / "run.safetensors", **settings)
    nblora.fit(whole, x, target, epochs=4, **settings)
    outputs |= {"run": run.eval()(x), "resumed": whole.get_parameters()}
    np.savez(folder / "outputs.npz", **outputs)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
