"""`fit` on texts and images: nothing of the padding, logits where labels are, accumulation, recomputing, resuming."""

import numpy as np
import pytest

import nblora
from nblora.layers import tree
from nblora.layers.run import Run
from nblora.layers.sinks import Held
from nblora.pretrained import text
from nblora.training import Callback, evaluate
from tests.pretrained.support import FIXTURES

BERT, LLAMA, GPT2 = (FIXTURES / case / "base" for case in ("bert_cls_qv", "llama_clm_all", "gpt2_clm"))
LENGTHS = (5, 1, 9, 3, 2, 7, 4)


@pytest.fixture
def texts(rng):
    return [rng.integers(5, 97, length) for length in LENGTHS]


def adapted(base=LLAMA, dtype="float64", method="lora", **settings):
    model = nblora.load_pretrained(base, dtype=dtype)
    return model.adapt("all-linear", method, rank=2, alpha=4, seed=0, **settings)


def trained(model):
    return {n: model.get_parameter(n) for n, _, t in model._parameters() if t}


def assert_same(first, second, tolerance=1e-11):
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_allclose(second[name], value, rtol=tolerance, atol=tolerance, err_msg=name)


def padded(texts, fill=0):
    width = max(map(len, texts))
    ids, mask = np.full((len(texts), width), fill), np.zeros((len(texts), width), int)
    for row, each in enumerate(texts):
        ids[row, : len(each)], mask[row, : len(each)] = each, 1
    return ids, mask


def test_lists_and_padded_arrays_learn_the_same(texts):
    ids, mask = padded(texts)
    labels = [np.where(np.arange(len(each)) < 2, -100, each) for each in texts]
    found = []
    for x, y in ((texts, labels), ({"input_ids": ids, "attention_mask": mask}, padded(labels, -100)[0])):
        model = adapted()
        nblora.fit(model, x, y, epochs=2, batch_size=3, lr=0.01, seed=1)
        found.append(trained(model))
    assert_same(*found)


def test_no_labels_learn_every_token(texts):
    first, second = adapted(), adapted()
    nblora.fit(first, texts, epochs=1, lr=0.01, seed=0)
    nblora.fit(second, texts, texts, epochs=1, lr=0.01, seed=0)
    assert_same(trained(first), trained(second))


@pytest.mark.parametrize("method", ["lora", "delta"])
@pytest.mark.parametrize("base", [LLAMA, BERT])
def test_several_batches_make_the_step_of_one(texts, base, method):
    y = [np.where(np.arange(len(each)) < place, -100, each) for place, each in enumerate(texts)]
    if base is BERT:
        y = np.arange(len(texts)) % 3
    found = []
    for size, several in ((6, 1), (2, 3), (1, 6)):
        model = adapted(base, method=method)
        history = nblora.fit(
            model, texts, y, epochs=2, batch_size=size, accumulate=several, shuffle=False, lr=0.01, delta_lr=0.5
        )
        found.append((trained(model), history["loss"]))
    for values, losses in found[1:]:
        assert_same(found[0][0], values, 1e-10)
        assert losses == pytest.approx(found[0][1], rel=1e-12)


@pytest.mark.parametrize("base", [LLAMA, GPT2])
def test_logits_in_pieces_are_the_same_logits(monkeypatch, texts, base):
    found = []
    for piece in (text.PIECE, 97 * 2, 1):
        monkeypatch.setattr(text, "PIECE", piece)
        model = adapted(base, modules_to_save=["lm_head"])
        history = nblora.fit(model, texts, epochs=2, batch_size=3, lr=0.01, seed=0)
        found.append((trained(model), history["loss"], history["accuracy"]))
    for values, *figures in found[1:]:
        assert_same(found[0][0], values, 1e-10)
        np.testing.assert_allclose(figures, found[0][1:], rtol=1e-12)


