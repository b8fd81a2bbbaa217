"""From a sweep's records to what is asked of them: averages over seeds, and the best setting of each method."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .sweep import sign

Record = Mapping[str, Any]

MANY_REASONS = 5  # lines about runs that failed


def default_metric(records: Iterable[Record], split: str = "val") -> str:
    """Return the accuracy of a split where the records have one, else its loss; ValueError where no run has ended well.

    `split` is "val" or "test"; without test results "test" means "val".
    """
    metrics = next((record["metrics"] for record in records if record["status"] == "done"), None)
    if metrics is None:
        raise ValueError("no run of this sweep has ended well, so there is nothing to summarise")
    names = [f"{split}_accuracy", f"{split}_loss", "val_accuracy", "val_loss"]
    found = next((name for name in names if name in metrics), None)
    if found is None:
        raise ValueError(
            f"the runs of this sweep have no {' or '.join(names)}, but {', '.join(metrics)}: name a metric"
        )
    return found


def label(settings: Mapping[str, Any], varied: Sequence[str]) -> str:
    """Return the values of the varied settings as text."""
    return ", ".join(f"{name} {settings[name]}" for name in varied if name in settings)


def varied_settings(records: Iterable[Record]) -> list[str]:
    """Return the names of the settings that differ between runs, without the seed."""
    values: dict[str, set[str]] = {}
    for record in records:
        for name, value in record["settings"].items():
            values.setdefault(name, set()).add(json.dumps(value))
    return [name for name, found in values.items() if name != "seed" and len(found) > 1]


def over_seeds(records: Iterable[Record], metric: str) -> list[tuple[dict[str, Any], dict[Any, float]]]:
    """Return pairs of settings, without the seed, and {seed: value}, the best mean first; without diverged runs."""
    groups: dict[str, tuple[dict[str, Any], dict[Any, float]]] = {}
    for record in records:
        if record["status"] != "done" or metric not in record["metrics"]:
            continue
        settings = {name: value for name, value in record["settings"].items() if name != "seed"}
        group = groups.setdefault(json.dumps(settings, sort_keys=True), (settings, {}))
        group[1][record["settings"]["seed"]] = record["metrics"][metric]
    return sorted(groups.values(), key=lambda group: -sign(metric) * float(np.mean(list(group[1].values()))))


def best_of_each_method(
    records: Sequence[Record], choose_by: str, report: str
) -> dict[str, tuple[dict[str, Any], dict[Any, float]]]:
    """Return for each method the settings with the best mean of `choose_by`, and their {seed: value} of `report`."""
    reported = {json.dumps(settings, sort_keys=True): values for settings, values in over_seeds(records, report)}
    found: dict[str, tuple[dict[str, Any], dict[Any, float]]] = {}
    for settings, _ in over_seeds(records, choose_by):
        found.setdefault(settings["method"], (settings, reported[json.dumps(settings, sort_keys=True)]))
    return found


def text_table(records: Sequence[Record], metric: str, rows: int = 10) -> str:
    """Return the best settings, averaged over seeds, as text."""
    groups, varied = over_seeds(records, metric), varied_settings(records)
    lines = [f"{metric}, mean ± std over seeds ({len(groups)} settings, best first)"]
    for settings, by_seed in groups[:rows]:
        values = np.array(list(by_seed.values()))
        spread = f" ± {values.std(ddof=1):.4f}" if len(values) > 1 else ""
        lines.append(f"  {values.mean():.4f}{spread}  n={len(values)}  {label(settings, varied) or settings['method']}")
    diverged = sum(record["status"] == "diverged" for record in records)
    if diverged:
        lines.append(f"  {diverged} runs diverged")
    return "\n".join([*lines, *(f"  {line}" for line in failures(records))])


def failures(records: Iterable[Record]) -> list[str]:
    """Return one line for each reason why runs failed, the most frequent first, with how many it ended."""
    reasons = Counter(record.get("error", "no reason recorded") for record in records if record["status"] == "failed")
    lines = [f"{count} runs failed: {reason}" for reason, count in reasons.most_common(MANY_REASONS)]
    others = sum(count for _, count in reasons.most_common()[MANY_REASONS:])
    return lines + ([f"{others} runs failed for other reasons"] if others else [])
