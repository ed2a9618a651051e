"""Large arrays are in memory of their own, which the next one uses when they are gone."""

import gc

import numpy as np
import pytest
import torch

from train.model import room


@pytest.fixture(autouse=True)
def none_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_free", {})


def address(values: np.ndarray) -> int:
    return int(values.ctypes.data)


def test_room_is_used_again_once_the_last_view_is_gone_and_not_before() -> None:
    first = room.array(2**20, np.float32)
    first[:] = 3
    place, view = address(first), torch.from_numpy(first)[5:9].view(2, 2)
    del first
    gc.collect()
    second = room.array(2**20, np.float32)
    assert address(second) != place
    second[:] = 7
    assert (view == 3).all()
    del view
    gc.collect()
    assert address(room.array(2**19 - 1, np.float64)) == place  # of another type and size, rounded to the same


def test_two_arrays_at_once_do_not_share_room() -> None:
    arrays = [room.array(2**18, np.int64) for _ in range(4)]
    for number, one in enumerate(arrays):
        one[:] = number
    assert [set(one.tolist()) for one in arrays] == [{0}, {1}, {2}, {3}]


def test_small_arrays_have_none() -> None:
    assert room.array(3, np.int64).shape == (3,) and room.array(0, np.float32).shape == (0,)
    assert room._free == {}


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_matrix_is_of_the_type_asked_for(kind: torch.dtype) -> None:
    for rows, columns in ((3, 5), (1024, 1024), (0, 5)):
        found = room.matrix(torch.zeros(1, dtype=kind), rows, columns)
        assert (found.dtype, found.shape) == (kind, (rows, columns))
        assert (found.fill_(1.5) == 1.5).all()
