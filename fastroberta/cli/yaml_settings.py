"""Settings from YAML files, each with its file and line, so that an error message can name them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigurationError

PRESETS = {path.stem: path for path in sorted((Path(__file__).parent.parent / "presets").glob("*.yaml"))}


def find_file(name: str, *, has_presets: bool) -> Path:
    """The file that --config names: a preset, if the program has presets, or a path. Raises ConfigurationError."""
    if has_presets and name in PRESETS:
        return PRESETS[name]
    if not Path(name).is_file():
        presets = f", and the presets are {', '.join(PRESETS)}" if has_presets else ""
        raise ConfigurationError(f"--config {name}: no such file{presets}")
    return Path(name)


def read_settings(path: Path) -> Iterator[tuple[str, Any, str]]:
    """Dotted key, value and place ("FILE:LINE: ") of each setting in a YAML file.

    Raises:
        ConfigurationError: the file cannot be read, is no YAML mapping, gives a key twice or holds an alias.
    """
    lines: dict[str, int] = {}

    def walk(node: yaml.MappingNode, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
        for name, child in node.value:
            key, line = f"{prefix}{name.value}", name.start_mark.line + 1
            if name.tag != "tag:yaml.org,2002:str":
                raise ConfigurationError(f"{path}:{line}: {name.value or 'this key'} is not a name")
            if key in lines:
                raise ConfigurationError(f"{path}:{line}: {key} is given twice, first in line {lines[key]}")
            lines[key] = line
            if isinstance(child, yaml.MappingNode):
                yield from walk(child, key + ".")
            else:
                yield key, loader.construct_object(child, deep=True), f"{path}:{line}: "

    try:
        text = path.read_text(encoding="utf-8")
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):  # it could contain itself
                raise yaml.MarkedYAMLError(problem="an alias: write the value out", problem_mark=event.start_mark)
        if isinstance(root, yaml.MappingNode):
            yield from walk(root)
        elif root is not None:
            raise ConfigurationError(f"{path}:1: settings are written as name: value")
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        fault = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigurationError(f"{path}{f':{mark.line + 1}' if mark else ''}: {fault}") from None
