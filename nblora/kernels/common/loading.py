"""Loading cached kernels: their machine code, and nothing of what compiling would need.

Before Numba looks into a cache it imports and registers every implementation that it knows (with SciPy's BLAS, where
that is installed), and it parses the intermediate code that only a later compilation would link. Loading the four
kernels of a process's first step took 0.29 s so, and takes 0.05 s without.
"""

from llvmlite import binding as llvm
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import compile_result
from numba.core.runtime import rtsys


class _LoadedLibrary(JITCodeLibrary):
    """Machine code from a cache; the intermediate code is parsed if another function comes to be linked with it."""

    def __init__(self, codegen, name, machine_code, bitcode, defined):
        super().__init__(codegen, name)
        self._bitcode = bitcode
        self.enable_object_caching()
        self._set_compiled_object(machine_code)
        self._finalize_final_module()
        codegen._engine._defined_symbols.update(defined)

    def _get_module_for_linking(self):
        if self._shared_module is None:
            self._shared_module = llvm.parse_bitcode(self._bitcode)
        return self._shared_module


def pack(compiled):
    """What to keep of a compiled function: what Numba keeps, and the names of symbols that it defines and needs.

    Left out are the environments of Numba's own functions that hold nothing: to restore one imports its module.
    """
    (name, _, code), *rest, environments = compiled._reduce()
    environments = [e for e in environments if e.consts or not e.globals["__name__"].startswith("numba.")]
    module = compiled.library._get_module_for_linking()
    symbols = [*module.functions, *module.global_variables]
    defined = [symbol.name for symbol in symbols if not symbol.is_declaration]
    needed = [symbol.name for symbol in symbols if symbol.is_declaration and not symbol.name.startswith("llvm.")]
    return (name, *code, defined), needed, (*rest, environments)


def load(context, packed):
    """The compiled function that was packed, ready to be called."""
    library, needed, rest = packed
    descriptor, environment, signature, objectmode, lifted, annotation, reload_init, environments = rest
    for function in reload_init:  # of parallel kernels: loads the threading layer, whose functions are needed
        function()
    _make_known(context, needed)
    library = _LoadedLibrary(context.codegen(), *library)
    library._reload_init.update(reload_init)  # what links this function will need them too
    for held in environments:
        library.codegen.set_env(held.env_name, held)
    return compile_result(
        target_context=context,
        typing_context=context.typing_context,
        library=library,
        environment=environment,
        entry_point=context.get_executable(library, descriptor, environment),
        fndesc=descriptor,
        type_annotation=annotation,
        signature=signature,
        objectmode=objectmode,
        lifted=lifted,
        reload_init=reload_init,
        referenced_envs=environments,
    )


def _make_known(context, names):
    """Let the linker find every name: code with one that it did not find would end the process when called."""
    for prepare in (rtsys.initialize, type(context).refresh):
        if all(map(llvm.address_of_symbol, names)):
            return
        prepare(context)
    missing = [name for name in names if not llvm.address_of_symbol(name)]
    if missing:
        raise RuntimeError(f"cached code calls what is not there: {', '.join(missing)}")
