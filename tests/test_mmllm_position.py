"""A log line says where in the data a run is."""

import pytest
from small_world import small_world

from data.config import DataConfig
from data.loader import Loader
from mmllm.megatron.metrics import position


def loader(**changes: object) -> Loader:
    return Loader(DataConfig(shards=small_world().tokens, block_len=64, **changes))  # type: ignore[arg-type]


def test_epochs_are_documents_of_the_rows_before() -> None:
    rows = loader(row_len=512)
    for consumed in (1, 5, 40):
        seen = sum(len(rows.row(number).keys) for number in range(consumed))
        (epoch,) = (value for name, value in position(rows, consumed).items() if name.startswith("epoch/"))
        assert epoch == pytest.approx(seen / 96)


def test_documents_that_were_left_out_are_counted() -> None:
    rows = loader(row_len=90, long_documents="drop")
    found = position(rows, 200)
    longer = sum(rows.plan.block(number).left_out for number in range(rows.plan._at(199)))
    assert found["left_out"] == longer > 0 and "cut" not in found
