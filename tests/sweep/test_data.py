"""Data of one's own: tables and arrays, how they are split, and what is said where they are no data."""

import re

import numpy as np
import pytest
from click.testing import CliRunner

from nblora.cli import main
from nblora.errors import FormatError, MissingExtraError
from nblora.sweep import Sweep, read_data, read_results, split_data
from nblora.sweep.data import FORMS
from nblora.sweep.task import prepare


def rows_of(data):
    return np.concatenate([data.x, data.x_validation, data.x_test])


def flowers(rng, count=60):
    """Two numbers each, and the name of the larger one."""
    x = rng.normal(size=(count, 2)).round(4)
    return x, np.where(x[:, 0] > x[:, 1], "wide", "long")


def write_csv(path, x, labels, separator=",", head="width,length,species"):
    lines = [separator.join([*map(repr, map(float, row)), str(label)]) for row, label in zip(x, labels, strict=True)]
    path.write_text("\n".join([head.replace(",", separator), *lines]) + "\n", encoding="utf-8-sig")
    return path


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.csv", ";"), ("a.tsv", "\t")])
def test_a_table_of_text(name, separator, tmp_path, rng):
    x, species = flowers(rng)
    data = read_data(write_csv(tmp_path / name, x, species, separator), label="species", standardise=False)
    assert (len(data.x), len(data.x_validation), len(data.x_test)) == (36, 12, 12)
    np.testing.assert_allclose(np.sort(rows_of(data), axis=0), np.sort(x.astype(np.float32), axis=0))
    for features, labels in ((data.x, data.y), (data.x_validation, data.y_validation), (data.x_test, data.y_test)):
        np.testing.assert_array_equal(labels, features[:, 0] > features[:, 1])  # "long" is 0, "wide" is 1
    scaled = read_data(tmp_path / name, label="species")
    np.testing.assert_allclose([scaled.x.mean(0), scaled.x.std(0)], [[0, 0], [1, 1]], atol=1e-5)


def test_parquet_equals_csv(tmp_path, rng):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    x, species = flowers(rng)
    table = pyarrow.table({"width": x[:, 0], "length": x[:, 1], "species": list(species)})
    parquet.write_table(table, tmp_path / "a.parquet")
    first = read_data(tmp_path / "a.parquet", label="species")
    second = read_data(write_csv(tmp_path / "a.csv", x, species), label="species")
    for name, array in vars(first).items():
        np.testing.assert_array_equal(array, getattr(second, name))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(FormatError, match="Parquet"):
        read_data(tmp_path / "b.parquet")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(MissingExtraError, match="pip install pyarrow"):
        read_data(tmp_path / "a.parquet")


def test_arrays_of_x_and_y_are_split_and_left_as_they_are(tmp_path, rng):
    x, y = rng.normal(size=(50, 3)), rng.integers(3, size=50)
    np.savez(tmp_path / "a.npz", x=x, y=y)
    data = read_data(tmp_path / "a.npz", validation=0.3, test=0.1, split_seed=4)
    assert (len(data.x), len(data.x_validation), len(data.x_test)) == (30, 15, 5)
    np.testing.assert_array_equal(np.sort(rows_of(data), axis=0), np.sort(x, axis=0))
    other = read_data(tmp_path / "a.npz", validation=0.3, test=0.1, split_seed=5)
    assert not np.array_equal(other.x, data.x)
    np.testing.assert_array_equal(read_data(tmp_path / "a.npz", split_seed=5, validation=0.3, test=0.1).x, other.x)
    assert split_data(x, y, test=0).x_test is None


def test_numbers_to_predict(tmp_path, rng):
    x, _ = flowers(rng)
    data = read_data(write_csv(tmp_path / "a.csv", x, x.sum(1), head="a,b,Target"), loss="mse", features=["b"])
    assert data.x.shape == (36, 1)
    assert (data.y.shape, data.y.dtype) == ((36, 1), np.float32)


def test_labels_that_are_integers_stay_what_they_are(tmp_path, rng):
    x, _ = flowers(rng)
    data = read_data(write_csv(tmp_path / "a.csv", x, rng.choice([3, 7], 60), head="a,b,y"))
    assert set(data.y) == {3, 7}
    signs = read_data(write_csv(tmp_path / "b.csv", x, rng.choice([-1, 1], 60), head="a,b,y"))
    assert set(signs.y) == {0, 1}


