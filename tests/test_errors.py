from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.errors import nearest, require


@given(st.lists(st.from_regex(r"[a-z]{3,8}\d?", fullmatch=True), min_size=1, max_size=8, unique=True))
def test_a_right_name_is_its_own_nearest(choices):
    for choice in choices:
        assert nearest(choice, choices, count=1) == f"; nearest: {choice!r}"


def test_case_does_not_matter_and_the_true_spelling_is_given():
    assert nearest("fitnets", ["KD", "FitNets", "RKD"], count=1) == "; nearest: 'FitNets'"


def test_without_anything_alike_the_first_names_are_given_and_nothing_of_nothing():
    assert nearest("zzzz", ["b", "a", "d", "c"]) == "; nearest: 'a', 'b', 'c'"
    assert nearest("a", []) == ""
    assert nearest("a", iter(["a"])) == "; nearest: 'a'"


def test_a_package_that_is_there_is_returned():
    assert require("json", extra="text") is json


def test_a_missing_package_names_the_extra_that_brings_it():
    with pytest.raises(ImportError, match=r"'no_such_package_here'.*pip install 'tutelage\[export\]'") as error:
        require("no_such_package_here", extra="export")
    assert isinstance(error.value.__cause__, ImportError)
