"""The ablations as a program: variants that differ as they should, runs that continue, and a report."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny import prepare_text

pytest.importorskip("matplotlib")
from fastroberta.ablate import main
from fastroberta.ablation.experiments import EXPERIMENTS, PRESETS
from fastroberta.ablation.nsp import PairTrainer, RobertaForPairs
from fastroberta.ablation.report import collect_results, write_report
from fastroberta.ablation.runs import Ablation, list_runs
from fastroberta.ablation.settings import AblateConfig
from fastroberta.cli.arguments import from_dict
from fastroberta.cli.program import run
from fastroberta.config import ModelConfig, TrainConfig
from fastroberta.errors import ConfigurationError, Stopped
from fastroberta.hf import load_huggingface
from fastroberta.model import WHOLE_SEQUENCE, RobertaForMaskedLM

PRESET = """
precision: fp32
max_seq_length: 32
train_batch_size: 8
max_steps: 16
logging_steps: 16
eval_sequences: 16
save_steps: 16
model:
  hidden_size: 32
  num_hidden_layers: 1
  num_attention_heads: 1
  intermediate_size: 64
  hidden_dropout_prob: 0.1
optimizer:
  learning_rate: 1e-3
lr_scheduler:
  warmup_steps: 4
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with prepared data in `shards` and a preset in `tiny.yaml`."""
    directory = tmp_path_factory.mktemp("ablate")
    names = ("Anna", "Ben", "Clara", "David", "Emma")
    stories = [
        f"{a} gives {b} a {thing}. {b} thanks {a} for the {thing}. Then {a} goes home."
        for a in names for b in names if a != b for thing in ("book", "ball", "pear", "coin")
    ]  # fmt: skip
    prepare_text(directory, "\n\n".join(stories), 300, 0.2)
    (directory / "tiny.yaml").write_text(PRESET)
    return directory


def list_arguments(place, experiment, out, *more):
    return [
        experiment, "--data", str(place / "shards"), "--out", str(out), "--preset", str(place / "tiny.yaml"),
        "--device", "cpu", *more,
    ]  # fmt: skip


def configure(place, out, **more):
    return AblateConfig(
        experiment="all",
        data=str(place / "shards"),
        out=str(out),
        preset=str(place / "tiny.yaml"),
        device="cpu",
        **more,
    )


@pytest.fixture(scope="module")
def finished(place):
    """The directory of masking with two seeds, and then of NSP."""
    out = place / "finished"
    assert main(list_arguments(place, "masking", out, "--seeds", "2")) == 0
    assert main(list_arguments(place, "nsp", out)) == 0
    return out


def test_every_variant_is_trained_once_and_scored_alike(finished):
    results = {path.parts[-3:-1]: json.loads(path.read_text()) for path in finished.glob("runs/*/*/result.json")}
    names = {"baseline", "static-masking", "segment-pairs-nsp", "sentence-pairs-nsp", "doc-sentences"}
    assert {name for name, _ in results} == names
    assert len(results) == 7  # the baseline of seed 1 is shared
    assert len({one["masked_tokens"] for one in results.values()}) == 1
    baseline = results["baseline", "seed-1"]
    assert {name for name, _ in results if "nsp_accuracy" in results[name, "seed-1"]} == {
        "segment-pairs-nsp",
        "sentence-pairs-nsp",
    }
    for one in results.values():
        assert one["settings"]["max_steps"] == 16 and one["loss"] < 5.6  # log(300) is 5.7
        assert one["tokens"] == pytest.approx(baseline["tokens"], rel=0.08)
    assert results["baseline", "seed-1"]["loss"] != results["static-masking", "seed-1"]["loss"]
    assert results["baseline", "seed-1"]["loss"] != results["baseline", "seed-2"]["loss"]


def test_the_report_has_our_figures_beside_the_paper_s(finished):
    report = (finished / "report.md").read_text()
    assert (finished / "report.png").read_bytes().startswith(b"\x89PNG")
    baseline = json.loads((finished / "runs" / "baseline" / "seed-1" / "result.json").read_text())
    line = next(line for line in report.splitlines() if line.startswith("| full sentences |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert f"{baseline['loss']:.3f}" in cells and cells[-4:] == ["90.4/79.1", "84.7", "92.5", "64.8"]
    assert "## Static and dynamic masking" in report  # of the command before
    assert "## Batch size" not in report
    assert "table 2" in report and "NSP accuracy" in report


def test_what_is_finished_is_not_done_again(place, finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    assert main(list_arguments(place, "masking", finished, "--seeds", "2")) == 0
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")} == before
    printed = capsys.readouterr().out
    assert "±" in printed and "Seeds of a variant differ by up to" in printed
    (place / "other.yaml").write_text(PRESET.replace("1e-3", "2e-3"))
    arguments = list_arguments(place, "masking", finished, "--preset", str(place / "other.yaml"))
    assert run(lambda: main(arguments)) == 2
    assert "holds a run with optimizer.learning_rate = 0.001, not 0.002; give another --out" in capsys.readouterr().err


def test_pairs_leave_an_ordinary_checkpoint(finished):
    """And beside it what only pairs need."""
    checkpoint = finished / "runs" / "segment-pairs-nsp" / "seed-1" / "checkpoint-00000016"
    assert load_huggingface(checkpoint).embeddings.token_type_embeddings.weight.shape[0] == 1
    own = load_file(checkpoint / "next_sentence.safetensors")
    assert set(own) == {
        "embeddings.second_type", "pooler.weight", "pooler.bias", "next_sentence.weight", "next_sentence.bias",
    }  # fmt: skip
    assert all(tensor.abs().sum() > 0 for tensor in own.values())


def test_an_interrupted_run_of_pairs_continues_to_the_bit(place, finished, tmp_path):
    ablation = Ablation(configure(place, tmp_path))
    variant = EXPERIMENTS["nsp"].variants[0]
    settings, make_blocks = ablation.configure(variant, 1), ablation.choose_blocks(variant, 1)
    trainer = PairTrainer(settings, make_blocks=make_blocks)
    steps = iter(range(1, 100))
    train_step = trainer.train_step

    def stop_at_step_5(meter):
        train_step(meter)
        if next(steps) == 5:
            trainer.stop.number = 15

    trainer.train_step = stop_at_step_5
    with pytest.raises(Stopped):
        trainer.train()
    ablation.run(variant, 1, None)
    path = "runs/segment-pairs-nsp/seed-1/checkpoint-00000016"
    for name in ("model", "optimizer", "next_sentence"):
        ours, theirs = (load_file(out / path / f"{name}.safetensors") for out in (tmp_path, finished))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


def test_pairs_start_from_the_weights_of_the_baseline(place, tmp_path):
    ablation = Ablation(configure(place, tmp_path))
    variant = EXPERIMENTS["nsp"].variants[0]
    model = PairTrainer(ablation.configure(variant, 1), make_blocks=ablation.choose_blocks(variant, 1)).model
    ordinary = PairTrainer.__base__(ablation.configure(EXPERIMENTS["masking"].variants[1], 1)).model.state_dict()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in ordinary.items())
    eos = ablation.manifest.special_token_ids["eos_token_id"]
    ids = torch.tensor([[0, 9, 10, eos, 9, 10, eos]])
    model.eval()
    with torch.no_grad():
        before = model.embeddings(ids)
        model.embeddings.second_type += torch.randn_like(model.embeddings.second_type)
        changed = (model.embeddings(ids) - before).abs().amax(dim=2)[0]
    assert changed[:4].max() == 0 and changed[4:].min() > 0  # the separator belongs to the first part


@pytest.mark.parametrize("is_tied", [True, False])
def test_masked_tokens_of_pairs_are_predicted_as_in_the_ordinary_model(is_tied):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    config = ModelConfig(
        vocab_size=40, max_position_embeddings=14, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        tie_word_embeddings=is_tied, initializer_range=0.3, **sizes,
    )  # fmt: skip
    ordinary = RobertaForMaskedLM(config)
    ordinary.init_weights(1)
    pairs = RobertaForPairs(ordinary, eos_token_id=2, seed=1)
    batch = (
        torch.randint(4, 40, (3, 12)),
        torch.tensor([[1, 4], [2, 5], [3, 11]]),
        torch.tensor([[7, 8], [9, 5], [6, 4]]),
    )
    expected = ordinary.loss(*batch).loss
    loss = pairs.loss(*batch, is_next=torch.tensor([0, 1, 1])).loss
    of_pairs = F.cross_entropy(pairs.classify(pairs.encode(batch[0], WHOLE_SEQUENCE)[:, 0]), torch.tensor([0, 1, 1]))
    torch.testing.assert_close(loss, expected + 6 * of_pairs)


def test_variants_change_what_they_are_named_for(place, tmp_path):
    ablation = Ablation(configure(place, tmp_path))
    variants = {variant.name: variant for one in EXPERIMENTS.values() for variant in one.variants}
    found = {name: ablation.configure(variant, 3) for name, variant in variants.items()}
    base = found["baseline"]
    assert (base.masking, base.packing, base.mlm_probability, base.seed) == ("dynamic", "full-sentences", 0.15, 3)
    assert found["static-masking"].masking == "static" and found["doc-sentences"].packing == "doc-sentences"
    for factor, rate in ((8, 7e-3), (32, 1e-2)):
        one = found[f"batch-x{factor}"]
        assert one.train_batch_size == 8 * factor and one.max_steps == max(1, 16 // factor)
        assert one.optimizer.learning_rate == pytest.approx(rate) and one.lr_scheduler.warmup_steps == 4 // factor
    assert [found[f"masked-{share}"].mlm_probability for share in (10, 20, 40)] == [0.1, 0.2, 0.4]
    sizes = [
        len(PairTrainer.__base__(found[name], make_blocks=ablation.choose_blocks(variants[name], 1)).blocks)
        for name in ("data-1-10", "data-1-3", "baseline")
    ]
    assert sizes[0] == sizes[2] // 10 and sizes[1] == sizes[2] // 3
    tokens = {  # of a step
        name: one.train_batch_size * ablation.count_tokens(one, variants[name]) for name, one in found.items()
    }
    assert tokens["doc-sentences"] == pytest.approx(tokens["baseline"], rel=0.07)  # half a sequence of 8
    assert tokens["sentence-pairs-nsp"] == pytest.approx(tokens["baseline"], rel=0.07)
    assert len(list_runs(list(variants.values()) * 2, ablation.config)) == len(variants) == 12


def test_presets_are_the_paper_s_and_a_small_one():
    paper = from_dict(TrainConfig, PRESETS["paper"][0])
    assert (paper.train_batch_size, paper.max_steps, paper.optimizer.learning_rate) == (256, 1_000_000, 1e-4)
    assert paper.model.hidden_size == 768 and paper.max_seq_length == 512
    small = from_dict(TrainConfig, PRESETS["small"][0])
    assert small.max_steps * small.train_batch_size * small.max_seq_length < 4e6


def test_a_downstream_task_is_added_to_finished_runs(place, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    ablation = Ablation(configure(place, tmp_path / "out"))
    scores = {"static-masking": 0.625, "baseline": 0.75}
    asked = []

    def score_task(directory, checkpoint, settings):
        assert load_huggingface(checkpoint) and settings == {} and directory == checkpoint.parent / "task"
        asked.append(directory.parts[-3])
        return {"name": "RTE", "metric": "accuracy", "score": scores[asked[-1]], "examples": {"train": 9, "dev": 3}}

    for variant in EXPERIMENTS["masking"].variants * 2:
        ablation.run(variant, 1, score_task)
    assert sorted(asked) == sorted(scores)
    results = collect_results(ablation)
    report = write_report(ablation, {"masking": results["masking"]}).read_text()
    assert "| RTE accuracy |" in report and "| 75.0 | 78.7 | 84.0 | 92.9 |" in report
    assert "accuracy on the dev data in per cent (9 train, 3 dev examples)" in report


def test_the_task_goes_through_finetune(place, finished, tmp_path, capsys):
    downstream = pytest.importorskip("fastroberta.ablation.downstream", exc_type=ImportError)
    file = tmp_path / "train.csv"
    file.write_text("text,label\nAnna gives Ben a book,yes\nBen thanks Anna,no\n")
    task = {"task_train": str(file), "task_dev": str(file)}
    given = downstream.configure_task(configure(place, tmp_path, **task))
    checkpoint = finished / "runs" / "baseline" / "seed-1" / "checkpoint-00000016"
    settings = {"epochs": 1, "kernels": False, "precision": "fp32"}
    found = downstream.score_task(given, tmp_path / "task", checkpoint, settings)
    assert found["name"] == "train" and found["metric"] == "accuracy" and found["score"] in (0.0, 0.5, 1.0)
    assert downstream.score_task(given, tmp_path / "task", checkpoint, settings) == found  # read, not trained
    with pytest.raises(ConfigurationError, match=r"task holds a run with epochs = 1; give another --out"):
        downstream.score_task(given, tmp_path / "task", checkpoint, {**settings, "epochs": 2})
    file.write_text("text,label\nAnna,yes\n")
    arguments = list_arguments(place, "masking", tmp_path / "out", "--task_train", str(file), "--task_dev", str(file))
    assert run(lambda: main(arguments)) == 3
    assert "every record has the label 'yes'" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--task", "cola"], "task and task_data belong together"),
        (["--task_train", "a.csv"], "task_train and task_dev belong together"),
        (["--task", "cola", "--task_data", ".", "--task_train", "a.csv"], "drop one of the two"),
        (["--preset", "tiny"], "preset = tiny: no such file, and the presets are small, paper, "),
    ],
)
def test_settings_that_do_not_fit_are_refused(place, tmp_path, capsys, more, message):
    assert run(lambda: main(list_arguments(place, "masking", tmp_path / "out", *more))) == 2
    found = capsys.readouterr().err
    assert message in found and found.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_several_processes_are_refused(place, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigurationError, match="ablate runs in one process; start it without torchrun"):
        main(list_arguments(place, "masking", tmp_path / "out"))
