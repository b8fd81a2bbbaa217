"""Checks of the operations on rows: each compares a CUDA backend with the reference on float64 arrays."""

import contextlib
import itertools

import numpy as np

from nblora.backends.protocol import Delta, Rows
from nblora.backends.reference import ReferenceBackend
from nblora.kernels.common.cuda.simulated import from_bfloat16, to_bfloat16
from tests.cuda.philox import dropout_mask

REFERENCE = ReferenceBackend()
DTYPES = ("float32", "float64")
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}


class Bench:
    """A backend, arrays for it, and the reference's answers in float64."""

    def __init__(self, backend, dtype, seed=0):
        self.backend, self.dtype, self.rng = backend, np.dtype(dtype), np.random.default_rng(seed)

    def new(self, *shape):
        """Values that float32 holds exactly, as float64."""
        return self.rng.normal(size=shape).astype(np.float32).astype(np.float64)

    def bring(self, array):
        return None if array is None else self.backend.from_host(array.astype(self.dtype))

    @contextlib.contextmanager
    def moves(self, **expected):
        """What is launched reads, and writes, so many elements of arrays: {name: (array, read, written)}."""
        traffic = getattr(self.backend._device, "traffic", None)
        if traffic is None:  # only the emulator counts
            yield expected
            return
        traffic.clear()
        yield expected
        for name, (array, *wanted) in expected.items():
            if array.size:
                base = id(array.memory.base)
                assert [traffic[base, "read"], traffic[base, "written"]] == wanted, name

    def same(self, found, expected, size=1.0):
        """`size`: how large the numbers are that were added up to these."""
        found = self.backend.to_host(found)
        assert found.dtype == self.dtype
        assert found.shape == expected.shape
        bound = TOLERANCE[self.dtype.name]
        np.testing.assert_allclose(found, expected, rtol=bound, atol=bound * size)


def ranges(rng, count, total):
    """Begins of ranges, none empty."""
    cuts = np.sort(rng.choice(np.arange(1, total), count - 1, replace=False)) if count > 1 else []
    return np.array([0, *cuts, total], np.int64)