def test_a_class_that_only_the_test_split_has(rng):
    x = rng.normal(size=(9, 2)).astype("float32")
    data = {"x": x, "y": x[:, 0] > 0, "x_validation": x, "y_validation": x[:, 0] > 0, "x_test": x, "y_test": [2] * 9}
    sweep = Sweep.grid(data, {"method": ["full"]})
    assert prepare(sweep.task, {"method": "full", "seed": 0}).out_features == 3


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a,b,kind\n1,2,x\n", {}, "label must name the column to predict: none of the columns 'a', 'b', 'kind'"),
        ("a,label,y\n1,2,x\n", {}, "several of the columns 'a', 'label', 'y' are called"),
        ("a,b,y\n1,2,x\n", {"label": "z"}, "has no column 'z'; there are 'a', 'b', 'y'"),
        ("a,b,y\n1,2,x\n", {"features": ["c"]}, "has no column 'c'; there are 'a', 'b', 'y'"),
        ("a,b,y\n1,2,x\n1,Paris,x\n", {}, "column 'b' must hold numbers, got 'Paris' in row 2: list the columns"),
        ("a,b,y\n1,2,x\n,2,x\n", {}, "column 'a' must hold numbers, got '' in row 2"),
        ("a,b,y\n1,2,x\n1,nan,x\n", {}, "column 'b' must hold finite numbers, got 'nan' in row 2"),
        ("a,b,y\n1,2,x\n1,2,\n", {}, "column 'y' must hold a label in every row"),
        (
            "a,b,y\n1,2,0\n1,2,0.5\n",
            {},
            "column 'y' must hold classes .*0.5. in row 2: for numbers take loss = \"mse\"",
        ),
        ("a,b,y\n1,2,x\n", {"loss": "mse"}, "column 'y' must hold numbers, got 'x' in row 1"),
        ("a,b,y\n1,2\n", {}, "row 1 has 2 values for 3 columns"),
        ("1,2,3\n4,5,6\n", {}, "first line must name the columns"),
        ("a,a,y\n1,2,3\n", {}, "first line must name the columns, each once"),
        ("a,b,y\n", {}, "a line of column names and at least one line of values"),
        ("", {}, "a line of column names and at least one line of values"),
        ("y\n1\n2\n", {}, "has no column to predict 'y' from"),
        ("a,y\n1,2\n\0,2\n", {}, "holds the character NUL"),
        ("a,y\n" + "1,2\n" * 9000 + "x,2\n", {}, "column 'a' must hold numbers, got 'x' in row 9001"),
        ("a,y\n" + "1,2\n" * 9000 + "1\n", {}, "row 9001 has 1 values for 2 columns"),
        ("a,y\n1,2\n3,4\n", {}, "2 samples are too few to hold out 0.2 of them"),
        ("a,y\n1,2\n", {"validation": 0.6, "test": 0.5}, "leave samples for training"),
    ],
)
def test_what_is_no_table(text, options, message, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(FormatError, match=message) as caught:
        read_data(path, **options)
    assert str(path) in str(caught.value)


def test_a_table_of_many_rows_takes_no_more_memory_than_it_must(tmp_path):
    tracemalloc = pytest.importorskip("tracemalloc")
    count = 100_000
    path = tmp_path / "a.csv"
    path.write_text(
        "a,b,y\n" + "".join(f"{place},{place}.5,{'ox' if place % 3 else 'cow'}\n" for place in range(count))
    )
    tracemalloc.start()
    data = read_data(path, standardise=False, test=0)
    assert tracemalloc.get_traced_memory()[1] < 5 * path.stat().st_size  # lists of cells took 15 times its size
    tracemalloc.stop()
    x = np.concatenate([data.x, data.x_validation])
    np.testing.assert_array_equal(np.sort(x, axis=0), np.arange(count, dtype="float32")[:, None] + np.float32([0, 0.5]))
    np.testing.assert_array_equal(data.y, data.x[:, 0] % 3 != 0)


def test_a_long_label_costs_no_more_than_itself(tmp_path):
    tracemalloc = pytest.importorskip("tracemalloc")
    path = tmp_path / "a.csv"
    path.write_text("a,y\n" + "1,x\n" * 20_000 + f"1,{'y' * 100_000}\n")
    tracemalloc.start()
    read_data(path)
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


def test_arrays_are_checked_like_tables(tmp_path, rng):
    x, y = rng.normal(size=(50, 3)), np.array(["ox", "cow"] * 25)

    def read(**arrays):
        np.savez(tmp_path / "a.npz", **({"x": x, "y": y} | arrays))
        return read_data(tmp_path / "a.npz")

    assert set(read().y) == set(read(y=np.arange(50) % 2.0).y) == {0, 1}
    for name, wrong in (
        ("x", x + 0j), ("x", np.full((50, 3), "2020-01-01", "M8[D]")), ("x", x[:, :0]), ("x", x * np.nan),
        ("x", x - np.inf), ("y", rng.normal(size=50)), ("y", np.full(50, np.nan)),
    ):  # fmt: skip
        with pytest.raises(FormatError, match=rf"a.npz: must be .*{name}.*(real|finite|classes)"):
            read(**{name: wrong})
    np.savez(tmp_path / "b.npz", x=x, y=x[:, 0] * np.nan)
    with pytest.raises(FormatError, match="y must hold finite numbers"):
        read_data(tmp_path / "b.npz", loss="mse")


def test_an_archive_that_unpacks_to_far_more_than_itself(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros((1 << 21, 4)), y=np.zeros(1 << 21, "i1"))
    with pytest.raises(FormatError, match="more than 200 times as large as the file"):
        read_data(tmp_path / "a.npz")
    np.savez_compressed(tmp_path / "b.npz", x=np.zeros((1 << 16, 4)), y=np.zeros(1 << 16, "i1"))
    assert len(read_data(tmp_path / "b.npz").x)


def test_labels_that_number_no_classes(tmp_path):
    (tmp_path / "a.csv").write_text("a,y\n" + "".join(f"{place},{2**40 * (place % 2)}\n" for place in range(40)))
    (record,) = Sweep.grid(read_data(tmp_path / "a.csv"), {"method": ["full"]}).run(tmp_path / "r.jsonl", workers=1)
    assert record["error"] == "the largest label is 1099511627776; labels number the classes from 0: number them anew"


def test_other_files(tmp_path, rng):
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00")
    np.savez(tmp_path / "b.npz", samples=np.zeros((3, 2)))
    parts = {"x": rng.normal(size=(4, 2)), "y": np.zeros(4, int)}
    np.savez(tmp_path / "c.npz", **parts, x_validation=parts["x"], y_validation=parts["y"])
    with pytest.raises(FormatError, match=re.escape(FORMS)):
        read_data(tmp_path / "a.xlsx")
    with pytest.raises(FormatError, match="UTF-8"):
        read_data(tmp_path / "a.csv")
    with pytest.raises(FormatError, match=r"must be an .npz file of x and y, or of x, y, x_validation"):
        read_data(tmp_path / "b.npz")
    for options in ({"test": 0.1}, {"standardise": True}):
        with pytest.raises(FormatError, match="parts of its own is taken as it is"):
            read_data(tmp_path / "c.npz", **options)
    with pytest.raises(FormatError, match="label name columns of a table"):
        read_data(tmp_path / "c.npz", label="y")
    with pytest.raises(FileNotFoundError):
        read_data(tmp_path / "d.csv")
    with pytest.raises(TypeError, match=r"data must have x, y, x_validation.*split_data"):
        Sweep.grid(parts, {"rank": [1]})


TOML = """
[data]
file = "own.csv"
label = "species"
[base]
hidden = [4]
target = "{target}"
[grid]
rank = [1, 2]
seed = [0, 1]
[fixed]
epochs = 2
"""


@pytest.fixture
def folder(tmp_path, rng):
    write_csv(tmp_path / "own.csv", *flowers(rng))
    (tmp_path / "sweep.toml").write_text(TOML.format(target="hidden1"))
    return tmp_path


def invoke(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def test_a_sweep_on_an_own_table(folder):
    result = invoke("sweep", folder / "sweep.toml", "--workers", 1)
    assert result.exit_code == 0, result.output
    records = read_results(folder / "sweep.jsonl")
    assert {record["settings"]["method"] for record in records} == {"lora"}
    assert all(record["status"] == "done" for record in records)


def test_failed_runs_say_why_once_and_end_with_1(folder):
    (folder / "sweep.toml").write_text(TOML.format(target="hiden1"))
    result = invoke("sweep", folder / "sweep.toml", "--workers", 1)
    assert result.exit_code == 1
    reason = "4 runs failed: target 'hiden1' matches none of the layers 'hidden1', 'head'"
    assert result.stdout.count("hiden1") == result.stdout.count(reason) == 1
    quiet = invoke("sweep", folder / "sweep.toml", "--workers", 1, "--quiet")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (1, "", f"{reason}\n")


def without_origin(path):
    """The file as an older nblora wrote it."""
    path.write_text(re.sub(r', "(data|task)": "\w+"', "", path.read_text()))


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("change", ["data", "base"])
def test_results_on_other_data_are_not_mixed(folder, rng, change, old):
    path, results = folder / "sweep.toml", folder / "sweep.jsonl"
    arguments = ["sweep", path, "--workers", 1]
    assert invoke(*arguments).exit_code == 0
    before = results.read_text()
    if old:
        without_origin(results)
        assert '"task"' not in results.read_text()
    assert invoke(*arguments).exit_code == 0  # the same data: nothing to do
    assert invoke("compare", results).exit_code == 0
    if change == "data":
        write_csv(folder / "own.csv", *flowers(rng))
    else:
        path.write_text(TOML.format(target="h*1").replace("[4]", "[5]"))
    refused = invoke(*arguments)
    assert refused.exit_code == 2
    assert "do not belong in one file" in refused.stderr
    assert invoke(*arguments, "--results", folder / "other.jsonl").exit_code == 0
    mixed = folder / "mixed.jsonl"
    mixed.write_text(results.read_text() + (folder / "other.jsonl").read_text())
    for command in ("compare", "plot"):
        result = invoke(command, mixed)
        assert result.exit_code == 2
        assert ("different data" if (change, old) == ("data", False) else "do not belong") in result.stderr
    assert len(before.splitlines()) == 4
