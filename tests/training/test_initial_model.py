"""Runs that start from published models: of other classes, for other tokenizers, for longer sequences."""

import json
import shutil

import pytest
import torch
from pretrained import TEXT, THINGS, make_model, make_tokenizer

from fastroberta.cli.arguments import from_dict
from fastroberta.config import TrainConfig
from fastroberta.corpus.tokenizer import load_tokenizer, special_token_ids
from fastroberta.errors import ConfigurationError
from fastroberta.evaluate import main as evaluate
from fastroberta.hf import HEAD_BIAS, POSITIONS, WORDS, read_pretrained
from fastroberta.model import AttentionScope
from fastroberta.prepare import main as prepare
from fastroberta.training.trainer import Trainer
from fastroberta.training.vocabulary import resize_vocabulary

transformers = pytest.importorskip("transformers")

# Shares words and letters with TEXT, and has its own.
OTHER = tuple(f"The cow sat on the {thing}. The dog jumped over the {thing} and the cow." for thing in THINGS)
SETTINGS = {
    "precision": "fp32", "max_seq_length": 40, "packing": "contiguous", "train_batch_size": 4, "max_steps": 2,
    "logging_steps": 2, "eval_steps": 2, "eval_sequences": 2, "save_steps": 1, "device": "cpu",
    "lr_scheduler": {"warmup_steps": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A function: model type -> its directory, and the data prepared with its tokenizer. Positions for 40 tokens."""
    made = {}

    def make(kind):
        if kind not in made:
            directory = tmp_path_factory.mktemp(kind)
            source, model, data = directory / "text.txt", directory / "model", directory / "data"
            source.write_text("\n\n".join(f"{one} {two}" for one in TEXT for two in TEXT))
            positions = {"max_position_embeddings": 40, "type_vocab_size": 2} if kind == "bert" else {}
            make_model(model, kind, make_tokenizer(kind), **positions)
            arguments = [str(source), "--out", str(data), "--tokenizer", str(model), "--workers", "1"]
            assert prepare([*arguments, "--heldout-fraction", "0.2"]) == 0
            made[kind] = model, data
        return made[kind]

    return make


def configure(data, output_dir, **changes):
    return from_dict(TrainConfig, {**SETTINGS, "data": str(data), "output_dir": str(output_dir), **changes})


@pytest.mark.parametrize(
    "kind, becomes, name",
    [("xlm-roberta", "xlm-roberta", "XLMRobertaForMaskedLM"), ("bert", "roberta", "RobertaForMaskedLM")],
)
def test_training_goes_on_from_a_published_model(models, tmp_path, capsys, kind, becomes, name):
    start, data = models(kind)
    copy, run = tmp_path / "start", tmp_path / "run"
    shutil.copytree(start, copy)
    config = configure(data, run, init_from=str(copy))
    Trainer(config).train()
    shown = capsys.readouterr().out
    assert (f"{copy}: BERT becomes RoBERTa: its 40 positions now start at 1" in shown) == (kind == "bert")
    assert (config.model.model_type, config.model.max_position_embeddings) == (becomes, 42)
    checkpoint = run / "checkpoint-00000002"
    trained = transformers.AutoModelForMaskedLM.from_pretrained(checkpoint)
    assert type(trained).__name__ == name
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer(TEXT[0])["input_ids"] == make_tokenizer(kind).encode(TEXT[0]).ids

    # Continuing needs the checkpoint only.
    shutil.rmtree(copy)
    shutil.rmtree(checkpoint)
    assert Trainer(configure(data, run, init_from=str(copy))).step == 1

    # The model's own length is the default, and the run began with the model's own score.
    arguments = ["--packing", "contiguous", "--precision", "fp32", "--device", "cpu", "--eval_sequences", "2"]
    assert evaluate([str(start), "--data", str(data), *arguments]) == 0
    captured = capsys.readouterr()
    scores, first = json.loads(captured.out), json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert scores["max_seq_length"] == 40 and first["step"] == 0
    assert scores["eval/loss"] == pytest.approx(first["eval/loss"], abs=1e-5)
    assert ("BERT becomes RoBERTa" in captured.err) == (kind == "bert")


def test_more_positions_repeat_those_there_are(models, tmp_path):
    start, data = models("xlm-roberta")
    asked = {"init_from": str(start), "max_seq_length": 600}
    with pytest.raises(
        ConfigurationError,
        match=r"lower max_seq_length to 40, or add --model.max_position_embeddings 602, which repeats",
    ):
        Trainer(configure(data, tmp_path, **asked))
    trainer = Trainer(configure(data, tmp_path, **asked, model={"max_position_embeddings": 612}))
    assert trainer.notes == [f"{start}: its 40 positions are repeated to make 610"]
    before = read_pretrained(start).tensors[POSITIONS][2:]
    after = trainer.model.embeddings.position_embeddings.weight
    assert after.shape[0] == trainer.config.model.max_position_embeddings == 612
    for first in (2, 42, 562):
        assert torch.equal(after[first : first + 40], before)
    assert torch.equal(after[602:], before[:10]) and not after[:2].any()


@pytest.mark.parametrize(
    "old_kind, new_kind", [("roberta",) * 2, ("xlm-roberta",) * 2, ("bert",) * 2, ("bert", "roberta")]
)
def test_a_vocabulary_is_resized_by_the_text_of_tokens(models, tmp_path, old_kind, new_kind):
    pretrained = read_pretrained(models(old_kind)[0])
    old, new = make_tokenizer(old_kind), make_tokenizer(new_kind, OTHER, 300)
    resized = resize_vocabulary(pretrained, old, new)
    old_ids, new_ids = (one.get_vocab(with_added_tokens=True) for one in (old, new))
    kept = [(new_ids[token], old_ids[token]) for token in new_ids.keys() & old_ids.keys()]
    kept += zip(special_token_ids(new), special_token_ids(old))
    added = {"cow": new_ids.keys() & {"cow", "Ġcow", "▁cow"}}
    for name in (WORDS, HEAD_BIAS):
        before, after = pretrained.tensors[name], resized.tensors[name]
        assert len(after) == len(new_ids) == resized.config.vocab_size
        if old_kind == new_kind:
            for row, source in kept:
                assert torch.equal(after[row], before[source])
        for token in added["cow"]:
            parts = old.encode(" cow", add_special_tokens=False).ids
            assert len(parts) > 1
            torch.testing.assert_close(after[new_ids[token]], before[parts].mean(dim=0))
    assert added["cow"] and f"vocabulary of {len(old_ids)} fitted to {len(new_ids)} tokens" in resized.notes[-1]
    numbers = [int(word) for word in resized.notes[-1].replace(",", "").split() if word.isdigit()]
    assert numbers[2] + numbers[3] == len(new_ids) and numbers[2] + numbers[4] == len(old_ids)

    # What is written in tokens of both gives the same hidden states, wherever the padding id has moved positions.
    bos, pad, eos, _, mask = zip(special_token_ids(old), special_token_ids(new))
    common = max(new_ids.keys() & old_ids.keys() - {"<mask>", "[MASK]"}, key=len)
    the = (old_ids[common], new_ids[common]) if old_kind == new_kind else (old_ids["the"], new_ids["Ġthe"])
    sequences = [bos, the, mask, the, eos, *[the] * 34, eos]
    hidden = [
        model.build().eval().encode(torch.tensor([[token[at] for token in sequences]]), AttentionScope())
        for at, model in enumerate((pretrained, resized))
    ]
    assert pad[1] == resized.pad_token_id
    assert (hidden[0] - hidden[1]).abs().max() < 1e-6


def test_a_model_for_other_data_needs_to_be_asked_for(models, tmp_path):
    _, data = models("xlm-roberta")
    other = tmp_path / "other"
    make_model(other, "xlm-roberta", make_tokenizer("xlm-roberta", OTHER, 300))
    with pytest.raises(ConfigurationError, match=r"has another tokenizer than .* --resize_vocabulary"):
        Trainer(configure(data, tmp_path / "run", init_from=str(other)))
    with pytest.raises(ConfigurationError, match="resize_vocabulary fits the model of init_from: give --init_from"):
        configure(data, tmp_path / "run", resize_vocabulary=True)
    trainer = Trainer(configure(data, tmp_path / "run", init_from=str(other), resize_vocabulary=True))
    assert "vocabulary of" in trainer.notes[-1] and trainer.config.model.vocab_size == trainer.manifest.vocab_size
    trainer.train()

    # Its tokenizer has got a word of its own, the model has not: the word's parts are those without it.
    make_model(other, "xlm-roberta", make_tokenizer("xlm-roberta"))
    tokenizer = load_tokenizer(other)
    tokenizer.add_tokens(["catdog"])
    wide = resize_vocabulary(read_pretrained(other), tokenizer, tokenizer)
    words, parts = wide.tensors[WORDS], make_tokenizer("xlm-roberta").encode("catdog", add_special_tokens=False).ids
    assert wide.notes[-1].endswith("1 new with the mean of their parts, 0 dropped") and len(parts) > 1
    torch.testing.assert_close(words[-1], words[parts].mean(dim=0))

    make_model(other, "xlm-roberta", make_tokenizer("xlm-roberta"), vocab_size=20)
    with pytest.raises(
        ConfigurationError, match=r"has embeddings for 20 tokens, but its tokenizer has \d+; add --resize"
    ):
        Trainer(configure(data, tmp_path / "next", init_from=str(other)))


def test_an_encoder_starts_with_a_new_head(models, tmp_path):
    _, data = models("bert")
    make_model(tmp_path / "encoder", "bert", make_tokenizer("bert"), head="SequenceClassification")
    trainer = Trainer(configure(data, tmp_path / "run", init_from=str(tmp_path / "encoder")))
    assert [note.split(": ", 1)[1] for note in trainer.notes[1:]] == [
        "has no masked-LM head: a new one starts from random weights", "left out: roberta.pooler.dense, classifier"
    ]  # fmt: skip
    trainer.train()