def check_tables(backend, dtype, samples, count, width):
    """Rows taken from one table and two, onto nothing and onto what is there; a table in bfloat16."""
    bench = Bench(backend, dtype)
    first, second, held = bench.new(count, width), bench.new(count, width), bench.new(samples, width)
    indices = bench.rng.integers(max(1, count // 2), size=samples)  # some several times, some never
    rounded = backend._device.upload(first.astype(np.float32), bfloat16=True)
    for add, two in itertools.product((False, True), repeat=2):
        tables, factors = ([first, second], [0.7, -1.3]) if two else ([first], [0.7])
        target, expected, brought = bench.bring(held), held.copy(), [bench.bring(table) for table in tables]
        with bench.moves(target=(target, add * held.size, held.size), table=(brought[-1], held.size, 0)):
            backend.take_rows(brought, factors, indices, target, add)
        REFERENCE.take_rows(tables, factors, indices, expected, add)
        bench.same(target, expected, 4)
        if dtype == "float32":
            tables[0] = from_bfloat16(to_bfloat16(first)).astype(np.float64)
            target, expected = bench.bring(held), held.copy()
            backend.take_rows([rounded, *map(bench.bring, tables[1:])], factors, indices, target, add)
            REFERENCE.take_rows(tables, factors, indices, expected, add)
            bench.same(target, expected, 4)
    bench.same(backend.gather(bench.bring(first), indices), first[indices])
    places, rows = bench.rng.permutation(samples + 3)[:samples], bench.new(samples + 3, width)
    for add in (False, True):
        target, expected, source = bench.bring(rows), rows.copy(), bench.bring(held)
        with bench.moves(target=(target, add * held.size, held.size), source=(source, held.size, 0)):
            backend.scatter(target, places, source, add)
        REFERENCE.scatter(expected, places, held, add)
        bench.same(target, expected)


def check_sums(backend, dtype, samples, count, width):
    """Gradients added up where their rows came from, and what is done with them."""
    bench = Bench(backend, dtype)
    gradient = bench.new(samples, width)
    indices = bench.rng.integers(max(1, count - 1), size=samples)  # the last one never, where there is another
    starts = np.zeros(count + 1, np.int64)
    np.cumsum(np.bincount(indices, minlength=count), out=starts[1:])
    rows, size = Rows(np.argsort(indices, kind="stable"), starts), 4 * np.sqrt(max(1, samples))
    target, expected = backend.empty((count, width), bench.dtype), np.zeros((count, width))
    brought = bench.bring(gradient)
    with bench.moves(gradient=(brought, gradient.size, 0), target=(target, 0, target.size)):
        backend.sum_rows(brought, rows, 0.3, target)
    REFERENCE.sum_rows(gradient, rows, 0.3, expected)
    bench.same(target, expected, size)
    table = bench.new(count, width)
    target, expected = bench.bring(table), table.copy()
    touched = width * np.count_nonzero(np.diff(starts))
    with bench.moves(gradient=(brought, gradient.size, 0), target=(target, touched, touched)):
        backend.descend_rows(brought, rows, 0.3, target)
    REFERENCE.descend_rows(gradient, rows, 0.3, expected)
    bench.same(target, expected, size)
    velocity = bench.new(count, width)
    moved = Delta(bench.bring(table), bench.bring(velocity), 0.4, 0.9)
    expected = Delta(table.copy(), velocity.copy(), 0.4, 0.9)
    each = table.size, table.size
    with bench.moves(gradient=(brought, gradient.size, 0), D=(moved.delta, *each), V=(moved.velocity, *each)):
        backend.follow_rows(brought, rows, moved, 0.3)
    REFERENCE.follow_rows(gradient, rows, expected, 0.3)
    bench.same(moved.delta, expected.delta, size)
    bench.same(moved.velocity, expected.velocity, size)


def check_means(backend, dtype, count, total, width):
    """Means of ranges of rows, and their gradient."""
    bench = Bench(backend, dtype)
    begins = ranges(bench.rng, count, total) if count else np.zeros(1, np.int64)
    x, grad = bench.new(total, width), bench.new(count, width)
    expected = REFERENCE.row_means(x, begins) if count else grad
    brought = bench.bring(x)
    with bench.moves(x=(brought, x.size, 0)):
        bench.same(backend.row_means(brought, begins), expected)
    with bench.moves() as moved:
        spread = backend.row_means_gradient(bench.bring(grad), begins)
        moved["rows"] = spread, 0, x.size
    bench.same(spread, REFERENCE.row_means_gradient(grad, begins))


def check_columns(backend, dtype, rows, parts, width):
    """Columns cut and joined."""
    bench = Bench(backend, dtype)
    x = bench.new(rows, parts * width)
    brought = bench.bring(x)
    with bench.moves(x=(brought, x.size, 0)) as moved:
        found = backend.split_columns(brought, parts)
        moved |= {f"part {i}": (part, 0, rows * width) for i, part in enumerate(found)}
    assert len(found) == parts
    for part, expected in zip(found, REFERENCE.split_columns(x, parts), strict=True):
        bench.same(part, expected)
    with bench.moves() as moved:
        joined = backend.join_columns(found)
        moved |= {f"part {i}": (part, rows * width, 0) for i, part in enumerate(found)}
        moved["whole"] = joined, 0, x.size
    bench.same(joined, x)
    two = bench.bring(x), bench.bring(x + 1)
    with bench.moves(x=(two[0], x.size, 0), y=(two[1], x.size, 0)) as moved:
        product = backend.multiplied(*two)
        moved["product"] = product, 0, x.size
    bench.same(product, x * (x + 1), 4)
    whole = bench.bring(np.tile(x, (2, 1)))
    bench.same(backend.join_columns([whole[:rows], whole[rows:]]), np.hstack([x, x]))  # of views


def check_norm(backend, dtype, rows, width):
    """LayerNorm and RMSNorm, with a bias and without, around a mean that is large beside the differences."""
    bench = Bench(backend, dtype)
    x, grad = bench.new(rows, width), bench.new(rows, width)
    weight, bias = bench.new(width) + 1, bench.new(width)
    for centred, shift, far in ((True, bias, 0), (True, None, 64), (False, None, 0), (False, bias, 0)):
        moved = x + far
        brought, reads = bench.bring(moved), 3 if centred else 2  # all but the first from a cache
        with bench.moves(x=(brought, reads * x.size, 0)) as moved_too:
            y, stats = backend.norm(brought, bench.bring(weight), bench.bring(shift), 1e-3, centred)
            moved_too |= {"y": (y, 0, x.size), "stats": (stats, 0, 2 * rows)}
        expected, expected_stats = REFERENCE.norm(moved, weight, shift, 1e-3, centred)
        lost = 64 if far else 1  # digits that x itself has not got
        bench.same(y, expected, 8 * lost)
        bench.same(stats, expected_stats, 8 * lost)
    for centred in (True, False):
        stats = REFERENCE.norm(x, weight, None, 1e-3, centred)[1]
        several, few = (True, True), 2  # parts, each of several rows a thread
        for wanted, parts in (
            (several, 128),
            (several, few),
            ((True, False), 128),
            ((False, True), few),
            ((False, False), few),
        ):
            backend._norm_shares = parts
            given = [bench.bring(array) for array in (grad, x, stats, weight)]
            reads = (2 * wanted[0] + wanted[1]) * x.size
            with bench.moves(grad=(given[0], reads, 0), x=(given[1], reads, 0)) as moved:
                found = backend.norm_gradient(*given, centred, wanted)
                moved |= {str(i): (part, 0, part.size) for i, part in enumerate(found) if part is not None}
            reference = REFERENCE.norm_gradient(grad, x, stats, weight, centred, wanted)
            assert [part is None for part in found] == [part is None for part in reference]
            for part, expected in zip(found, reference, strict=True):
                if expected is not None:
                    bench.same(part, expected, 32 * np.sqrt(max(1, rows)))


def check_pointwise(backend, dtype, *shape):
    """Every activation, its gradient, its gate and that one's gradients; infinities and NaN pass."""
    bench = Bench(backend, dtype)
    x, u, grad = 3 * bench.new(*shape), bench.new(*shape), bench.new(*shape)
    x.reshape(-1)[:1], x.reshape(-1)[3:4] = np.nan, np.inf
    with np.errstate(all="ignore"):
        for code in range(8):
            given = [bench.bring(array) for array in (grad, x, u)]
            for name, own, host in (
                ("pointwise", given[1:2], (x,)),
                ("pointwise_gradient", given[:2], (grad, x)),
                ("gated", given[1:], (x, u)),
                ("gated_gradient", given, (grad, x, u)),
            ):
                with bench.moves(**{f"operand {i}": (array, x.size, 0) for i, array in enumerate(own)}) as moved:
                    found = getattr(backend, name)(*own, code)
                    results = found if isinstance(found, tuple) else (found,)
                    moved |= {f"result {i}": (array, 0, x.size) for i, array in enumerate(results)}
                expected = getattr(REFERENCE, name)(*host, code)
                expected = expected if isinstance(expected, tuple) else (expected,)
                for part, other in zip(results, expected, strict=True):
                    bench.same(part, other, 16 if len(host) == 3 else 4)


def check_dropout(backend, dtype, *shape):
    """What `dropout_mask` would keep of a key, forward and back."""
    bench = Bench(backend, dtype)
    x, grad = bench.new(*shape), bench.new(*shape)
    brought = bench.bring(x)
    with bench.moves(x=(brought, x.size, 0)) as moved:
        y, kept = backend.dropout(brought, 0.3, np.random.default_rng(5))
        moved["y"] = y, 0, x.size
    mask = dropout_mask(REFERENCE, np.random.default_rng(5), shape, 0.3, np.float64)
    bench.same(y, x * mask)
    bench.same(backend.dropout_gradient(bench.bring(grad), 0.3, kept), grad * mask)


def check_largest(backend, dtype, rows, width):
    """The largest of each row: the first of equals, the first NaN; and how many are where labels say."""
    bench = Bench(backend, dtype)
    plain = bench.new(rows, width)
    equal = bench.rng.integers(3, size=(rows, width)).astype(np.float64)
    broken = np.where(bench.rng.random((rows, width)) < 2 / width, np.nan, plain)
    low = np.full((rows, width), -np.inf)
    for x in (plain, equal, broken, low):
        device = bench.bring(x)
        with bench.moves(x=(device, x.size, 0)):
            places, numbers = backend.largest(device)
        expected, values = REFERENCE.largest(x)
        assert places.dtype == np.int64
        assert isinstance(places, np.ndarray)
        assert numbers.dtype == dtype
        np.testing.assert_array_equal(places, expected)
        np.testing.assert_array_equal(numbers, values)
        labels = np.where(np.arange(rows) % 3 == 1, (expected + 1) % width, expected)
        labels[::5] = -100
        for given in (labels, backend.from_host(labels)):
            numbers = [backend.right_answers(device, given), 0.5 * backend.right_answers(device, given)]
            right = REFERENCE.right_answers(x, labels)
            assert backend.read(numbers) == [right, 0.5 * right]


def check_softmax(backend, dtype, rows, width):
    """Cross-entropy of rows that each thread reads more than once, with labels that are ignored."""
    bench = Bench(backend, dtype)
    z, labels = 4 * bench.new(rows, width), bench.rng.integers(width, size=rows)
    labels[1::3] = -100
    if not rows:
        value, gradient = backend.softmax_cross_entropy(bench.bring(z), labels)
        assert (float(value), gradient.shape) == (0, (0, width))
        return
    rising, low = np.sort(z, axis=1) * 8, np.round(16 * z) / 16 - 800  # which float32 holds
    barred = z.copy()  # -inf everywhere but at the last, which is right
    barred[:, :-1] = -np.inf
    for logits, right in ((z, labels), (rising, labels), (low, labels), (barred, np.full(rows, width - 1))):
        expected, slope = REFERENCE.softmax_cross_entropy(logits, right)
        brought, learnt = bench.bring(logits), np.count_nonzero(right >= 0)
        with bench.moves(logits=(brought, learnt * (2 * width + 1), 0)):
            value, gradient = backend.softmax_cross_entropy(brought, right)
        np.testing.assert_allclose(float(value), expected, rtol=1e-5 if dtype == "float32" else 1e-12, atol=1e-7)
        bench.same(gradient, slope, abs(slope).max(initial=0))
    for wrong in (np.nan, np.inf):
        spoilt = z.copy()
        spoilt[:, width // 2] = wrong
        value, gradient = backend.softmax_cross_entropy(bench.bring(spoilt), labels)
        learnt = labels >= 0
        assert np.isnan(float(value)) == learnt.any()
        found = backend.to_host(gradient)
        assert np.isnan(found[learnt]).all()
        assert not found[~learnt].any()


def run_everything(backend, dtype, rows=40, width=24):
    """Every operation once, in each of its forms."""
    bench = Bench(backend, dtype)
    x, y, weight = (
        bench.bring(bench.new(rows, width)),
        bench.bring(bench.new(rows, width)),
        bench.bring(bench.new(width)),
    )
    indices, begins, labels = np.arange(rows), np.array([0, 3, rows]), backend.from_host(np.zeros(rows, np.int64))
    sorted_rows = Rows(indices, np.arange(rows + 1))
    rounded = backend._device.upload(np.zeros((rows, width), np.float32), bfloat16=True)
    backend.take_rows([x, y], [1.0, 2.0], indices, x, True)
    if dtype == "float32":
        backend.take_rows([rounded], [1.0], indices, x, False)
        backend.take_rows([rounded, y], [1.0, 2.0], indices, x, False)
    backend.sum_rows(x, sorted_rows, 0.5, y)
    backend.descend_rows(x, sorted_rows, 0.5, y)
    backend.follow_rows(x, sorted_rows, Delta(x, y, 0.5, 0.9), 0.1)
    backend.row_means_gradient(backend.row_means(x, begins), begins)
    backend.scatter(x, indices, y, True)
    backend.join_columns(backend.split_columns(x, 2))
    for centred in (True, False):
        _, stats = backend.norm(x, weight, weight, 1e-5, centred)
        for wanted in ((True, True), (True, False), (False, True)):
            backend.norm_gradient(y, x, stats, weight, centred, wanted)
    backend.pointwise(x, 2)
    backend.pointwise_gradient(y, x, 2)
    backend.gated(x, y, 2)
    backend.gated_gradient(x, x, y, 2)
    backend.multiplied(x, y)
    backend.dropout(x, 0.5, np.random.default_rng(0))
    with np.errstate(invalid="ignore"):  # a device that only records has no answers
        backend.largest(x)
    backend.right_answers(x, labels)
    backend.softmax_cross_entropy(x, labels)


def vectors(code, what):
    """128-bit loads ("LD") or stores ("ST") of a kernel's machine code, those by addresses it was given among them."""
    return code.count(f"{what}G.E.128") + code.count(f"{what}.E.128")
