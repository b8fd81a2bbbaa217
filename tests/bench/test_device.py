"""`nblora bench --device cuda` without a GPU: clock, peers, runner and dry run, on stand-ins and on the simulator."""

import json
import sys

import pytest
from click.testing import CliRunner

from nblora import devices
from nblora.bench import rehearsal
from nblora.bench.cases import CHECKED_LR, DTYPES, KINDS, LAYOUTS, Case, faults, make_arrays, reference
from nblora.bench.peers import PEERS, PeerSpec, peers_of
from nblora.bench.peers.clock import event_clock
from nblora.bench.peers.worker import Driver, Refusal
from nblora.bench.process import DeviceMissingError, Worker
from nblora.bench.runner import Bench, Effort, run_cases
from nblora.bench.sections import growth_curves, startup
from nblora.bench.suites import Group, chosen, default, full, on_device, quick
from nblora.cli import bench, main

LITTLE = Effort(rounds=3, burst=0.002, warm=0.005, rates=0.001)
without_gpu = pytest.mark.skipif(any(n.startswith("cuda") for n in devices()), reason="needs a machine without a GPU")

# CuPy's face on NumPy's arrays. Its clock ticks with the work that was queued, however long the host takes.
CUPY = """
import sys
import types
import numpy as np
from numpy import asarray, empty_like

rates = sys.modules.get("nblora_peers.rates")
if rates:  # in a peer's process
    rates.SIZES["cuda"] = (32, 64), 2**16
ticks = [0.0]
used = []
asnumpy = np.array


class Event:
    def record(self):
        ticks[0] += 0.5  # a call takes some time
        self.at = ticks[0]
    def synchronize(self): assert self.at == ticks[0], "only the last event is waited for"


class Device:
    def __init__(self, index): self.index = index
    def use(self): used.append(self.index)


def matmul(a, b, out):
    ticks[0] += 4.0
    return np.matmul(a, b, out)


def copyto(target, source):
    ticks[0] += 0.5
    np.copyto(target, source)


class CUDARuntimeError(RuntimeError):
    pass


def get_elapsed_time(begin, end):
    return end.at - begin.at


count = 1


def getDeviceCount():
    if count < 0:
        raise CUDARuntimeError("no driver")
    return count


runtime = types.SimpleNamespace(getDeviceCount=getDeviceCount, CUDARuntimeError=CUDARuntimeError)
cuda = types.SimpleNamespace(Event=Event, Device=Device, get_elapsed_time=get_elapsed_time, runtime=runtime)
"""
TICKING = """
import cupy
from nblora_peers.cupy_peer import CupyPeer

class Ticking(CupyPeer):
    def step(self, lr):
        super().step(lr)
        cupy.ticks[0] += 2.0
"""


@pytest.fixture
def cupy(tmp_path):
    """The folder of a module `cupy` that is NumPy, and of a peer whose step takes 2 ms of its clock."""
    (tmp_path / "cupy.py").write_text(CUPY)
    (tmp_path / "ticking.py").write_text(TICKING)
    return tmp_path


