"""The Philox mask: known answers, the same bits everywhere, and the right statistics."""

import pytest
import torch

import lora_kernels as lk
from lora_kernels.impl.eager import conv_mask
from lora_kernels.impl.eager import mask as eager_mask
from lora_kernels.impl.reference import mask as reference_mask
from lora_kernels.native import absence
from lora_kernels.operands.dropout import Dropout, drop_threshold, keep_scale
from lora_kernels.registration import operators
from tests.support.implementations import IMPLS, skip_if_refused

WORD = 0xFFFFFFFF


def scalar_philox(counter, key):
    """Philox-4x32-10 in Python integers, all 128 counter bits: independent of the package."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & WORD, (p0 >> 32) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return [c0, c1, c2, c3]


# The known-answer vectors that the generator's authors publish.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([WORD] * 4, [WORD] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_scalar_philox_gives_the_published_answers(counter, key, words):
    assert scalar_philox(counter, key) == words


def test_reference_philox_equals_the_scalar_one():
    for _ in range(50):
        counter = int(torch.randint(-(1 << 63), (1 << 63) - 1, ()))
        seed = int(torch.randint(-(1 << 63), (1 << 63) - 1, ()))
        words = reference_mask.philox_4x32_10(torch.tensor([counter]), seed)[0].tolist()
        unsigned = counter & (1 << 64) - 1
        key = [seed & WORD, (seed >> 32) & WORD]
        assert words == scalar_philox([unsigned & WORD, unsigned >> 32, 0, 0], key)


def test_mask_element_takes_its_lane():
    rows, columns, seed, threshold = 3, 21, 12345, 20000
    mask = reference_mask.keep_mask(rows, columns, threshold, seed, "cpu")
    for m in range(rows):
        for k in range(columns):
            words = scalar_philox([m * 3 + k // 8, 0, 0, 0], [seed, 0])
            lane = words[k % 8 // 2] >> (16 * (k % 2)) & 0xFFFF
            assert mask[m, k] == (lane >= threshold)


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 1001), (700, 768), (2100, 129)], ids=str)
@pytest.mark.parametrize("block", [1 << 6, 1 << 17])
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "aten"])
def test_eager_blocks_have_the_bits_of_the_reference(shape, block, compiled, monkeypatch):
    if compiled and absence("cpu") is not None:
        pytest.skip(f"compiled CPU part: {absence('cpu')}")
    if not compiled:
        monkeypatch.setattr(eager_mask, "absence", lambda part: "left out by this test")
    monkeypatch.setattr(eager_mask, "BLOCK_COUNTERS", block)
    seed = torch.randint(-(1 << 63), (1 << 63) - 1, ())
    mask = torch.zeros(shape, dtype=torch.int16)
    for rows, keep in eager_mask.keep_blocks(*shape, Dropout(seed, 6554)):
        mask[rows] = keep
    assert torch.equal(mask.bool(), reference_mask.keep_mask(*shape, 6554, seed, "cpu"))


@pytest.mark.parametrize("own_last", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_blocks_of_a_convolution_s_samples(last, own_last, monkeypatch):
    """Samples of 35 positions in blocks of 8: channels may come first, in one tensor or both."""
    monkeypatch.setattr(eager_mask, "BLOCK_COUNTERS", 16)
    dropout = Dropout(torch.randint(-(1 << 63), (1 << 63) - 1, ()), 20000)
    mask = reference_mask.keep_mask(3 * 35, 13, 20000, dropout.seed, "cpu")
    mask = mask.view(3, 5, 7, 13).movedim(-1, 1)
    forms = [torch.channels_last if f else torch.contiguous_format for f in (last, own_last)]
    x, own = (torch.randn(3, 13, 5, 7).contiguous(memory_format=form) for form in forms)
    before, wanted = x.clone(), [torch.where(mask, t, 0.0) for t in (x, own)]
    assert torch.equal(conv_mask.kept(x, dropout), wanted[0])
    assert conv_mask.kept_both(None, None, dropout) == (None, None)
    alone = conv_mask.kept_both(None, own.clone(), dropout)
    assert alone[0] is None
    assert torch.equal(alone[1], wanted[1])
    found = conv_mask.kept_both(x, own, dropout)
    assert all(map(torch.equal, found, wanted))
    assert torch.equal(x, before)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "aten"])
def test_lanes_beyond_the_32_bit_counter(compiled):
    if compiled and absence("cpu") is not None:
        pytest.skip(f"compiled CPU part: {absence('cpu')}")
    start, count, seed, threshold = (1 << 32) - 100, 333, torch.tensor(-987654321), 6554
    lanes = torch.full((count, 8), 7, dtype=torch.int16)
    fill = eager_mask._compiled_fill(seed) if compiled else eager_mask._aten_fill(seed, count)
    fill(lanes, start, threshold)
    words = reference_mask.philox_4x32_10(torch.arange(start, start + count), seed)
    expected = torch.stack((words & 0xFFFF, words >> 16), -1).reshape(count, 8) >= threshold
    assert torch.equal(lanes, expected.to(torch.int16))


def test_compiled_lanes_do_not_depend_on_the_number_of_threads():
    if absence("cpu") is not None:
        pytest.skip(f"compiled CPU part: {absence('cpu')}")
    masks, threads = [], torch.get_num_threads()
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        masks.append(
            next(eager_mask.keep_blocks(999, 1000, Dropout(torch.tensor(5), 6554)))[1].clone()
        )
    torch.set_num_threads(threads)
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("lanes", [torch.zeros(4, 7).short(), torch.zeros(4, 8), torch.zeros(8)])
def test_compiled_generator_refuses_other_tensors(lanes):
    if absence("cpu") is not None:
        pytest.skip(f"compiled CPU part: {absence('cpu')}")
    with pytest.raises(RuntimeError, match="lanes: expected"):
        torch.ops.lora_kernels.keep_lanes_(lanes, 0, 1, 2)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_call_uses_the_mask_that_dropout_mask_shows(impl, dtype):
    skip_if_refused(impl, dtype)
    x = torch.rand(3, 5, 33).to(dtype) + 1
    eye = torch.eye(33, dtype=dtype)
    y = lk.lora_linear(x, 0 * eye, eye, eye, dropout_p=0.4, training=True, seed=77, impl=impl)
    mask = lk.dropout_mask(x.shape, 0.4, 77)
    assert torch.equal(y != 0, mask)
    torch.testing.assert_close(y, x * mask * keep_scale(drop_threshold(0.4)))


def test_mask_statistics():
    p, shape = 0.1, (2000, 777)
    mask = lk.dropout_mask(shape, p, seed=int(torch.randint(0, 1 << 62, ())))
    n = mask.numel()
    deviation = (mask.float().mean() - (1 - p)).abs()
    assert deviation < 6 * (p * (1 - p) / n) ** 0.5
    other = lk.dropout_mask(shape, p, seed=int(torch.randint(0, 1 << 62, ())))
    agreement = (mask == other).double().mean()
    assert abs(agreement - (p * p + (1 - p) ** 2)) < 6 / n**0.5
    lanes = mask[:, :768].reshape(-1, 8).float().mean(0)
    assert (lanes - (1 - p)).abs().max() < 6 * (p * (1 - p) * 8 / n) ** 0.5


def test_expectation_is_the_input():
    x, eye = torch.ones(1, 64), torch.eye(64)
    total = torch.zeros(1, 64)
    for seed in range(2000):
        total += lk.lora_linear(x, 0 * eye, eye, eye, dropout_p=0.3, training=True, seed=seed)
    assert (total / 2000 - 1).abs().max() < 6 * (0.3 / 0.7 / 2000) ** 0.5


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.5, 1 - 1e-9])
def test_threshold_stays_within_the_lane(p):
    assert 0 <= drop_threshold(p) <= 65535
    assert keep_scale(drop_threshold(p)) >= 1


def test_no_dropout_outside_training():
    x, w, a, b = torch.randn(4, 8), torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
    plain = lk.lora_linear(x, w, a, b)
    assert torch.equal(lk.lora_linear(x, w, a, b, dropout_p=0.5, training=False), plain)
    assert not torch.equal(lk.lora_linear(x, w, a, b, dropout_p=0.5, training=True), plain)


def test_torch_seed_reproduces_and_calls_differ():
    x, w, a, b = torch.randn(4, 80), torch.randn(6, 80), torch.randn(2, 80), torch.randn(6, 2)

    def call():
        return lk.lora_linear(x, w, a, b, dropout_p=0.5, training=True)

    torch.manual_seed(3)
    first, second = call(), call()
    torch.manual_seed(3)
    assert torch.equal(call(), first)
    assert not torch.equal(first, second)


def test_seed_as_tensor_and_as_number_agree():
    x, w, a, b = torch.randn(4, 80), torch.randn(6, 80), torch.randn(2, 80), torch.randn(6, 2)
    number = lk.lora_linear(x, w, a, b, dropout_p=0.5, training=True, seed=-5)
    tensor = lk.lora_linear(x, w, a, b, dropout_p=0.5, training=True, seed=torch.tensor(-5))
    assert torch.equal(number, tensor)


def check_that_nothing_is_dropped(impl):
    """Check that an operator without a seed, or without a threshold, has no dropout at all."""
    x, w, a, b = (torch.randn(shape) for shape in ((40, 24), (16, 24), (4, 24), (16, 4)))
    forward, backward = operators("lora_linear", impl)

    def results(seed, threshold):
        rest = (seed, threshold, None, 1.0)
        y, xa = forward(x, w, None, None, a, b, None, *rest)
        return y, xa, *backward(torch.ones_like(y), x, xa, w, None, None, a, b, *rest, [True] * 4)

    plain = results(None, 0)
    for seed, threshold in ((None, 30000), (torch.tensor(3), 0)):
        for expected, actual in zip(plain, results(seed, threshold), strict=True):
            assert torch.equal(expected, actual)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_seed_or_no_threshold_is_no_dropout(impl):
    skip_if_refused(impl)
    check_that_nothing_is_dropped(impl)
