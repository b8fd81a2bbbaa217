"""From a file of texts to an adapter: what `nblora finetune` runs."""

from .run import Finetuned, finetune
from .settings import Settings

__all__ = ["Finetuned", "Settings", "finetune"]
