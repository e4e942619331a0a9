"""Explanations: shares that add up to what they explain, the model's own attention, and a page that stands alone."""

import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from fastroberta.cli.program import run
from fastroberta.explain import main
from fastroberta.tasks.explanation import explain

transformers = pytest.importorskip("transformers")
pytest.importorskip("captum")
pytest.importorskip("matplotlib")

TEXT = "The capital of<mask> is Paris & $x$."
HOSTILE = "<script>x()</script> &$y"


def explain_in(directory, out, *arguments):
    assert main([str(directory), *arguments, "--out", str(out)]) == 0
    return json.loads((out / "explanation.json").read_text())


def compute_log_probabilities(directory, auto_class, text, hide):
    """By transformers alone: with hide, every token that is not special is the mask."""
    model = auto_class.from_pretrained(directory).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    place = ids[0] == tokenizer.mask_token_id
    if hide:
        ids[ids > tokenizer.unk_token_id] = tokenizer.mask_token_id
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    return (logits[0, place][0] if place.any() else logits[0]).log_softmax(dim=-1)


@pytest.mark.parametrize("head", ["MaskedLM", "SequenceClassification"])
def test_shares_add_up_to_the_difference_of_outputs(checkpoint, add_head, head):
    directory = checkpoint if head == "MaskedLM" else add_head(head)
    text = TEXT if head == "MaskedLM" else "The capital of France is Paris."
    auto_class = getattr(transformers, f"AutoModelFor{head}")
    output, baseline = (compute_log_probabilities(directory, auto_class, text, hide) for hide in (False, True))
    best = int(output.argmax() if head == "MaskedLM" else output.argmin())  # the likely label hardly leaves 0
    target = None if head == "MaskedLM" else str(best)
    explanation, _ = explain(Path(directory), text, target=target)
    assert explanation.output == pytest.approx(float(output[best]), abs=1e-4)
    assert explanation.baseline == pytest.approx(float(baseline[best]), abs=1e-4)
    difference = float(output[best] - baseline[best])
    assert abs(difference) > 0.05
    assert sum(explanation.shares) == pytest.approx(difference, rel=0.01)
    assert explanation.remainder == pytest.approx(difference - sum(explanation.shares), abs=1e-4)
    assert [share for token, share in zip(explanation.tokens, explanation.shares) if token in ("<s>", "</s>")] == [0, 0]
    assert sum(abs(share) > 1e-3 for share in explanation.shares) > 5
    coarse, _ = explain(Path(directory), text, target=target, steps=1)
    assert abs(coarse.remainder) > abs(explanation.remainder)


