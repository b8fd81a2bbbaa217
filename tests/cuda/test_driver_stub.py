"""The host's part on a driver that computes nothing: warnings, launches, allocations, copies, contexts, the cache."""

import pytest

from nblora.kernels.common.cache import read_checked
from tests.cuda.stub import needs_driver, script

pytestmark = needs_driver

STEP = """
adapter = nblora.DeltaLoRAAdapter(nblora.Dense.random(768, 768, seed=0), 8, seed=0).to("cuda")
x, grad = (adapter._backend.from_host(normal(64, 768)) for _ in range(2))


def step():
    adapter.forward(x)
    adapter.backward_update(grad, 0.1)

"""


@pytest.fixture(scope="module")
def steps(folder):
    """Ten thousand steps of Delta-LoRA, in the first process that uses the cache."""
    code = (
        STEP
        + """
first = counted(step)
second = counted(step)
rest = counted(lambda: [step() for _ in range(10_000)])
end = counts()
adapter.close()
del x, grad
closed = counted(nblora.backends.resolve("cuda").release)
say(first=first, second=second, rest=rest, end=end, closed=counts())
"""
    )
    return script(folder, code)


def test_a_step_allocates_once(steps):
    assert steps["first"]["alloc"] <= 20
    assert steps["second"]["alloc"] == steps["second"]["free"] == 0
    assert steps["second"]["d2h"] == steps["second"]["sync"] == 0
    assert steps["second"]["launch"] <= 11


def test_ten_thousand_steps_leak_nothing(steps):
    assert steps["rest"]["launch"] == 10_000 * steps["second"]["launch"]
    assert steps["rest"]["alloc"] == steps["rest"]["free"] == 0
    assert steps["rest"]["push"] == 0
    assert steps["end"]["free_noctx"] == 0
    assert steps["end"]["depth"] <= 1


def test_close_frees_the_memory(steps):
    held = steps["closed"]["alloc"] - steps["closed"]["free"]
    assert 0 <= held <= 3  # two tables, and zeros that stand for a bias, stay with the backend
    assert steps["closed"]["free_noctx"] == 0


def test_a_second_process_compiles_nothing(folder, steps):
    code = (
        STEP
        + """
def refused(*arguments):
    raise AssertionError("compiled")

cubins.compile_kernel = refused
say(**counted(step))
"""
    )
    assert script(folder, code)["launch"] == steps["first"]["launch"]


def test_a_damaged_file_is_compiled_again(folder, steps):
    files = sorted((folder / "cache").rglob("*.cubin"))
    assert len(files) >= 5
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert read_checked(file) is None
    assert script(folder, STEP + "say(**counted(step))")["launch"] == steps["first"]["launch"]
    assert sum(read_checked(file) is not None for file in files) >= 5


def test_a_full_device_is_said_after_its_idle_memory_was_freed(folder):
    code = """
backend = nblora.backends.resolve("cuda")
for size in range(1, 40):
    backend.from_host(normal(1000 * size))
before = counts()
driver.stub_fail(0)
try:
    backend.from_host(normal(5_000_000))
except nblora.errors.DeviceMemoryError as error:
    message = str(error)
say(message=message, freed=counts()["free"] - before["free"], held=before["alloc"] - before["free"])
"""
    said = script(folder, code)
    assert "20.0 MB wanted" in said["message"]
    assert "of 85899.3 MB free" in said["message"]
    assert said["held"] - 2 == said["freed"] > 0  # two tables stay with the backend


def test_a_driver_without_a_gpu_is_said(folder):
    code = """
message = ""
try:
    nblora.Dense.random(2, 2).to("cuda")
except nblora.errors.DeviceUnavailableError as error:
    message = str(error)
say(message=message, devices=nblora.devices())
"""
    said = script(folder, code, STUB_NO_GPU="1", CUDA_VISIBLE_DEVICES="")
    assert "the driver finds no GPU (CUDA_VISIBLE_DEVICES is '')" in said["message"]
    assert said["devices"] == ["cpu"]


def test_two_gpus(folder):
    code = """
one, two = (nblora.Dense.random(3, 2, seed=0).to(f"cuda:{index}") for index in range(2))
try:
    two(one._backend.from_host(normal(4, 3)))
except ValueError as error:
    say(message=str(error), devices=nblora.devices())
"""
    said = script(folder, code, STUB_DEVICES="2")
    assert said["devices"] == ["cpu", "cuda:0", "cuda:1"]
    assert "on cuda:0 and the layer on cuda:1" in said["message"]


TENSOR = """
from nblora.backends import dlpack

given_back = []


class Tensor:
    def __init__(self, array, index=0):
        self.array, self.index, self.streams = array, index, []

    def __dlpack_device__(self):
        return 2, self.index

    def __dlpack__(self, *, stream=None):
        self.streams.append(stream)
        log()
        keep = Keep()
        return dlpack.give(self.array.ctypes.data, self.array.shape, self.array.dtype, False, (2, self.index), keep)


class Keep:
    def __del__(self):
        given_back.append(len(given_back))

"""


