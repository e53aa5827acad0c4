"""A recipe that cannot work is refused with every reason at once."""

from dataclasses import replace
from pathlib import Path

import pytest
from toy_rows import TINY, tiny

from mmllm.config import Model, Parallel, recipe_hash
from mmllm.violations import check


def test_every_violation_is_listed_at_once() -> None:
    recipe = tiny(Path("x"), global_batch=5, model=replace(TINY, num_layers=3, num_query_groups=3),
                  parallel=Parallel(ranks=4, tp=2, pp=2), image_loss_weight=-1.0)
    with pytest.raises(ValueError, match="cannot work") as caught:
        check(recipe)
    lines = str(caught.value).splitlines()[1:]
    for part in ("num_attention_heads 4 is no multiple of model.num_query_groups 3",
                 "3 key heads cannot be split over 2 ranks",
                 "num_layers 3 cannot be split into 2 stages", "text_loss_weight and image_loss_weight"):
        assert any(part in line for line in lines), part
    assert len(lines) == 4


def test_a_recipe_that_works_passes() -> None:
    check(tiny(Path("x"), parallel=Parallel(ranks=4, tp=2)))


def test_the_hash_ignores_what_may_change_on_continuing() -> None:
    recipe = tiny(Path("x"))
    assert recipe_hash(recipe) == recipe_hash(replace(recipe, out=Path("y"), parallel=Parallel(ranks=2), save_every=7))
    assert recipe_hash(recipe) != recipe_hash(replace(recipe, seed=4))


def test_padding_of_the_vocabulary_reaches_the_multiple_and_no_further() -> None:
    model = Model(num_layers=1, hidden_size=8, num_attention_heads=1, ffn_hidden_size=8)
    for size in (1, 127, 128, 129, 1000):
        rows = model.vocab_rows(size)
        assert rows % model.vocab_multiple == 0 and 0 <= rows - size < model.vocab_multiple
