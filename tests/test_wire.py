"""Reading what Flower sends gives what Flower reads."""

import numpy as np
import pytest
from flwr.app import Array
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedmi.exposure.wire import to_array

KINDS = st.sampled_from(["<f4", "<f8", ">f4", "<i8", "|u1", "|b1"])


@given(arrays.arrays(KINDS, arrays.array_shapes(min_dims=0, max_dims=4, min_side=0)))
def test_an_array_is_read_as_flower_reads_it(value: np.ndarray) -> None:
    for sent in (value, np.asfortranarray(value)):
        array = Array(sent)
        ours, theirs = to_array(array), array.numpy()
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        np.testing.assert_array_equal(ours, theirs)
        assert ours.flags.writeable


def test_what_was_read_is_a_copy() -> None:
    array = Array(np.zeros(3, dtype=np.float32))
    to_array(array)[0] = 1
    assert to_array(array).tolist() == [0, 0, 0]


def test_an_array_cut_short_is_refused() -> None:
    array = Array(np.zeros((4, 4), dtype=np.float32))
    cut = Array(dtype=array.dtype, shape=array.shape, stype=array.stype, data=array.data[:-16])
    with pytest.raises(ValueError, match=r"reshape|EOF|array"):
        to_array(cut)


def test_an_array_that_does_not_say_its_type_is_parsed() -> None:
    """As Flower's own servers of the older kind send them."""
    known = Array(np.arange(6, dtype=np.float32).reshape(2, 3))
    untyped = Array(dtype="", shape=(), stype=known.stype, data=known.data)
    assert to_array(untyped).tolist() == [[0, 1, 2], [3, 4, 5]]
