"""How the programs read their settings: dataclasses as command-line options and YAML files, checked name by name.

jsonargparse converts the values and writes --help and --print_config; the names are checked here, before it, because it
would take abbreviations, NaN in files and the second of two equal keys.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import yaml

from ..config import TrainConfig
from ..errors import ConfigurationError

# fairseq's names, by their last part: ours, and how to convert. Asked only for names that are not ours.
FAIRSEQ_NAMES = {
    "activation_dropout": "has no counterpart: RoBERTa has no dropout inside the MLP",
    "adam_betas": "is optimizer.betas here, a list: [0.9, 0.98]",
    "adam_eps": "is optimizer.eps here",
    "arch": "is --config here, with a preset: distilroberta, roberta-base or roberta-large",
    "attention_dropout": "is model.attention_probs_dropout_prob here",
    "batch_size": "is micro_batch_size here; train_batch_size = batch_size x update_freq x number of devices",
    "bf16": "is precision: bf16 here",
    "checkpoint_activations": "is gradient_checkpointing here",
    "clip_norm": "is optimizer.max_grad_norm here; 0 switches it off in both",
    "cpu": "is device: cpu here",
    "dropout": "is model.hidden_dropout_prob here",
    "encoder_attention_heads": "is model.num_attention_heads here",
    "encoder_embed_dim": "is model.hidden_size here",
    "encoder_ffn_embed_dim": "is model.intermediate_size here",
    "encoder_layers": "is model.num_hidden_layers here",
    "fp16": "is precision: fp16 here",
    "keep_interval_updates": "is save_total_limit here",
    "keep_last_epochs": "is save_total_limit here, counted in checkpoints",
    "leave_unmasked_prob": "is fixed here at 0.1, as in the paper",
    "log_interval": "is logging_steps here",
    "lr": "is optimizer.learning_rate here, one number instead of a list",
    "mask_prob": "is mlm_probability here",
    "mask_whole_words": "has no counterpart: RoBERTa masks single tokens",
    "max_epoch": "has no counterpart: give max_steps = epochs x sequences / train_batch_size",
    "max_positions": "is model.max_position_embeddings here, two more than fairseq's number",
    "max_sentences": "is micro_batch_size here; train_batch_size = max_sentences x update_freq x number of devices",
    "max_source_positions": "is model.max_position_embeddings here, two more than fairseq's number",
    "max_tokens": "has no counterpart, every sequence being full: give micro_batch_size = max_tokens / max_seq_length",
    "max_update": "is max_steps here",
    "memory_efficient_fp16": "is precision: fp16 here",
    "min_lr": "has no counterpart: the schedules end at 0",
    "no_progress_bar": "is not needed: without a terminal the progress is plain lines",
    "peak_lr": "is optimizer.learning_rate here",
    "random_token_prob": "is fixed here at 0.1, as in the paper",
    "restore_file": "is init_from here, a Hugging Face directory; a run in output_dir continues by itself",
    "sample_break_mode": "is packing here: complete -> full-sentences, complete_doc -> doc-sentences, "
    "none -> contiguous",
    "save_dir": "is output_dir here",
    "save_interval_updates": "is save_steps here",
    "shorten_method": "has no counterpart: a sentence longer than max_seq_length is split, nothing is lost",
    "skip_invalid_size_inputs_valid_test": "has no counterpart: a long sentence is split, nothing is skipped",
    "tensorboard_logdir": "is tensorboard: true here; the files go to output_dir",
    "tokens_per_sample": "is max_seq_length here",
    "total_num_update": "is max_steps here: the decay ends with the run",
    "update_freq": "has no counterpart: it follows from train_batch_size, the sequences of a whole step "
    "(batch_size x update_freq x number of devices), and micro_batch_size",
    "validate_interval_updates": "is eval_steps here",
    "warmup_updates": "is lr_scheduler.warmup_steps here",
}
# Settings of plan.py's PlanConfig, which training does not have; importing plan.py from here would go against the floors.
PLAN_NAMES = (
    "nodes", "gpus", "gpu_name", "gpu_memory", "gpu_bandwidth", "mfu", "node_bandwidth", "network_bandwidth",
)  # fmt: skip


class _Setting(NamedTuple):
    """One leaf of a dataclass of settings; the key is dotted, default is MISSING where the user must give one."""

    key: str
    type: Any
    default: Any
    help: str
    valid: str | None
    positional: bool
    section: str  # what its group in --help is about


Config = TypeVar("Config")
PRESETS = Path(__file__).parent.parent / "presets"


def parse_arguments(
    argv: Sequence[str] | None, config_class: type[Config], *, description: str, default_preset: str | None = None
) -> Config:
    """The settings of a program from its command line (None: sys.argv), validated.

    Settings are given as --key value or --key=value, nested ones with dots, dashes and underscores alike, a true
    or false one also by its name alone; --config names a YAML file, or, where the program has a default_preset, a
    preset, and may be repeated. The command line overrides files, whatever the order. --help and --print_config
    print and exit. Raises ConfigurationError in one line that names the option, or the file and the line.
    """
    settings = _list_settings(config_class)
    files, options, actions = _split_arguments(sys.argv[1:] if argv is None else argv, settings, config_class)
    if default_preset and not files:
        files = [default_preset]
    parser = _build_parser(settings, description, has_presets=default_preset is not None)
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for file in files:
        path = _find_config(file, has_presets=default_preset is not None)
        for key, value, line in _read_yaml(path):
            if key not in settings:
                if value is None and _is_section(key, settings):
                    continue  # "model:" with nothing below it
                raise _unknown(key, settings, config_class, f"{path}:{line}: ")
            places[key] = f"{path}:{line}: "
            values[key] = _convert(parser, settings[key], value, places[key])
    for key, option in options.items():
        places.pop(key, None)
        values[key] = _convert(parser, settings[key], option, "--")
    if actions:
        parser.set_defaults(values)
        parser.parse_args(actions)  # prints and exits
    config = _build(config_class, values)
    try:
        validate(config)
    except ConfigurationError as error:
        place = places.get(str(error).split(" ")[0], "")  # the messages of validate begin with their key
        raise ConfigurationError(f"{place}{error}") from None
    return config


def validate(config: Any) -> None:
    """Raise ConfigurationError, naming the setting, where a value is missing, not finite or out of its range.

    After the single values, the method check() of the parts and of the whole, where there is one, looks at what
    belongs together.
    """
    for one in _list_settings(type(config)).values():
        value: Any = config
        for name in one.key.split("."):
            value = getattr(value, name)
        if value is None or (one.positional and value == [] and one.default is dataclasses.MISSING):
            if one.default is dataclasses.MISSING:
                raise ConfigurationError(f"{one.key if one.positional else '--' + one.key} is required: see --help")
            if type(None) not in typing.get_args(one.type):
                raise ConfigurationError(f"{one.key} = null: takes {_describe_type(one.type)}")
        for item in value if isinstance(value, tuple | list) else [value]:
            if item == "":
                way_out = "give a value" if one.default is dataclasses.MISSING else "give a value, or leave it out"
                raise ConfigurationError(f"{one.key} is empty: {way_out}")
            if isinstance(item, bool) or not isinstance(item, int | float):
                continue
            if not math.isfinite(item):
                raise ConfigurationError(f"{one.key} = {item}: must be a finite number")
            if one.valid and not _lies_in(item, one.valid):
                raise ConfigurationError(f"{one.key} = {item}: must lie in {one.valid}")
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
    settings = _list_settings(config_class)
    parser = _build_parser(settings, "", has_presets=False)
    flat: dict[str, Any] = {}

    def flatten(inside: Mapping[str, Any], prefix: str) -> None:
        for name, value in inside.items():
            key = f"{prefix}{name}"
            if isinstance(value, Mapping):
                flatten(value, key + ".")
            elif key not in settings:
                raise _unknown(key, settings, config_class)
            else:
                flat[key] = _convert(parser, settings[key], value)

    flatten(values, "")
    config = _build(config_class, flat)
    validate(config)
    return config


def _list_settings(config_class: type, prefix: str = "", section: str = "") -> dict[str, _Setting]:
    """Every leaf below the dataclass by its dotted key, in the order of the fields."""
    settings: dict[str, _Setting] = {}
    types = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        key, kind = prefix + field.name, types[field.name]
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            settings |= _list_settings(kind, key + ".", kind.__doc__ or "")
            continue
        about, default = field.metadata, field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        valid, positional = about.get("valid"), about.get("positional", False)
        settings[key] = _Setting(key, kind, default, about.get("help", ""), valid, positional, section)
    return settings


def _is_section(key: str, settings: Mapping[str, _Setting]) -> bool:
    return any(other.startswith(key + ".") for other in settings)


def _lies_in(number: float, interval: str) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = number >= low if interval[0] == "[" else number > low
    return above and (number <= high if interval[-1] == "]" else number < high)


def _describe_type(kind: Any) -> str:
    """A type in words: "a whole number or auto"."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if kind in words:
        return words[kind]
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return _join(map(str, inside))
    if origin is tuple:
        return f"a list of {len(inside)} as [a, b], each {_describe_type(inside[0])}"
    if origin is list:
        return f"a list as [a, b], each {_describe_type(inside[0])}"
    return _join(map(_describe_type, inside))