@pytest.fixture
def cupy_driver(cupy, monkeypatch):
    """CuPy's peer in this process."""
    monkeypatch.syspath_prepend(str(cupy))
    for name in ("cupy", "nblora.bench.peers.cupy_peer"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield Driver(PEERS["cupy"].module, PEERS["cupy"].cls)
    for name in ("cupy", "nblora.bench.peers.cupy_peer"):
        sys.modules.pop(name, None)


# --- the clock ---------------------------------------------------------------------------------------------------


def test_events_lie_between_the_calls_and_the_host_waits_once():
    said = []

    class Event:
        def __init__(self):
            said.append("event")

        def record(self):
            said.append("record")
            self.at = said.count("call")

        def synchronize(self):
            said.append("wait")

    clock = event_clock(Event, lambda begin, end: 1000.0 * (end.at - begin.at) + end.at)
    assert clock(lambda: said.append("call"), 3) == pytest.approx([1.001, 1.002, 1.003])
    assert said == ["event"] * 4 + ["record"] + ["call", "record"] * 3 + ["wait"]


# --- peers -------------------------------------------------------------------------------------------------------


def test_peers_of_a_device():
    assert list(peers_of("cuda:1")) == ["nblora", "torch-eager", "torch-manual", "torch-compile", "cupy"]
    assert "cupy" not in peers_of("cpu")
    assert {"numpy", "peft", "jax"} <= set(peers_of("cpu"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cupys_formulas_are_the_reference(cupy_driver, kind, layout, dtype):
    case = Case(kind, 9, 24, 20, 4, dtype, layout, device="cuda:2")
    arrays = make_arrays(case)
    cupy_driver.start("cuda:2")
    cupy_driver.set_up(case.settings(), dict(arrays))
    assert sys.modules["cupy"].used[-1] == 2
    assert faults(case, arrays, reference(case, arrays), cupy_driver.check(CHECKED_LR)) == []


def test_cupy_says_what_it_lacks(cupy_driver):
    with pytest.raises(Refusal, match="no CPU"):
        cupy_driver.start()
    for count, words in ((0, "no CUDA device"), (-1, "no driver")):
        sys.modules["cupy"].count = count
        with pytest.raises(Refusal, match=words):
            cupy_driver.start("cuda")


def test_a_peer_without_the_device_is_told_from_one_that_is_not_installed():
    with Worker(PEERS["numpy"], 1) as worker, pytest.raises(DeviceMissingError, match="does not run on cuda"):
        worker.ask("start", device="cuda")


@pytest.mark.parametrize("name", ["torch-eager", "torch-manual"])
@pytest.mark.parametrize("kind", KINDS)
def test_pytorch_moves_its_tensors_and_takes_events(name, kind, monkeypatch):
    """PyTorch's CPU stands for its GPU: the tensors are taken there, and times come from its events."""
    torch = pytest.importorskip("torch")
    moved = []

    def to(tensor, device):
        moved.append(device)
        return tensor

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = len(moved)

        synchronize = record

        def elapsed_time(self, end):
            return 7.0

    monkeypatch.setattr(torch.Tensor, "to", to)
    for part, stand_in in (("is_available", lambda: True), ("Event", Event), ("set_device", lambda device: None)):
        monkeypatch.setattr(torch.cuda, part, stand_in)
    driver = Driver(PEERS[name].module, PEERS[name].cls)
    driver.start("cuda:1")
    case = Case(kind, 9, 24, 20, 4, device="cuda:1")
    arrays = make_arrays(case)
    driver.set_up(case.settings(), dict(arrays))
    assert moved == ["cuda:1"] * len(arrays)
    assert faults(case, arrays, reference(case, arrays), driver.check(CHECKED_LR)) == []
    assert driver.burst(0.0, 3) == driver.warm(0.0, 0.0, 3) == driver.first(0.0) == 7e-3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Refusal, match="no CUDA device"):
        driver.start("cuda")


# --- the runner --------------------------------------------------------------------------------------------------


def test_cases_and_limits_by_the_devices_own_clock(cupy):
    """A made-up device: its clock alone decides the times, the product rate and the bandwidth."""
    spec = PeerSpec("ticking", "Ticking", (), "ticks", folders=(str(cupy),), devices=("cuda",))
    rates = PEERS["cupy"]._replace(folders=(str(cupy),))
    bench = Bench({"ticking": spec, "cupy": rates}, LITTLE, print, device="cuda")
    case = Case("step", 8, 24, 20, 4, device="cuda")
    with bench.crew(1, ["ticking"]) as crew:
        result = crew.run(case)
        crew.measure_machine("float32")
    machine = bench.machines["float32", 1]
    assert result.faults == {}
    assert result.seconds == {"ticking": [pytest.approx(2.5e-3)] * LITTLE.rounds}
    assert machine.flops == pytest.approx(2 * 64**3 / 4.5e-3)
    assert machine.flops_by == machine.bandwidth_by == "cupy-cuda12x"
    assert machine.bandwidth == pytest.approx(2 * 2**16 / 1e-3)


def test_suites_on_a_device():
    for suite in (quick, default, full):
        groups = on_device(suite(2), "cuda:1", 2, large=suite is not quick)
        cases = [case for group in groups for case in group.cases]
        assert len(cases) == len(set(cases))
        assert {case.device for case in cases} == {"cuda:1"}
        assert {case.threads for case in cases} == {2}
        assert not any(group.goals for group in groups)
        moved = {case for group in suite(2) for case in group.cases if case.threads == 2}
        assert len(cases) >= len(moved)
    assert any(
        case.out_features == 11008 for group in on_device(default(2), "cuda", 2, large=True) for case in group.cases
    )
    (group,) = chosen([(8, 16, 24, 4)], threads=[2], device="cuda")
    assert group.cases[0].device == "cuda"
    curves = growth_curves(2, False, "cuda")
    assert set(curves) == {"N", "in", "out", "rank"}
    assert {case.device for cases in curves.values() for case in cases} == {"cuda"}
    with pytest.raises(ValueError, match="device must be"):
        Case("step", 1, 2, 2, 1, device="gpu")


# --- the dry run -------------------------------------------------------------------------------------------------


def test_a_dry_run_takes_one_small_case_of_each_kind():
    groups = on_device(default(2), "cuda", 2, large=True)
    small = rehearsal.small_cases(groups, ("forward", "lora-step"))
    assert [case.kind for case in small] == ["forward", "lora-step"]
    assert {(case.n, case.in_features, case.out_features, case.rank) for case in small} == {rehearsal.SMALL}
    assert rehearsal.bytes_of(Case("step", 2, 3, 5, 1)) == 4 * (3 * 15 + 2 * 2 * 8)
    bench_ = Bench(PEERS, Effort(15, 0.1, 0.3), print)
    two = [Group("both", (Case("step", 2, 3, 5, 1), Case("lora-step", 2, 3, 5, 1)))]
    assert rehearsal.least_seconds(bench_, two, ["nblora", "peft"]) == pytest.approx(3 * (15 * 0.15 + 0.3))


def test_a_dry_run_performs_what_it_can(cupy):
    """On its device, on the CPU instead, not at all; and a peer that is wrong."""
    (cupy / "wrong.py").write_text(
        "from nblora_peers.numpy_peer import NumpyPeer\n"
        "class Wrong(NumpyPeer):\n"
        "    def forward(self):\n"
        "        super().forward()\n"
        "        self.y[0, 0] += 1\n"
    )
    both = ("cpu", "cuda")
    peers = {
        "ready": PEERS["cupy"]._replace(folders=(str(cupy),)),
        "elsewhere": PEERS["numpy"]._replace(devices=both),
        "absent": PEERS["numpy"]._replace(module="a_library_that_nobody_has", devices=both),
        "unable": PEERS["numpy"]._replace(devices=("cuda",)),
        "wrong": PeerSpec("wrong", "Wrong", (), "wrong", folders=(str(cupy),), devices=both),
    }
    bench_ = Bench(peers, LITTLE, print, device="cuda")
    groups = on_device(quick(1), "cuda", 1, large=False)
    found = rehearsal.rehearse(bench_, groups)
    assert {name: outcome.device for name, outcome in found.items()} == {
        "ready": "cuda", "elsewhere": "cpu", "absent": "", "unable": "", "wrong": "cpu",
    }  # fmt: skip
    assert {name: (o.right, o.checked, o.failed) for name, o in found.items()} == {
        "ready": (3, 3, False), "elsewhere": (3, 3, False), "absent": (0, 0, False), "unable": (0, 0, False),
        "wrong": (0, 3, True),
    }  # fmt: skip
    text = rehearsal.dry_run_text(bench_, groups, ("cases",), "nothing there", found)
    assert "Device cuda: not available here: nothing there" in text
    assert "unable: left out: cuda: it does not run on cuda" in text
    assert "wrong: 0 of 3 small cases right on cpu" in text
    assert "wrong result: y is off by" in text
    assert "Timing the cases of ready, elsewhere: " in text


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "EFFORTS", dict.fromkeys(("quick", "default", "full"), LITTLE))
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(main, ["bench", *arguments])


@without_gpu
def test_without_a_gpu_it_says_what_is_missing_and_a_dry_run_goes_on(run, tmp_path):
    refused = run("--device", "cuda")
    assert refused.exit_code == 2
    assert "device 'cuda' is not available" in refused.output
    assert "--dry-run" in refused.output
    tried = run("--device", "cuda", "--dry-run", "--peer", "cupy")
    assert tried.exit_code == 0, tried.output
    assert "Device cuda: not available here: " in tried.output
    assert "nblora: 3 of 3 small cases right on cpu" in tried.output
    assert "step, large layers: 4" in tried.output
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_on_the_cpu(run, monkeypatch, tmp_path):
    tried = run("--quick", "--dry-run", "--peer", "numpy")
    assert tried.exit_code == 0, tried.output
    assert "Device cpu: available" in tried.output
    assert "numpy: 3 of 3 small cases right on cpu" in tried.output
    assert list(tmp_path.iterdir()) == []
    failed = {"numpy": rehearsal.Rehearsed("cpu", 3, 0, ["step: wrong"], True)}
    monkeypatch.setattr(bench, "rehearse", lambda *_: failed)
    monkeypatch.setattr(bench, "dry_run_text", lambda *_: "text\n")
    assert run("--quick", "--dry-run").exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "gpu"], "cuda:N"),
        (["--device", "cuda", "--peer", "jax"], "not on cuda"),
        (["--peer", "cupy"], "not on cpu"),
        (["--device", "cuda", "--section", "memory"], "sections are"),
    ],
)
def test_wrong_arguments_end_with_2(run, monkeypatch, arguments, words):
    monkeypatch.setattr(bench, "_device_problem", lambda device: None)
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.output


