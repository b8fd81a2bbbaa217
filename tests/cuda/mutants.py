"""Kernels with one barrier, bound check or tail taken away, built from the sources; none may pass the checks."""

import contextlib
import importlib
import importlib.machinery
import re
import sys
from pathlib import Path

import numpy as np

import nblora.kernels
from nblora.backends.reference import ReferenceBackend
from tests.cuda.philox import dropout_mask

FOLDER = Path(nblora.kernels.__file__).parent
PACKAGE = nblora.kernels.__name__
LINEAR = (
    "common.cuda.sums",
    "linear.cuda.tiles",
    "linear.cuda.forward",
    "linear.cuda.gradients",
    "linear.cuda.vectors",
    "update.cuda",
    "losses.cuda",
    "masks.cuda",
)
"""Kernels of the linear step, and what they stand on; others have tests, and mutants, of their own."""

# What may be taken away: pattern, what stands there instead. Every place where a pattern matches is one mutant;
# `python -m tests.cuda.mutants` lists them.
BARRIER = (r"cuda\.syncthreads\(\)", "None")
GUARDS = [
    (r" if (?:o < outer_end|k < k_end|n < N|row < rows) else int32\(0\)", ""),  # rows beyond the array
    (r"valid = (?:k_end - k|outer_end - o)(?= if)", "valid = LANES"),  # the tail of a vector
    (r"valid = (?:out - o|inputs - i|columns - column)(?= if|\n)", "valid = LANES"),
    (r"int32\(columns - column\)", "int32(LANES)"),
    (r"min\(begin \+ chunk, (?:inner|rows)\)", "begin + chunk"),  # the last split
    (r"(?<=valid = )(?:target|out|parameter|delta|weight)\.size - offset", "LANES"),  # the tail of an array
    (r"array\.size - offset", "LANES"),
    (r"if n < N and o < outputs:", "if n < N:"),
    (r"if n < N and o < outputs:", "if o < outputs:"),
    (r"mask\.size - offset(?=, aligned, first)", "4"),  # the tail of a mask
    (r"mask\.size - offset - 2", "2"),
    (r"split < sums\.size", "split < 0"),  # the splits after the first
    (r"if label < 0:", "if False:"),  # a label of which nothing is learnt
    (r"if member == 0 and row < rows:", "if member == 0:"),
    (r" if flags & HAS_LOW and split == 0 else int32\(0\)", ""),  # the low-rank part once, not in every split
    (r"job \+ 1 < table\.shape\[0\] and ", ""),  # the end of a table of products
    (r"if (?:t|member) < width:", "if True:"),  # the idle half of a tree
    (r"\(array\.size \+ LANES - 1\) // LANES", "array.size // LANES"),  # the tail of an array left out
    (r"(?<=while i < )(?:\w+\.)?size", r"\g<0> + 1"),  # the end of a loop over elements
]


def source_file(module):
    """Where a kernel's source lies."""
    return FOLDER / (module.replace(".", "/") + ".py")


def kernel_modules():
    """Every module of kernels for a GPU, in an order in which they can be imported, by its name under `kernels`."""
    names = [path.relative_to(FOLDER).with_suffix("").as_posix().replace("/", ".") for path in FOLDER.rglob("*.py")]
    found = sorted(name for name in names if ".cuda" in name and not name.endswith("__init__"))
    fixed = ("intrinsics", "target", "simulated", "rules")
    return [name for name in found if name.rpartition(".")[2] not in fixed]


def mutants(modules=LINEAR, guards=GUARDS):
    """(name, module, function from source to source) of every mutant."""
    found = []
    for module in modules:
        source = source_file(module).read_text()
        for pattern, instead in [BARRIER, *guards]:
            for place, match in enumerate(re.finditer(pattern, source)):
                line = source.count("\n", 0, match.start()) + 1
                name = f"{module}:{line} {match[0].strip()}"

                def mutate(text, pattern=pattern, instead=instead, place=place):
                    found = list(re.finditer(pattern, text))[place]
                    return text[: found.start()] + found.expand(instead) + text[found.end() :]

                found.append((name, module, mutate))
    return found


