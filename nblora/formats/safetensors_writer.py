"""`write_safetensors` where it used to be: an import path in users' scripts."""

from nblora.storage.safetensors_writer import write_safetensors

__all__ = ["write_safetensors"]