def test_the_whole_matrix_of_logits_is_never_held(monkeypatch, rng):
    monkeypatch.setattr(text, "PIECE", 97 * 8)
    model = adapted(dtype="float32")
    x = [rng.integers(5, 97, 60) for _ in range(60)]
    nblora.fit(model, x[:2], epochs=1, batch_size=2)
    most = []
    head, forward = model.head, model.head._forward
    monkeypatch.setattr(head, "_forward", lambda rows, run: most.append(len(rows)) or forward(rows, run))
    nblora.fit(model, x, epochs=1, batch_size=60)
    assert max(most) == 8
    assert sum(most) == 60 * 59


@pytest.mark.parametrize("base", [LLAMA, BERT, FIXTURES / "vit_cls_qv" / "base", FIXTURES / "resnet_conv" / "base"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_blocks_have_the_same_gradients(texts, rng, base, dropout):
    images = "vit" in str(base) or "resnet" in str(base)
    x = rng.normal(size=(7, 3, 12, 12)) if images else texts
    y = None if base is LLAMA else np.arange(7) % 3
    found = []
    for recompute in (False, True):
        model = nblora.load_pretrained(base, dtype="float64")
        model.adapt("convolution" if "resnet" in str(base) else "all-linear", rank=2, seed=0, lora_dropout=dropout)
        history = nblora.fit(model, x, y, epochs=3, batch_size=3, lr=0.01, seed=0, recompute=recompute)
        found.append((trained(model), history["loss"]))
    assert_same(found[0][0], found[1][0], 1e-12)
    assert found[0][1] == found[1][1]


def test_recomputing_keeps_less(rng):
    x = [rng.integers(5, 97, 60) for _ in range(40)]
    peaks = []

    class Peak(Callback):
        def on_step_end(self, step, metrics):
            peaks.append(self.model._backend.arena._most)

    for recompute in (False, True):
        nblora.fit(adapted(dtype="float32"), x, epochs=1, batch_size=40, recompute=recompute, callbacks=[Peak()])
    assert 0 < peaks[1] < 0.75 * peaks[0]


def test_nothing_runs_back_below_the_lowest_adapter(texts):
    model = nblora.load_pretrained(LLAMA).adapt("layers.1.mlp.down_proj", rank=2)
    run = Run(model._backend, training=True, live=False)
    run.sink, loss = Held(), nblora.training.CrossEntropy()
    tokens = model._as_samples("x", texts)
    model._learn(tokens, model._as_targets("y", None, tokens, loss), loss, run)
    kept = {id(layer) for layer, values in run._kept.items() if any(value is not None for value in values)}
    names = {name for name, layer, _ in tree.walk(model) if id(layer) in kept}
    assert names == {"", "model.layers.1.mlp.down_proj", "model.norm"}
    down = next(v[0] for k, v in run._kept.items() if getattr(k, "rank", 0))
    assert not down.live


def test_validation_and_evaluation_count_learnt_tokens(texts):
    model = adapted()
    y = [np.where(np.arange(len(each)) % 2 == 0, -100, each) for each in texts]
    whole = evaluate(model, texts, y, batch_size=7)
    assert evaluate(model, texts, y, batch_size=2) == pytest.approx(whole, rel=1e-12)
    history = nblora.fit(model, texts, y, epochs=1, lr=0.0, validation=(texts, y), batch_size=2, seed=0)
    assert history["val_loss"][0] == pytest.approx(whole["loss"], rel=1e-12)
    assert history["loss"][0] == pytest.approx(whole["loss"], rel=1e-12)


def test_batches_of_like_length(rng):
    lengths = rng.integers(1, 40, 200)
    x = [rng.integers(5, 97, length) for length in lengths]
    model = nblora.load_pretrained(BERT).adapt("query", rank=1)
    seen = []

    learn = model._learn
    model._learn = lambda x, y, loss, run: seen.append(np.diff(x.begins)) or learn(x, y, loss, run)
    x = [each[:30] for each in x]
    nblora.fit(model, x, np.arange(200) % 3, epochs=1, batch_size=8, length_grouping=True, seed=0)
    assert sum(map(len, seen)) == 200
    assert np.mean([batch.max() - batch.min() for batch in seen]) <= 3
    firsts = [batch.mean() for batch in seen]
    assert firsts != sorted(firsts)
    with pytest.raises(ValueError, match="length_grouping is for texts"):
        nblora.fit(nblora.Dense.random(3, 2), np.ones((4, 3)), np.ones((4, 2)), loss="mse", length_grouping=True)


@pytest.mark.parametrize("method", ["lora", "delta"])
def test_a_run_resumes_bit_for_bit(tmp_path, texts, method):
    whole = adapted(method=method)
    settings = {"lr": 0.01, "batch_size": 2, "seed": 3, "accumulate": 2, "length_grouping": True}
    nblora.fit(whole, texts, epochs=4, **settings)
    part = adapted(method=method)
    nblora.fit(part, texts, epochs=2, checkpoint=tmp_path / "run.safetensors", **settings)
    again = adapted(method=method)
    nblora.fit(again, texts, epochs=4, resume=tmp_path / "run.safetensors", **settings)
    assert_same(trained(whole), trained(again), 0)
    base = nblora.load_pretrained(LLAMA, dtype="float64")
    loaded = nblora.load(tmp_path / "run.safetensors", base=base)
    assert_same(trained(part), trained(loaded), 0)


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        ({"ids": [[5]]}, None, ValueError, "x must be a dict of input_ids, attention_mask, token_type_ids"),
        ([[5, 6], [7]], [[5, 6]], ValueError, "one row of labels for each of the 2 texts, got 1"),
        ([[5, 6], [7]], [[5], [7]], ValueError, r"y\[0\] must hold one label for each of the 2 tokens"),
        ([[5, 6], [7]], [[5, 97], [7]], ValueError, r"y must hold tokens from 0 to 96.*got 97 at \(0, 1\)"),
        ([[5, 6], [7]], [[5.0, 6.0], [7.0]], TypeError, "must hold integers"),
        ([[5, 97]], None, IndexError, r"got 97 at \(0, 1\)"),
        ([], None, ValueError, "at least one sequence"),
    ],
)
def test_data_that_does_not_fit(x, y, error, message):
    model = adapted()
    before = trained(model)
    with pytest.raises(error, match=message):
        nblora.fit(model, x, y, epochs=1)
    assert_same(before, trained(model), 0)


