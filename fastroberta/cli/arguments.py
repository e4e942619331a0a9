"""The settings of a program: a dataclass filled from YAML files and the command line, then checked.

argparse only lays out --help: it cannot name the line of a file, or tell `--flag word` from `--key value`.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import operator
import sys
import textwrap
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import yaml

from ..config import TrainConfig
from ..errors import ConfigurationError
from .conversion import BOOLEANS, FAULTS, convert, describe_type, lies_in, show
from .directories import check_local
from .foreign_names import HINTS
from .yaml_settings import PRESETS, find_file, read_settings

Config = TypeVar("Config")
# Dotted key, value, and how a message about it begins: "FILE:LINE: ", "--" or "".
Found = Iterable[tuple[str, Any, str]]
COMMON = {"config": str, "print_config": bool, "help": bool}


class _Setting(NamedTuple):
    """A leaf of a dataclass of settings; the default is MISSING where the user must give a value."""

    type: Any
    default: Any
    help: str
    valid: str | None
    positional: bool
    path: str | None
    replaces: str | None
    section: str  # docstring of its dataclass, if nested


def parse_arguments(
    argv: Sequence[str] | None, config_class: type[Config], *, description: str, default_preset: str | None = None
) -> Config:
    """The settings of a program from its command line (None: sys.argv), validated.

    --key value and --key=value are the same, as are dashes and underscores; a boolean is set by its name alone, and an
    option that takes a list may be repeated. --config names a YAML file, or a preset if the program has a default_preset,
    and may be repeated. The command line overrides files, wherever --config stands. --help and --print_config print and
    exit. A ConfigurationError names the option, or file and line.
    """
    settings = _list_settings(config_class)
    options = list(_split(sys.argv[1:] if argv is None else argv, settings, config_class))
    files = [value for key, value, _ in options if key == "config"]
    if default_preset and not files and all(key != "data" for key, _, _ in options):
        files = [default_preset]  # own data ask for the defaults, which suit them
    found = [one for file in files for one in read_settings(find_file(file, has_presets=bool(default_preset)))]
    found += [one for one in options if one[0] not in COMMON]
    values = _collect(config_class, settings, found)
    if actions := {key for key, _, _ in options} & {"help", "print_config"}:
        help_text = _format_help(values, settings, description, files, default_preset)
        print(help_text if "help" in actions else yaml.safe_dump(values, sort_keys=False), end="")
        sys.exit(0)
    config = _build(config_class, values)
    try:
        validate(config)
        for key, one in settings.items():
            value = functools.reduce(getattr, key.split("."), config)
            if one.path and value:
                for item in value if isinstance(value, list) else [value]:
                    check_local(key, str(item), one.path)
    except ConfigurationError as error:  # begins with the key
        place = {key: place for key, _, place in found}.get(str(error).split(" ")[0], "")
        raise ConfigurationError(f"{place}{error}") from None
    return config


def validate(config: Any) -> None:
    """Check each value by itself, then values together, by the check() of each section and of the whole.

    Raises:
        ConfigurationError: naming the setting whose value is missing, empty or out of range.
    """
    for key, one in _list_settings(type(config)).items():
        value = functools.reduce(getattr, key.split("."), config)
        if one.default is dataclasses.MISSING and value in (None, []):
            raise ConfigurationError(f"{key if one.positional else '--' + key} is required: see --help")
        for item in value if isinstance(value, tuple | list) else [value]:
            if item == "":
                raise ConfigurationError(f"{key} is empty: give a value")
            if one.valid and isinstance(item, int | float) and not lies_in(item, one.valid):
                raise ConfigurationError(f"{key} = {item}: must lie in {one.valid}")
    parts = [getattr(config, field.name) for field in dataclasses.fields(config)]
    for part in [*filter(dataclasses.is_dataclass, parts), config]:
        if hasattr(part, "check"):
            part.check()


def to_dict(config: Any) -> dict[str, Any]:
    """The settings as nested dictionaries of what JSON knows (tuples become lists)."""
    return dataclasses.asdict(
        config, dict_factory=lambda items: {name: [*v] if isinstance(v, tuple) else v for name, v in items}
    )


def from_dict(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """The inverse of to_dict; what is left out has its default. Raises ConfigurationError as parse_arguments does."""

    def flatten(inside: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, str]]:
        for name, value in inside.items():
            if isinstance(value, Mapping):
                yield from flatten(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value, ""

    config = _build(config_class, _collect(config_class, _list_settings(config_class), flatten(values)))
    validate(config)
    return config


def _list_settings(config_class: Any, prefix: str = "") -> dict[str, _Setting]:
    """Every leaf below the dataclass by its dotted key, in the order of the fields."""
    settings: dict[str, _Setting] = {}
    kinds = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(kind := kinds[field.name]):
            settings |= _list_settings(kind, f"{prefix}{field.name}.")
        else:
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            kind = kind | None if default is None else kind
            section = config_class.__doc__ if prefix else ""
            settings[prefix + field.name] = _Setting(kind, default, **field.metadata, section=section)
    return settings


def _collect(config_class: type, settings: Mapping[str, _Setting], found: Found) -> dict[str, Any]:
    """All settings, nested: the last value found, converted, or else the default, or None where there is none."""
    values = {key: None if one.default is dataclasses.MISSING else one.default for key, one in settings.items()}
    lists: dict[str, list[Any]] = {}  # given so far on the command line
    for key, value, place in found:
        if key in settings:
            try:
                values[key] = given = convert(value, settings[key].type)
                if place == "--" and isinstance(given, list):
                    values[key] = lists[key] = lists.get(key, []) + given
            except FAULTS:
                wanted = describe_type(settings[key].type)
                raise ConfigurationError(f"{place}{key} = {show(value)}: takes {wanted}") from None
            if settings[key].replaces and values[key] is not None:
                values[".".join([*key.split(".")[:-1], str(settings[key].replaces)])] = None
        elif value is not None or not any(other.startswith(key + ".") for other in settings):  # "model:" alone is none
            raise _unknown(key, settings, config_class, place)
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        functools.reduce(lambda inside, section: inside.setdefault(section, {}), sections, nested)[name] = value
    return nested


def _build(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    kinds = typing.get_type_hints(config_class)
    return config_class(**{k: _build(kinds[k], v) if isinstance(v, dict) else v for k, v in values.items()})


def _split(argv: Sequence[str], settings: Mapping[str, _Setting], config_class: type) -> Iterator[tuple[str, Any, str]]:
    """Key, value and place of each setting on the command line, and of --config, --print_config and --help."""
    kinds = COMMON | {key: one.type for key, one in settings.items()}
    words, rest = [], [*argv]
    while rest:
        word = rest.pop(0)
        name, equals, value = ("--help" if word == "-h" else word).partition("=")
        key = name[2:].replace("-", "_")
        if word == "--":
            words += rest
            break
        if not name.startswith("-") or name == "-":
            words.append(word)
        elif not name.startswith("--"):
            raise ConfigurationError(f"{name}: options begin with two dashes, see --help")
        elif key not in kinds:
            raise _unknown(key, settings, config_class, "--")
        elif key in settings and settings[key].positional:
            raise ConfigurationError(f"--{key}: give the value alone, without --{key}; see --help")
        elif equals:
            yield key, value, "--"
        elif kinds[key] is bool and (not rest or rest[0].lower() not in BOOLEANS):
            yield key, "true", "--"
        elif not rest or rest[0].startswith("--"):
            raise ConfigurationError(f"--{key} needs a value")
        else:
            yield key, rest.pop(0), "--"
    for key, one in settings.items():
        if one.positional and words:
            count = len(words) if one.type == list[str] else 1
            yield key, words if one.type == list[str] else words[0], ""
            words = words[count:]
    if words:
        raise ConfigurationError(f"{words[0]}: unexpected argument, see --help")


def _unknown(key: str, settings: Mapping[str, _Setting], config_class: type, place: str) -> ConfigurationError:
    """The error for a name that is not ours: what another library's name is here, or the most similar of ours."""
    last = key.rpartition(".")[2]
    if issubclass(config_class, TrainConfig) and last in HINTS:
        return ConfigurationError(f"{place}{key} {HINTS[last]}")
    if example := next((other for other in settings if other.startswith(key + ".")), None):
        return ConfigurationError(f"{place}{key} is a group of settings; give single ones, such as {example}")

    def likeness(other: str) -> float:
        pairs = ((key, other), (last, other.rpartition(".")[2]))
        return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    dashes = "--" if place == "--" else ""
    named = [other for other, one in settings.items() if not (dashes and one.positional)]
    return ConfigurationError(f"{place}{key} is not a setting; did you mean {dashes}{max(named, key=likeness)}?")