def test_predictions_are_the_models_and_a_target_may_be_given(checkpoint, add_head, tmp_path, capsys):
    log_probabilities = compute_log_probabilities(checkpoint, transformers.AutoModelForMaskedLM, TEXT, False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    default = explain_in(checkpoint, tmp_path / "default", TEXT)
    best = log_probabilities.exp().topk(5)
    assert [name for name, _ in default["predictions"]] == [tokenizer.decode([i]) for i in best.indices.tolist()]
    assert [p for _, p in default["predictions"]] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert default["target"] == default["predictions"][0][0]
    assert f"{default['target']!r}: " in capsys.readouterr().out
    assert {"a", "Ġa"} <= set(tokenizer.get_vocab())
    given = explain_in(checkpoint, tmp_path / "given", TEXT, "--target", "a")
    assert given["target"] == " a"  # the word, rather than a part of one
    assert given["output"] == pytest.approx(float(log_probabilities[tokenizer.convert_tokens_to_ids("Ġa")]), abs=1e-4)
    (tmp_path / "alone").mkdir()  # empty, and so free to use
    assert explain_in(checkpoint, tmp_path / "alone", TEXT, "--target", "$")["target"] == "$"
    classifier = add_head("SequenceClassification")
    pairs = [
        explain_in(classifier, tmp_path / name, "Anna", "--pair", "Ben thanks Anna", "--target", name)
        for name in ("no", "yes")
    ]
    assert [one["target"] for one in pairs] == ["no", "yes"]
    assert sum(torch.tensor(one["output"]).exp() for one in pairs) == pytest.approx(1, abs=1e-5)
    shown = "".join(pairs[0]["tokens"])
    assert shown == "<s>Anna</s></s>Ben thanks Anna</s>"
    assert explain_in(checkpoint, tmp_path / "parts", "日<mask>", "--steps", "1")["tokens"][1:5] == [*"日⋯⋯", "<mask>"]


def test_a_label_that_is_a_number_is_found_by_its_name(add_head, tmp_path):
    labels = ["-1", "0", "1"]
    classifier = add_head(
        "SequenceClassification", id2label=dict(enumerate(labels)), label2id=dict(zip(labels, range(3)))
    )
    for target, label in (("1", "1"), ("0", "0"), ("2", "1")):  # no label is called 2: it is the number of one
        found = explain_in(classifier, tmp_path / target, "Ben thanks Anna", "--target", target, "--steps", "1")
        assert found["target"] == label


def test_a_regression_is_explained_in_its_own_unit(add_head, tmp_path):
    found = explain_in(add_head("SequenceClassification", num_labels=1), tmp_path / "out", "Ben thanks Anna")
    assert found["predictions"] == [["LABEL_0", pytest.approx(found["output"])]]
    assert sum(found["shares"]) == pytest.approx(found["output"] - found["baseline"], rel=0.01)
    assert "log-probabilities" not in (tmp_path / "out" / "index.html").read_text()


def test_attention_is_the_models(checkpoint):
    _, attentions = explain(Path(checkpoint), TEXT, steps=1)
    model = transformers.AutoModel.from_pretrained(checkpoint, attn_implementation="eager").eval()
    inputs = transformers.AutoTokenizer.from_pretrained(checkpoint)(TEXT, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs, output_attentions=True).attentions
    assert len(attentions) == 2
    for layer, theirs in zip(attentions, expected):
        torch.testing.assert_close(layer, theirs[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(layer.sum(dim=-1), torch.ones(layer.shape[:2]), atol=1e-5, rtol=0)


class Resources(HTMLParser):
    """Every tag of a page, and every address that it would fetch."""

    def __init__(self):
        super().__init__()
        self.tags, self.addresses, self.text = set(), [], ""

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_alone_and_shows_text_as_text(add_head, tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    out = tmp_path / "out"
    explain_in(add_head("SequenceClassification", id2label={0: "<i>", 1: "&"}), out, HOSTILE, "--steps", "2")
    page = (out / "index.html").read_text()
    found = Resources()
    found.feed(page)
    assert not found.tags & {"script", "link", "base", "iframe", "i"} and "url(" not in page and "@import" not in page
    assert len(found.addresses) == 1 and found.addresses[0].startswith("data:image/png;base64,")
    assert f"<s>{HOSTILE}</s>" in found.text.replace("␣", " ")
    assert {path.name for path in out.iterdir()} == {"index.html", "explanation.json", "attention-layer-01.png"}
    picture = pillow.open(out / "attention-layer-01.png").convert("L")
    assert min(picture.size) > 200 and picture.getextrema()[0] < 100
    if (chromium := shutil.which("chromium")) is not None:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom"]
        command = [chromium, *flags, (out / "index.html").as_uri()]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
        assert shown.count("<img") == 1 and "<script" not in shown


@pytest.mark.parametrize(
    ("head", "arguments", "code", "message"),
    [
        ("MaskedLM", ["no mask"], 3, "text: contains <mask> 0 times; put it once"),
        ("MaskedLM", ["<mask> and <mask>"], 3, "text: contains <mask> 2 times"),
        ("MaskedLM", ["word " * 60 + "<mask>"], 3, "tokens, the model takes 32; shorten it"),
        ("MaskedLM", [TEXT, "--target", "unimaginable"], 2, "target = unimaginable: not one token"),
        ("MaskedLM", [TEXT, "--pair", "x"], 2, "pair: a masked LM takes one text"),
        ("MaskedLM", [TEXT, "--steps", "0"], 2, "--steps = 0: must lie in [1, inf)"),
        ("SequenceClassification", [TEXT, "--target", "perhaps"], 2, "target = perhaps: no label of this model; it has no"),
        ("QuestionAnswering", [TEXT], 6, "RobertaForQuestionAnswering; this works for masked LM, sequence classification"),
    ],
)  # fmt: skip
def test_wrong_input_is_refused(checkpoint, add_head, tmp_path, capsys, head, arguments, code, message):
    directory = checkpoint if head == "MaskedLM" else add_head(head)
    assert run(lambda: main([str(directory), *arguments, "--out", str(tmp_path / "out")])) == code
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and message in error[0]
    assert not list(tmp_path.iterdir())


def test_a_directory_in_use_is_refused(checkpoint, tmp_path, capsys):
    (tmp_path / "note").write_text("mine")
    assert run(lambda: main([str(checkpoint), TEXT, "--out", str(tmp_path)])) == 2
    assert "exists and is not an empty directory" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


@pytest.mark.parametrize(("module", "name"), [("captum.attr", "captum"), ("matplotlib.figure", "matplotlib")])
def test_a_missing_package_is_named(checkpoint, tmp_path, capsys, monkeypatch, module, name):
    monkeypatch.setitem(sys.modules, module, None)
    assert run(lambda: main([str(checkpoint), TEXT, "--out", str(tmp_path / "out")])) == 2
    assert f"explain needs {name}; pip install 'fastroberta[explain]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
