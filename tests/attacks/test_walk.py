"""A few random walks; `make soak` runs many."""

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from .walk import COUNTS, ModelWalk

FEW = settings(
    max_examples=2, stateful_step_count=12, derandomize=True, database=None, deadline=None,
    suppress_health_check=list(HealthCheck), phases=(Phase.generate,),
)  # fmt: skip


@pytest.mark.usefixtures("one_thread")
def test_after_each_step_of_a_random_walk_a_model_is_what_its_state_dict_says():
    """The walk itself asserts, after each of its steps; here, that it took some."""
    before = COUNTS.total()
    run_state_machine_as_test(ModelWalk, settings=FEW)
    assert COUNTS.total() > before
