"""Values of settings: from text, YAML or JSON to the type of a dataclass field."""

from __future__ import annotations

import json
import types
import typing
from typing import Any, Literal

import yaml

# What may go wrong in `convert`.
FAULTS = (ValueError, TypeError, OverflowError, RecursionError, yaml.YAMLError)
BOOLEANS = {"true": True, "yes": True, "false": False, "no": False}
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}


def convert(value: Any, kind: Any) -> Any:
    """`value` as the type `kind`; text is read as in YAML, except that 6e-4 is a number. Raises one of FAULTS.

    A list may be given as YAML, as words between commas, or as its only item.
    """
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        for one in sorted(inside, key=lambda one: one is not types.NoneType):  # "null" is not text here
            try:
                return convert(value, one)
            except FAULTS:
                continue
    elif origin is Literal and value in inside:
        return value
    elif origin in (tuple, list):
        items = value
        if isinstance(value, str):
            if value.lstrip().startswith("["):
                items = yaml.safe_load(value)
            else:  # a name may hold commas
                items = [value] if inside[0] is str else [item.strip() for item in value.split(",")]
        elif origin is list and isinstance(items, int | float):
            items = [items]
        if isinstance(items, tuple | list) and (origin is list or len(items) == len(inside)):
            return origin(convert(item, inside[0]) for item in items)
    elif kind is types.NoneType and value in (None, "null"):
        return None
    elif kind is bool and str(value).lower() in BOOLEANS:
        return BOOLEANS[str(value).lower()]
    elif kind is str and isinstance(value, str):
        return value
    elif kind in (int, float) and not isinstance(value, bool) and not (kind is int and isinstance(value, float)):
        return kind(value)
    raise ValueError(value)


def describe_type(kind: Any) -> str:
    """A type in words: "a whole number or auto"."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if kind in WORDS:
        return WORDS[kind]
    if origin is tuple:
        return f"a list of {len(inside)} as [a, b], each {describe_type(inside[0])}"
    if origin is list:
        return f"{describe_type(inside[0])}, or a list as [a, b]"
    *first, last = map(str if origin is Literal else describe_type, inside)
    return f"{', '.join(first)} or {last}" if first else last


def show(value: Any) -> str:
    """A value as YAML has it: null, true, [0.9, 0.98]; text without quotes."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def lies_in(number: float, interval: str) -> bool:
    """Whether a number lies in an interval such as "[0, 1)"; NaN lies in none."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = number >= low if interval[0] == "[" else number > low
    return above and (number <= high if interval[-1] == "]" else number < high)
