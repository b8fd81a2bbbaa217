"""SIGKILL at any moment: the inputs are untouched, the output is absent or whole, and the next run ends well."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from nblora.weights import merge
from tests.weights.support import linear_factors, snapshot, write_adapter, write_file

RUN = "import sys; from nblora.weights import merge; merge(sys.argv[1], sys.argv[2], sys.argv[3], {options})"


def prepare(tmp_path, rng, folder):
    weights = {f"layers.{at}.weight": rng.standard_normal((2048, 1024)).astype(np.float32) for at in range(3)}
    path = tmp_path / "base" / "model.safetensors" if folder else tmp_path / "base.safetensors"
    write_file(path, weights)
    tensors = {}
    for at in range(3):
        tensors |= linear_factors(rng, f"layers.{at}", 2048, 1024, rank=8)
    return path.parent if folder else path, write_adapter(tmp_path / "adapter", tensors, r=8)


def run(base, adapter, out, keep):
    program = RUN.format(options=f"keep_original={keep}, max_memory='2MiB'")
    return subprocess.Popen([sys.executable, "-c", program, str(base), str(adapter), str(out)])


def kill_at_random(tmp_path, rng, moments):
    for folder, keep in ((False, False), (True, True)):
        place = tmp_path / f"{folder}"
        place.mkdir()
        base, adapter = prepare(place, rng, folder)
        before = snapshot(base, adapter)
        whole = place / "whole"
        merge(base, adapter, whole, keep_original=keep)
        expected = {path.name: data for path, data in snapshot(whole).items()}
        out = place / ("out" if folder else "whole.safetensors")
        began = time.perf_counter()
        assert run(base, adapter, out, keep).wait() == 0
        duration = time.perf_counter() - began
        interrupted = 0
        for moment in rng.uniform(0.2, 1.05, moments // 2) * duration:
            for path in [out, out.with_name(out.name + ".nblora-originals")]:
                if path.is_dir():
                    for file in path.iterdir():
                        file.unlink()
                    path.rmdir()
                elif path.exists():
                    path.unlink()
            process = run(base, adapter, out, keep)
            time.sleep(moment)
            process.send_signal(signal.SIGKILL)
            interrupted += process.wait() == -signal.SIGKILL
            assert snapshot(base, adapter) == before
            if out.exists():
                assert_whole(out, expected)
            merge(base, adapter, out, keep_original=keep)
            assert_whole(out, expected)
            beside = {path.name for path in place.iterdir()}
            kept = set() if folder or not keep else {out.name + ".nblora-originals"}
            assert beside == {base.name, adapter.name, "whole", out.name} | kept, "something is left of the killed run"
        assert interrupted > 0


def assert_whole(out, expected):
    files = {path.name: data for path, data in snapshot(out).items()}
    if out.is_dir():
        assert files == expected
    else:
        assert list(files.values()) == list(expected.values())


def test_a_killed_merge_leaves_nothing_that_looks_whole(tmp_path, rng):
    kill_at_random(tmp_path, rng, 8)


@pytest.mark.slow
def test_fifty_killed_merges_leave_nothing_that_looks_whole(tmp_path, rng):
    kill_at_random(tmp_path, rng, 50)


def test_a_living_merge_is_not_disturbed_by_another(tmp_path, rng):
    base, adapter = prepare(tmp_path, rng, False)
    out = tmp_path / "out.safetensors"
    merge(base, adapter, out)
    expected = out.read_bytes()
    processes = [run(base, adapter, out, False) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert out.read_bytes() == expected
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base.safetensors", "out.safetensors"]
