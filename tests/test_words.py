"""The bit stream of checkpoints, against whole columns as Python integers."""

import numpy as np
import pytest
from gptq_fn_kernels.words import chunk_of, pack, unpack, words_of
from hypothesis import given
from hypothesis import strategies as st

all_bits = pytest.mark.parametrize("bits", [2, 3, 4, 8])


def as_integer(values: np.ndarray, bits: int) -> int:
    """One integer whose digits of `bits` bits are the values, the first one lowest."""
    return sum((int(value) % 2**bits) << (bits * i) for i, value in enumerate(values))


@all_bits
@given(count=st.integers(1, 200), seed=st.integers(0, 2**32 - 1))
def test_a_column_is_one_number_in_words_as_in_codes(bits, count, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (count, 3)).astype(np.int32)
    words = pack(codes, bits, np)
    assert words.dtype == np.int32
    assert words.shape == (words_of(len(codes), bits), 3)
    for column in range(3):
        assert as_integer(words[:, column], 32) == as_integer(codes[:, column], bits)
    np.testing.assert_array_equal(unpack(words, bits, count, np), codes)


@all_bits
@given(chunks=st.integers(1, 6), seed=st.integers(0, 2**32 - 1))
def test_unpacking_undoes_packing_and_packing_unpacking(bits, chunks, seed):
    rng = np.random.default_rng(seed)
    words = rng.integers(-(2**31), 2**31, (chunks * chunk_of(bits)[1], 2, 3)).astype(np.int32)
    count = len(words) * 32 // bits
    codes = unpack(words, bits, count, np)
    assert codes.shape == (count, 2, 3)
    assert codes.min() >= 0
    assert codes.max() < 2**bits
    np.testing.assert_array_equal(pack(codes, bits, np), words)
    fewer = count - int(rng.integers(32 // bits if bits != 3 else 10))  # not so few that a word would be empty
    np.testing.assert_array_equal(unpack(words, bits, fewer, np), codes[:fewer])


@all_bits
def test_a_wrong_number_of_words_is_refused(bits):
    words = np.zeros((6, 1), np.int32)
    count = 6 * 32 // bits
    for wrong in (count + 1, count - 32 // bits - 1):
        with pytest.raises(ValueError, match=f"{wrong} codes of {bits} bits fill {words_of(wrong, bits)} words, but there are 6"):
            unpack(words, bits, wrong, np)


def test_the_words_of_a_symmetric_grid_are_those_that_readers_expect():
    """The constants that AutoGPTQ's files hold: every zero point is the middle code, stored less one."""
    for bits, word in ((2, 0x55555555), (4, 0x77777777), (8, 0x7F7F7F7F)):
        codes = np.full((32 // bits, 1), 2 ** (bits - 1) - 1, np.int32)
        assert int(pack(codes, bits, np)[0, 0]) == word
