import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sft.common_prefix import common_prefix_length

FEW = st.lists(st.integers(0, 2), max_size=12)


@given(FEW, FEW, FEW)
def test_texts_tuples_and_arrays_have_the_same_length(shared: list[int], left: list[int], right: list[int]) -> None:
    first, second = [*shared, *left], [*shared, *right]
    pairs = zip(first, second, strict=False)
    expected = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
    arrays = [np.array(values, dtype=np.int64).data for values in (first, second)]
    texts = ["".join(map(str, values)) for values in (first, second)]
    assert common_prefix_length(tuple(first), tuple(second)) == expected
    assert common_prefix_length(*texts) == expected
    assert common_prefix_length(*arrays) == expected