@pytest.mark.slow
def test_from_end_to_end_on_the_simulator(cupy, run, monkeypatch, tmp_path):
    """The command as for a GPU: real kernels on Numba's simulator, CuPy's place taken by NumPy, a report at the end."""
    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", "1")
    monkeypatch.setenv("PYTHONPATH", str(cupy))
    monkeypatch.setattr(
        bench, "_device_problem", lambda device: None
    )  # this process has no simulator, its workers have
    arguments = ("--device", "cuda", "--case", "5,12,10,2", "--threads", "1", "--rounds", "2", "--peer", "cupy")
    tried = run(*arguments, "--dry-run")
    assert tried.exit_code == 0, tried.output
    assert "Device cuda: Numba's simulator" in tried.output
    assert "nblora: 1 of 1 small cases right on cuda" in tried.output
    assert "cupy: 1 of 1 small cases right on cuda" in tried.output
    done = run(*arguments, "--kind", "step", "--kind", "forward", "--layout", "fullyconnected", "--section", "cases")
    assert done.exit_code == 0, done.output
    assert "Numba's simulator of a GPU" in done.output
    content = json.loads((tmp_path / "nblora-bench" / "results.json").read_text())
    for result in content["groups"][0]["results"]:
        assert result["case"]["device"] == "cuda"
        own = result["peers"]["nblora"]
        assert len(own["rounds"]) == 2
        assert own["seconds"]["median"] > 0
        assert own["fraction_of_limit"] > 0
        assert "fault" not in result["peers"]["cupy"]


@pytest.mark.slow
def test_startup_on_the_simulator(monkeypatch):
    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", "1")
    bench_ = Bench({"nblora": PEERS["nblora"]}, LITTLE, print, device="cuda")
    (row,) = startup(bench_, 1, 1, False, (4, 12, 10))
    assert row["seconds"]["median"] > row["first"]["median"] > 0


@pytest.mark.gpu
@pytest.mark.skipif("cuda:0" not in devices(), reason="needs an NVIDIA GPU, its driver, and nblora[cuda12]")
def test_on_a_gpu():
    """Ready for a device; it has not run on one yet."""
    bench_ = Bench({"nblora": PEERS["nblora"]}, LITTLE, print, device="cuda")
    cases = [Case(kind, 64, 256, 192, 8, layout=layout, device="cuda") for kind in KINDS for layout in LAYOUTS]
    for result in run_cases(bench_, cases):
        assert result.faults == {}
        assert 0 < result.fraction(bench_.machines["float32", 1]) < 2
