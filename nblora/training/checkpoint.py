"""The state of a run as a file: what was trained, a digest of what was not, and how the run goes on."""

import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from nblora import checks
from nblora.layers import Layer, tree
from nblora.layers.saving import FROZEN, check_same_base
from nblora.storage.checkpoint import read_checkpoint, take_tensor, write_checkpoint

from .calibration import Bound
from .callbacks import Callback
from .history import Row
from .sinks import Trained
from .step import Step

# Names of a run's tensors begin with a word that no parameter's name begins with: layers' names have no dots.
_SLOT, _CALLBACK = "fit.:slot.", "fit.:callback."


class RunState(NamedTuple):
    """What a checkpoint holds beside what was trained: all that decides how the run goes on.

    `frozen` has a digest of each parameter that is not trained; `first_loss` is that of the run's first batch; `within`
    counts the updates of an epoch that is not whole, whose order is drawn from `shuffle` again; `sums` are those of a
    row of the history that is not whole.
    """

    epoch: int
    step: int
    shuffle: dict[str, Any] | None
    rows: list[Row]
    frozen: dict[str, str]
    first_loss: float
    within: int = 0
    sums: Row = {}  # noqa: RUF012 - never changed


def write_run(
    path: str | os.PathLike[str], model: Layer, step: Step, callbacks: list[Callback], state: RunState
) -> None:
    """Write what was trained, optimiser, callbacks and random states to one file, atomically."""
    tensors = {named.name: model._logical_copy(named.parameter) for named in tree.changing(model)}
    for trained in step.trained:
        for slot, array in zip(step.optimizer.slots, trained.slots, strict=True):
            tensors[f"{_SLOT}{slot}.{trained.name}"] = model._logical_copy(trained.parameter, array)
    kept = []
    for place, callback in enumerate(callbacks):
        held = callback.state_dict()
        arrays = {name: value for name, value in held.items() if isinstance(value, np.ndarray)}
        tensors.update({f"{_CALLBACK}{place}.{name}": array for name, array in arrays.items()})
        plain = {name: value for name, value in held.items() if name not in arrays}
        kept.append({"kind": type(callback).__name__, "state": plain})
    run = {
        "epoch": state.epoch,
        "step": state.step,
        "optimizer": type(step.optimizer).__name__,
        "shuffle": state.shuffle,
        "random_states": {name: g.bit_generator.state for name, g in tree.generators(model).items()},
        "callbacks": kept,
        "first_loss": state.first_loss if math.isfinite(state.first_loss) else None,
        "delta_lr": step.delta_rates if step.calibrates else {},
        "delta_bound": None if step.delta_bound is None else step.delta_bound._asdict(),
        "rows": state.rows,
        "within": state.within,
        "sums": state.sums,
    }
    write_checkpoint(path, type(model).__name__, {**model._config(), "fit": run, FROZEN: state.frozen}, tensors)


