"""Which cases a suite holds, and what filters leave of it."""

import pytest

from nblora.bench.cases import DTYPES, KINDS
from nblora.bench.peers import PEERS
from nblora.bench.suites import LIMIT, chosen, default, full, narrowed, quick


@pytest.mark.parametrize("suite", [quick, default, full])
@pytest.mark.parametrize("threads", [1, 2])
def test_no_case_twice_and_goals_name_peers(suite, threads):
    groups = suite(threads)
    cases = [case for group in groups for case in group.cases]
    assert len(cases) == len(set(cases))
    assert {case.kind for case in cases} == set(KINDS)
    assert all(1 <= case.threads <= threads for case in cases)
    assert {name for group in groups for name in group.goals} <= {*PEERS, LIMIT}


def test_goals_of_the_peer_that_knows_only_lora_are_for_lora():
    for group in default(2):
        if "peft" in group.goals:
            assert {case.kind for case in group.cases} == {"lora-step"}


def test_full_holds_the_default_suite():
    everything = {case for group in full(2) for case in group.cases}
    assert {case for group in default(2) for case in group.cases} < everything


def test_narrowed_keeps_what_matches():
    groups = narrowed(default(2), {"kind": ["forward"], "dtype": ["float32"], "layout": []}, [])
    assert groups
    assert {case.kind for group in groups for case in group.cases} == {"forward"}
    assert narrowed(default(2), {"kind": ["forward"], "dtype": ["float64"]}, []) == []


def test_narrowed_takes_every_case_at_the_given_threads():
    cases = [case for group in narrowed(quick(2), {"kind": ["step"]}, [1, 2]) for case in group.cases]
    assert {case.threads for case in cases} == {1, 2}
    assert len(cases) == 2 * len([c for group in quick(2) for c in group.cases if c.kind == "step"])


def test_chosen_combines_everything():
    (group,) = chosen(
        [(8, 16, 24, 4)], kind=["step", "forward"], dtype=DTYPES, layout=["fullyconnected"], threads=[1, 2]
    )
    assert len(group.cases) == 8
    assert {(c.n, c.in_features, c.out_features, c.rank) for c in group.cases} == {(8, 16, 24, 4)}
    (single,) = chosen([(8, 16, 24, 4)], threads=[2])
    assert [(c.kind, c.dtype, c.layout) for c in single.cases] == [("step", "float32", "dense")]
