"""Operations on rows on the emulator: tables, columns, means, norms, gates, the largest, and wide cross-entropy."""

import pytest

pytest.importorskip("greenlet", reason="the emulator needs greenlet (extra test)")

from tests.cuda import rows
from tests.cuda.emulated import make_backend
from tests.cuda.emulator import ORDERS
from tests.cuda.rows import DTYPES

# Nothing, single elements, whole vectors and groups, and one more or less than those.
TABLES = [
    (0, 3, 5), (1, 1, 1), (3, 2, 4), (7, 5, 3), (8, 4, 8), (9, 11, 5), (33, 6, 12), (40, 2, 7), (5, 40, 129),
    (70, 1, 16), (2, 3, 131), (64, 65, 2), (100, 3, 132),
]  # fmt: skip
MEANS = [
    (0, 0, 5), (1, 1, 1), (1, 9, 4), (2, 7, 3), (3, 3, 8), (4, 41, 5), (5, 12, 12), (2, 100, 7), (1, 70, 129),
    (7, 8, 131), (6, 33, 2), (3, 64, 132), (9, 300, 1),
]  # fmt: skip
COLUMNS = [
    (0, 3, 5), (1, 1, 1), (3, 2, 4), (7, 3, 3), (8, 4, 8), (9, 2, 5), (33, 3, 12), (5, 2, 129), (2, 3, 131), (64, 1, 2),
    (10, 2, 132), (1, 5, 7),
]  # fmt: skip
WIDE = [
    (0, 5), (1, 1), (2, 2), (3, 3), (4, 7), (5, 31), (9, 33), (33, 8), (7, 64), (3, 127), (2, 130), (5, 260), (1, 1030),
]  # fmt: skip
CHECKS = [
    *((rows.check_tables, shape) for shape in TABLES),
    *((rows.check_sums, shape) for shape in TABLES),
    *((rows.check_means, shape) for shape in MEANS),
    *((rows.check_columns, shape) for shape in COLUMNS),
    *((rows.check_norm, shape) for shape in WIDE),
    *((rows.check_largest, shape) for shape in WIDE),
    *((rows.check_softmax, shape) for shape in WIDE),
    *((rows.check_pointwise, shape) for shape in WIDE),
]


def name(value):
    return value.__name__ if callable(value) else str(value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("check", "shape"), CHECKS, ids=name)
def test_values(check, shape, dtype):
    for order in ORDERS:
        check(make_backend(order), dtype, *shape)