def read_run(path: str | os.PathLike[str], model: Layer, step: Step, callbacks: list[Callback]) -> RunState:
    """Bring model, optimiser and callbacks to the state in the file, and return the run's.

    Raises
    ------
    FormatError
        For a broken file, one without a run's state, and one of another model or optimiser. The model is unchanged.
    """

    def build(kind: str, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> tuple[RunState, Callable[[], None]]:
        if "fit" not in config:
            raise ValueError("holds a model but no state of a run: resume needs what fit(checkpoint=...) wrote")
        run, frozen = config.pop("fit"), config.pop(FROZEN, {})
        _check_same_model(model, kind, config)
        if frozen:  # files of before have the frozen values themselves
            check_same_base(model, frozen)
        actions = [*_model_actions(model, run, tensors), *_slot_actions(step, run, tensors)]
        state = RunState(
            checks.check_integer("epoch", run["epoch"], 0),
            checks.check_integer("step", run["step"], 1),
            None if run["shuffle"] is None else _checked_state(run["shuffle"]),
            [_checked_row(row) for row in run["rows"]],
            frozen,
            math.inf if run.get("first_loss") is None else checks.check_not_negative("first_loss", run["first_loss"]),
            checks.check_integer("within", run.get("within", 0), 0),  # files of before have none
            _checked_row(run.get("sums", {})),
        )
        rates = {
            name: checks.check_not_negative(f"delta_lr[{name!r}]", rate)
            for name, rate in run.get("delta_lr", {}).items()  # files of before have none
        }
        held = run.get("delta_bound")  # files of before have none
        bound = (
            None
            if held is None
            else Bound(*(checks.check_number(f"delta_bound[{name!r}]", held[name]) for name in Bound._fields))
        )
        _load_callbacks(callbacks, run["callbacks"], tensors)

        def apply() -> None:
            step.take_delta_rates(rates, bound)
            for action in actions:
                action()

        return state, apply

    state, apply = read_checkpoint(path, build)
    apply()
    step.count = state.step
    return state


def _model_actions(model: Layer, run: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> list[Callable[[], None]]:
    changing = {named.name for named in tree.changing(model)}
    values = {}
    for name, parameter, _ in model._parameters():
        if name in changing:
            values[name] = take_tensor(tensors, name, model.dtype, parameter.shape)
        elif name in tensors and not np.array_equal(tensors[name], model.get_parameter(name), equal_nan=True):
            raise ValueError(f"the frozen parameter {name!r} has other values than the model's")
    actions = [_setter(model, values)]
    for name, generator in tree.generators(model).items():
        actions.append(_state_setter(generator, _checked_state(run["random_states"][name])))
    return actions


def _slot_actions(step: Step, run: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> list[Callable[[], None]]:
    kind = type(step.optimizer).__name__
    if run["optimizer"] != kind:
        raise ValueError(f"the run was made with the optimizer {run['optimizer']}, not {kind}")
    actions = []
    for trained in step.trained:
        for slot, array in zip(step.optimizer.slots, trained.slots, strict=True):
            name = f"{_SLOT}{slot}.{trained.name}"
            value = take_tensor(tensors, name, array.dtype, trained.parameter.shape)
            actions.append(_slot_setter(trained, array, value))
    return actions


def _load_callbacks(callbacks: list[Callback], kept: list[Any], tensors: Mapping[str, np.ndarray]) -> None:
    """Give each callback the state of the first callback of its kind that no other has taken."""
    free = list(enumerate(kept))
    for callback in callbacks:
        for entry in free:
            place, held = entry
            if held["kind"] == type(callback).__name__:
                prefix = f"{_CALLBACK}{place}."
                arrays = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
                callback.load_state_dict({**held["state"], **arrays})
                free.remove(entry)
                break


def _check_same_model(model: Layer, kind: str, config: Mapping[str, Any]) -> None:
    if kind != type(model).__name__:
        raise ValueError(f"the run trained a {kind}, not a {type(model).__name__}")
    difference = _difference(config, model._config(), "")
    if difference:
        raise ValueError(f"the run's model is another than the one given: {difference}")


def _difference(saved: Any, own: Any, path: str) -> str:
    """Describe the first setting in which two configurations differ; modes and random states are no settings."""
    if isinstance(saved, Mapping) and isinstance(own, Mapping):
        names = [name for name in {**own, **saved} if name not in ("training", "random_state")]
        pairs = [(saved.get(name), own.get(name), f"{path}.{name}" if path else str(name)) for name in names]
    elif isinstance(saved, list) and isinstance(own, list) and len(saved) == len(own):
        pairs = [(a, b, f"{path}[{place}]") for place, (a, b) in enumerate(zip(saved, own, strict=True))]
    else:
        return "" if saved == own else f"{path} was {saved!r} and is {own!r}"
    return next((found for pair in pairs if (found := _difference(*pair))), "")


def _checked_state(state: Any) -> dict[str, Any]:
    np.random.PCG64(0).state = state
    return dict(state)


def _checked_row(row: Any) -> Row:
    return {str(name): number for name, number in row.items() if checks.check_number(name, number) is not None}


def _setter(model: Layer, values: Mapping[str, np.ndarray]) -> Callable[[], None]:
    return lambda: model._assign(values)


def _state_setter(generator: np.random.Generator, state: dict[str, Any]) -> Callable[[], None]:
    def act() -> None:
        generator.bit_generator.state = state

    return act


def _slot_setter(trained: Trained, array: Any, value: np.ndarray) -> Callable[[], None]:
    def act() -> None:
        array[...] = value.T if trained.parameter.transposed else value

    return act
