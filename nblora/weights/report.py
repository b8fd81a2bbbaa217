"""What a merge did, tensor by tensor, as numbers, a table and JSON."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from nblora.kernels.weights.codes import BASE, CHANGE, LOST, NOT_FINITE
from nblora.weights.stream import Change


@dataclass(frozen=True)
class TensorReport:
    """What happened to one tensor.

    Attributes
    ----------
    name, dtype : str
        Dtype of the output.
    shape : tuple of int
    change_norm : float
        Frobenius norm of the change, before rounding.
    base_norm : float
        Frobenius norm of what the checkpoint held.
    share : float
        change_norm / base_norm; infinite for a base of zeros.
    lost_fraction : float
        Fraction of all entries whose change is not zero but vanished when the result was rounded.
    not_finite : int
        Infinities and NaN in the result.
    adapters : list of str
        The adapters that changed it.
    tied : list of str
        Other names of the same weight.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    change_norm: float
    base_norm: float
    share: float
    lost_fraction: float
    not_finite: int
    adapters: list[str] = field(default_factory=list)
    tied: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls, name: str, dtype: str, shape: tuple[int, ...], change: Change, adapters: list[str], tied: list[str]
    ) -> "TensorReport":
        """Sum up a measured change."""
        change_norm, base_norm = (math.sqrt(change.squares[at]) for at in (CHANGE, BASE))
        share = change_norm / base_norm if base_norm else (math.inf if change_norm else 0.0)
        lost = int(change.counts[LOST]) / max(math.prod(shape), 1)
        return cls(
            name, dtype, shape, change_norm, base_norm, share, lost, int(change.counts[NOT_FINITE]), adapters, tied
        )


@dataclass
class MergeReport:
    """The result of `merge` or `unmerge`.

    Attributes
    ----------
    output : str
    tensors : list of TensorReport
        Those that adapters changed.
    copied : int
        Number of the other tensors.
    nbytes : int
        Bytes of the output.
    seconds : float
    dry_run : bool
        Whether nothing was written; then the norms are not known (NaN).
    warnings : list of str
    exact : bool or None
        After `unmerge`: whether the base came back bit for bit.
    restored : list of str
        Tensors that came back from the originals.
    off_by, off_by_rms : float or None
        After a subtraction: a bound on the distance of any entry from the base's, and what to expect of it in the mean
        square; both assume that the merge rounded every entry once.
    """

    output: str
    tensors: list[TensorReport]
    copied: int
    nbytes: int
    seconds: float = 0.0
    dry_run: bool = False
    warnings: list[str] = field(default_factory=list)
    exact: bool | None = None
    restored: list[str] = field(default_factory=list)
    off_by: float | None = None
    off_by_rms: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON can hold it: numbers that are not finite become None."""
        return plain(asdict(self))

    def table(self) -> str:
        """Return the report as text, a line for every changed tensor."""
        width = max([len(tensor.name) for tensor in self.tensors] + [6])
        lines = [f"{'tensor':<{width}}  {'dtype':>5}  {'change':>10}  {'share':>9}  {'lost':>7}  not finite"]
        for tensor in self.tensors:
            lines.append(
                f"{tensor.name:<{width}}  {tensor.dtype:>5}  {tensor.change_norm:>10.4g}  {tensor.share:>9.3%}  "
                f"{tensor.lost_fraction:>7.2%}  {tensor.not_finite}"
            )
        if self.exact:
            lines = [f"{len(self.restored)} tensors restored bit for bit from the originals"]
        if self.off_by is not None:
            lines.append(f"off by at most {self.off_by:.3g} an entry, {self.off_by_rms:.3g} in the mean square")
        verb = "would be changed" if self.dry_run else "changed"
        lines.append(
            f"{len(self.tensors)} tensors {verb}, {self.copied} copied, {self.nbytes} bytes in {self.seconds:.2f} s"
        )
        return "\n".join(lines)


def plain(value: Any) -> Any:
    """Return a report as JSON can hold it: tuples become lists, numbers that are not finite None."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
