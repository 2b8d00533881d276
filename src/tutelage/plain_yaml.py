"""YAML of which nobody has to be afraid: plain values, and no more of them than a recipe needs."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import yaml

from tutelage.trusted import RecipeError

# What no recipe needs and a hostile one has: a few lines of aliases to aliases stand for 10⁹ values.
MOST_BYTES, MOST_VALUES, MOST_DEPTH = 2**20, 10_000, 60


class RecipeLoader(yaml.SafeLoader):
    """Plain values alone; ``1e-3`` is a number, and a field that stands twice is a mistake."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, times in keys.items():
            if key != "<<" and times > 1:
                raise yaml.MarkedYAMLError(problem=f"the field {key!r} stands twice", problem_mark=node.start_mark)
        return node

    def construct_yaml_str(self, node: yaml.ScalarNode) -> str:
        # JSON writes what lies above U+FFFF as two escapes; one of them alone is no character
        return str(self.construct_scalar(node)).encode("utf-16", "surrogatepass").decode("utf-16")

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_VALUES:  # before PyYAML 6.0.4 ``<<`` of ``<<`` multiplies
            raise yaml.MarkedYAMLError(problem=f"more than {MOST_VALUES:,} fields", problem_mark=node.start_mark)


RecipeLoader.add_constructor("tag:yaml.org,2002:str", RecipeLoader.construct_yaml_str)
RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
)


class _Dumper(yaml.SafeDumper):
    """Quotes text that looks like one of :class:`RecipeLoader`'s numbers, and writes no aliases."""

    yaml_implicit_resolvers = RecipeLoader.yaml_implicit_resolvers

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = '"' if re.search("[\x85\u2028\u2029]", data) else None  # unquoted they are read as breaks of lines
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_Dumper.add_representer(str, _Dumper.represent_str)


def written_yaml(value: Any, flow: bool | None = False) -> str:
    """Plain values as YAML that :func:`parse_yaml` reads back; with ``flow=None`` the innermost ones on one line.

    >>> written_yaml({"out": "1e3", "training": {"lr": 0.001}})
    "out: '1e3'\\ntraining:\\n  lr: 0.001\\n"
    """
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=flow, width=100, allow_unicode=True)


def parse_yaml(text: str, what: str) -> Any:
    """Plain values from YAML; ``what`` it is stands in the message of a mistake."""
    try:
        value = yaml.load(text, RecipeLoader)
        _written_out(value, what, {})
        return value
    except RecipeError:
        raise
    except RecursionError:
        raise RecipeError(f"{what}: a part of it contains itself, or it is nested too deeply") from None
    except Exception as error:  # a wrong value after a tag, such as `!!bool x`, makes the reader raise anything
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise RecipeError(f"{what}{line}: not YAML: {problem}") from None


def _written_out(value: Any, what: str, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """How many values there are, and how deep, when each alias is written out; more than a recipe needs is refused."""
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise RecipeError(f"{what}: a whole number of {value.bit_length()} bits: expected 64 at most")
    if not isinstance(value, dict | list | set | tuple):
        return 1, 1
    if id(value) not in known:
        known[id(value)] = MOST_VALUES, MOST_DEPTH  # what it counts as where it contains itself
        inside = (*value, *value.values()) if isinstance(value, dict) else value
        found = [_written_out(part, what, known) for part in inside]
        count, depth = 1 + sum(n for n, _ in found), 1 + max((d for _, d in found), default=0)
        if depth > MOST_DEPTH:
            raise RecipeError(f"{what}: a part of it contains itself, or it is nested more than {MOST_DEPTH} deep")
        if count > MOST_VALUES:
            raise RecipeError(f"{what}: more than {MOST_VALUES:,} values, with its aliases written out")
        known[id(value)] = count, depth
    return known[id(value)]
