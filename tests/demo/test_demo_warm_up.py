"""Compiling ahead: in two processes where that helps, not at all where the cache holds kernels."""

import pytest

from nblora.demo import run, warm_up
from nblora.kernels import jit


class Calls(list):
    def __call__(self, *arguments, **options):
        self.append(arguments)
        return self

    def wait(self):
        self.append("waited")


@pytest.fixture
def calls(monkeypatch):
    """What was started, forward's and backward's compilation among it; nothing is really compiled."""
    calls = Calls()
    monkeypatch.setattr(warm_up.subprocess, "Popen", calls)
    monkeypatch.setattr(warm_up, "compile_forward", lambda: calls.append("forward"))
    monkeypatch.setattr(warm_up, "compile_backward", lambda: calls.append("backward"))
    monkeypatch.setattr(warm_up, "usable_cores", lambda: 2)
    monkeypatch.setattr(jit, "JIT_DISABLED", False)
    return calls


@pytest.mark.small
def test_an_empty_cache_is_filled_by_two_processes(calls, monkeypatch, tmp_path):
    monkeypatch.setattr(jit, "cache_folder", lambda: tmp_path)
    assert warm_up.compile_kernels()
    assert calls[0][0][1:] == ["-c", warm_up.PROGRAM]
    assert calls[1:] == ["forward", "waited"]


@pytest.mark.small
def test_a_filled_cache_is_left_alone(calls, monkeypatch, tmp_path):
    (tmp_path / "forward.nbi").touch()
    monkeypatch.setattr(jit, "cache_folder", lambda: tmp_path)
    assert not warm_up.compile_kernels()
    assert calls == []


@pytest.mark.small
@pytest.mark.parametrize(("cores", "writable"), [(1, True), (2, False)])
def test_one_core_or_no_cache_compiles_here(calls, monkeypatch, tmp_path, cores, writable):
    monkeypatch.setattr(jit, "cache_folder", lambda: tmp_path if writable else None)
    monkeypatch.setattr(warm_up, "usable_cores", lambda: cores)
    assert warm_up.compile_kernels()
    assert calls == ["forward", "backward"]


@pytest.mark.small
def test_without_a_compiler_there_is_nothing_to_do(calls, monkeypatch):
    monkeypatch.setattr(jit, "JIT_DISABLED", True)
    assert not warm_up.compile_kernels()
    assert calls == []


@pytest.mark.small
def test_the_program_of_the_other_process_runs():
    namespace = {}
    exec(warm_up.PROGRAM, namespace)
    warm_up.compile_forward()
    assert namespace["compile_backward"] is warm_up.compile_backward


@pytest.mark.small
def test_one_thread_gives_the_threads_back():
    import numba

    before = numba.get_num_threads()
    with run.one_thread():
        assert numba.get_num_threads() == 1
    assert numba.get_num_threads() == before
