"""Small models of transformers' classes with tokenizers of their kinds, as others publish them."""

import functools

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers

from fastroberta.corpus.tokenizer import save_tokenizer, special_token_ids, train_tokenizer, vocabulary_size

THINGS = ("mat", "log", "box", "lawn", "sofa", "table")
TEXT = tuple(
    f"The {a} sat on the {thing}. Was the {a} on the {thing}?" for a in ("cat", "dog", "owl") for thing in THINGS
)
SIZES = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, max_position_embeddings=42,
    type_vocab_size=1, layer_norm_eps=1e-5,
)  # fmt: skip


def train_unigram(texts, size):
    """XLM-R's kind: Unigram, words that begin with a block."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.train_from_iterator(
        texts,
        trainers.UnigramTrainer(
            vocab_size=size, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
        ),
    )
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return tokenizer


def train_wordpiece(texts, size):
    """BERT's kind: WordPiece, parts inside a word that begin with ##."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=names, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


TRAINERS = {"bert": train_wordpiece, "xlm-roberta": train_unigram, "camembert": train_unigram}


@functools.cache  # training some of them twice gives two tokenizers
def make_tokenizer(kind, texts=TEXT, size=280):
    """The tokenizer that models of this type have."""
    return TRAINERS.get(kind, train_tokenizer)(texts, size)


def make_model(directory, kind, tokenizer, head="MaskedLM", save=None, **changes):
    """Write a model with random weights in all its tensors, and return it in eval mode."""
    import transformers

    ids = special_token_ids(tokenizer)
    settings = {**SIZES, "vocab_size": vocabulary_size(tokenizer), "pad_token_id": ids.pad, **changes}
    config = transformers.AutoConfig.for_model(kind, **settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel").from_config(config).eval()
    with torch.no_grad():  # a bias of zero would hide that it is not used
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    save_tokenizer(tokenizer, directory)
    model.save_pretrained(directory, **(save or {}))
    return model
