"""Two processes on the CPU (gloo), started as torchrun does, under `contconv run`: DDP, FSDP2, sharded checkpoints.

One launch gives all findings; distributed_worker.py is what it runs.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from . import distributed_worker as worker

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
PENALTY, POWER = 0.1, 2


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """What one process trained and saved, in the folder that the job gets."""
    folder = tmp_path_factory.mktemp("job")
    model = worker.make_model()
    optimizer = worker.train(model, range(2), worker.batch)
    with pytest.warns(UserWarning, match="single process"):
        worker.save(model, optimizer, folder / "single", no_dist=True)
    return folder, model


@pytest.fixture(scope="module")
def job(single):
    folder, _ = single
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    run = ["-m", "timm_contconv", "run", "--penalty", str(PENALTY), "--penalty-power", str(POWER)]
    # Otherwise restarted processes may find the addresses of the dead ones in the store that they share.
    fresh_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    environment = {**os.environ, **fresh_store, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*torchrun, *run, worker.__file__, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


@pytest.fixture(scope="module")
def findings(job):
    return torch.load(job / "findings.pt")


@pytest.mark.parametrize("wrapped", ["DDP", "FSDP2", "FSDP2 by block"])
def test_gradients_of_two_processes_are_those_of_one_on_the_whole_batch(findings, wrapped):
    torch.testing.assert_close(findings["gradients"][wrapped], findings["gradients"]["alone"], atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("wrapped", ["DDP", "FSDP2"])
def test_steps_with_penalty_and_constraints_lead_where_one_process_gets(findings, wrapped):
    weights = findings["trainings"]["weights"]
    torch.testing.assert_close(weights[wrapped], weights["alone"], atol=1e-9, rtol=1e-7)


def test_points_of_which_one_process_holds_all_train_as_in_one_process(findings):
    torch.testing.assert_close(findings["smp"]["FSDP2"], findings["smp"]["alone"], atol=1e-9, rtol=1e-7)


def test_geometry_can_stay_float32_where_weights_are_cast(findings):
    position, weight, output = findings["mixed precision"]
    assert (position, weight, output) == (torch.float32, torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize("wrapped", ["DDP", "FSDP2"])
def test_shared_positions_stay_equal_across_ranks_and_layers(findings, wrapped):
    first, second = findings["trainings"]["geometry"][wrapped]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    of_stage = [first[1:3], first[3:7], first[7:9]]  # test_convnext has stages of 1, 2, 4 and 2 blocks
    assert all(torch.equal(layer, stage[0]) for stage in of_stage for layer in stage)


def test_positions_of_the_compared_trainings_were_clamped(findings):
    """Otherwise the comparisons would say nothing about constraints."""
    assert all(largest == border for border, largest in findings["trainings"]["borders"])


def test_the_penalty_of_shards_is_that_of_the_whole_model(findings):
    penalties = findings["trainings"]["penalty"]
    assert penalties["FSDP2"] == pytest.approx(penalties["alone"], rel=1e-6)
    assert penalties["alone"] > 0


def test_a_sharded_checkpoint_loads_into_one_process(job, findings):
    model = worker.make_model()
    optimizer = worker.make_optimizer(model)
    with pytest.warns(UserWarning, match="single process"):
        worker.load(model, optimizer, job / "sharded", no_dist=True)
    torch.testing.assert_close(worker.weights(model), findings["trainings"]["weights"]["FSDP2"], atol=0, rtol=0)
    steps = {int(state["step"]) for state in optimizer.state.values()}
    assert steps == {worker.STEPS}


def test_what_one_process_saved_loads_into_shards(single, findings):
    _, model = single
    torch.testing.assert_close(findings["loaded"], worker.weights(model), atol=0, rtol=0)


def test_a_job_of_which_a_rank_was_killed_ends_at_the_same_weights(job, findings):
    restarted = torch.load(job / "killed.pt")
    assert restarted["started from"] == worker.CHECKPOINT_EVERY
    torch.testing.assert_close(restarted["weights"], findings["never killed"]["weights"], atol=0, rtol=0)
