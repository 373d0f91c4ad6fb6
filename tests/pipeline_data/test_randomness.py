"""The generators of samples: apart from each other, and the same everywhere and for ever."""

from __future__ import annotations

from itertools import product

import numpy as np

from pipeline.data import sample_generator


def test_each_part_of_the_name_makes_another_generator() -> None:
    names = list(product([0, 1, 2**40], [0, 1], [0, 1, 2**33], ["crop", "mask"], [0, 3]))
    first = {name: tuple(sample_generator(*name).integers(0, 2**62, 4).tolist()) for name in names}
    assert len(set(first.values())) == len(names)
    assert first == {name: tuple(sample_generator(*name).integers(0, 2**62, 4).tolist()) for name in names}


def test_numbers_do_not_change_between_versions() -> None:
    """Runs that began with an older Tessera or NumPy must be able to go on: these numbers are part of the format."""
    generator = sample_generator(seed=7, epoch=3, index=11, stream="mask")
    assert generator.integers(0, 1_000_000, 5).tolist() == [796800, 994284, 478048, 223561, 925277]


def test_generators_are_numpys_own_philox_of_that_key_and_counter() -> None:
    ours = sample_generator(seed=7, epoch=3, index=11, stream="mask").bit_generator.state
    assert ours["bit_generator"] == "Philox"
    assert ours["state"]["key"][0] == 7
    theirs = np.random.Philox(key=ours["state"]["key"], counter=ours["state"]["counter"])
    assert np.array_equal(
        sample_generator(seed=7, epoch=3, index=11, stream="mask").bit_generator.random_raw(100), theirs.random_raw(100)
    )
