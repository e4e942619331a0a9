"""Masking: what it promises, its statistics, and kernel and twin equal bit for bit."""

from __future__ import annotations

from fractions import Fraction
from math import floor

import pytest
import torch
from fastroberta_kernels import masking, philox
from fastroberta_kernels._dispatch import jit, record_launches, tl
from fastroberta_kernels.masking import MaskedTokens, TokenMasker, count_chosen, mask_tokens
from test_philox import philox_integers

from bench.launch_cases import masking_cases

MASK, VOCAB = 50264, 50265
SPECIAL = (0, 1, 2, 3, MASK)
ROBERTA = {"mask_token_id": MASK, "vocab_size": VOCAB, "special_token_ids": SPECIAL}
SMALL = {"mask_token_id": 104, "vocab_size": 105, "special_token_ids": (0, 1, 2, 3, 104)}  # 100 ordinary ids


def make_batch(batch, length, seed=0):
    """Sequences of different lengths: <s>, ordinary tokens, some <unk>, </s>, <pad> to the end."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, MASK, (batch, length), generator=generator)
    ids[torch.rand((batch, length), generator=generator) < 0.02] = 3
    ids[:, :1] = 0
    for row in range(batch):
        end = length - (row * 13) % max(1, length // 2)
        ids[row, end - 1 : end] = 2
        ids[row, end:] = 1
    return ids


def assert_same(ours: MaskedTokens, theirs: MaskedTokens):
    for name in MaskedTokens._fields:
        left, right = getattr(ours, name), getattr(theirs, name)
        assert left.dtype == right.dtype == torch.int64
        assert torch.equal(left, right), name


def assert_within(chi_square, freedom, what):
    """Five standard deviations of a chi-square value, either side: too even is as wrong as too uneven."""
    assert abs(chi_square - freedom) <= 5 * (2 * freedom) ** 0.5, f"{what}: chi-square {chi_square} for {freedom}"


def mask_row_in_integers(ids, sample, seed, millionths, mask_token_id, vocab_size, special_token_ids):
    """One sequence in plain Python: the definition, written a third time."""
    words = [
        philox_integers(
            (position, 0x6D61736B, sample & 0xFFFFFFFF, (sample >> 32) & 0xFFFFFFFF),
            (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF),
        )
        for position in range(len(ids))
    ]
    maskable = [position for position, token in enumerate(ids) if token not in special_token_ids]
    k = floor(Fraction(millionths * len(maskable), 10**6) + Fraction(1, 2))
    k = max(k, 1 if maskable and millionths else 0)
    chosen = sorted(sorted(maskable, key=lambda position: (words[position][0], position))[:k])
    ordinary = [token for token in range(vocab_size) if token not in special_token_ids]
    output = list(ids)
    for position in chosen:
        _, action, draw, _ = words[position]
        if action < floor(0.8 * 2**32 + 0.5):
            output[position] = mask_token_id
        elif action < floor(0.9 * 2**32 + 0.5):
            output[position] = ordinary[draw * len(ordinary) >> 32]
    return output, chosen


@pytest.mark.parametrize("probability", ["0", "0.000001", "0.1", "0.15", "0.3", "0.5", "0.999999", "1"])
def test_count_chosen_rounds_half_up(probability):
    for num_maskable in range(600):
        expected = floor(Fraction(probability) * num_maskable + Fraction(1, 2))
        if num_maskable and float(probability):
            expected = max(expected, 1)
        assert count_chosen(num_maskable, float(probability)) == expected
    assert count_chosen(510, 0.15) == 77  # 76.5: Python's round() would give 76
    assert count_chosen(5, 1e-9) == 1


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("seed, samples", [(0, [0, 1, 2]), (-12345, [2**32 + 7, 7, -1])])
def test_equals_the_definition_in_plain_integers(impl, seed, samples, device):
    ids = make_batch(3, 40)
    ids[ids > 3] %= 100
    ids = ids.to(device)
    ours = mask_tokens(
        ids, **SMALL, mlm_probability=0.4, seed=seed, sample_ids=torch.tensor(samples, device=device), impl=impl
    )
    for row, sample in enumerate(samples):
        output, chosen = mask_row_in_integers(ids[row].tolist(), sample, seed, 400_000, **SMALL)
        assert ours.input_ids[row].tolist() == output
        assert ours.positions[row, : len(chosen)].tolist() == chosen
        assert ours.labels[row, : len(chosen)].tolist() == ids[row, chosen].tolist()


@pytest.mark.parametrize("probability", [0.0, 0.15, 0.5, 1.0])
def test_promises(probability):
    """Exactly k, ascending, ordinary tokens only, untouched elsewhere, unused slots marked."""
    ids = make_batch(9, 101)
    special = torch.tensor(SPECIAL)
    before = ids.clone()
    output, positions, labels = mask_tokens(
        ids, **ROBERTA, mlm_probability=probability, seed=1, sample_ids=torch.arange(9)
    )
    assert torch.equal(ids, before), "the input must stay as it is"
    assert positions.shape == labels.shape == (9, count_chosen(101, probability))
    for row in range(9):
        k = count_chosen((~torch.isin(ids[row], special)).sum().item(), probability)
        used = positions[row, :k]
        assert (used[1:] > used[:-1]).all()
        assert not torch.isin(ids[row, used], special).any()
        assert torch.equal(labels[row, :k], ids[row, used])
        assert (positions[row, k:] == 100).all() and (labels[row, k:] == -100).all()
        changed = (output[row] != ids[row]).nonzero()[:, 0]
        assert torch.isin(changed, used).all()
    assert not torch.isin(output[output != ids], torch.tensor(SPECIAL[:-1])).any(), "a special token was drawn"


def test_position_statistics():
    """Each position, and each pair of neighbours, is chosen as often as it should be."""
    length, samples, k = 64, 20_000, 10
    ids, sample_ids = torch.full((samples, length), 9), torch.arange(samples)
    chosen = mask_tokens(ids, **ROBERTA, mlm_probability=k / length, seed=3, sample_ids=sample_ids).positions
    assert chosen.shape == (samples, k)
    counts = torch.bincount(chosen.flatten(), minlength=length).double()
    expected = samples * k / length
    # Drawing k without replacement, counts vary less than a multinomial's by 1 - k / length and sum to a constant.
    chi_square = ((counts - expected).square() / (expected * (1 - k / length))).sum().item() * (length - 1) / length
    assert_within(chi_square, length - 1, "positions")
    pairs = torch.bincount(chosen[:, :-1][chosen.diff(dim=1) == 1], minlength=length - 1).double()[: length - 1]
    probability = k * (k - 1) / (length * (length - 1))
    deviation = (samples * probability * (1 - probability)) ** 0.5
    assert ((pairs - samples * probability).abs() <= 5 * deviation).all(), "neighbouring pairs"


def test_action_and_replacement_statistics():
    """80/10/10, and replacements uniform over the ordinary ids; the input lies outside the vocabulary to tell apart."""
    samples, length = 20_000, 64
    ids = torch.full((samples, length), 1000)
    output, positions, labels = mask_tokens(ids, **SMALL, seed=4, sample_ids=torch.arange(samples))
    assert (labels == 1000).all()
    tokens = output.gather(1, positions)
    num_chosen = tokens.numel()
    for name, share, count in (
        ("masked", 0.8, (tokens == 104).sum().item()),
        ("kept", 0.1, (tokens == 1000).sum().item()),
        ("replaced", 0.1, ((tokens >= 4) & (tokens < 104)).sum().item()),
    ):
        assert abs(count - num_chosen * share) <= 5 * (num_chosen * share * (1 - share)) ** 0.5, name
    replaced = tokens[(tokens != 104) & (tokens != 1000)]
    assert replaced.min() >= 4 and replaced.max() < 104, "a special token was drawn"
    counts = torch.bincount(replaced - 4, minlength=100).double()
    expected = replaced.numel() / 100
    assert_within(((counts - expected).square() / expected).sum().item(), 99, "replacements")
    # The action does not depend on the slot: each of the ten slots has its 80%.
    masked = (tokens == 104).double().sum(dim=0)
    chi_square = ((masked - samples * 0.8).square() / (samples * 0.8 * 0.2)).sum().item()
    assert_within(chi_square, masked.numel(), "actions by slot")


def test_special_ids_anywhere_in_the_vocabulary_are_skipped():
    """Special ids at both ends, adjacent and alone; every ordinary id can be drawn, no other."""
    special = (0, 1, 5, 6, 7, 19)
    output, positions, _ = mask_tokens(
        torch.full((2000, 64), 99),
        mask_token_id=19,
        vocab_size=20,
        special_token_ids=special,
        seed=5,
        sample_ids=torch.arange(2000),
    )
    drawn = output.gather(1, positions).unique().tolist()
    assert drawn == [token for token in range(20) if token not in special] + [19, 99]


def test_a_function_of_seed_and_sample_alone():
    ids, samples = make_batch(8, 60), torch.arange(8) * 1000 + 2**33
    whole = mask_tokens(ids, **ROBERTA, seed=11, sample_ids=samples)
    order = torch.tensor([3, 0, 7, 1, 2, 6, 5, 4])
    assert_same(
        mask_tokens(ids[order], **ROBERTA, seed=11, sample_ids=samples[order]),
        MaskedTokens(*(part[order] for part in whole)),
    )
    for rows in (slice(0, 3), slice(3, 8), slice(5, 6)):
        part = mask_tokens(ids[rows], **ROBERTA, seed=11, sample_ids=samples[rows])
        assert_same(part, MaskedTokens(*(tensor[rows] for tensor in whole)))
    # Padding on the right changes neither the choice nor the tokens.
    padded = mask_tokens(torch.nn.functional.pad(ids, (0, 13), value=1), **ROBERTA, seed=11, sample_ids=samples)
    assert torch.equal(padded.input_ids[:, :60], whole.input_ids)
    # A tensor seed is the int; its first row plays no part.
    assert_same(mask_tokens(ids, **ROBERTA, seed=torch.tensor([11, 500]), sample_ids=samples), whole)


def test_other_samples_and_other_seeds_draw_otherwise():
    ids = torch.full((4, 200), 9)
    samples = torch.tensor([0, 1, 2**32, 2**40])  # the high word counts too
    first = mask_tokens(ids, **ROBERTA, seed=0, sample_ids=samples).positions
    second = mask_tokens(ids, **ROBERTA, seed=2**32, sample_ids=samples).positions
    rows = torch.cat((first, second)).tolist()
    assert len({tuple(row) for row in rows}) == 8


def test_ten_million_samples_do_not_collide():
    """Distinct samples have distinct counters under a bijection; here their draws at a position are looked at."""
    numbers = torch.arange(5_000_000)
    samples = torch.cat((numbers, numbers + 2**32))
    keys = []
    for piece in samples.split(50_000):
        words = philox.philox_torch(
            (torch.zeros((), dtype=torch.int64), torch.tensor(masking.MASKING_TAG), *philox.split_words(piece)),
            philox.split_words(torch.tensor(12)),
        )
        keys.append((words[0] << 32) | words[1])
    keys = torch.cat(keys).sort().values
    assert keys.numel() == 10_000_000 and (keys[1:] != keys[:-1]).all()


@pytest.mark.parametrize("probability", [0.0, 0.15, 1.0])
@pytest.mark.parametrize("length", [1, 2, 7, 64, 511, 512, 600])  # 600: a block that is larger than the smallest
def test_triton_equals_torch(length, probability, device):
    ids = make_batch(2, length).to(device)
    arguments = ROBERTA | {
        "mlm_probability": probability,
        "seed": -99,
        "sample_ids": torch.tensor([5, -(2**40)], device=device),
    }
    assert_same(mask_tokens(ids, **arguments, impl="triton"), mask_tokens(ids, **arguments, impl="torch"))


@pytest.mark.parametrize("special", [(), (1,), tuple(range(90)), tuple(range(1, 100, 3))])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_any_set_of_special_ids(special, impl, device):
    ids = (torch.arange(600) % 150).reshape(2, 300)  # a third lies outside the vocabulary, so is never special
    ours = mask_tokens(
        ids.to(device),
        mask_token_id=99,
        vocab_size=100,
        special_token_ids=special,
        mlm_probability=1.0,
        seed=1,
        sample_ids=torch.arange(2, device=device),
        impl=impl,
    )
    for row in range(2):
        output, chosen = mask_row_in_integers(ids[row].tolist(), row, 1, 1_000_000, 99, 100, special)
        assert ours.input_ids[row].tolist() == output
        assert ours.positions[row, : len(chosen)].tolist() == chosen


@jit
def coarse_philox(c0, c1, c2, c3, k0, k1, ROUNDS: tl.constexpr):
    w0, w1, w2, w3 = philox.philox(c0, c1, c2, c3, k0, k1, 10)
    return w0 & 0xC0000000, w1, w2, w3


@pytest.mark.skipif(torch.cuda.is_available(), reason="replaces the generator, which a compiled kernel has built in")
def test_equal_keys_go_to_the_smaller_position(monkeypatch):
    """32-bit keys seldom tie, so the generator is made coarse: four different keys only."""

    def coarse_philox_torch(counter, key):
        selection, *rest = philox.philox_torch(counter, key)
        return selection & 0xC0000000, *rest

    ids = torch.full((3, 100), 9)
    arguments = ROBERTA | {"seed": 6, "sample_ids": torch.arange(3)}
    monkeypatch.setattr(masking, "philox", coarse_philox)
    monkeypatch.setattr(masking, "philox_torch", coarse_philox_torch)
    for probability in (0.05, 0.15, 0.6):
        ours = mask_tokens(ids, **arguments, mlm_probability=probability, impl="triton")
        assert_same(ours, mask_tokens(ids, **arguments, mlm_probability=probability, impl="torch"))
        for row in range(3):
            keys = [
                philox_integers((position, masking.MASKING_TAG, row, 0), (6, 0))[0] >> 30 for position in range(100)
            ]
            order = sorted(range(100), key=lambda position: (keys[position], position))
            assert ours.positions[row].tolist() == sorted(order[: ours.positions.shape[1]])


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0)])
def test_empty_batches(shape, impl, device):
    ours = mask_tokens(
        torch.zeros(shape, dtype=torch.int64, device=device),
        **ROBERTA,
        seed=0,
        sample_ids=torch.zeros(shape[0], dtype=torch.int64, device=device),
        impl=impl,
    )
    assert ours.input_ids.shape == shape
    assert ours.positions.shape == ours.labels.shape == (shape[0], count_chosen(shape[1], 0.15))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_sequences_without_an_ordinary_token_mask_nothing(impl, device):
    ids = torch.tensor([[0, 1, 2, 3], [0, 9, 2, 1]], device=device)
    ours = mask_tokens(ids, **ROBERTA, seed=0, sample_ids=torch.arange(2, device=device), impl=impl)
    assert ours.positions.tolist() == [[3], [1]]
    assert ours.labels.tolist() == [[-100], [9]]
    assert torch.equal(ours.input_ids[0], ids[0])


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_inputs_need_not_be_contiguous(impl, device):
    ids, samples = make_batch(3, 40).to(device), torch.tensor([4, 9, 2], device=device)
    strided_ids, strided_samples = ids.t().contiguous().t(), samples.repeat_interleave(2)[::2]
    assert not strided_ids.is_contiguous() and not strided_samples.is_contiguous()
    ours = mask_tokens(strided_ids, **ROBERTA, seed=2, sample_ids=strided_samples, impl=impl)
    assert_same(ours, mask_tokens(ids, **ROBERTA, seed=2, sample_ids=samples, impl=impl))
    assert all(part.is_contiguous() for part in ours)


def test_special_ids_in_a_tensor():
    ids = make_batch(4, 50)
    in_tensor = ROBERTA | {"special_token_ids": torch.tensor(SPECIAL)}
    arguments = {"seed": 2, "sample_ids": torch.arange(4)}
    assert_same(mask_tokens(ids, **in_tensor, **arguments), mask_tokens(ids, **ROBERTA, **arguments))


def test_module_is_the_function_and_saves_nothing(device):
    masker = TokenMasker(**ROBERTA, mlm_probability=0.3).to(device)
    ids, samples = make_batch(4, 50).to(device), torch.arange(4, device=device)
    expected = mask_tokens(ids, **ROBERTA, mlm_probability=0.3, seed=2, sample_ids=samples)
    assert_same(masker(ids, samples, 2), expected)
    assert masker.state_dict() == {} and list(masker.parameters()) == []
    assert_same(masker.to(torch.bfloat16)(ids, samples, 2), expected)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        TokenMasker(mask_token_id=7, vocab_size=5, special_token_ids=())
    with pytest.raises(ValueError, match="expected 0 <= mlm_probability <= 1"):
        TokenMasker(**ROBERTA, mlm_probability=15)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mlm_probability": -0.1}, "expected 0 <= mlm_probability <= 1"),
        ({"mlm_probability": 1.5}, "expected 0 <= mlm_probability <= 1"),
        ({"mlm_probability": float("nan")}, "expected 0 <= mlm_probability <= 1"),
        ({"mask_token_id": 105}, "mask_token_id=105 lies outside"),
        ({"mask_token_id": -1}, "mask_token_id=-1 lies outside"),
        ({"special_token_ids": (0, 105)}, "lie outside the vocabulary"),
        ({"special_token_ids": (-1, 3)}, "lie outside the vocabulary"),
        ({"special_token_ids": (3, 0)}, "must ascend"),
        ({"special_token_ids": (3, 3)}, "must ascend"),
        ({"special_token_ids": torch.tensor([[1]])}, "one int64 vector"),
        ({"special_token_ids": torch.tensor([1.0])}, "one int64 vector"),
        ({"special_token_ids": tuple(range(105))}, "leaves no token"),
        ({"special_token_ids": torch.arange(105)}, "leaves no token"),
        ({"sample_ids": torch.arange(3)}, "sample_ids must be int64"),
        ({"sample_ids": torch.arange(2.0)}, "sample_ids must be int64"),
        ({"input_ids": torch.zeros(2, 8)}, "input_ids must be int64"),
        ({"input_ids": torch.zeros(8, dtype=torch.int64)}, "input_ids must be int64"),
        ({"input_ids": torch.zeros((2, 4097), dtype=torch.int64)}, "longer than 4096"),
        ({"seed": torch.tensor([1.0])}, "seed: expected an int"),
        ({"impl": "cuda"}, "impl='cuda' is unknown"),
        ({"sample_ids": torch.zeros(2, dtype=torch.int64, device="meta")}, "move them to one device"),
    ],
)
def test_wrong_input_is_named(change, message):
    arguments = SMALL | {"input_ids": torch.full((2, 8), 9), "seed": 0, "sample_ids": torch.arange(2)} | change
    with pytest.raises(ValueError, match=message):
        mask_tokens(**arguments)


def test_longest_sequence_works_in_the_twin():
    ids = torch.full((1, masking.LONGEST_SEQUENCE), 9)
    ours = mask_tokens(ids, **ROBERTA, seed=0, sample_ids=torch.arange(1))
    assert (ours.input_ids != ids).sum() > 0.8 * ours.positions.numel()


def test_opcheck(device):
    ids = make_batch(2, 20).to(device)
    samples, seed = torch.arange(2, device=device), torch.tensor([1, 0], device=device)
    special = torch.tensor(SPECIAL, device=device)
    torch.library.opcheck(masking._mask_tokens_op.registered, (ids, samples, seed, special, MASK, VOCAB, 0.15))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_compiled_equals_eager(impl, device):
    ids, samples, seed = make_batch(2, 20).to(device), torch.arange(2, device=device), torch.tensor([1], device=device)

    def mask(ids, samples, seed):
        return mask_tokens(ids, **ROBERTA, seed=seed, sample_ids=samples, impl=impl)

    torch.compiler.reset()
    compiled = torch.compile(mask, fullgraph=True, backend="aot_eager")
    for offset in (0, 10):
        assert_same(compiled(ids, samples + offset, seed), mask(ids, samples + offset, seed))


def test_fake_tensors_leave_nothing_behind():
    """A first call with fake tensors must not put a fake constant into the cache that the next call uses."""
    masking._cached_ids.cache_clear()
    arguments = {"input_ids": torch.full((2, 20), 9), "sample_ids": torch.arange(2)}
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mask_tokens(**{name: mode.from_tensor(value) for name, value in arguments.items()}, **ROBERTA, seed=1)
        assert fake.positions.shape == (2, 3)
    assert mask_tokens(**arguments, **ROBERTA, seed=1).positions.shape == (2, 3)
    with torch._subclasses.FakeTensorMode() as mode:
        mask_tokens(**{name: mode.from_tensor(value) for name, value in arguments.items()}, **ROBERTA, seed=1)


@pytest.mark.gpu
def test_every_configuration_on_the_device(device):
    """Every block size, and all arguments equal to one, against the twin on the CPU."""
    for length in (1, 2, 510, 512, 513, 1024, 1025, 2048, 3000, 4096):
        ids, samples = make_batch(16, length), torch.arange(16) * 2**31
        for probability in (0.0, 1e-6, 0.15, 0.4, 1.0):
            arguments = ROBERTA | {"mlm_probability": probability, "seed": 2**63 + 5}
            ours = mask_tokens(ids.to(device), **arguments, sample_ids=samples.to(device), impl="triton")
            theirs = mask_tokens(ids, **arguments, sample_ids=samples, impl="torch")
            assert_same(MaskedTokens(*(part.cpu() for part in ours)), theirs)
            on_device = mask_tokens(ids.to(device), **arguments, sample_ids=samples.to(device), impl="torch")
            assert_same(ours, on_device)
    one = {"mask_token_id": 1, "vocab_size": 2, "special_token_ids": (1,), "mlm_probability": 1e-6, "seed": 1}
    ids, samples = torch.zeros((3, 1), dtype=torch.int64), torch.arange(3)
    ours = mask_tokens(ids.to(device), **one, sample_ids=samples.to(device), impl="triton")
    assert_same(MaskedTokens(*(part.cpu() for part in ours)), mask_tokens(ids, **one, sample_ids=samples))


@pytest.mark.gpu
def test_graph_replay_with_another_seed_masks_otherwise(device):
    masker = TokenMasker(**ROBERTA).to(device)
    ids, samples = make_batch(16, 512).to(device), torch.arange(16, device=device)
    seed = torch.tensor([1, 0], device=device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        masker(ids, samples, seed)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = masker(ids, samples, seed)
    for key in (1, 2, 3):
        seed[0] = key
        graph.replay()
        assert_same(captured, masker(ids, samples, torch.tensor([key, 0], device=device)))


@pytest.mark.gpu
def test_compiled_for_the_device_equals_eager(device):
    masker = TokenMasker(**ROBERTA).to(device)
    ids, samples, seed = make_batch(8, 512).to(device), torch.arange(8, device=device), torch.tensor([5], device=device)
    assert_same(torch.compile(masker, fullgraph=True)(ids, samples, seed), masker(ids, samples, seed))


@pytest.mark.gpu
def test_hundred_repeats_are_bitwise_equal(device):
    ids, samples = make_batch(64, 512).to(device), torch.arange(64, device=device)
    first = mask_tokens(ids, **ROBERTA, seed=1, sample_ids=samples)
    for _ in range(100):
        assert_same(mask_tokens(ids, **ROBERTA, seed=1, sample_ids=samples), first)


@pytest.mark.gpu
@pytest.mark.xdist_group("large")
def test_more_than_two_to_the_31_elements(device):
    batch, length = 2**19 + 2, 4096
    if torch.cuda.mem_get_info()[0] < 4 * batch * length * 8:
        pytest.skip("needs 64 GiB of free GPU memory")
    ids = torch.full((batch, length), 9, device=device)
    ours = mask_tokens(ids, **ROBERTA, seed=1, sample_ids=torch.arange(batch, device=device))
    last = mask_tokens(ids[-3:], **ROBERTA, seed=1, sample_ids=torch.arange(batch, device=device)[-3:])
    assert_same(MaskedTokens(*(part[-3:] for part in ours)), last)


def test_launch_cases_reach_every_block_size():
    with record_launches() as launches:
        for case in masking_cases():
            case()
    assert {launch.options["BLOCK"] for launch in launches} == {512, 1024, 2048, 4096}
