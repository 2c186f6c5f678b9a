"""Which case comes next, on cases whose answer is plain."""

from __future__ import annotations

import pytest

from vclipseg.errors import UsageError
from vclipseg.ranking import STRATEGIES, Signals, rank


def case(name, uncertainty=0.5, shares=(0.1, 0.1), features=(0.0,)):
    return Signals(name, uncertainty, shares, features)


def order(strategy, candidates, labeled=(), seed=0):
    return [choice.case_id for choice in rank(strategy, candidates, labeled, seed)]


def test_the_least_sure_comes_first():
    cases = [case("a", 0.2), case("b", 0.9), case("c", 0.5)]
    assert order("uncertain", cases) == ["b", "c", "a"]


def test_the_farthest_from_what_is_labeled_comes_first():
    labeled = [case("known", features=(0.0, 0.0))]
    cases = [
        case("near", features=(1.0, 0.0)),
        case("far", features=(10.0, 0.0)),
        case("beside far", features=(9.5, 0.0)),
        case("elsewhere", features=(0.0, 5.0)),
    ]
    assert set(order("novel", cases, labeled)[:2]) == {"far", "elsewhere"}
    assert order("novel", cases, labeled)[-1] == "beside far"


def test_scores_fall_from_place_to_place():
    cases = [case(str(i), i / 10, (i / 20, 0.1), (float(i % 4), float(i))) for i in range(9)]
    for strategy in STRATEGIES:
        scores = [choice.score for choice in rank(strategy, cases, cases[:2])]
        assert scores == sorted(scores, reverse=True)


def test_what_shows_rare_classes_comes_first():
    labeled = [case("known", shares=(0.19, 0.01))]
    cases = [
        case("usual", shares=(0.3, 0.01)),
        case("rare", shares=(0.02, 0.02)),
        case("none", shares=(0, 0)),
    ]
    assert order("class_rare", cases, labeled) == ["rare", "usual", "none"]


def test_one_class_is_never_rare():
    cases = [case("a", shares=(0.3,)), case("b", shares=(0.1,)), case("c", shares=(0.0,))]
    choices = rank("class_rare", cases, [case("known", shares=(0.2,))])
    assert [c.score for c in choices] == [0, 0, 0]
    assert not any("class-rare" in c.reasons for c in choices)


def test_all_three_together():
    labeled = [case("known", shares=(0.19, 0.01), features=(0.0,))]
    best = case("best", 0.9, (0.02, 0.02), (9.0,))
    cases = [case("a", 0.1, (0.3, 0.0), (0.1,)), best, case("b", 0.3, (0.2, 0.01), (0.2,))]
    first = rank("combined", cases, labeled)[0]
    assert (first.case_id, first.score) == ("best", 1.0)
    assert first.reasons == ("uncertain", "novel", "class-rare")


def test_random_is_a_function_of_the_seed():
    cases = [case(str(i)) for i in range(20)]
    assert order("random", cases, seed=1) == order("random", cases, seed=1)
    assert order("random", cases, seed=1) != order("random", cases, seed=2)
    assert order("first", cases) == [str(i) for i in range(20)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_few_cases(strategy):
    assert rank(strategy, [], []) == []
    assert order(strategy, [case("a")]) == ["a"]
    assert set(order(strategy, [case("a"), case("b")])) == {"a", "b"}
    no_features = [case("a", features=()), case("b", features=())]
    assert set(order(strategy, no_features, [case("c", features=())])) == {"a", "b"}


def test_an_unknown_strategy():
    with pytest.raises(UsageError, match="no strategy 'best'; there are combined"):
        rank("best", [], [])
