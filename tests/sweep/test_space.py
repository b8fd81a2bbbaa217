import json

import numpy as np
import pytest

from nblora.sweep import draw_random, expand_grid
from nblora.sweep.space import run_key


def test_grid_is_every_combination():
    runs = expand_grid({"rank": [1, 2], "lr": [0.1, 0.2, 0.3]}, {"method": "lora", "seed": 4})
    assert len(runs) == 6
    assert {(run["rank"], run["lr"]) for run in runs} == {(r, lr) for r in (1, 2) for lr in (0.1, 0.2, 0.3)}
    assert all(run["method"] == "lora" and run["seed"] == 4 for run in runs)


def test_settings_that_a_method_does_not_use_make_no_runs():
    grid = {"method": ["head", "lora", "delta", "full"], "rank": [1, 2], "delta_scaling": [0.1, 0.2, 0.5]}
    runs = expand_grid(grid)
    counts = {method: sum(run["method"] == method for run in runs) for method in grid["method"]}
    assert counts == {"head": 1, "lora": 2, "delta": 6, "full": 1}
    assert not any("rank" in run for run in runs if run["method"] in ("head", "full"))
    assert not any("delta_scaling" in run for run in runs if run["method"] != "delta")
    assert "weight_decay" not in expand_grid({"optimizer": ["sgd"]}, {"rank": 1, "weight_decay": 0.1})[0]


def test_random_draws_repeat_and_stay_in_range():
    space = {
        "method": ["delta"],
        "rank": {"low": 1, "high": 4},
        "lr": {"low": 1e-4, "high": 1e-1, "scale": "log"},
        "delta_scaling": {"low": 0.1, "high": 0.5},
        "seed": [0, 1, 2],
    }
    runs = draw_random(space, 20, seed=3)
    assert runs == draw_random(space, 20, seed=3)
    assert runs != draw_random(space, 20, seed=4)
    assert len(runs) == 60
    assert {run["rank"] for run in runs} == {1, 2, 3, 4}
    assert all(1e-4 <= run["lr"] <= 1e-1 and 0.1 <= run["delta_scaling"] <= 0.5 for run in runs)
    assert sum(run["lr"] < 3e-3 for run in runs) > 15  # half of a logarithmic range is below its middle
    without = [{name: value for name, value in run.items() if name != "seed"} for run in runs[:3]]
    assert without[0] == without[1] == without[2]


def test_a_whole_logarithmic_range_draws_integers():
    runs = draw_random({"batch_size": {"low": 8, "high": 128, "scale": "log"}}, 5, fixed={"method": "full"})
    assert all(isinstance(run["batch_size"], int) and 8 <= run["batch_size"] <= 128 for run in runs)


def test_key_depends_on_settings_and_task_and_survives_json():
    settings = expand_grid({"lr": [0.1], "rank": [np.int64(2)]})[0]
    key = run_key(settings, "task")
    assert key == run_key(json.loads(json.dumps(dict(reversed(settings.items())))), "task")
    assert key != run_key(settings | {"lr": 0.2}, "task")
    assert key != run_key(settings, "another")


@pytest.mark.parametrize(
    ("grid", "fixed", "error", "message"),
    [
        ({"ranks": [1]}, {}, ValueError, "unknown setting 'ranks'"),
        ({"rank": 1}, {}, TypeError, r"grid\['rank'\] must be a list"),
        ({"rank": []}, {}, TypeError, "at least one value"),
        ({"rank": "12"}, {}, TypeError, "must be a list"),
        ({"rank": [1]}, {"rank": 2}, ValueError, "give it once"),
        ({"method": ["lora"]}, {}, ValueError, "rank must be given"),
        ({"method": ["prefix"]}, {}, ValueError, "method must be one of"),
        ({"rank": [1], "lr": [float("nan")]}, {}, ValueError, "lr must be finite"),
        ({"rank": [[1]]}, {}, TypeError, "rank must be a number"),
    ],
)
def test_bad_grids(grid, fixed, error, message):
    with pytest.raises(error, match=message):
        expand_grid(grid, fixed)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"low": 1}, "low, high"),
        ({"low": 2.0, "high": 1.0}, "low < high"),
        ({"low": 0.0, "high": 1.0, "scale": "log"}, "both positive"),
        ({"low": 1.0, "high": 2.0, "scale": "square"}, "scale must be one of"),
    ],
)
def test_bad_ranges(entry, message):
    with pytest.raises(ValueError, match=message):
        draw_random({"lr": entry}, 3, fixed={"rank": 1})
