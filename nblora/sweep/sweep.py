"""`Sweep`: the same task with many settings, each combination run once, however often the sweep is started."""

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np

from nblora import checks
from nblora.layers import Layer
from nblora.training.fit import check_model
from nblora.training.losses import as_loss

from .engines import dask_client, run_here, run_in_processes, run_on_dask
from .space import Settings, draw_random, expand_grid, run_key
from .store import ResultsFile, check_origin
from .task import DEFAULT_LOSS, Data, Records, Task
from .texts import TextTask, make_task

if TYPE_CHECKING:
    from distributed import Client

LARGER_IS_BETTER = ("accuracy",)


class Sweep:
    """A search over methods, ranks, learning rates, seeds and so on, on one task.

    Parameters
    ----------
    data : Data, or mapping with the names of its fields
        `x`, `y`, `x_validation`, `y_validation` and, if wanted, `x_test`, `y_test`. `read_data` and `split_data` make
        it of a file, and of samples that are not split yet.
    runs : list of dict
        The settings of each run: what `grid` and `random` make.
    base : Layer or path, optional
        The pretrained model; every run adapts a clone. Without it each run draws a network from its own seed. A path is
        that of a pretrained model of text: `x` are then texts, `y` labels of any type, and a run is a
        `nblora.estimators.TextClassifier`'s (extras `sklearn` and `text`).
    hidden : sequence of int
        Widths of the hidden layers of that network.
    loss : {"cross_entropy", "mse", "binary_cross_entropy"}
    target, modules_to_save
        Which layers are adapted, and which are trained as they are: as in `Sequential.adapt`. On texts "*" is every
        linear layer, and the head is what is trained as it is.
    max_length : int or None
        Tokens that texts are cut at.
    metric : str, optional
        What `best` and the progress bar go by: "val_accuracy" or "val_loss", by default the first that there is.
    threads : int
        Of each run. With one, the results are the same bit for bit wherever the runs are executed.

    Examples
    --------
    >>> import numpy as np
    >>> from nblora.sweep import Sweep
    >>> x = np.random.default_rng(0).normal(size=(60, 4)).astype("float32")
    >>> y = (x.sum(1) > 0).astype(int)
    >>> data = {"x": x[:40], "y": y[:40], "x_validation": x[40:], "y_validation": y[40:]}
    >>> sweep = Sweep.grid(data, {"method": ["lora", "delta"], "rank": [1, 2], "seed": [0, 1]}, {"epochs": 2})
    >>> len(sweep.runs)
    8
    """

    def __init__(
        self,
        data: Data | Mapping[str, Any],
        runs: Sequence[Settings],
        *,
        base: Layer | str | os.PathLike[str] | None = None,
        hidden: Sequence[int] = (32,),
        loss: str = DEFAULT_LOSS,
        target: Any = "*",
        modules_to_save: Any = None,
        max_length: int | None = 256,
        metric: str | None = None,
        threads: int = 1,
    ) -> None:
        if not runs:
            raise ValueError("runs must not be empty: give at least one combination of settings")
        checked = data if isinstance(data, Data) else _as_data(data)
        threads = checks.check_integer("threads", threads, 1)
        if isinstance(base, str | os.PathLike):
            if modules_to_save is not None or loss != DEFAULT_LOSS:
                raise ValueError("on texts the head is trained, by cross_entropy: leave out modules_to_save and loss")
            texts = make_task(checked, base, "all-linear" if target == "*" else target, max_length, threads)
            texts.check(runs)
            self.task: Task | TextTask = texts
        else:
            self.task = _task_of_arrays(checked, base, hidden, loss, target, modules_to_save, threads)
        names = [f"val_{name}" for name in (*as_loss(loss).metrics, "loss")]
        self.metric = checks.check_choice("metric", metric or names[0], names)
        digest = self.task.digest()
        self._origin = {"data": self.task.data_digest(), "task": digest}
        self.runs = {run_key(settings, digest): dict(settings) for settings in runs}

    @classmethod
    def grid(
        cls,
        data: Data | Mapping[str, Any],
        grid: Mapping[str, Any],
        fixed: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> "Sweep":
        """Make a sweep over every combination of `grid`'s lists, with `fixed` settings for all; see `Sweep`."""
        return cls(data, expand_grid(grid, fixed), **options)

    @classmethod
    def random(
        cls,
        data: Data | Mapping[str, Any],
        space: Mapping[str, Any],
        runs: int,
        fixed: Mapping[str, Any] | None = None,
        *,
        draw_seed: int = 0,
        **options: Any,
    ) -> "Sweep":
        """Make a sweep over `runs` random combinations, each with every seed of `space`; see `Sweep`.

        `space` maps settings to lists, or to ranges such as `{"low": 1e-4, "high": 1e-2, "scale": "log"}`.
        """
        return cls(data, draw_random(space, runs, draw_seed, fixed), **options)

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str], *, threads: int | None = None) -> "Sweep":
        """Make the sweep that a TOML file describes; docs/sweeps.md shows one."""
        from .specification import named, read_specification

        options = read_specification(path)
        with named(path):
            return cls(**options if threads is None else options | {"threads": threads})

    def run(
        self,
        results: str | os.PathLike[str],
        *,
        workers: int | None = None,
        scheduler: str | None = None,
        cluster: str | None = None,
        client: "Client | None" = None,
        progress: bool | None = None,
    ) -> list[dict[str, Any]]:
        """Execute the runs that the results file does not hold yet, and return the records of all.

        Parameters
        ----------
        results : path
            Each run's record is added to this file when the run ends, one line of JSON. A sweep that was killed goes
            on from it: start it again with the same file. Runs on other data, or of another base, target or loss, are
            another sweep, with a file of its own.
        workers : int, optional
            Processes of this machine, by default as many as its cores allow; 1 executes in this process. A script that
            uses more needs `if __name__ == "__main__":`, as with Python's multiprocessing.
        scheduler : str, optional
            Address of a Dask scheduler, such as "tcp://10.0.0.1:8786".
        cluster : {"dask"}, optional
            Start a Dask cluster of `workers` processes on this machine.
        client : distributed.Client, optional
            One that you have.
        progress : bool, optional
            Show a bar with the best result so far; by default where standard error is a terminal.

        Returns
        -------
        list of dict
            In the order of `runs`. `status` is "done", "diverged" (the loss stopped being finite) or "failed".

        Raises
        ------
        FormatError
            For a results file that holds something else, or results of another sweep.
        NbloraError
            While another sweep writes to the file.
        MissingExtraError
            For a Dask sweep without Dask.
        """
        if sum(option is not None for option in (scheduler, cluster, client)) > 1:
            raise ValueError("scheduler, cluster and client exclude each other: give one of them")
        if cluster is not None:
            checks.check_choice("cluster", cluster, ("dask",))
        count = default_workers(self.task.threads) if workers is None else checks.check_integer("workers", workers, 1)
        with ResultsFile(results) as file, contextlib.ExitStack() as stack:
            check_origin([*file.records.values(), self._origin], os.fspath(results))
            waiting = {key: settings for key, settings in self.runs.items() if not file.is_finished(key)}
            if not waiting:
                return self._select(file)
            if scheduler is not None or cluster is not None:
                client = stack.enter_context(dask_client(scheduler, count, self.task.threads))
            if client is not None:
                ended = run_on_dask(self.task, waiting, client)
            else:
                ended = run_here(self.task, waiting) if count == 1 else run_in_processes(self.task, waiting, count)
            self._collect(ended, file, progress)
            return self._select(file)

    def _collect(self, ended: Records, file: ResultsFile, progress: bool | None) -> None:
        from tqdm import tqdm

        done = [record for key, record in file.records.items() if key in self.runs and file.is_finished(key)]
        # disable=None: silent where standard error is no terminal
        off = None if progress is None else not progress
        with tqdm(total=len(self.runs), initial=len(done), unit="run", disable=off, dynamic_ncols=True) as bar:
            for record in ended:
                file.append(record | self._origin)
                done.append(record)
                best = self.best(done)
                if best is not None:
                    bar.set_postfix_str(f"best {self.metric} {best['metrics'][self.metric]:.4g}")
                bar.update()

    def _select(self, file: ResultsFile) -> list[dict[str, Any]]:
        return [file.records[key] for key in self.runs]

    def best(self, records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
        """Return the record with the best `metric`, the first of equals; None where no run has ended well.

        It is the luckiest seed's: `summarise` averages over seeds.
        """
        return best_record(records, self.metric)


def _task_of_arrays(
    data: Data, base: Any, hidden: Any, loss: str, target: Any, modules_to_save: Any, threads: int
) -> Task:
    if base is not None:
        check_model(base)
    arrays: dict[str, Any] = {name: v if v is None else np.asarray(v) for name, v in vars(data).items()}
    if isinstance(hidden, str) or not isinstance(hidden, Iterable):
        raise TypeError(f"hidden must be a list of widths, got {hidden!r}")
    widths = tuple(checks.check_integer("hidden", width, 1) for width in hidden)
    return Task(Data(**arrays), base, widths, loss, target, modules_to_save, threads)


def _as_data(parts: Mapping[str, Any]) -> Data:
    known = {field.name for field in fields(Data)}
    missing = [name for name in ("x", "y", "x_validation", "y_validation") if name not in parts]
    if missing or not known.issuperset(parts):
        raise TypeError(
            f"data must have x, y, x_validation, y_validation and perhaps x_test, y_test, got "
            f"{', '.join(parts) or 'nothing'}: split_data(x, y) makes the parts of samples that are not split"
        )
    return Data(**parts)


def best_record(records: Sequence[Mapping[str, Any]], metric: str) -> Mapping[str, Any] | None:
    """Return the record of the best run by `metric`: the largest accuracy or the smallest loss."""
    ended = [record for record in records if record["status"] == "done"]
    return max(ended, key=lambda record: sign(metric) * record["metrics"][metric], default=None)


def sign(metric: str) -> int:
    """1 where more is better, -1 where less is."""
    return 1 if metric.rpartition("_")[2] in LARGER_IS_BETTER else -1


def default_workers(threads: int) -> int:
    """As many runs at a time as the cores that this process may use, at `threads` each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // threads)