@contextlib.contextmanager
def mutated(module, mutate):
    """Import the kernels and the backend anew, with one module's source changed; the module `emulated` over them."""
    importlib.import_module("nblora.backends.cuda")
    backend = [name for name in sys.modules if name.startswith("nblora.backends.cuda")]
    names = [*(f"{PACKAGE}.{name}" for name in kernel_modules()), *backend, "tests.cuda.emulated"]
    packages = [importlib.import_module(name) for name in sorted({name.rpartition(".")[0] for name in names})]
    held = {name: sys.modules.pop(name, None) for name in names}
    attributes = [dict(vars(package)) for package in packages]
    for name in names:  # `from package import module` looks at the package first
        package, _, short = name.rpartition(".")
        if package in sys.modules:
            vars(sys.modules[package]).pop(short, None)
    finder = _Finder(f"{PACKAGE}.{module}", mutate)
    sys.meta_path.insert(0, finder)
    try:
        yield importlib.import_module("tests.cuda.emulated")
    finally:
        sys.meta_path.remove(finder)
        for name, old in held.items():
            sys.modules.pop(name, None)
            if old is not None:
                sys.modules[name] = old
        for package, before in zip(packages, attributes, strict=True):
            vars(package).update(before)


class _Finder:
    def __init__(self, name, mutate):
        self.name, self.mutate = name, mutate

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        location = str(source_file(name.removeprefix(f"{PACKAGE}.")))
        return importlib.util.spec_from_file_location(name, location, loader=_Loader(name, location, self.mutate))


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, name, path, mutate):
        super().__init__(name, path)
        self.mutate = mutate

    def get_code(self, fullname):
        return compile(self.mutate(Path(self.path).read_text()), self.path, "exec")


def checks(emulated):
    """Callables that raise where a kernel is wrong: together they reach every barrier, bound and tail."""
    from tests.test_kernels import RELU, Case, run

    def problem(shape, transposed, order, dtype="float32", splits=False, **case):
        def check():
            backend = emulated.make_backend(order)
            if splits:
                backend._device.multiprocessors = 8
            run(shape, dtype, transposed, Case(**case), backend, 1e-5)

        return check

    everything = {"train": True, "masked": True, "activation": RELU}
    for order in ("forward", "reverse"):
        yield lambda order=order: check_updates(emulated.make_backend(order))
        yield lambda order=order: check_losses(emulated.make_backend(order))
        yield lambda order=order: check_masks(emulated.make_backend(order))
        for transposed in (False, True):
            yield problem((9, 11, 13, 5), transposed, order, **everything)
            yield problem((1, 67, 18, 3), transposed, order, **everything)
    yield problem((17, 12, 24, 3), False, "random", **everything)
    yield problem((9, 45, 13, 5), False, "random", splits=True)
    yield problem((9, 13, 45, 5), True, "random", splits=True)
    yield problem((70, 7, 6, 2), False, "random", splits=True, train=True)


def check_updates(backend, size=71):
    """Every element-wise kernel on an array that no vector divides."""
    rng = np.random.default_rng(0)
    p, g, v, u = (rng.normal(size=(1, size)) for _ in range(4))
    u = abs(u)
    new = backend.from_host
    for dtype in ("float32", "float64"):
        bound = {"rtol": 1e-5 if dtype == "float32" else 1e-12, "atol": 1e-6 if dtype == "float32" else 1e-13}

        def same(array, reference, bound=bound):
            np.testing.assert_allclose(backend.to_host(array), reference, **bound)

        a, b, c, d = (new(array.astype(dtype)) for array in (p, g, v, u))
        assert not backend.to_host(backend.zeros_like(a)).any()
        backend.sgd_update(a, b, 0.1)
        same(a, p - 0.1 * g)
        backend.momentum_update(a, c, b, 0.9, 0.1)
        velocity = 0.9 * v + 0.1 * g
        same(c, velocity)
        same(a, p - 0.1 * g - 0.1 * velocity)
        backend.add(b, c)
        same(b, g + velocity)
        backend.scale(b, 3.0)
        same(b, 3 * (g + velocity))
        a, b, c, d = (new(array.astype(dtype)) for array in (p, g, v, u))
        backend.adamw_update(a, b, c, d, 1e-2, (0.9, 0.99), 1e-8, 0.1, 3)
        first, second = 0.9 * v + 0.1 * g, 0.99 * u + 0.01 * g * g
        step = 1e-2 / (1 - 0.9**3) * first / (np.sqrt(second / (1 - 0.99**3)) + 1e-8)
        same(a, p * (1 - 1e-3) - step)
        same(c, first)
        same(d, second)
        mask = new((rng.random((1, size)) > 0.5).astype(dtype))
        same(backend._masked(new(p.astype(dtype)), mask), p * backend.to_host(mask))
        total = backend.sum_of_squares(new(p.astype(dtype)))
        np.testing.assert_allclose(total, (p**2).sum(), rtol=1e-6)
        several = backend.read([2.5, *backend.sums_of_squares([new(array.astype(dtype)) for array in (p, g[:, :3])])])
        np.testing.assert_allclose(several, [2.5, (p**2).sum(), (g[:, :3] ** 2).sum()], rtol=1e-6)


