"""Compiling what only kernels call: lowered to LLVM, linked into the kernels, and optimised there, once.

Numba optimises every function that it compiles, with all that it calls, and makes machine code of it, before a caller
links it and does the same again, level by level. Of parts only the intermediate code is needed. Leaving out the rest
took the first step of a process without a cache from 35 s to 16 s.
"""

from numba.core import compiler, cpu
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler_lock import global_compiler_lock


class PartLibrary(JITCodeLibrary):
    """The intermediate code of a part and of all that it calls: neither optimised nor made into machine code."""

    def finalize(self):
        """Link what is called."""
        self._raise_if_finalized()
        for library in dict.fromkeys(self._linking_libraries):
            self._reload_init.update(library._reload_init)
            self._final_module.link_in(library._get_module_for_linking(), preserve=True)
        self._finalized = True

    def get_pointer_to_function(self, name):
        """Return 0: there is no machine code."""
        self._ensure_finalized()
        return 0


class _PartContext(cpu.CPUContext):
    """Numba's target, but for the address of a part's environment, which is nowhere in memory."""

    def get_executable(self, library, fndesc, env):
        """Return what stands for the part among Numba's functions; it must not be called."""
        return cpu._dynfunc.make_function(fndesc.lookup_module(), fndesc.qualname, "a part", 0, env, (library,))


class PartCompiler(compiler.Compiler):
    """Numba's compiler, for parts."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.state.targetctx.__class__ = _PartContext
        self.state["library"] = library_for(self.state.targetctx, "part")


def library_for(context, name):
    """A new `PartLibrary`."""
    library = PartLibrary(context.codegen(), name)
    library.enable_object_caching()
    return library


def compile_part(context, function, signature):
    """Compile a function for the code that is being generated, which will hold it; return its descriptor."""
    flags = compiler.Flags()
    flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
    with global_compiler_lock:
        library = library_for(context, function.__name__)
        compiled = compiler.compile_internal(
            context.typing_context, context, library, function, signature.args, signature.return_type, flags, {}
        )
        context.active_code_library.add_linking_library(library)
    return compiled.fndesc
