"""Generating: what transformers generates, a full forward at each step, drawing, ends, and bad input."""

import json
import shutil

import numpy as np
import pytest

import nblora
from nblora.backends import resolve
from nblora.errors import FormatError, NonFiniteError
from nblora.pretrained.generation import Choice, Decoding
from tests.pretrained.support import FIXTURES, relative_to_largest
from tests.processes import ROOT

MODELS = ROOT / "tests" / "data" / "generation"
CASES = ("gpt2", "llama", "qwen2")


def loaded(name, dtype="float64"):
    return nblora.load_pretrained(MODELS / name / "base", dtype=dtype)


@pytest.fixture(params=CASES)
def case(request):
    held = np.load(MODELS / request.param / "io.npz")
    prompts = [row[:length] for row, length in zip(held["prompts"], held["lengths"], strict=True)]
    greedy = [row[:length] for row, length in zip(held["greedy"], held["greedy_lengths"], strict=True)]
    return loaded(request.param), prompts, greedy, held["logits"]


def test_greedy_is_that_of_transformers(case):
    model, prompts, greedy, _ = case
    found = nblora.generate(model, prompts, max_new_tokens=24)
    assert [new.tolist() for new in found] == [new.tolist() for new in greedy]
    assert all(new.dtype == np.int64 for new in found)
    assert min(map(len, found)) < max(map(len, found))  # some ended, the others went on
    alone = [nblora.generate(model, prompt, max_new_tokens=24)[0].tolist() for prompt in prompts]
    assert alone == [new.tolist() for new in greedy]


def test_every_step_equals_a_full_forward(case):
    model, prompts, greedy, exact = case
    model.adapt("all-linear", rank=2, seed=1)
    for _, layer in model.named_layers():
        if isinstance(layer, nblora.LoRAAdapter):
            layer.lora_layer.B[:] = 0  # the logits of the file are those of the base
    lengths = np.array([len(prompt) for prompt in prompts])
    decoding = Decoding(model, lengths + 3)  # too small: places grow on the way
    texts, ids, on = [list(prompt) for prompt in prompts], np.concatenate(prompts), np.arange(len(prompts))
    for step in range(max(map(len, greedy))):
        logits = decoding.logits(ids, lengths)
        for row, text in zip(logits, on, strict=True):
            assert relative_to_largest(row, model([texts[text]])[0, -1]) < 1e-9
            if text == 0:
                assert relative_to_largest(row, exact[step]) < 1e-9
            texts[text].append(int(row.argmax()))
        going = [place for place, text in enumerate(on) if len(greedy[text]) > step + 1]
        decoding.keep(np.array(going, np.int64))
        on, lengths = on[going], np.ones(len(going), np.int64)
        ids = np.array([texts[text][-1] for text in on])


def test_pieces_of_a_prompt_give_what_the_whole_gives(case):
    model, prompts, _, exact = case
    decoding, prompt = Decoding(model, np.array([4])), prompts[0]
    for start, stop in ((0, 3), (3, 4), (4, len(prompt))):
        logits = decoding.logits(prompt[start:stop], np.array([stop - start]))
    assert relative_to_largest(logits[0], exact[0]) < 1e-9


def test_float32_chooses_the_same(case):
    model, prompts, greedy, _ = case
    single = nblora.load_pretrained(model._origin.folder)
    found = nblora.generate(single.train(), prompts, max_new_tokens=24)  # dropout is off in training mode too
    assert [new.tolist() for new in found] == [new.tolist() for new in greedy]


def test_adapters_take_part():
    fixture = FIXTURES / "llama_clm_all"
    model = nblora.load_pretrained(fixture / "base", dtype="float64")
    model.load_adapter(fixture / "adapter")
    held = np.load(fixture / "io.npz")
    prompt = held["input_ids"][0]
    found = nblora.generate(model, [prompt], max_new_tokens=4, eos=[])[0]
    assert found[0] == held["logits"][0, -1].argmax()
    assert found.tolist() == nblora.generate(model.merge(), [prompt], max_new_tokens=4, eos=[])[0].tolist()
    with model.disable_adapter():
        assert nblora.generate(model, [prompt], max_new_tokens=1)[0] == held["logits0"][0, -1].argmax()


def test_no_end_and_other_ends(case):
    model, prompts, greedy, _ = case
    full = nblora.generate(model, prompts, max_new_tokens=24, eos=[])
    assert [len(new) for new in full] == [24] * 4
    for new, ended in zip(full, greedy, strict=True):
        assert new[: len(ended)].tolist() == ended.tolist()
    end = int(full[0][3])
    found = nblora.generate(model, prompts, max_new_tokens=24, eos=end)
    for new, whole in zip(found, full, strict=True):
        places = np.flatnonzero(whole == end)
        assert new.tolist() == whole[: places[0] + 1 if len(places) else None].tolist()


