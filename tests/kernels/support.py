"""A package of two small kernels beside copies of `jit.py` and what it needs, and a process that calls them."""

from tests.processes import run

HELPER = "from .common.jit import kernel\n@kernel(inline='always')\ndef add(a, b):\n    return a + b\n"
MAIN = "from .helper import add\nfrom .common.jit import kernel\n@kernel\ndef total(a, b):\n    return add(a, b)\n"
CALL = """
from package.main import total
from package.common.cache import cache_folder
print(total(2, 3), sum(total.stats.cache_hits.values()), sum(total.stats.cache_misses.values()), cache_folder())
"""


def call(package, code=CALL, **environment):
    """Result, cache hits, cache misses and folder of one process."""
    defaults = {"NUMBA_CACHE_DIR": None, "XDG_CACHE_HOME": str(package.parent / "user"), "NUMBA_DISABLE_JIT": None}
    done = run(code, path=package.parent, **(defaults | environment))
    result, hits, misses, folder = done.stdout.split()
    return int(result), int(hits), int(misses), folder
