from __future__ import annotations

import pytest

import tutelage
from tutelage.catalogue import _METHODS, ROLES, Method, method, methods


def entry(name: str) -> Method:
    return Method(name, "2.1", "losses", "Somebody: Something", 2020, "https://arxiv.org/abs/1", lambda: None)


def test_every_method_says_where_it_comes_from():
    found = methods()
    assert found
    for m in found:
        assert m.name == m.thing.__name__
        assert m.role in ROLES, m.name
        assert m.section[0] in "2345678", m.name
        assert 1990 <= m.year <= 2026, m.name
        assert m.link.startswith("https://"), m.name
        assert ":" in m.paper, m.name
        assert m.summary.endswith("."), m.name
    assert [m.section for m in found] == sorted(m.section for m in found)
    assert len({m.name for m in found}) == len({m.recipe for m in found}) == len(found)


def test_kd_is_described_from_its_signature_and_docstring():
    kd = next(m for m in methods() if m.name == "KD")
    assert kd.thing is tutelage.KD
    assert kd.defaults == {"temperature": 4.0, "weight": 0.9, "name": None}
    assert kd.summary.startswith("Soft targets")
    assert kd.recipe == "kd.yaml"


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("KD", "kd.yaml"),
        ("FitNets", "fit_nets.yaml"),
        ("AttentionTransfer", "attention_transfer.yaml"),
        ("TaskLoss", "task_loss.yaml"),
        ("CRD", "crd.yaml"),
        ("born_again", "born_again.yaml"),
        ("KDPlus", "kd_plus.yaml"),
    ],
)
def test_recipe_names(name, recipe):
    assert entry(name).recipe == recipe


@pytest.fixture
def clean_catalogue():
    before = dict(_METHODS)
    yield
    _METHODS.clear()
    _METHODS.update(before)


def test_a_method_enters_itself_and_stays_what_it_was(clean_catalogue):
    decorate = method(section="2.1", role="losses", paper="A: B", year=2020, link="https://x")

    def my_method(alpha: float, beta: float = 0.5) -> None:
        """What it does.

        More.
        """

    assert decorate(my_method) is my_method
    entered = _METHODS["my_method"]
    assert (entered.summary, entered.defaults) == ("What it does.", {"beta": 0.5})
    assert my_method not in [m.thing for m in methods()], "other people's methods are not in the survey's list"
    decorate(my_method)  # a module that is loaded again


def test_two_methods_of_one_name_are_refused(clean_catalogue):
    class KD:
        pass

    with pytest.raises(ValueError, match=r"two methods are called 'KD': tutelage\.knowledge\.response\.kd and"):
        method(section="2.1", role="losses", paper="A: B", year=2020, link="https://x")(KD)


def test_an_unknown_role_is_refused():
    with pytest.raises(ValueError, match="role='loss': expected one of"):
        method(section="2.1", role="loss", paper="A: B", year=2020, link="https://x")
