"""docs/api.md is what the docstrings say."""

import importlib
import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("sklearn")

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("build_api", DOCS / "build_api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(generator):
    written = (DOCS / "api.md").read_text(encoding="utf-8")
    assert written == generator.build(), "run `python docs/build_api.py`"


def test_every_public_name_is_on_the_page(generator):
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    for name in generator.MODULES:
        module = importlib.import_module(name)
        for key in getattr(module, "__all__", ()):
            if key not in ("__version__", "read_layer") and callable(getattr(module, key)):
                # read_layer is there as nblora.load
                assert f"\n### `{key}`\n" in text, f"{name}.{key}"
    for name in (
        "DeltaLoRAAdapter.get_current_delta",
        "Layer.backward_update",
        "Layer.get_parameter",
        "LoRAClassifier.fit",
    ):
        assert f"\n#### `{name}`\n" in text, name
