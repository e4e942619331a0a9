"""Distillation: the loss against plain PyTorch, the student's start, and runs with a teacher."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from fastroberta_kernels.masking import mask_tokens
from safetensors.torch import load_file
from test_golden import write_shards
from tiny import prepare_text, type_settings
from torch.utils._python_dispatch import TorchDispatchMode

from fastroberta.cli.arguments import from_dict, parse_arguments
from fastroberta.cli.program import run
from fastroberta.config import DistillationConfig, ModelConfig, TrainConfig
from fastroberta.corpus.tokenizer import load_tokenizer
from fastroberta.costs import estimate_memory, flops_per_step
from fastroberta.errors import CheckpointError, ConfigurationError
from fastroberta.hf import save_huggingface
from fastroberta.model import WHOLE_SEQUENCE, RobertaForMaskedLM
from fastroberta.plan import PlanConfig, predict
from fastroberta.train import main
from fastroberta.training.distillation import CHUNK_ROWS, Distillation, choose_layers, soft_target_loss
from fastroberta.training.trainer import Trainer

SIZES = {
    "hidden_size": 32, "num_attention_heads": 1, "intermediate_size": 64, "max_position_embeddings": 34,
    "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
}  # fmt: skip
SETTINGS = {
    "precision": "fp32", "max_seq_length": 32, "packing": "contiguous", "train_batch_size": 8, "micro_batch_size": 4,
    "max_steps": 6, "logging_steps": 2, "eval_steps": 3, "eval_sequences": 16, "save_steps": 3,
    "device": "cpu", "model": {**SIZES, "num_hidden_layers": 2}, "optimizer": {"learning_rate": 5e-3},
    "lr_scheduler": {"warmup_steps": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    lines = [f"Number {i} comes before {i + 1}. Nobody knows why {i} does that.\n" for i in range(300)]
    return prepare_text(tmp_path_factory.mktemp("data"), "\n".join(lines), 280)


def make_model(num_layers, vocab_size, seed, **changes):
    model = RobertaForMaskedLM(
        ModelConfig(vocab_size=vocab_size, num_hidden_layers=num_layers, initializer_range=0.2, **{**SIZES, **changes})
    )
    model.init_weights(seed)
    return model


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    """A teacher of four layers with predictions that are far from even."""
    tokenizer = load_tokenizer(data)
    model = make_model(4, tokenizer.get_vocab_size(), 7)
    directory = tmp_path_factory.mktemp("teacher")
    save_huggingface(model, tokenizer, directory)
    return directory


def configure(data, output_dir, **changes):
    return from_dict(TrainConfig, {**SETTINGS, "data": str(data), "output_dir": str(output_dir), **changes})


def read_weights(output_dir, step=6):
    checkpoint = output_dir / f"checkpoint-{step:08d}"
    return {**load_file(checkpoint / "model.safetensors"), **load_file(checkpoint / "optimizer.safetensors")}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


# The loss.


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_soft_targets_are_the_divergence_of_plain_pytorch(dtype, bound):
    """Two chunks, the second of them short; a vocabulary with rows of padding; rows without a target."""
    generator = torch.Generator().manual_seed(0)
    count, width, rows, classes, temperature = CHUNK_ROWS + 37, 16, 64, 51, 2.0

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    features, teacher_features = draw(count, width), draw(count, width)
    weight, bias, teacher_weight, teacher_bias = draw(rows, width), draw(rows), draw(rows, width), draw(rows)
    is_used = torch.rand(count, generator=generator) < 0.9
    inputs = [one.to(dtype) for one in (features, weight, bias, teacher_features, teacher_weight, teacher_bias)]
    ours = [one.clone().requires_grad_() for one in inputs[:3]]
    theirs = [one.double().requires_grad_() for one in inputs[:3]]

    loss = soft_target_loss(*ours, *inputs[3:], is_used, temperature, classes)
    (loss * 0.7).backward()
    student_logits = F.linear(*theirs)[is_used, :classes] / temperature
    teacher_logits = F.linear(*(one.double() for one in inputs[3:]))[is_used, :classes] / temperature
    expected = temperature**2 * F.kl_div(
        student_logits.log_softmax(1), teacher_logits.log_softmax(1), reduction="sum", log_target=True
    )
    (expected * 0.7).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=bound)
    for one, other in zip(ours, theirs):
        assert one.grad.dtype == one.dtype
        assert (one.grad.double() - other.grad).norm() <= bound * other.grad.norm()


@pytest.mark.parametrize(
    "weights, is_tied",
    [((5.0, 2.0, 1.0), True), ((1.0, 0.0, 0.0), True), ((0.0, 0.0, 1.0), True), ((5.0, 2.0, 1.0), False)],
)
def test_gradient_of_all_terms_is_that_of_plain_pytorch(weights, is_tied):
    vocabulary = 75
    changes = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "tie_word_embeddings": is_tied}
    student, teacher, reference = (
        make_model(*one, **changes).double() for one in ((2, vocabulary, 1), (3, vocabulary, 2), (2, vocabulary, 1))
    )
    for model in (student, teacher, reference):
        model.compute_dtype = torch.float64
    ids = torch.randint(4, vocabulary, (6, 32), generator=torch.Generator().manual_seed(1))
    ids[3, :25] = 2  # so few tokens that some slots stay unused
    input_ids, positions, labels = mask_tokens(
        ids, mask_token_id=4, vocab_size=vocabulary, special_token_ids=(0, 1, 2, 3), mlm_probability=0.3, seed=5,
        sample_ids=torch.arange(6),
    )  # fmt: skip
    assert (labels == -100).any()
    names = ("alpha_ce", "alpha_mlm", "alpha_cos")
    settings = DistillationConfig(temperature=3.0, **dict(zip(names, weights)))
    result = Distillation(student, teacher, settings).loss(input_ids, positions, labels)
    result.loss.backward()

    used = labels != -100
    rows = torch.arange(6)[:, None].expand_as(positions)[used], positions[used]
    s_hidden, t_hidden = (model.encode(input_ids, WHOLE_SEQUENCE)[rows] for model in (reference, teacher))
    s, t = (
        model.lm_head.logits(hidden, model.decoder_weight, vocabulary)
        for model, hidden in ((reference, s_hidden), (teacher, t_hidden))
    )
    mlm = F.cross_entropy(s, labels[used], reduction="sum")
    soft = F.kl_div((s / 3).log_softmax(1), (t / 3).softmax(1), reduction="sum") * 9
    cosine = F.cosine_embedding_loss(s_hidden, t_hidden, torch.ones(len(s)), reduction="sum")
    sum(weight * term for weight, term in zip(weights, (soft, mlm, cosine))).backward()
    assert result.loss.item() == pytest.approx(mlm.item())
    assert result.num_targets == used.sum()
    for (name, ours), theirs in zip(student.named_parameters(), reference.parameters()):
        ours, theirs = (torch.zeros_like(one) if one.grad is None else one.grad for one in (ours, theirs))
        assert (ours - theirs).norm() <= 1e-9 * (1 + theirs.norm()), name
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_no_tensor_holds_more_logits_than_a_chunk():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.numel = max(self.numel, result.untyped_storage().nbytes() // result.element_size())
            return result

    width, classes = 8, 600
    largest = []
    for count in (CHUNK_ROWS, 3 * CHUNK_ROWS):
        features, weight = torch.randn(count, width, requires_grad=True), torch.randn(classes, width)
        with Largest() as mode:
            soft_target_loss(
                features, weight, weight[:, 0], features.detach(), weight, weight[:, 0],
                torch.ones(count, dtype=torch.bool), 2.0, classes,
            ).backward()  # fmt: skip
        largest.append(mode.numel)
    assert largest == [CHUNK_ROWS * classes] * 2


# The start.


@pytest.mark.parametrize(
    "sizes, layers",
    [
        ((12, 6), [0, 2, 4, 6, 8, 10]),
        ((24, 12), list(range(0, 24, 2))),
        ((12, 5), [0, 2, 4, 7, 9]),
        ((3, 3), [0, 1, 2]),
    ],
)
def test_layers_are_evenly_spaced(sizes, layers):
    assert choose_layers(*sizes) == layers


def test_student_starts_as_every_second_layer_of_its_teacher(data, teacher, tmp_path, capsys):
    trainer = Trainer(configure(data, tmp_path, distill_from=str(teacher), precision="bf16"))
    source, ours = load_file(teacher / "model.safetensors"), tmp_path / "ours"
    save_huggingface(trainer.model, trainer.tokenizer, ours)
    found = load_file(ours / "model.safetensors")
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, source[name.replace(".layer.1.", ".layer.2.")]), name
    assert {name for name in source if ".layer." not in name} <= found.keys()
    trainer.describe()
    assert "4 layers; the student starts from layers 0, 2; temperature 2, weights 5 (soft" in capsys.readouterr().out


# Runs.


@pytest.fixture(scope="module")
def finished(data, teacher, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("finished")
    Trainer(configure(data, output_dir, distill_from=str(teacher))).train()
    return output_dir


def test_without_a_word_of_the_teacher_it_is_the_ordinary_run(data, teacher, finished, tmp_path):
    weights = {"alpha_ce": 0.0, "alpha_mlm": 1.0, "alpha_cos": 0.0}
    trainer = Trainer(configure(data, tmp_path / "ours", distill_from=str(teacher), distillation=weights))
    save_huggingface(trainer.model, trainer.tokenizer, tmp_path / "start")
    trainer.train()
    Trainer(configure(data, tmp_path / "ordinary", init_from=str(tmp_path / "start"))).train()
    ordinary = read_weights(tmp_path / "ordinary")
    assert_same(read_weights(tmp_path / "ours"), ordinary)
    name = "roberta.encoder.layer.0.output.dense.weight"
    assert not torch.equal(read_weights(finished)[name], ordinary[name])


def test_resumed_run_is_bit_identical_and_keeps_its_teacher(data, teacher, finished, tmp_path):
    resumed, moved = tmp_path / "resumed", tmp_path / "moved"
    shutil.copytree(finished, resumed, ignore=shutil.ignore_patterns("*00000006"))
    shutil.copytree(teacher, moved)
    Trainer(configure(data, resumed, distill_from=str(moved))).train()
    assert_same(read_weights(resumed), read_weights(finished))

    tokenizer = load_tokenizer(data)
    save_huggingface(make_model(4, tokenizer.get_vocab_size(), 8), tokenizer, moved)
    for other in ({"distill_from": str(moved)}, {}):
        with pytest.raises(ConfigurationError, match=r"distill_from: .* is not the teacher that .* was trained with"):
            Trainer(configure(data, resumed, **other))
    with pytest.raises(ConfigurationError, match=r"distillation.alpha_ce: 1.0, but .* was trained with 5.0"):
        Trainer(configure(data, resumed, distill_from=str(teacher), distillation={"alpha_ce": 1.0}))


def test_micro_batches_and_recomputation_change_nothing_beyond_rounding(data, teacher, finished, tmp_path):
    changes = {"micro_batch_size": 8, "gradient_checkpointing": True}
    Trainer(configure(data, tmp_path, distill_from=str(teacher), **changes)).train()
    ours, theirs = read_weights(tmp_path), read_weights(finished)
    assert (
        max((ours[name] - theirs[name]).abs().max() for name in ours if "exp" not in name) < 1e-3
    )  # a step moves them by 5e-3


def test_bf16_follows_fp32(data, teacher, finished, tmp_path):
    Trainer(configure(data, tmp_path, distill_from=str(teacher), precision="bf16")).train()
    states = [path / "checkpoint-00000006" / "trainer_state.json" for path in (tmp_path, finished)]
    ours, theirs = (json.loads(path.read_text())["eval_loss"] for path in states)
    assert ours == pytest.approx(theirs, abs=0.05)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": {**SIZES, "num_hidden_layers": 2, "intermediate_size": 96}},
         r"model.intermediate_size = 96, but the teacher .* has 64, .*: set model.intermediate_size to 64"),
        ({"model": {**SIZES, "num_hidden_layers": 5}}, r"model.num_hidden_layers = 5, but the teacher .* has only 4"),
        ({"sharding": "full"}, "sharding = full and distill_from cannot be combined"),
        ({"distillation": {"alpha_ce": 0.0, "alpha_mlm": 0.0, "alpha_cos": 0.0}}, "are all 0"),
        ({"distill_from": None, "distillation": {"alpha_ce": 1.0}}, "distillation settings need a teacher: give"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_in_one_line(data, teacher, tmp_path, changes, message):
    with pytest.raises(ConfigurationError, match=message) as error:
        Trainer(configure(data, tmp_path, **{"distill_from": str(teacher), **changes}))
    assert "\n" not in str(error.value)


def test_a_teacher_with_another_tokenizer_or_none_is_refused(data, teacher, finished, tmp_path):
    other = prepare_text(tmp_path, "\n\n".join(f"Other words, {i} of them." for i in range(200)), 270)
    with pytest.raises(ConfigurationError, match=r"distill_from: .* has another tokenizer than"):
        Trainer(configure(other, tmp_path / "run", distill_from=str(teacher)))
    with pytest.raises(CheckpointError, match=r"not a checkpoint; give .*checkpoint-00000006"):
        Trainer(configure(data, tmp_path / "run", distill_from=str(finished)))


@pytest.mark.slow(reason="two minutes")
def test_a_student_learns_more_from_its_teacher_than_without(tmp_path):
    """On a text with something to learn; the figures of docs/distillation.md."""
    write_shards(tmp_path)
    common = {
        "max_seq_length": 64, "train_batch_size": 16, "micro_batch_size": 16, "logging_steps": 100,
        "eval_sequences": 64, "lr_scheduler": {"warmup_steps": 50}, "optimizer": {"learning_rate": 2e-3},
    }  # fmt: skip
    model = {
        **SIZES,
        "max_position_embeddings": 66,
        "hidden_size": 64,
        "intermediate_size": 256,
        "initializer_range": 0.06,
    }
    model |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_attention_heads": 2}

    def train(name, num_layers, steps, **changes):
        changes |= {"max_steps": steps, "eval_steps": steps, "save_steps": steps}
        changes |= {"model": {**model, "num_hidden_layers": num_layers}}
        Trainer(configure(tmp_path, tmp_path / name, **common, **changes)).train()
        checkpoint = tmp_path / name / f"checkpoint-{steps:08d}"
        return str(checkpoint), json.loads((checkpoint / "trainer_state.json").read_text())["eval_loss"]

    teacher, teacher_loss = train("teacher", 4, 800)
    found = {"teacher": teacher_loss}
    for seed in (1, 2, 3):
        for name, changes in {
            "alone": {},
            "from the teacher's layers": {
                "distill_from": teacher, "distillation": {"alpha_ce": 0.0, "alpha_mlm": 1.0, "alpha_cos": 0.0}
            },
            "distilled": {"distill_from": teacher},
        }.items():  # fmt: skip
            found[f"{name}, seed {seed}"] = train(f"{name} {seed}", 2, 200, seed=seed, **changes)[1]
    print(json.dumps({name: round(loss, 4) for name, loss in found.items()}))
    for seed in (1, 2, 3):
        assert found[f"distilled, seed {seed}"] < found[f"from the teacher's layers, seed {seed}"]
        assert found[f"distilled, seed {seed}"] < found[f"alone, seed {seed}"]


# What it costs.


def test_plan_and_dry_run_count_the_teacher(data, teacher, tmp_path, capsys):
    settings = {**SETTINGS, "data": data, "output_dir": tmp_path, "distill_from": teacher}
    assert main([*type_settings(settings), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "memory, teacher: " in shown and "one micro-batch done" in shown
    cluster = ["--config=distilroberta", "--gpus=8"]
    assert run(lambda: main(["--plan", *cluster, f"--distill_from={teacher}"])) == 0
    shown = capsys.readouterr().out
    assert "  teacher" in shown

    plain, distilled = (
        parse_arguments(cluster, PlanConfig, description="", default_preset="roberta-base") for _ in range(2)
    )
    for config in (plain, distilled):
        config.model.vocab_size = 50265
    distilled.distill_from, distilled.distillation.teacher_layers = "somewhere", 12
    base = parse_arguments(["--config=roberta-base"], PlanConfig, description="", default_preset="roberta-base")
    base.model.vocab_size = 50265
    rate = base.train_batch_size / distilled.train_batch_size
    assert flops_per_step(distilled) - flops_per_step(plain) == pytest.approx(flops_per_step(base) / rate / 3)
    assert predict(distilled, 1, 8).compute > 1.6 * predict(plain, 1, 8).compute
    found = estimate_memory(distilled, 8)["total"] - estimate_memory(plain, 8)["total"]
    weights = 12 * 7_087_872 * 2 + (50265 + 514 + 1) * 768 * 4
    assert weights < found < weights + 0.8e9
