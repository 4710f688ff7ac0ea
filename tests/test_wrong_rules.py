"""A wrong rule is noticed: each rule with one fault (mutants.py), on each target, beside the honest oracle.

The oracle is torch.optim in float64, or the paper's formula, never a rule of zerograph. Right rules are
within 1e-6 (1 + |p|) of it; each wrong one is ten times as far away.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.by_hand import honest
from tests.kernels import F64, TARGETS, Targets
from tests.lamb import Lamb
from tests.mutants import WRONG, forget, register
from tests.updates import CASES, Case, Problem, Slice, differences
from zerograph.codegen.rules import RULES
from zerograph.codegen.spec import Update

RIGHT, NOTICED = 1e-6, 1e-5
EACH_TARGET = pytest.mark.parametrize("target", [*TARGETS, "numpy"])


@pytest.fixture(autouse=True)
def wrong_rules() -> Iterator[None]:
    register()
    yield
    forget()


def visible(case: Case) -> Case:
    """With an `eps` that is not lost beside a root."""
    more = {"eps": 1e-2} if "eps" in case.described.defaults else {}
    return replace(case, options={**case.options, **more})


def faults(case: Case) -> list[str]:
    """Those that the case's options show: of scalars that its kernel reads, of flags that it has."""
    flags = case.described.flags(case.full)
    read = {name for _, name in Update(case.rule, flags, F64, F64).scalars()}
    own = {key: wrong for key, wrong in WRONG.items() if wrong.base == case.rule}
    if not case.full.get("dampening"):
        own.pop("sgd without whole first gradient", None)
    return [
        key
        for key, wrong in own.items()
        if (not wrong.scalar or wrong.scalar in read) and (not wrong.flag or wrong.flag in flags)
    ]


@EACH_TARGET
@pytest.mark.parametrize("case", list(map(visible, CASES)), ids=lambda case: case.name or case.rule)
def test_a_wrong_rule_is_noticed(call: Targets, case: Case, target: str) -> None:
    problem = Problem(case, 64, 20)
    expected = honest(problem, F64)

    def run(rule: str) -> Slice:
        return problem.reference(rule) if target == "numpy" else problem.run(call, target, rule)

    assert not differences(run(case.rule), expected, RIGHT)
    wrong = faults(case)
    assert len(wrong) >= 4
    assert [key for key in wrong if not differences(run(key), expected, NOTICED)] == []


@EACH_TARGET
def test_a_wrong_lamb_is_noticed(call: Targets, target: str) -> None:
    problem = Lamb((16, 32, 16), 16, 6, eps=1e-2)
    expected = problem.by_hand()

    def run(rule: str) -> Slice:
        made = problem.reference(rule) if target == "numpy" else problem.run(call, target, rule)
        return replace(made, low=None)

    assert not differences(run("lamb"), expected, RIGHT)
    wrong = [key for key, each in WRONG.items() if each.base == "lamb"]
    assert [key for key in wrong if not differences(run(key), expected, NOTICED)] == []


def test_there_is_a_fault_of_each_rule_and_of_each_scalar() -> None:
    """Coefficients of all columns; of the rules that correct a bias, without it; of all, decay elsewhere."""
    shown = {key for case in CASES for key in faults(case)}
    assert shown == {key for key, wrong in WRONG.items() if wrong.base != "lamb"}
    for base in ("adamw", "adam", "sgd", "adagrad", "lion", "lamb"):
        own = [key for key, wrong in WRONG.items() if wrong.base == base]
        scaled = {WRONG[key].scalar for key in own} - {""}
        assert scaled == set(RULES[base].scalars)
        assert any(key.startswith(f"{base}, decay") for key in own)
        corrects = any(key.endswith("first correction") for key in own)
        assert corrects == ("bias_correction" in RULES[base].defaults)
