"""What every device must do with pretrained models, beside the same models on the CPU."""

import warnings
from pathlib import Path

import numpy as np

import nblora

FOLDER = Path(__file__).parents[1] / "data" / "models"
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
TEXTS = (5, 3, 1, 6, 2, 4, 7, 3)
"""Lengths of the eight texts of a data set."""

# By a name: the folder, what `load_pretrained` is told, and what is done to the model then.
CASES = {
    "bert": ("bert_cls_qv", {"task": "sequence-classification"}, ("all-linear", "lora")),
    "bert, delta": ("bert_cls_qv", {"task": "sequence-classification"}, ("all-linear", "delta")),
    "bert, dora": ("bert_cls_qv", {"task": "sequence-classification"}, (["query", "word_embeddings"], "dora")),
    "bert, whole": ("bert_cls_qv", {"task": "sequence-classification"}, None),
    "bert, embedding": ("bert_embedding_all", {"task": "embedding"}, ("all-linear", "lora")),
    "distilbert": ("distilbert_cls", {"task": "sequence-classification"}, ("all-linear", "lora")),
    "roberta": ("roberta_cls", {"task": "sequence-classification"}, ("query", "pissa")),
    "llama": ("llama_clm_all", {"task": "causal-lm"}, ("all-linear", "lora")),
    "llama, whole": ("llama_clm_all", {"task": "causal-lm"}, None),
    "llama, classes": ("llama_cls", {"task": "sequence-classification"}, ("all-linear", "miss")),
    "gpt2": ("gpt2_clm", {"task": "causal-lm"}, ("all-linear", "zi")),
    "qwen2, table": ("qwen2_clm_tied", {"task": "causal-lm"}, (["embed_tokens", "q_proj"], "lora")),
    "qwen2, delta of a table": ("qwen2_clm_tied", {"task": "causal-lm"}, ("embed_tokens", "delta")),
    "resnet": ("resnet_conv", {"task": "image-classification"}, ("convolution", "lora")),
    "resnet, delta": ("resnet_bottleneck", {"task": "image-classification"}, ("convolution", "delta")),
    "resnet, dora": ("resnet_conv", {"task": "image-classification"}, ("convolution", "dora")),
    "resnet, whole": ("resnet_conv", {"task": "image-classification"}, None),
    "vit": ("vit_cls_qv", {"task": "image-classification"}, ("all-linear", "lora")),
    "vit, whole": ("vit_cls_qv", {"task": "image-classification"}, None),
}


def load(name):
    """A model as a case wants it."""
    folder, settings, adapted = CASES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is in a folder and not for a task
        model = nblora.load_pretrained(FOLDER / folder / "base", **settings)
    if adapted is None:
        return model.unfreeze()
    target, method = adapted
    settings = {"init": "pissa"} if method == "pissa" else {}
    model.adapt(target, "lora" if settings else method, rank=2, seed=0, **settings)
    rng = np.random.default_rng(2)
    for name in model.parameter_names():  # what begins at zero would hide the gradients of the rest
        if name.endswith(("lora_B", "block", "delta", "velocity")):
            held = model.get_parameter(name)
            model.set_parameter(name, held + 0.05 * rng.standard_normal(held.shape))
    return model


def data(model, samples=8):
    """A few samples of what the model reads, and what it is to learn of them."""
    rng = np.random.default_rng(1)
    if hasattr(model.body, "image"):
        channels, *sizes = model.body.image
        x = rng.standard_normal((samples, channels, *(size or 12 for size in sizes))).astype(np.float32)
        return x, np.arange(samples) % model.out_features
    x = [rng.integers(0, model.body.table.in_features, length) for length in TEXTS[:samples]]
    if model.task == "causal-lm":
        return x, None
    if model.task == "embedding":
        return x, rng.standard_normal((samples, model.out_features)).astype(np.float32)
    return x, np.arange(samples) % model.out_features


def check_learning(move, name, samples=8, merged=True, **settings):
    """`fit`, evaluation, forward and merging give what the CPU gives."""
    host, device = load(name), move(load(name))
    assert device.device == "cuda:0"
    x, y = data(host, samples)
    loss = "mse" if host.task == "embedding" else "cross_entropy"
    # AdamW would make steps of whatever rounding leaves of a key's bias, whose gradient is zero.
    rule = {"optimizer": "sgd" if CASES[name][2] is None else "adamw", "lr": 1e-2, "delta_lr": 1e-2}
    options = {"loss": loss, "epochs": 1, "batch_size": 4, "seed": 0} | rule | settings
    found, expected = (nblora.fit(model, x, y, progress=False, **options) for model in (device, host))
    for column in ("loss", *(["accuracy"] if loss == "cross_entropy" else [])):
        np.testing.assert_allclose(found[column], expected[column], **CLOSE)
    for parameter in host.parameter_names():
        np.testing.assert_allclose(device.get_parameter(parameter), host.get_parameter(parameter), **CLOSE)
    y_device, y_host = device.eval()(x), host.eval()(x)
    assert isinstance(y_device, np.ndarray)
    np.testing.assert_allclose(y_device, y_host, **CLOSE)
    if merged and CASES[name][2] is not None:
        whole = device.merge()
        assert whole.device == "cuda:0"
        np.testing.assert_allclose(whole(x), y_host, **CLOSE)


def check_generation(move, name, tokens=4):
    """The same tokens, the likeliest and drawn ones, with room for keys that has to grow."""
    host, device = load(name), move(load(name))
    prompts = data(host, 3)[0]
    for settings in ({}, {"temperature": 1.0, "top_p": 0.9, "seed": 3}):
        found, expected = (
            nblora.generate(model, prompts, max_new_tokens=tokens, eos=[], **settings) for model in (device, host)
        )
        assert [new.tolist() for new in found] == [new.tolist() for new in expected]