def _format_help(
    values: Mapping[str, Any],
    settings: Mapping[str, _Setting],
    description: str,
    files: Sequence[str],
    default_preset: str | None,
) -> str:
    """The text of --help: each default, and the value that the files give where it is another."""
    spec = sys.modules["__main__"].__spec__  # None where the program is a file, not a module
    words = [key.upper() + "..." * (one.type == list[str]) for key, one in settings.items() if one.positional]
    config = "PRESET|FILE" if default_preset else "FILE"
    source = " and ".join(files)
    parser = argparse.ArgumentParser(
        prog=f"python -m {spec.name}" if spec else None,
        usage=" ".join(["%(prog)s", *words, f"[--config {config}]", "[--SETTING VALUE]..."]),
        description="\n\n".join(textwrap.fill(part, 80) for part in description.split("\n\n")),
        epilog=textwrap.fill(
            "A YAML file replaces the defaults that it names, and no others. Without --config and --data, the preset "
            f"{default_preset} is such a file."
            + f" Where {source} differs from a default, its value stands beside it."
            * bool(files),
            80,
        )
        * bool(default_preset),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--print_config", action="store_true", help="print all settings as YAML for --config and exit")
    presets = f"preset ({', '.join(PRESETS)}) or " if default_preset else ""
    parser.add_argument("--config", metavar=config, help=f"{presets}YAML file of settings; may be repeated")
    groups: dict[str, Any] = {"": parser}
    for key, one in settings.items():
        value = functools.reduce(operator.getitem, key.split("."), values)
        note = "required" if one.default is dataclasses.MISSING else f"default: {show(one.default)}"
        if value != one.default and note != "required":
            note += f"; {source}: {show(value)}"
        text = f"{one.help} ({describe_type(one.type)}; {note})".replace("%", "%%")
        if one.section not in groups:
            groups[one.section] = parser.add_argument_group(key.rpartition(".")[0], one.section)
        if one.positional:
            parser.add_argument(key, metavar=key.upper(), help=one.help.replace("%", "%%"))
        else:
            groups[one.section].add_argument(f"--{key}", action="store_true", help=text)
    return parser.format_help()
