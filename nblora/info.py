"""What `nblora info` reports: versions, processor, threads, libraries, devices and caches of this machine."""

import importlib
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

REQUIRED = ("nblora", "numpy", "numba", "llvmlite", "scipy", "safetensors", "ml_dtypes", "threadpoolctl", "click")
OPTIONAL = ("scikit-learn", "matplotlib", "onnx", "numba-cuda", "dask")
# Widest first: what decides how many numbers one instruction takes.
VECTOR_FEATURES = {"avx512f": 512, "avx2": 256, "avx": 256, "sse2": 128, "neon": 128}
OTHER_FEATURES = ("fma", "f16c", "avx512bf16", "avx512fp16", "amx-tile")

LAYER_MODULES = {
    "tbb": "numba.np.ufunc.tbbpool",
    "omp": "numba.np.ufunc.omppool",
    "workqueue": "numba.np.ufunc.workqueue",
}


def collect() -> dict[str, Any]:
    """Describe this machine and installation: a dict that JSON can hold.

    Returns
    -------
    dict
        `versions`, `optional` (version or None), `cpu`, `threads`, `blas`, `cuda`, `cache`, `devices`.
    """
    from nblora.backends import devices

    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in REQUIRED}},
        "optional": {name: _version(name) for name in OPTIONAL},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": describe_cpu(),
        "threads": describe_threads(),
        "blas": describe_blas(),
        "cuda": describe_cuda(),
        "cache": describe_cache(),
        "devices": devices(),
    }


def _version(distribution: str) -> str | None:
    if distribution == "nblora":
        from nblora._version import __version__

        return __version__
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_cpu() -> dict[str, Any]:
    """Name of the processor, cores this process may use, and the vector instructions that LLVM finds on it."""
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    present = [name for name in (*VECTOR_FEATURES, *OTHER_FEATURES) if features.get(name)]
    return {
        "name": _cpu_name(),
        "llvm_name": llvm.get_host_cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "vector_bits": next((bits for name, bits in VECTOR_FEATURES.items() if name in present), None),
        "features": present,
    }


def usable_cores() -> int:
    """The number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe_threads() -> dict[str, Any]:
    """Numba's thread count, the threading layers that load here, and the one that a first parallel kernel takes."""
    import numba
    from numba.core import config

    settings: Any = config  # Numba fills the module when it is loaded

    available = [layer for layer, module in LAYER_MODULES.items() if _loads(module)]
    try:
        layer: str | None = numba.threading_layer()
        running, threads = True, numba.get_num_threads()
    except ValueError:  # no parallel kernel has run yet, and asking Numba for its threads would start them
        layer = _choose_layer(available, str(settings.THREADING_LAYER).lower(), settings.THREADING_LAYER_PRIORITY)
        running, threads = False, settings.NUMBA_NUM_THREADS
    return {
        "numba_threads": threads,
        "numba_threads_limit": settings.NUMBA_NUM_THREADS,
        "layer": layer,
        "layer_running": running,
        "layer_setting": str(settings.THREADING_LAYER),
        "layers_available": available,
    }


def _loads(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def _choose_layer(available: list[str], setting: str, priority: list[str]) -> str | None:
    """Numba's own rule: a layer by its name, the first that is safe in the way asked for, or the first of all."""
    openmp_forks = sys.platform != "linux"  # GNU's does not
    kinds = {
        "default": priority,
        "safe": ["tbb"],
        "threadsafe": ["tbb", "omp"],
        "forksafe": ["tbb", *(["omp"] if openmp_forks else []), "workqueue"],
    }
    return next((layer for layer in kinds.get(setting, [setting]) if layer in available), None)


def describe_blas() -> list[dict[str, Any]]:
    """The BLAS and OpenMP libraries that NumPy and SciPy have loaded, with their threads."""
    import numpy  # noqa: F401 - loads its BLAS, so that threadpoolctl sees it
    import scipy.linalg  # noqa: F401 - likewise
    from threadpoolctl import threadpool_info

    keys = ("user_api", "internal_api", "version", "num_threads", "threading_layer", "architecture", "filepath")
    return [{key: library.get(key) for key in keys} for library in threadpool_info()]


def describe_cuda() -> dict[str, Any]:
    """Whether a GPU can be used, and what is missing where not."""
    from nblora.backends import devices, resolve
    from nblora.errors import DeviceUnavailableError

    found = [device for device in devices() if device.startswith("cuda")]
    try:
        resolve("cuda")
    except DeviceUnavailableError as error:
        return {"available": False, "devices": found, "reason": str(error)}
    return {"available": True, "devices": found, "reason": None}


def describe_cache() -> dict[str, Any]:
    """The folder of the compiled kernels; None where no folder is writable."""
    from nblora.kernels.common.cache import cache_folder, source_digest

    folder = cache_folder()
    files = [path for path in folder.rglob("*") if path.is_file()] if folder is not None else []
    return {
        "folder": None if folder is None else str(folder),
        "writable": folder is not None,
        "digest": source_digest(),
        "files": len(files),
        "bytes": sum(path.stat().st_size for path in files),
    }


def as_text(info: dict[str, Any]) -> str:
    """Lay out what `collect` returned for reading."""
    cpu, threads, cache, cuda = (info[key] for key in ("cpu", "threads", "cache", "cuda"))
    missing = [name for name, version in info["optional"].items() if version is None]
    found = [f"{name} {version}" for name, version in info["optional"].items() if version is not None]
    folder = cache["folder"] or "no writable folder"
    running = "running" if threads["layer_running"] else "taken by the first parallel kernel"
    rows = [
        ("versions", ", ".join(f"{name} {version}" for name, version in info["versions"].items())),
        ("optional", ", ".join(found) or "none"),
        ("not installed", ", ".join(missing) or "none"),
        ("system", info["system"]),
        ("processor", f"{cpu['name']} ({cpu['llvm_name']}), {cpu['usable_cores']} of {cpu['cores']} cores usable"),
        ("vectors", f"{cpu['vector_bits']} bits; {', '.join(cpu['features'])}"),
        ("threads", f"{threads['numba_threads']} of at most {threads['numba_threads_limit']}"),
        ("threading layer", f"{threads['layer']} ({running}); available: {', '.join(threads['layers_available'])}"),
        *((library["user_api"], _library_text(library)) for library in info["blas"]),
        ("CUDA", ", ".join(cuda["devices"]) if cuda["available"] else f"unavailable: {cuda['reason']}"),
        ("devices", ", ".join(info["devices"])),
        ("kernel cache", f"{folder}; {cache['files']} files, {cache['bytes']:,} bytes"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _library_text(library: dict[str, Any]) -> str:
    kind = " ".join(str(library[key]) for key in ("internal_api", "version", "architecture") if library[key])
    return f"{kind}, {library['num_threads']} threads, {library['filepath']}"