def test_ends_of_the_folder(tmp_path):
    folder = shutil.copytree(MODELS / "llama" / "base", tmp_path / "model")
    first = int(nblora.generate(loaded("llama"), [11], max_new_tokens=1)[0][0])
    for name in ("config.json", "generation_config.json"):
        raw = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**raw, "eos_token_id": 96 if name == "config.json" else first}))
    model = nblora.load_pretrained(folder)
    assert len(nblora.generate(model, [11], max_new_tokens=5)[0]) == 1
    (folder / "generation_config.json").write_text('{"eos_token_id": null}')
    assert len(nblora.generate(model, [11], max_new_tokens=5)[0]) == 5
    (folder / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(FormatError, match=r"generation_config\.json: eos_token_id is '</s>'"):
        nblora.generate(model, [11], max_new_tokens=5)


def test_drawing_repeats_and_is_each_texts_own(case):
    model, prompts, _, _ = case
    settings = {"max_new_tokens": 8, "temperature": 1.3, "top_p": 0.9, "seed": 3, "eos": []}
    found = [new.tolist() for new in nblora.generate(model, prompts, **settings)]
    assert found == [new.tolist() for new in nblora.generate(model, prompts, **settings)]
    assert found[0] == nblora.generate(model, prompts[0], **settings)[0].tolist()
    assert found != [new.tolist() for new in nblora.generate(model, prompts, **{**settings, "seed": 4})]
    greedy = nblora.generate(model, prompts, max_new_tokens=8, eos=[])
    cold = nblora.generate(model, prompts, **{**settings, "temperature": 1e-300})
    narrow = nblora.generate(model, prompts, **{**settings, "top_p": 1e-9})
    assert [n.tolist() for n in cold] == [n.tolist() for n in narrow] == [n.tolist() for n in greedy]


@pytest.mark.parametrize(("top_p", "kept"), [(1.0, 4), (0.95, 4), (0.8, 3), (0.75, 2), (0.5, 1), (0.45, 1)])
def test_the_frequencies_of_a_nucleus(top_p, kept):
    share = np.array([0.1, 0.5, 0.15, 0.25])  # in their order: tokens 1, 3, 2, 0
    choice = Choice(2.0, top_p, [np.random.default_rng(0)])
    logits, backend = (2 * np.log(share) + 7).astype(np.float64)[None], resolve("cpu")
    drawn = np.bincount([choice(logits, np.array([0]), backend)[0] for _ in range(4000)], minlength=4) / 4000
    nucleus = np.argsort(-share)[:kept]
    expected = np.zeros(4)
    expected[nucleus] = share[nucleus] / share[nucleus].sum()
    np.testing.assert_allclose(drawn, expected, atol=0.03)
    assert (drawn[expected == 0] == 0).all()


def test_bad_input():
    model = loaded("gpt2", "float32")
    prompts = [[1, 2], [3]]
    for settings, error, message in (
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": 2.0}, TypeError, "max_new_tokens"),
        ({"max_new_tokens": 47}, ValueError, "max_new_tokens must be at most 46, got 47: the model has 48 positions"),
        ({"temperature": -1}, ValueError, "temperature must be finite and not negative"),
        ({"temperature": float("nan")}, ValueError, "temperature"),
        ({"top_p": 0}, ValueError, "top_p"),
        ({"top_p": 1.01}, ValueError, r"top_p must be in \(0, 1\]"),
        ({"eos": 97}, IndexError, "eos must hold indices from 0 to 96"),
        ({"eos": "</s>"}, TypeError, "eos"),
    ):
        with pytest.raises(error, match=message):
            nblora.generate(model, prompts, **{"max_new_tokens": 3, **settings})
    for ids, error, message in (
        ([], ValueError, "input_ids must hold at least one"),
        ([[1], []], ValueError, "input_ids must hold at least one token in every sequence"),
        ([[1, 97]], IndexError, r"input_ids must hold integers from 0 to 96, got 97 at \(0, 1\)"),
        ([[1, -1]], IndexError, "input_ids"),
        ([[1.5]], TypeError, "input_ids"),
    ):
        with pytest.raises(error, match=message):
            nblora.generate(model, ids, max_new_tokens=3)
    assert len(nblora.generate(model, prompts, max_new_tokens=46, eos=[])[0]) == 46
    encoder = nblora.load_pretrained(FIXTURES / "bert_cls_qv" / "base")
    with pytest.raises(ValueError, match="model must be a causal language model"):
        nblora.generate(encoder, prompts, max_new_tokens=3)
    with pytest.raises(TypeError, match="model must be what"):
        nblora.generate(nblora.Dense.random(2, 2), prompts, max_new_tokens=3)


def test_logits_that_are_not_finite_are_told():
    model = loaded("llama", "float32")
    model.set_parameter("model.norm.weight", np.full(24, np.float32(3e38)))
    with pytest.raises(NonFiniteError, match="logits of text 0"), np.errstate(all="ignore"):
        nblora.generate(model, [1, 2], max_new_tokens=3)
