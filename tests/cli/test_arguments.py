"""Settings: what is accepted, and the one line that says why anything else is not."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from fastroberta.cli.arguments import from_dict, parse_arguments, to_dict, validate
from fastroberta.cli.foreign_names import COMMON_NAMES, FAIRSEQ_NAMES, HUGGING_FACE_NAMES
from fastroberta.cli.program import run
from fastroberta.cli.yaml_settings import PRESETS
from fastroberta.config import LRSchedulerConfig, ModelConfig, OptimizerConfig, TrainConfig, setting
from fastroberta.costs import num_parameters
from fastroberta.errors import ConfigurationError
from fastroberta.plan import ClusterConfig


@dataclass
class CopyConfig:
    """A program with positional arguments, a required option and a list."""

    sources: list[str] = setting(help="files", positional=True)
    out: str = setting(help="folder; 100% yours")
    kinds: list[str] = setting(list, "kinds")
    skip_empty: bool = setting(False, "skip")
    share: float = setting(0.5, "share", valid="(0, 1]")


@dataclass
class ExportConfig:
    checkpoint: str = setting(help="checkpoint", positional=True)
    out: str = setting(help="folder", positional=True)


def parse(*argv: str) -> TrainConfig:
    return parse_arguments(argv, TrainConfig, description="Train.", default_preset="quickstart")


def refuse(*argv: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        parse(*argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


# What is accepted.


def test_nothing_on_the_command_line_is_the_default_preset():
    config = parse()
    assert config.output_dir == "runs/quickstart"
    own = parse("--data", "mine")
    assert (own.max_seq_length, own.output_dir) == (512, "runs/roberta")  # of a first run on one's own text
    assert config.model.hidden_size == 128


@pytest.mark.parametrize("argv", [["--optimizer.learning_rate", "1e-2"], ["--optimizer.learning_rate=1e-2"]])
def test_dotted_override(argv):
    assert parse(*argv).optimizer.learning_rate == 0.01


def test_dashes_flags_and_lists():
    config = parse("--dry-run", "--torch-compile", "false", "--max-steps", "1_000", "--optimizer.betas", "[0.8, 0.9]")
    assert config.dry_run is True
    assert config.torch_compile is False
    assert config.max_steps == 1000
    assert config.optimizer.betas == (0.8, 0.9)


@pytest.mark.parametrize("text", ["trackio", "[trackio]", "trackio, wandb", "[trackio, wandb]", "[]"])
def test_a_list_may_be_words(text):
    expected = [name for name in ("trackio", "wandb") if name in text]
    assert parse("--report_to", text).report_to == expected
    assert refuse("--report_to", "none").startswith(
        "--report_to = none: takes tensorboard, trackio or wandb, or a list"
    )


def test_command_line_overrides_files_and_later_files_earlier_ones(tmp_path):
    first = write(tmp_path / "a.yaml", "seed: 2\nmax_steps: 600\neval_steps: 5\n")
    second = write(tmp_path / "b.yaml", "seed: 3\nmax_steps: 700\n")
    config = parse("--seed", "4", "--config", "quickstart", "--config", first, f"--config={second}")
    assert (config.seed, config.max_steps, config.eval_steps, config.max_seq_length) == (4, 700, 5, 64)


def test_file_starts_from_the_defaults_not_from_the_default_preset(tmp_path):
    config = parse("--config", write(tmp_path / "a.yaml", "seed: 2\n"))
    assert config == TrainConfig(seed=2)
    assert config.model == ModelConfig(max_position_embeddings=514)
    assert (config.max_steps, config.lr_scheduler.warmup_steps) == (10_000, 600)


def test_values_keep_their_types(tmp_path):
    text = "data: '2024'\nmicro_batch_size: 8\noptimizer:\n  learning_rate: 6e-4\n  eps: 1\nmodel:\n"
    config = parse("--config", write(tmp_path / "a.yaml", text))
    assert config.data == ["2024"]
    assert config.micro_batch_size == 8
    assert config.optimizer.learning_rate == 6e-4  # YAML 1.1 reads this as text
    assert isinstance(config.optimizer.eps, float)
    assert parse("--data", "2024", "--micro-batch-size", "auto").data == ["2024"]
    assert parse("--data", "a,b", "--seed", "2", "--data=[c, 'd:0.3']").data == ["a,b", "c", "d:0.3"]
    assert parse("--config", write(tmp_path / "b.yaml", "data: [a, b]\n"), "--data", "c").data == ["c"]
    assert parse("--data", "null").data is None


@pytest.mark.parametrize(
    "given",
    [[], ["--num_train_epochs", "3"], ["--lr_scheduler.warmup_ratio", "0.1"], ["--report_to", "trackio"]],
    ids=lambda given: "".join(given) or "preset",
)
def test_print_config_reads_back(tmp_path, capsys, given):
    given = ["--config", "roberta-large", "--seed", "7", *given]
    with pytest.raises(SystemExit) as caught:
        parse(*given, "--print_config")
    assert caught.value.code == 0
    assert parse("--config", write(tmp_path / "a.yaml", capsys.readouterr().out)) == parse(*given)


def test_what_says_the_same_in_another_unit_is_replaced_by_what_comes_later(tmp_path):
    """roberta-base has 24,000 warm-up steps of 500,000."""

    def read_steps(*argv):
        config = parse("--config", "roberta-base", *argv)
        return config.max_steps, config.num_train_epochs, config.lr_scheduler.warmup_steps

    epochs = write(tmp_path / "a.yaml", "num_train_epochs: 3\nlr_scheduler:\n  warmup_ratio: 0.1\n")
    assert read_steps() == (500_000, None, 24_000)
    assert read_steps("--lr_scheduler.warmup_ratio", "0.1") == (500_000, None, 50_000)
    assert read_steps("--config", epochs, "--max_steps", "2000") == (2000, None, 200)
    assert read_steps("--config", epochs, "--max_steps", "2000", "--lr_scheduler.warmup_steps=5") == (2000, None, 5)
    config = parse("--config", epochs)
    assert (config.num_train_epochs, config.lr_scheduler.warmup_steps) == (3, None)  # the data decide
    config.settle_steps(700)
    assert (config.max_steps, config.num_train_epochs, config.lr_scheduler.warmup_steps) == (700, None, 70)


def test_position_table_follows_the_length_unless_set():
    assert parse("--max_seq_length", "128").model.max_position_embeddings == 130
    config = parse("--max_seq_length", "128", "--model.max_position_embeddings", "514")
    assert config.model.max_position_embeddings == 514
    assert parse("--model.max_position_embeddings", "null").model.max_position_embeddings == 66


def test_readme_shows_a_whole_file(tmp_path):
    page = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    config = parse("--config", write(tmp_path / "a.yaml", text))
    assert config.num_train_epochs and config.data and config.output_dir.startswith("runs/")


def test_help_shows_every_field_and_its_sentence(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--config", "roberta-large", "--help")
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in (TrainConfig, ModelConfig, OptimizerConfig, LRSchedulerConfig):
        for field in fields(part):
            if not is_dataclass(getattr(TrainConfig(), field.name, None)):
                assert len(field.metadata["help"].split()) > 1 and not field.metadata["help"].startswith("of "), (
                    field.name
                )
                assert f"{field.name} " in shown
                # Wrapped lines break at hyphens.
                assert field.metadata["help"].replace(" ", "") in shown.replace(" ", ""), field.name
    assert "(a whole number; default: 768; roberta-large: 1024)" in shown
    assert "Where roberta-large differs from a default, its value stands beside it." in shown
    with pytest.raises(SystemExit):
        parse("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "(a whole number; default: 10000; quickstart: 2400)" in shown
    assert "Without --config and --data, the preset quickstart is such a file." in shown


def test_positional_arguments_before_between_and_after_options():
    expected = CopyConfig(sources=["a", "c"], out="d", skip_empty=True)
    for argv in ("--out d --skip-empty a c", "a --out=d c --skip_empty", "a c --skip-empty true --out d"):
        assert parse_arguments(argv.split(), CopyConfig, description="") == expected
    assert parse_arguments(["--out", "d", "--", "-b"], CopyConfig, description="").sources == ["-b"]
    assert parse_arguments(["123", "null"], ExportConfig, description="") == ExportConfig("123", "null")


def test_dictionary_round_trip_through_json():
    config = parse("--config", "roberta-large", "--optimizer.betas", "[0.8, 0.9]", "--micro_batch_size", "64")
    assert to_dict(config)["optimizer"]["betas"] == [0.8, 0.9]
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config
    assert from_dict(TrainConfig, {}) == TrainConfig()  # a checkpoint from before a field was added


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_valid(name):
    config = parse("--config", name)
    assert config.output_dir == f"runs/{name}"
    assert config.data is None
    short = parse("--config", name, "--max_steps", "20")  # no setting has to follow
    assert short.lr_scheduler.warmup_steps == round(20 * config.lr_scheduler.warmup_steps / config.max_steps)


def test_warmups_are_whole_steps_of_the_whole_run():
    steps = {"distilroberta": 6000, "quickstart": 200, "roberta-base": 24_000, "roberta-large": 30_000}
    assert {name: parse("--config", name).lr_scheduler.warmup_steps for name in PRESETS} == steps


def test_presets_hold_the_numbers_of_the_papers_table_9():
    assert list(PRESETS) == ["distilroberta", "quickstart", "roberta-base", "roberta-large"]
    base, large = parse("--config", "roberta-base"), parse("--config", "roberta-large")
    for config, learning_rate, warmup_steps in ((base, 6e-4, 24_000), (large, 4e-4, 30_000)):
        optimizer = OptimizerConfig(learning_rate=learning_rate, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01)
        assert config.optimizer == optimizer
        assert (optimizer.decay, optimizer.max_grad_norm) == ("all", 0)
        assert config.lr_scheduler == LRSchedulerConfig("linear", None, warmup_steps)
        assert config.model.max_position_embeddings == 514
        assert (config.max_steps, config.train_batch_size, config.max_seq_length) == (500_000, 8192, 512)
        assert (config.model.hidden_dropout_prob, config.model.attention_probs_dropout_prob) == (0.1, 0.1)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("roberta-base", 124_697_433), ("distilroberta", 82_170_201), ("roberta-large", 355_412_057)],
)
def test_presets_have_the_published_number_of_parameters(name, parameters):
    model = parse("--config", name).model
    model.vocab_size = 50265
    assert num_parameters(model) == parameters


def test_the_default_model_is_roberta_base():
    assert parse("--config", "roberta-base").model == TrainConfig().model


# What is refused.


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("optimizer.learning_rat", "optimizer.learning_rate"),
        ("learning_rate", "optimizer.learning_rate"),
        ("num_layers", "model.num_hidden_layers"),
        ("max_step", "max_steps"),
        ("trainbatchsize", "train_batch_size"),
    ],
)
def test_unknown_key_gets_the_nearest(tmp_path, key, nearest):
    assert refuse(f"--{key}", "3") == f"--{key} is not a setting; did you mean --{nearest}?"
    path = write(tmp_path / "a.yaml", f"seed: 1\n{key}: 3\n")
    assert refuse("--config", path) == f"{path}:2: {key} is not a setting; did you mean {nearest}?"
    with pytest.raises(ConfigurationError, match=rf"{key} is not a setting; did you mean {nearest}\?"):
        from_dict(TrainConfig, {key: 3})


def test_abbreviations_are_refused():
    assert "did you mean" in refuse("--max_st", "3")
    assert "did you mean" in refuse("--optimizer.learn=3")


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("update_freq", "train_batch_size"),
        ("tokens_per_sample", "max_seq_length"),
        ("lr", "optimizer.learning_rate"),
        ("sample_break_mode", "complete_doc -> doc-sentences"),
        ("max_positions", "two more"),
        ("fp16", "precision: fp16"),
        ("max_epoch", "is num_train_epochs here"),
        ("tensorboard", "is report_to: tensorboard here"),
        ("warmup_ratio", "did you mean --lr_scheduler.warmup_ratio"),
        ("weight_decay", "did you mean --optimizer.weight_decay"),
        ("gradient_accumulation_steps", "train_batch_size"),
        ("per_device_train_batch_size", "is micro_batch_size here"),
        ("model_name_or_path", "is init_from here"),
        ("lr_scheduler_type", "is lr_scheduler.name here"),
        ("resume_from_checkpoint", "a run found in output_dir continues by itself"),
        ("push_to_hub", "python -m fastroberta.export"),
        ("deepspeed", "is sharding here"),
    ],
)
def test_foreign_name_gets_ours(name, ours):
    assert ours in refuse(f"--{name.replace('_', '-')}", "3")


def test_foreign_names_in_a_file_are_told_with_their_line(tmp_path):
    path = write(tmp_path / "a.yaml", "seed: 1\noptimization:\n  clip_norm: 3\n")  # fairseq's files have such sections
    assert refuse("--config", path).startswith(f"{path}:3: optimization.clip_norm is optimizer.max_grad_norm here")


@pytest.mark.parametrize("names", [FAIRSEQ_NAMES, HUGGING_FACE_NAMES, COMMON_NAMES])
def test_hints_name_only_what_we_have(names):
    ours = {
        field.name for part in (TrainConfig, ModelConfig, OptimizerConfig, LRSchedulerConfig) for field in fields(part)
    }
    theirs = {"complete_doc", "batch_size", "heldout_fraction", *names}  # heldout_fraction is prepare's
    for name, text in names.items():
        assert name not in {field.name for field in fields(TrainConfig)}
        words = {part for word in text.split() for part in word.strip(",.:;()").removeprefix("--").split(".")}
        assert {word for word in words if "_" in word} <= ours | theirs | {"print_config"}, name
        assert refuse(f"--{name}", "3") == f"--{name} {text}"


def test_settings_of_a_plan_are_told_where_they_belong(tmp_path):
    for field in fields(ClusterConfig):
        assert f"--{field.name} belongs to python -m fastroberta.plan" in refuse(f"--{field.name}", "1")
    path = write(tmp_path / "a.yaml", "seed: 1\nnodes: 4\n")
    assert refuse("--config", path).startswith(f"{path}:2: nodes belongs to python -m fastroberta.plan")


def test_every_float_has_an_interval():
    """It is what refuses NaN and infinity."""
    for part in (TrainConfig, ModelConfig, OptimizerConfig, LRSchedulerConfig, ClusterConfig):
        for field in fields(part):
            assert "float" not in str(field.type) or field.metadata["valid"], field.name


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("optimizer:\n  learning_rate: .nan\n", 2, "optimizer.learning_rate = nan: must lie in (0, inf)"),
        ("optimizer:\n  betas: [0.9, -.inf]\n", 2, "optimizer.betas = -inf: must lie in [0, 1)"),
        ("seed: 1\nseed: 2\n", 2, "seed is given twice, first in line 1"),
        ("model:\n  hidden_size: 4\nmodel.hidden_size: 8\n", 3, "model.hidden_size is given twice, first in line 2"),
        ("model:\n  hidden_size: 4\nmodel:\n  vocab_size: 8\n", 3, "model is given twice, first in line 1"),
        ("seed: x\n", 1, "seed = x: takes a whole number"),
        ("seed: true\n", 1, "seed = true: takes a whole number"),
        ("seed: null\n", 1, "seed = null: takes a whole number"),
        ("seed: 1.5\n", 1, "seed = 1.5: takes a whole number"),
        ("optimizer: 3\n", 1, "optimizer is a group of settings; give single ones, such as optimizer.name"),
        ("optimizer:\n  betas: 0.9\n", 2, "optimizer.betas = 0.9: takes a list of 2 as [a, b], each a number"),
        ("device: gpu\n", 1, "device = gpu: takes auto, cpu or cuda"),
        ("\nmodel:\n  hidden_size: 770\n", 3, "model.hidden_size = 770 must be a multiple of"),
        ("model:\n  hidden_dropout_prob: 1\n", 2, "model.hidden_dropout_prob = 1.0: must lie in [0, 1)"),
        ("seed: [1\nmax_steps: 3\n", 2, "expected ',' or ']'"),
        ("data: &a x\noutput_dir: *a\n", 2, "an alias"),
        ("data: &a [*a]\n", 1, "an alias"),
        ("data: !!python/name:os.system\n", 1, "could not determine a constructor"),
        ("- seed\n", 1, "settings are written as name: value"),
        ("3: 4\n", 1, "3 is not a name"),
    ],
)
def test_bad_file_names_the_line(tmp_path, text, line, what):
    path = write(tmp_path / "a.yaml", text)
    assert refuse("--config", path).startswith(f"{path}:{line}: {what}")


def test_value_of_the_command_line_is_not_blamed_on_a_file(tmp_path):
    path = write(tmp_path / "a.yaml", "seed: 3\n")
    assert refuse("--config", path, "--seed", "-1") == "--seed = -1: must lie in [0, 2147483648)"


def test_files_that_are_no_yaml(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"data: \xff\n")
    assert refuse("--config", str(tmp_path / "a.yaml")).endswith(
        "'utf-8' codec can't decode byte 0xff in position 6: invalid start byte"
    )
    deep = write(tmp_path / "b.yaml", "data: " + "[" * 3_000)
    assert refuse("--config", deep).startswith(f"{deep}: maximum recursion depth exceeded")
    assert refuse("--config", str(tmp_path)).endswith(f"no such file, and the presets are {', '.join(PRESETS)}")
    write(tmp_path / "c.yaml", "a: \x00")
    assert "c.yaml: " in refuse("--config", str(tmp_path / "c.yaml"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seed"], "--seed needs a value"),
        (["--data", "--seed", "3"], "--data needs a value"),
        (["more"], "more: unexpected argument, see --help"),
        (["-s", "3"], "-s: options begin with two dashes, see --help"),
        (["--seed", "x"], "--seed = x: takes a whole number"),
        (["--seed", "1e3"], "--seed = 1e3: takes a whole number"),
        (["--micro_batch_size", "some"], "--micro_batch_size = some: takes a whole number or auto"),
        (["--optimizer.learning_rate", "nan"], "--optimizer.learning_rate = nan: must lie in (0, inf)"),
        (["--optimizer.learning_rate", ".inf"], "--optimizer.learning_rate = .inf: takes a number"),
        (["--optimizer.learning_rate", "-1e-3"], "--optimizer.learning_rate = -0.001: must lie in (0, inf)"),
        (["--optimizer.learning_rate", "0"], "--optimizer.learning_rate = 0.0: must lie in (0, inf)"),
        (["--optimizer.betas", "[0.9, 1]"], "--optimizer.betas = 1.0: must lie in [0, 1)"),
        (["--seed", "-1"], "--seed = -1: must lie in [0, 2147483648)"),
        (["--micro_batch_size", "0"], "--micro_batch_size = 0: must lie in [1, inf)"),
        (["--micro_batch_size", "3"], "--micro_batch_size = 3 must divide train_batch_size = 16"),
        (["--output_dir", ""], "--output_dir is empty: give a value"),
        (["--data="], "--data is empty: give a value"),
        (["--mlm_probability", "0.001"], "--mlm_probability = 0.001 is less than one token in 64: raise it"),
        (["--lr_scheduler.power", "0.5"], "--lr_scheduler.power = 0.5 belongs to the polynomial schedule"),
        (["--optimizer.name", "apex_lamb"], "--optimizer.name = apex_lamb: takes adamw or lamb"),
        (["--precision", "fp8", "--model.intermediate_size", "500"], "--precision = fp8 needs multiples of 16 in"),
        (["--model.num_attention_heads", "3"], "model.hidden_size = 128 must be a multiple of"),
        (["--model.hidden_size", "1024"], "model.num_attention_heads = 4 makes heads of 256, and attention takes at"),
    ],
)
def test_bad_command_line(argv, message):
    # A value that the command line does not change keeps its place in the preset.
    assert re.sub(r"^\S+\.yaml:\d+: ", "", refuse(*argv)).startswith(message)


def test_too_long_sequences_and_warmups_say_what_to_change():
    message = refuse("--config", "roberta-base", "--max_seq_length", "513", "--model.max_position_embeddings", "514")
    assert "at least 515" in message
    assert "lower max_seq_length to 512" in message
    assert "--lr_scheduler.warmup_steps 2" in refuse("--max_steps", "20", "--lr_scheduler.warmup_steps", "21")


def test_ends_of_an_interval():
    assert parse_arguments(["a", "--out", "d", "--share", "1"], CopyConfig, description="").share == 1
    assert parse("--seed", "0").seed == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--init_from", "roberta-base"], "`hf download roberta-base --local-dir roberta-base` and give roberta-base"),
        (["--init_from", "FacebookAI/xlm-r/"], "`hf download FacebookAI/xlm-r --local-dir xlm-r` and give xlm-r"),
        (["--init_from", "s3://bucket/model"], "only a local path works here; copy it to this machine first"),
        (["--data", "data/a,hf://datasets/b:0.3"], "only a local path works here; copy it to this machine first"),
        (["--output_dir", "gs://bucket/run"], "only a local path works here; upload the result afterwards"),
    ],
)
def test_what_is_not_on_this_machine_is_told_so(tmp_path, argv, message):
    assert refuse(*argv).startswith(f"{argv[0]} = {argv[1]}: ") and message in refuse(*argv)
    path = write(tmp_path / "a.yaml", f"{argv[0][2:]}: {argv[1]}\n")
    assert refuse("--config", path).startswith(f"{path}:1: {argv[0][2:]} = {argv[1]}: ")


def test_a_missing_local_path_is_left_to_the_program(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("runs/model", "./roberta-base", "a/b/c", str(tmp_path / "model")):
        assert parse("--init_from", path).init_from == path
    (tmp_path / "roberta-base").mkdir()
    assert parse("--init_from", "roberta-base").init_from == "roberta-base"


@pytest.mark.parametrize(
    "program", ["evaluate", "export", "fill_mask", "embed", "explain", "finetune", "prepare --tokenizer"]
)
def test_every_program_knows_what_is_not_local(program, tmp_path, capsys):
    """By its main, which imports what it works with only after its settings."""
    name, *option = program.split()
    more = {
        "evaluate": ["--data", "x"], "export": ["out"], "fill_mask": ["<mask>"], "embed": ["--out", "x.npy"],
        "explain": ["text", "--out", "x"], "finetune": ["--task", "rte", "--data", "x", "--out", "x"],
        "prepare": ["x.txt", "--out", "x"],
    }[name]  # fmt: skip
    main = importlib.import_module(f"fastroberta.{name}").main
    for path, message in (("s3://bucket/roberta", "only a local path"), ("FacebookAI/roberta-base", "hf download")):
        assert run(lambda: main([*option, path, *more])) == 2  # noqa: B023
        assert message in capsys.readouterr().err


def test_required_and_leftover_arguments():
    for argv, message in (
        (["a"], "--out is required: see --help"),
        (["--out", "d"], "sources is required: see --help"),
        (["a", "--out", "d", "--share", "0"], r"share = 0\.0: must lie in \(0, 1\]"),
        (["a", "--out", "d", "--share", "1.5"], r"share = 1\.5: must lie in \(0, 1\]"),
        (["a", "--out", "d", "--sources", "x"], "--sources: give the value alone, without --sources"),
        (["a", "--out", ""], "out is empty: give a value$"),
        (["a", "", "--out", "d"], "sources is empty: give a value$"),
        (["a", "--lr", "d"], "--lr is not a setting; did you mean --share?"),  # fairseq's names concern training
    ):
        with pytest.raises(ConfigurationError, match=message):
            parse_arguments(argv, CopyConfig, description="")
    with pytest.raises(ConfigurationError, match="c: unexpected argument"):
        parse_arguments(["a", "b", "c"], ExportConfig, description="")


def test_validate_refuses_what_code_puts_in():
    config = TrainConfig()
    config.optimizer.eps = float("nan")
    with pytest.raises(ConfigurationError, match=r"optimizer\.eps = nan: must lie in \(0, inf\)"):
        validate(config)
    config = TrainConfig(model=ModelConfig(num_attention_heads=0))
    with pytest.raises(ConfigurationError, match=r"model\.num_attention_heads = 0: must lie in \[1, inf\)"):
        validate(config)


def test_import_is_light():
    code = "import sys, fastroberta.cli.arguments; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_preset_files_are_plain_yaml():
    for path in PRESETS.values():
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)