def check_masks(backend, size=71):
    """Every number of a mask that no vector divides."""
    for dtype in (np.dtype(np.float32), np.dtype(np.float64)):
        for shape in ((1, size), (1, 1)):
            drawn = backend.dropout_mask(np.random.default_rng(0), shape, 0.4, dtype)
            expected = dropout_mask(ReferenceBackend(), np.random.default_rng(0), shape, 0.4, dtype)
            np.testing.assert_array_equal(backend.to_host(drawn), expected)


def check_losses(backend, samples=7, outputs=37):
    """Every loss, and its gradient."""
    rng = np.random.default_rng(1)
    z, t = 3 * rng.normal(size=(samples, outputs)), rng.random((samples, outputs))
    labels = rng.integers(outputs, size=samples)
    ignored, learnt = labels.copy(), np.arange(samples) % 3 != 1
    ignored[~learnt] = -100
    softmax = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    onehot = np.eye(outputs)[labels]
    expected = {
        "mean_squared_error": (t, ((z - t) ** 2).mean(), 2 * (z - t) / z.size),
        "binary_cross_entropy": (t, (np.log1p(np.exp(z)) - z * t).mean(), (1 / (1 + np.exp(-z)) - t) / z.size),
        "softmax_cross_entropy": (labels, -np.log((softmax * onehot).sum(1)).mean(), (softmax - onehot) / samples),
    }
    cases = [(name, *case) for name, case in expected.items()]
    value = -np.log((softmax * onehot).sum(1))[learnt].mean()
    cases.append(("softmax_cross_entropy", ignored, value, (softmax - onehot) * learnt[:, None] / learnt.sum()))
    for name, target, value, gradient in cases:
        for bring in (backend.from_host, np.asarray):  # from the device to the device, from the host to the host
            computed, slope = getattr(backend, name)(bring(z), bring(target))
            np.testing.assert_allclose(float(computed), value, rtol=1e-12)
            np.testing.assert_allclose(backend.to_host(slope), gradient, rtol=1e-10, atol=1e-15)
        target = target.astype(np.float32) if target.dtype == np.float64 else target
        computed, slope = getattr(backend, name)(backend.from_host(z.astype(np.float32)), backend.from_host(target))
        np.testing.assert_allclose(float(computed), value, rtol=1e-6)
        assert slope.dtype == np.float32
        np.testing.assert_allclose(backend.to_host(slope), gradient, rtol=1e-5, atol=1e-6 * abs(gradient).max())


def killed_by(module, mutate, checks=checks):
    """The first error that a mutant runs into; None where it passes everything.

    `checks` takes the module `emulated` over the changed kernels, and gives callables that raise where one is wrong.
    """
    with mutated(module, mutate) as emulated:
        for check in checks(emulated):
            try:
                check()
            except Exception as error:  # whatever goes wrong is a mutant caught
                return error
    return None


if __name__ == "__main__":
    print(*(name for name, *_ in mutants()), sep="\n")
