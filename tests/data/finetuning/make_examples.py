"""Writes examples.json: what TRL's SFTTrainer makes of ten records, token ids and labels.

Made with TRL 1.16.0 and transformers 5.24.0, neither of which the tests need: `python -m
tests.data.finetuning.make_examples`, from the repository's root. The tokenizers are learnt here from
tests/data/text/page.txt, and are in the file: one without a first token, with a template that marks no turns, which TRL
knows how to mark (Phi-3's); one with a first token, and a template that marks its turns itself.
"""

import json
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import phi3_chat_template

HERE = Path(__file__).parent
MARKED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}[A]{% generation %}"
    "{{ m.content | trim }}{{ eos_token }}{% endgeneration %}{% else %}[{{ m.role }}] {{ m.content }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[A]{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 1 + 1? ½é\n"},
    {"role": "assistant", "content": " Two. "},
    {"role": "user", "content": "And 北京?"},
    {"role": "assistant", "content": "A city \U0001f600"},
]
RECORDS = {
    "phi": [
        {"text": "The sky is blue, and naïve."},
        {"text": "It has its end.<|endoftext|>"},
        {"prompt": "Question: why?\nAnswer:", "completion": " because of the light"},
        {"prompt": "the mea", "completion": "ning of the"},
        {"messages": TALK},
    ],
    "marked": [
        {"text": " leading blank"},
        {"prompt": "Say é: ", "completion": "é</s>"},
        {"prompt": "", "completion": "all of it"},
        {"messages": TALK[1:3]},
        {"messages": TALK},
    ],
}
LONG = 12
"""Tokens of the cut versions."""


def learn(folder, special, bos, eos, template):
    """Learn a byte-level tokenizer, and write it as transformers saves one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    tokenizer.train([str(HERE.parent / "text" / "page.txt")], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=eos)
    fast.chat_template = template
    fast.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def prepared(tokenizer, record, length, folder):
    """What the trainer would train on: ids and labels, or None for a record that it drops."""
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1,
    ))  # fmt: skip
    settings = SFTConfig(
        folder, max_length=length, assistant_only_loss="messages" in record, report_to=[], use_cpu=True, bf16=False
    )
    trainer = SFTTrainer(model, settings, train_dataset=Dataset.from_list([record]), processing_class=tokenizer)
    if not len(trainer.train_dataset):
        return None
    batch = trainer.data_collator([trainer.train_dataset[0]])
    return {"ids": batch["input_ids"][0].tolist(), "labels": batch["labels"][0].tolist()}


if __name__ == "__main__":
    torch.manual_seed(0)
    result = {"length": LONG}
    kinds = {
        "phi": (["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], None, "<|endoftext|>"),
        "marked": (["<s>", "</s>", "[A]"], "<s>", "</s>"),
    }
    for name, (special, bos, eos) in kinds.items():
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = learn(folder, special, bos, eos, phi3_chat_template if name == "phi" else MARKED)
            samples = [
                {"record": record, "whole": prepared(tokenizer, record, None, folder),
                 "cut": prepared(tokenizer, record, LONG, folder)}
                for record in RECORDS[name]
            ]  # fmt: skip
            files = {path.name: path.read_text() for path in Path(folder).iterdir() if path.name.startswith("token")}
            template = tokenizer.chat_template
        result[name] = {
            "files": {file: json.loads(text) for file, text in files.items()},
            "template": template,
            "samples": samples,
        }
    (HERE / "examples.json").write_text(json.dumps(result, ensure_ascii=False, indent=None) + "\n", encoding="utf-8")
