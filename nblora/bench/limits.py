"""How fast a case could run on this machine: the cost model, and the fraction of it that was reached."""

from typing import NamedTuple

from .cases import Case

# Flops for each sample and each element of weight and factors, and sweeps over weight-sized arrays. A step: three
# products; read W and D forward, read W, read and write D and V backward. Without the delta: two products, W twice.
FLOPS = {"step": 6, "forward": 2, "lora-step": 4}
SWEEPS = {"step": 7, "forward": 2, "lora-step": 2}


class Machine(NamedTuple):
    """What was measured of the machine, for one dtype and number of threads.

    `flops`: the best rate of a plain matrix product, in flop/s, and who reached it; `bandwidth`: of a parallel copy
    of arrays far larger than any cache, in bytes read plus bytes written a second.
    """

    flops: float
    bandwidth: float
    flops_by: str = ""
    bandwidth_by: str = ""

    def best(self, other: "Machine") -> "Machine":
        """Take the better of two measurements, figure by figure: a limit is what is possible."""
        flops = max((self.flops, self.flops_by), (other.flops, other.flops_by))
        bandwidth = max((self.bandwidth, self.bandwidth_by), (other.bandwidth, other.bandwidth_by))
        return Machine(flops[0], bandwidth[0], flops[1], bandwidth[1])


def limit_seconds(case: Case, machine: Machine) -> float:
    """The least time the case can take where its matrices come from memory: the longer of products and sweeps.

        limit(N) = max( 6 N (in out + rank (in + out)) / P ,  7 in out itemsize / BW )

    with 2 N and 2 sweeps for a forward, 4 N and 2 sweeps for a step without the delta. Matrices that stay in cache
    can be swept faster than that, so small cases may reach more than 1.
    """
    elements = case.in_features * case.out_features
    factors = case.rank * (case.in_features + case.out_features)
    products = FLOPS[case.kind] * case.n * (elements + factors) / machine.flops
    return max(products, SWEEPS[case.kind] * elements * case.itemsize / machine.bandwidth)