def _join(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def _build_parser(settings: Mapping[str, _Setting], description: str, *, has_presets: bool) -> Any:
    import jsonargparse  # slow to import, and not needed to use a configuration

    spec = sys.modules["__main__"].__spec__  # None where the program is a file, not a module
    program = f"python -m {spec.name}" if spec else None
    parser = jsonargparse.ArgumentParser(
        prog=program, description=description, exit_on_error=False, epilog="Dashes and underscores are the same."
    )
    presets = f"one of the presets {', '.join(_list_presets())}, or " if has_presets else ""
    parser.add_argument(
        "--config",
        action="config",
        metavar="PRESET|FILE" if has_presets else "FILE",
        help=f"{presets}a YAML file as --print_config prints it; may be repeated",
    )
    several = {one.key: "..." if typing.get_origin(one.type) is list else "" for one in settings.values()}
    words = [one.key.upper() + several[one.key] for one in settings.values() if one.positional]
    config = "[--config PRESET|FILE]" if has_presets else "[--config FILE]"
    parser.usage = " ".join(["%(prog)s", *words, config, "[--SETTING VALUE]..."])
    groups: dict[str, Any] = {"": parser}
    for one in settings.values():
        required = one.default is dataclasses.MISSING
        text = one.help + (" (required)" if required and not one.positional else "")
        options: dict[str, Any] = {"type": one.type, "help": text, "default": None if required else one.default}
        name = "--" + one.key
        if one.positional:
            options |= {"type": str, "nargs": "*" if several[one.key] else "?", "metavar": one.key.upper()}
            name = one.key
        if one.section not in groups:
            groups[one.section] = parser.add_argument_group(one.key.rpartition(".")[0], one.section)
        groups[one.section].add_argument(name, **options)
    return parser


def _split_arguments(
    argv: Sequence[str], settings: Mapping[str, _Setting], config_class: type
) -> tuple[list[str], dict[str, Any], list[str]]:
    """The command line as files of --config, values by key, and options that print and exit."""
    files: list[str] = []
    options: dict[str, Any] = {}
    actions: list[str] = []
    words: list[str] = []
    rest = iter(range(len(argv)))
    for i in rest:
        if argv[i] == "--":
            words += argv[i + 1 :]
            break
        if not argv[i].startswith("-") or argv[i] == "-":
            words.append(argv[i])
            continue
        name, equals, value = argv[i].partition("=")
        key = "help" if name == "-h" else name[2:].replace("-", "_")
        if not name.startswith("--") and name != "-h":
            raise ConfigurationError(f"{name}: options begin with two dashes, see --help")
        if key in ("help", "print_config"):
            actions.append(f"--{key}{equals}{value}")
            continue
        if key != "config" and key not in settings:
            raise _unknown(key, settings, config_class, "--")
        if key != "config" and settings[key].positional:
            raise ConfigurationError(f"--{key}: is given without its name, see --help")
        following = argv[i + 1] if i + 1 < len(argv) else "--"
        if not equals:
            if key != "config" and settings[key].type is bool and following.lower() not in _BOOLEANS:
                value = "true"
            elif following.startswith("--"):
                raise ConfigurationError(f"--{key} needs a value")
            else:
                value = following
                next(rest)
        if key == "config":
            files.append(value)
        else:
            options[key] = value
    for one in settings.values():
        if one.positional and words:
            several = typing.get_origin(one.type) is list
            options[one.key] = words if several else words[0]
            words = [] if several else words[1:]
    if words:
        raise ConfigurationError(f"{words[0]}: belongs to no option, see --help")
    return files, options, actions


_BOOLEANS = ("true", "false", "yes", "no")


def _unknown(key: str, settings: Mapping[str, _Setting], config_class: type, place: str = "") -> ConfigurationError:
    """The error for a name that is not ours: how fairseq's name converts, or the nearest of ours."""
    last = key.rpartition(".")[2]
    if last in FAIRSEQ_NAMES and issubclass(config_class, TrainConfig):
        return ConfigurationError(f"{place}{key} {FAIRSEQ_NAMES[last]}")
    if key in PLAN_NAMES and config_class is TrainConfig:
        return ConfigurationError(
            f"{place}{key} belongs to --plan, which predicts a run and does not train: give --plan too, or leave it out"
        )
    if _is_section(key, settings):
        example = next(other for other in settings if other.startswith(key + "."))
        return ConfigurationError(f"{place}{key} is a group of settings: give them singly, as {example}")

    def likeness(other: str) -> float:
        return max(
            difflib.SequenceMatcher(None, key, other).ratio(),
            difflib.SequenceMatcher(None, last, other.rpartition(".")[2]).ratio(),
        )

    dashes = "--" if place == "--" else ""
    named = [other for other, one in settings.items() if not (dashes and one.positional)]
    return ConfigurationError(f"{place}{key} is not a setting; the nearest is {dashes}{max(named, key=likeness)}")


def _convert(parser: Any, one: _Setting, value: Any, place: str = "") -> Any:
    """The value as the setting's type; text from the command line is read as YAML would be."""
    from jsonargparse import ArgumentError

    try:
        if place == "--" and not one.positional:
            converted = parser.parse_args([f"--{one.key}={value}"])[one.key]
        else:
            converted = parser.parse_object({one.key: value})[one.key]
    except ArgumentError:
        raise ConfigurationError(f"{place}{one.key} = {value}: takes {_describe_type(one.type)}") from None
    return converted


def _build(config_class: type[Config], values: Mapping[str, Any], prefix: str = "") -> Config:
    """The dataclass from values by dotted key; a required one that is missing becomes None, for validate to find."""
    types = typing.get_type_hints(config_class)
    given = {}
    for field in dataclasses.fields(config_class):  # type: ignore[arg-type]
        key = prefix + field.name
        if dataclasses.is_dataclass(types[field.name]):
            given[field.name] = _build(types[field.name], values, key + ".")
        elif key in values:
            given[field.name] = values[key]
        elif field.default is field.default_factory is dataclasses.MISSING:
            given[field.name] = None
    return config_class(**given)


def _list_presets() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def _find_config(name: str, *, has_presets: bool) -> Path:
    presets = _list_presets() if has_presets else []
    if name in presets:
        return PRESETS / f"{name}.yaml"
    path = Path(name)
    if path.is_file():
        return path
    if presets:
        raise ConfigurationError(f"--config {name}: no such file, and the presets are {', '.join(presets)}")
    raise ConfigurationError(f"--config {name}: no such file")


class _Loader(yaml.SafeLoader):
    """YAML without aliases, which could hold themselves."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "an alias: write the value out", mark)
        return super().compose_node(parent, index)


def _read_yaml(path: Path) -> Iterator[tuple[str, Any, int]]:
    """Dotted key, value and line of each leaf of a YAML file."""
    lines: dict[str, int] = {}

    def walk(node: yaml.MappingNode, prefix: str) -> Iterator[tuple[str, Any, int]]:
        for name, child in node.value:
            line = name.start_mark.line + 1
            if name.tag != "tag:yaml.org,2002:str":
                raise ConfigurationError(f"{path}:{line}: {name.value or 'this key'} is not a name")
            key = prefix + name.value
            if key in lines:
                raise ConfigurationError(f"{path}:{line}: {key} is given twice, first in line {lines[key]}")
            lines[key] = line
            if isinstance(child, yaml.MappingNode):
                yield from walk(child, key + ".")
                continue
            yield key, loader.construct_object(child, deep=True), line

    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if isinstance(root, yaml.MappingNode):
            yield from walk(root, "")
        elif root is not None:
            raise ConfigurationError(f"{path}:1: settings are written as name: value")
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path}: is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise ConfigurationError(f"{path}: is nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigurationError(f"{path}:{line}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{path}: {' '.join(str(error).split())}") from None
