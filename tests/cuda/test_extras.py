"""Importing nblora, and what `nblora info` says, with the CUDA packages that are installed here.

None, a whole extra, or broken ones: `.ci/cuda` makes an environment for each.
"""

import importlib.util
import os
import sysconfig

import pytest

from tests.processes import run

DRIVERLESS = "import numba.cuda as c; print(c.is_available(), c.cuda_error() is not None)"
USE = """
import nblora
print(nblora.devices())
layer = nblora.Dense.random(3, 2)
try:
    layer.to("cuda")
except nblora.errors.DeviceUnavailableError as error:
    print(error)
assert layer.device == nblora.Dense.random(3, 2).to("auto").device == "cpu"
"""
# Where the compilers of a whole extra come from.
LIBRARIES = """
from cuda.pathfinder import load_nvidia_dynamic_lib
for name in ("cudart", "nvrtc", "nvvm", "nvJitLink"):
    print(load_nvidia_dynamic_lib(name).abs_path)
"""
INFO = "from nblora.cli import main; main(['info'])"


def installed():
    """What there is: "none", "whole" (CUDA can be imported, and finds no driver), "broken", or "gpu"."""
    if importlib.util.find_spec("numba_cuda") is None:
        return "none"
    done = run(DRIVERLESS, check=False, options=(), NUMBA_ENABLE_CUDASIM=None)
    if done.returncode:
        return "broken"
    return "gpu" if done.stdout.startswith("True") else "whole"


SAID = {
    "none": "the package numba-cuda is not installed: pip install 'nblora[cuda12]' or 'nblora[cuda13]'",
    "whole": "no NVIDIA driver answers: install one, and look at what nvidia-smi says",
    "broken": "the CUDA packages fail at import (",
}


def test_import_never_fails_and_says_what_is_missing():
    state = installed()
    if state == "gpu":
        pytest.skip("nothing is missing here")
    used = run(USE, NUMBA_ENABLE_CUDASIM=None).stdout
    assert used.startswith("['cpu']\n")
    assert f"device 'cuda:0' is not available: {SAID[state]}" in used
    assert "or use device='cpu'" in used
    (line,) = [line for line in run(INFO).stdout.splitlines() if line.startswith("CUDA ")]
    assert SAID[state] in line
    if state != "whole":
        assert "nblora[cuda12]" in line


@pytest.mark.skipif("NBLORA_TOOLKIT_HIDDEN" not in os.environ, reason="a toolkit of the system may be in sight")
def test_only_the_wheels_of_the_extra_serve():
    if installed() != "whole":
        pytest.skip("no whole extra is installed")
    paths = run(LIBRARIES, options=()).stdout.split()
    assert len(paths) == 4
    assert all(path.startswith(sysconfig.get_path("purelib")) for path in paths), paths


def test_the_environment_is_the_one_that_was_meant():
    """`.ci/cuda` says which it has made, so that no state goes untested unnoticed."""
    meant = os.environ.get("NBLORA_CUDA_PACKAGES")
    if meant is None:
        pytest.skip("NBLORA_CUDA_PACKAGES does not say what is installed")
    assert installed() == meant