def test_classes_that_do_not_fit(texts):
    model = adapted(BERT)
    with pytest.raises(ValueError, match=r"labels from 0 to 2.*got 3 at sample 6"):
        nblora.fit(model, texts, [0, 1, 2, 0, 1, 2, 3], epochs=1)
    with pytest.raises(ValueError, match="y is needed"):
        nblora.fit(model, texts, epochs=1)


@pytest.mark.parametrize(("kind", "labels"), [("regression", 1), ("multi_label_classification", 3)])
def test_other_kinds_of_problem(texts, rng, kind, labels):
    model = nblora.load_pretrained(BERT, num_labels=labels, seed=0, dtype="float64")
    model._origin.config["problem_type"] = kind
    y = rng.normal(size=(7, labels)) if kind == "regression" else rng.integers(0, 2, (7, labels))
    history = nblora.fit(model.adapt("query", rank=2), texts, y, epochs=20, lr=0.01, seed=0)
    assert history["loss"][-1] < 0.9 * history["loss"][0]


@pytest.mark.parametrize("case", ["vit_cls_qv", "resnet_conv"])
@pytest.mark.parametrize("method", ["lora", "delta"])
def test_images_are_learnt(rng, case, method):
    model = nblora.load_pretrained(FIXTURES / case / "base")
    target = "convolution" if case == "resnet_conv" else ["q_proj", "v_proj"]
    size = 20 if case == "resnet_conv" else 12
    y = np.arange(24) % 3
    x = rng.normal(size=(24, 3, size, size)) + y[:, None, None, None]
    history = nblora.fit(
        model.adapt(target, method, rank=2, seed=0), {"pixel_values": x}, y, epochs=12, lr=0.01, batch_size=8, seed=0
    )
    assert history["loss"][-1] < 0.5 * history["loss"][0]
