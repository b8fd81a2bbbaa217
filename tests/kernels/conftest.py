import shutil

import pytest

from nblora.kernels.common import cache, jit, linking, loading, notice
from tests.kernels.support import HELPER, MAIN


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "site" / "package"
    common = folder / "common"
    common.mkdir(parents=True)
    for module in (cache, jit, linking, loading, notice):
        shutil.copy(module.__file__, common)
    (folder / "__init__.py").touch()
    (common / "__init__.py").touch()
    (folder / "helper.py").write_text(HELPER)
    (folder / "main.py").write_text(MAIN)
    return folder