def test_arrays_of_another_gpu_are_refused(folder):
    """Whether they say where they are, or only at which address."""
    code = (
        TENSOR
        + """
from types import SimpleNamespace

one, two = (nblora.Dense.random(3, 2, seed=0).to(f"cuda:{index}") for index in range(2))
tensor, messages = Tensor(normal(4, 3), 1), []
on_two = two._backend.from_host(normal(4, 3))
interface = SimpleNamespace(__cuda_array_interface__=on_two.__cuda_array_interface__)
for value in (tensor, interface):
    try:
        one(value)
    except ValueError as error:
        messages.append(str(error))
two(tensor), two(interface)
say(messages=messages, streams=tensor.streams)
"""
    )
    said = script(folder, code, STUB_DEVICES="2")
    assert len(said["messages"]) == 2
    assert all("on cuda:1 and the layer on cuda:0" in message for message in said["messages"])
    assert said["streams"] == [1]  # the GPU that refused never asked for it


def test_streams_of_producers_are_waited_for(folder):
    code = (
        TENSOR
        + """
from types import SimpleNamespace

layer = nblora.Dense.random(3, 2, seed=0).to("cuda")
tensor = Tensor(normal(4, 3))
layer(tensor)
by_dlpack = log()
ours = layer._backend.from_host(normal(4, 3))
other = SimpleNamespace(__cuda_array_interface__=ours.__cuda_array_interface__ | {"stream": 77})
log()
layer(other)
say(asked=tensor.streams, by_dlpack=by_dlpack, by_interface=log())
"""
    )
    said = script(folder, code)
    assert said["asked"] == [1]  # so that the producer has our stream wait
    assert [row[:2] for row in said["by_dlpack"]] == [[1, 1]]
    assert [row[:2] for row in said["by_interface"]] == [[4, 77], [1, 1]]


def test_a_stream_that_takes_a_result_waits_for_it(folder):
    code = """
layer = nblora.Dense.random(3, 2, seed=0).to("cuda")
y = layer(layer._backend.from_host(normal(4, 3)))
device, seen = y._device, {}
assert y.__dlpack_device__() == (2, 0)
for stream in (None, 1, 2, -1, 77):
    log()
    capsule = y.__dlpack__(stream=stream)
    seen[str(stream)] = log()
ours = device.is_ours(y)
del capsule, y
log()
z = layer(layer._backend.from_host(normal(4, 3)))
refused = ""
try:
    z.__dlpack__(dl_device=(1, 0))
except BufferError as error:
    refused = str(error)
say(seen=seen, ours=ours, after=[row for row in log() if row[0] == 5], refused=refused, fresh=device.is_ours(z))
"""
    said = script(folder, code)
    assert said["seen"]["None"] == said["seen"]["1"] == said["seen"]["2"] == said["seen"]["-1"] == []
    (record, event, ours), (wait, stream, waited) = said["seen"]["77"]
    assert (record, ours, wait, stream) == (2, 1, 3, 77)
    assert event == waited
    assert not said["ours"]  # the other library may write to it, so no product of it is put off
    assert said["fresh"]
    assert len(said["after"]) == 1  # and its memory is the driver's again, not the next result's
    assert "on cuda:0" in said["refused"]


def test_memory_of_others_is_handed_back_once_it_was_read(folder):
    code = (
        TENSOR
        + """
layer = nblora.Dense.random(3, 2, seed=0).to("cuda")
seen = []
driver.stub_ready(0)
layer(Tensor(normal(4, 3)))
seen.append(len(given_back))
layer(Tensor(normal(4, 3)))
layer(Tensor(normal(4, 3)))
seen.append(len(given_back))  # the GPU has not come so far
driver.stub_ready(1)
layer(Tensor(normal(4, 3)))
seen.append(len(given_back))
layer._backend._device.synchronize()
seen.append(len(given_back))
say(seen=seen)
"""
    )
    assert script(folder, code)["seen"] == [0, 0, 1, 3]  # the layer keeps the last


def test_more_samples_than_a_grid_has_rows(folder):
    code = """
adapter = nblora.LoRAAdapter(nblora.Dense.random(2, 2, seed=0), 1, seed=0).to("cuda")
samples = adapter._backend.from_host(np.zeros((5_000_000, 2), np.float32))
say(**counted(lambda: (adapter.forward(samples), adapter.backward(samples))))
"""
    assert script(folder, code)["launch"] >= 6


FIT = """
from nblora.training.callbacks import Callback

sizes = [64, 256, 256, 256, 10]
activations = ["relu", "relu", "relu", "identity"]
layers = [nblora.Dense.random(a, b, activation=f, seed=b) for a, b, f in zip(sizes, sizes[1:], activations)]
model = nblora.Sequential(*layers)
model.adapt([str(i) for i in range(4)], "lora", rank=8, seed=0)
model.to("cuda")
seen = []


class Count(Callback):
    def on_step_end(self, step, figures):
        seen.append(counts())


nblora.fit(
    model, normal(640, 64), normal(640, 10), loss="mse", optimizer="OPTIMIZER", epochs=3, batch_size=64, seed=0,
    callbacks=[Count()], CLIP
)
say(steps=[{name: after[name] - before[name] for name in NAMES} for before, after in zip(seen, seen[1:])])
"""


@pytest.mark.parametrize(("optimizer", "clip"), [("adamw", ""), ("sgd", "")])
def test_fit_of_four_layers(folder, optimizer, clip):
    steps = script(folder, FIT.replace("OPTIMIZER", optimizer).replace("CLIP", clip))["steps"]
    inside = [step for place, step in enumerate(steps) if place > 0 and (place + 1) % 10]  # an epoch's end does more
    assert len(inside) >= 25
    for step in inside:
        assert step["launch"] <= 20
        assert step["alloc"] == step["free"] == 0
        assert step["d2h"] == 1
