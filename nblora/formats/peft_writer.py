"""Write PEFT adapters: a folder that is whole or absent, its tensors as PEFT names and shapes them."""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nblora.formats.peft_config import CONFIG_NAME
from nblora.formats.peft_tensors import TENSORS_NAME
from nblora.formats.replace import check_output, replace_folder
from nblora.storage.safetensors_writer import write_safetensors


def write_adapter(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    force: bool = False,
) -> None:
    """Write an adapter's two files.

    Parameters
    ----------
    folder : path-like
        Replaced whole, or not at all.
    config : mapping
        What `adapter_config.json` will hold.
    tensors : mapping of str to ndarray
        By PEFT's names; uint16 is the bits of bfloat16.
    force : bool
        Replace a folder that is there already, though nblora did not write it.

    Raises
    ------
    FormatError
        If there is such a folder, or a file.
    OSError
        If the folder cannot be written.
    """
    check_output(Path(folder), (), {TENSORS_NAME, CONFIG_NAME}, force)
    with replace_folder(Path(folder)) as hidden:
        write_safetensors(hidden / TENSORS_NAME, tensors, {"format": "pt"})
        with open(hidden / CONFIG_NAME, "x", encoding="utf-8") as file:
            json.dump(dict(config), file, indent=2, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())


def pattern_fields(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """The configuration fields that give every module its own rank and alpha.

    Parameters
    ----------
    ranks, alphas : mapping of str to number
        By module.

    Returns
    -------
    dict
        `r` and `lora_alpha` for most of the modules, `rank_pattern` and `alpha_pattern` for the others.
    """
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_exactly(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {_exactly(name): value for name, value in alphas.items() if value != alpha},
    }


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}$"


def only_these(names: list[str]) -> str:
    """The `target_modules` expression that matches these modules and no other."""
    return "|".join(re.escape(name) for name in names)
