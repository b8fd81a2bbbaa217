"""`nblora info`: every part is there, true, and the same as text and as JSON."""

import json
import os
import subprocess
import sys

import numba
import numpy as np
import pytest
from click.testing import CliRunner

import nblora
from nblora import info
from nblora.cli import main
from nblora.kernels.common import cache, jit

PRIORITY = ["tbb", "omp", "workqueue"]


@pytest.fixture(scope="module")
def collected():
    return info.collect()


def test_versions_are_those_of_the_imported_packages(collected):
    assert collected["versions"]["nblora"] == nblora.__version__
    assert collected["versions"]["numpy"] == np.__version__
    assert collected["versions"]["numba"] == numba.__version__
    assert None not in collected["versions"].values()


def test_a_missing_optional_package_is_none(monkeypatch):
    monkeypatch.setattr(info, "OPTIONAL", ("a-package-that-nobody-has-made",))
    collected = info.collect()
    assert collected["optional"] == {"a-package-that-nobody-has-made": None}
    assert "not installed    a-package-that-nobody-has-made" in info.as_text(collected)


def test_cpu_and_threads_fit_this_machine(collected):
    cpu, threads = collected["cpu"], collected["threads"]
    assert 1 <= cpu["usable_cores"] <= cpu["cores"] == os.cpu_count()
    assert cpu["vector_bits"] in (128, 256, 512, None)
    assert 1 <= threads["numba_threads"] <= threads["numba_threads_limit"]
    assert threads["layer"] in threads["layers_available"]
    assert "workqueue" in threads["layers_available"]  # always built


def test_a_system_without_affinity_and_proc_is_described_too(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(info.Path, "read_text", _no_file)
    cpu = info.describe_cpu()
    assert cpu["usable_cores"] == os.cpu_count()
    assert cpu["name"]


def _no_file(*args, **kwargs):
    raise FileNotFoundError("/proc/cpuinfo")


@pytest.mark.parametrize(
    ("setting", "available", "chosen"),
    [
        ("default", ["omp", "workqueue"], "omp"),
        ("default", ["tbb", "omp"], "tbb"),
        ("workqueue", ["omp", "workqueue"], "workqueue"),
        ("tbb", ["omp", "workqueue"], None),
        ("safe", ["omp", "workqueue"], None),
        ("threadsafe", ["omp", "workqueue"], "omp"),
        ("forksafe", ["workqueue"], "workqueue"),
    ],
)
def test_the_layer_is_chosen_as_numba_chooses(setting, available, chosen):
    assert info._choose_layer(available, setting, PRIORITY) == chosen


@pytest.mark.parametrize(("platform", "chosen"), [("linux", "workqueue"), ("darwin", "omp")])
def test_openmp_is_not_fork_safe_on_linux(monkeypatch, platform, chosen):
    monkeypatch.setattr(sys, "platform", platform)
    assert info._choose_layer(["omp", "workqueue"], "forksafe", PRIORITY) == chosen


@pytest.mark.skipif(jit.JIT_DISABLED, reason="no threads run without compiled kernels")
@pytest.mark.parametrize("setting", ["default", "workqueue"])
def test_the_layer_foretold_is_the_one_that_runs(setting):
    program = (
        "import numba, numpy\n"
        "from nblora.info import describe_threads\n"
        "before = describe_threads()\n"
        "@numba.njit(parallel=True)\n"
        "def total(a):\n"
        "    s = 0.0\n"
        "    for i in numba.prange(a.size):\n"
        "        s += a[i]\n"
        "    return s\n"
        "total(numpy.ones(4))\n"
        "after = describe_threads()\n"
        "assert not before['layer_running'], before\n"
        "assert after['layer_running'], after\n"
        "assert before['layer'] == after['layer'] == numba.threading_layer(), (before, after)\n"
    )
    environment = os.environ | {"NUMBA_THREADING_LAYER": setting}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=120)


def test_blas_of_numpy_is_found(collected):
    assert any(library["user_api"] == "blas" for library in collected["blas"])


def test_cuda_says_what_is_missing_or_which_devices_there_are(collected):
    cuda = collected["cuda"]
    assert cuda["available"] == (cuda["reason"] is None)
    assert cuda["available"] == any(device.startswith("cuda") for device in collected["devices"])


def test_cache_reports_folder_and_size(tmp_path, monkeypatch):
    (tmp_path / "kernel.nbc").write_bytes(b"12345")
    monkeypatch.setattr(cache, "cache_folder", lambda: tmp_path)
    assert info.describe_cache() == {
        "folder": str(tmp_path),
        "writable": True,
        "digest": cache.source_digest(),
        "files": 1,
        "bytes": 5,
    }


def test_no_writable_cache_is_said(monkeypatch):
    monkeypatch.setattr(cache, "cache_folder", lambda: None)
    collected = info.collect()
    assert collected["cache"]["folder"] is None
    assert not collected["cache"]["writable"]
    assert "no writable folder" in info.as_text(collected)


def test_the_command_prints_json_that_equals_collect(collected):
    result = CliRunner().invoke(main, ["info", "--json"])
    assert result.exit_code == 0
    printed = json.loads(result.output)
    for part in ("versions", "optional", "system", "cpu", "devices"):
        assert printed[part] == collected[part]


def test_the_command_prints_every_part_as_text(collected):
    result = CliRunner().invoke(main, ["info"])
    assert result.exit_code == 0
    for expected in (nblora.__version__, collected["cpu"]["name"], "threading layer", "CUDA", "kernel cache"):
        assert expected in result.output
