"""Tiny causal models, and what transformers generates with them, in float64 (offline, CPU, seconds).

Needs: torch, transformers, numpy.  Usage: python make_generation.py OUTDIR CASE...   (no case: lists them)
For every case it writes OUTDIR/CASE/base, as save_pretrained does, and OUTDIR/CASE/io.npz:
    prompts, lengths    padded at the right            greedy, greedy_lengths    the new tokens of each, up to an end
    logits              that chose each of the new tokens of prompt 0
Ends are tokens that two of the texts come to; of "qwen2" config.json alone says them, of the others generation_config.json.
"""
import os, shutil, sys
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "models"))
os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
import numpy as np, torch, transformers as tf
from make_models import double_everywhere, llama, randomise

SIZES = dict(vocab_size=97, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=40, max_position_embeddings=64)
CASES = {
    "llama": lambda: llama(tie_word_embeddings=True),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SIZES, tie_word_embeddings=False, use_sliding_window=False)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=97, n_embd=24, n_layer=2, n_head=3, n_positions=48)),
}
NEW = 24


def make(name, out):
    torch.manual_seed(sum(map(ord, name))); g = torch.Generator().manual_seed(7); rng = np.random.default_rng(3)
    d = os.path.join(out, name, "base"); shutil.rmtree(os.path.dirname(d), ignore_errors=True)
    m = CASES[name](); randomise(m, g); m.eval()
    with torch.no_grad():  # or the same token would follow itself for ever
        for n, p in m.named_parameters():
            if p.dim() == 2 and not any(part in n for part in ("embed", "wte", "wpe")): p.mul_(3)
    m.config.eos_token_id = m.generation_config.eos_token_id = None
    lengths = [11, 1, 7, 4]; prompts = np.zeros((4, 11), "i8"); greedy = np.zeros((4, NEW), "i8"); counts = []
    for i, n in enumerate(lengths): prompts[i, :n] = rng.integers(8, 97, n)
    ends = []
    for i, place in ((1, 4), (2, 9)):
        ids = torch.tensor(prompts[i : i + 1, : lengths[i]])
        ends.append(int(m.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(ids))[0, lengths[i] + place]))
    m.generation_config.eos_token_id = ends
    if name == "qwen2": m.config.eos_token_id = ends
    m.save_pretrained(d)
    if name == "qwen2": os.remove(os.path.join(d, "generation_config.json"))
    m = type(m).from_pretrained(d).eval().double(); double_everywhere()
    for i, n in enumerate(lengths):
        ids = torch.tensor(prompts[i : i + 1, :n])
        r = m.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True)
        new = r.sequences[0, n:].numpy(); counts.append(len(new)); greedy[i, : len(new)] = new
        if i == 0: logits = torch.cat(r.logits).numpy()
    assert logits.dtype == np.float64
    np.savez_compressed(os.path.join(out, name, "io.npz"), prompts=prompts, lengths=lengths, greedy=greedy, greedy_lengths=counts, logits=logits)
    print(name, counts, greedy[0])


if __name__ == "__main__":
    if len(sys.argv) < 3: print(__doc__, *CASES)
    elif len(sys.argv) == 3: make(sys.argv[2], sys.argv[1])
    else:
        import subprocess
        for n in sys.argv[2:]: subprocess.run([sys.executable, __file__, sys.argv[1], n], check=True)
