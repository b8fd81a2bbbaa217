"""Machine code of kernels: compiled once for a source, its types and a GPU's generation, then read from the disk."""

import functools
import hashlib
import importlib.metadata
import re
from collections.abc import Sequence
from types import CodeType
from typing import Any

from numba.core import types

from nblora.kernels.common.cache import KERNELS, cache_folder, read_checked, source_digest, write_checked


def machine_code(kernel: Any, argument_types: Sequence[Any], capability: tuple[int, int]) -> tuple[bytes, bytes]:
    """The name and the machine code of a kernel for these types: from the disk, else compiled and left there."""
    folder = cache_folder()
    path = None if folder is None else folder / f"{_key(kernel, argument_types, capability)}.cubin"
    held = None if path is None else read_checked(path)
    if held is None:
        held = compile_kernel(kernel, argument_types, capability)[0]
        if path is not None:
            write_checked(path, held)
    return entry_name(held), held


def compile_kernel(
    kernel: Any, argument_types: Sequence[Any], capability: tuple[int, int], output: str = "ltoir"
) -> tuple[bytes, str]:
    """Compile and link a kernel; the machine code, and what the assembler says of it."""
    from numba import cuda

    code, _ = cuda.compile(
        kernel.py_func,
        types.void(*argument_types),
        device=False,
        cc=capability,
        abi="numba",
        output=output,
        launch_bounds=kernel.targetoptions["launch_bounds"],
    )
    return _link(code.encode() if isinstance(code, str) else code, capability, output)


def entry_name(cubin: bytes) -> bytes:
    """The name of the kernel in its machine code."""
    found = re.search(rb"\.text\.([\w$]+)\0", cubin)
    if found is None:
        raise RuntimeError("the linker left no kernel in its machine code")
    return found[1]


def _link(code: bytes, capability: tuple[int, int], output: str) -> tuple[bytes, str]:
    from cuda.bindings import nvjitlink

    options = [f"-arch=sm_{capability[0]}{capability[1]}", "-verbose", "-Xptxas=-v"]
    if output == "ltoir":
        options.append("-lto")
    handle = nvjitlink.create(len(options), options)
    try:
        kind = nvjitlink.InputType.PTX if output == "ptx" else nvjitlink.InputType.LTOIR
        try:
            nvjitlink.add_data(handle, kind, code, len(code), "kernel")
            nvjitlink.complete(handle)
        except nvjitlink.nvJitLinkError as error:
            log = bytearray(nvjitlink.get_error_log_size(handle))
            nvjitlink.get_error_log(handle, log)
            raise RuntimeError(log.decode(errors="replace")) from error
        cubin = bytearray(nvjitlink.get_linked_cubin_size(handle))
        nvjitlink.get_linked_cubin(handle, cubin)
        log = bytearray(nvjitlink.get_info_log_size(handle))
        nvjitlink.get_info_log(handle, log)
        return bytes(cubin), log.decode(errors="replace").rstrip("\0")
    finally:
        nvjitlink.destroy(handle)


# --- the cache -------------------------------------------------------------------------------------------------------


@functools.cache
def cuda_digest() -> str:
    """Digest of every kernel source, a GPU's included, and of the packages that compile them."""
    digest = hashlib.sha256(source_digest().encode())
    for path in sorted(KERNELS.rglob("*.py")):
        if "cuda" in path.relative_to(KERNELS).with_suffix("").parts:
            digest.update(str(path.relative_to(KERNELS)).encode())
            digest.update(path.read_bytes())
    for package in importlib.metadata.distributions():
        name = (package.metadata["Name"] or "").lower()
        if name.startswith(("numba-cuda", "nvidia-", "cuda-", "llvmlite")):
            digest.update(f"{name}={package.version};".encode())
    return digest.hexdigest()


def _key(kernel: Any, argument_types: Sequence[Any], capability: tuple[int, int]) -> str:
    bounds = kernel.targetoptions["launch_bounds"]
    parts = cuda_digest(), fingerprint(kernel.py_func), bounds, [str(kind) for kind in argument_types], capability
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:40]


def fingerprint(value: Any) -> Any:
    """What tells one kernel of a factory from another: the constants that it encloses, at any depth.

    The text of functions is in the sources' digest.
    """
    value = getattr(value, "py_func", value)
    code = getattr(value, "__code__", None)
    if isinstance(code, CodeType):
        constants = [repr(constant) for constant in code.co_consts if not isinstance(constant, CodeType)]
        cells = [fingerprint(cell.cell_contents) for cell in value.__closure__ or ()]
        return value.__module__, value.__qualname__, constants, list(zip(code.co_freevars, cells, strict=True))
    return str(value) if isinstance(value, types.Type) else repr(value)
