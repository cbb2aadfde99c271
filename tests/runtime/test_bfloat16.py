from __future__ import annotations

import numpy as np
import pytest

from relay_attention.runtime import bfloat16


def test_every_number_is_widened_exactly_and_narrowed_to_itself():
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(2, -1)
    wide = bfloat16.widen(bits)
    assert wide.dtype == np.float32
    assert wide.shape == bits.shape
    assert bfloat16.widen(np.uint16([0x3F80, 0xC040, 0x7F80])).tolist() == [1.0, -3.0, np.inf]
    back = bfloat16.narrow(wide)
    is_nan = np.isnan(wide)
    np.testing.assert_array_equal(back[~is_nan], bits[~is_nan])
    assert np.isnan(bfloat16.widen(back[is_nan])).all()


@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        (1 + 2**-8, 1.0),  # a tie, to the even one below
        (1 + 3 * 2**-8, 1 + 2**-6),  # a tie, to the even one above
        (1 + 2**-8 + 2**-20, 1 + 2**-7),
        (-1 - 2**-8 + 2**-20, -1.0),
        (2 - 2**-9, 2.0),
        (3.4e38, np.inf),
        (-np.inf, -np.inf),
        (1e-45, 0.0),
    ],
)
def test_rounding(value: float, rounded: float):
    found = bfloat16.widen(bfloat16.narrow(np.float32([value])))
    assert found.tolist() == [rounded]


def test_rounding_is_what_others_do():
    other = pytest.importorskip("ml_dtypes").bfloat16
    random = np.random.default_rng(0)
    values = random.integers(0, 1 << 32, 100000, dtype=np.uint32).view(np.float32)
    values = values[~np.isnan(values)]
    np.testing.assert_array_equal(bfloat16.narrow(values), values.astype(other).view(np.uint16))
    assert np.isnan(
        bfloat16.widen(bfloat16.narrow(np.uint32([0x7F800001, 0xFFFFFFFF]).view(np.float32)))
    ).all()


def test_what_holds_each_type():
    assert bfloat16.storage("bfloat16") == np.uint16
    assert bfloat16.storage("float16") == np.float16
    assert bfloat16.element_type(np.dtype(np.uint16)) == 16
    assert bfloat16.element_type(np.dtype(np.float32)) is np.float32
