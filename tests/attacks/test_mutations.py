"""A few damaged folders of each kind; `make soak` loads many."""

import pytest

import timm_contconv as tcc

from ..hub.helpers import LOADERS, small
from .mutations import KINDS, attack


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tcc.save_pretrained(small(), tmp_path_factory.mktemp("saved") / "model")


@pytest.mark.usefixtures("one_thread")
def test_damaged_folders_are_refused_or_give_what_their_files_say(saved, tmp_path):
    endings = {attack(saved, tmp_path, seed) for seed in range(3 * len(KINDS) * len(LOADERS))}
    assert {ending.partition(":")[0] for ending in endings} == set(KINDS)
    assert "bytes of weights: loaded as the files say" in endings
    assert "length of the file: refused" in endings
