"""From text to tokens and back: the tokenizers and chat templates of pretrained models, and sentence embeddings."""

from .encoding import encode
from .tokens import Encoding, Tokenizer, load_tokenizer

__all__ = ["Encoding", "Tokenizer", "encode", "load_tokenizer"]
