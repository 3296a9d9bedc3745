"""What each process of test_distributed.py runs, under torchrun and `contconv run`: distributed_worker.py FOLDER.

The first time round it leaves its findings in FOLDER/findings.pt, and rank 1 then kills itself in the middle of a
training; torchrun starts all processes again, and they take that training up where its last checkpoint is.
"""

import copy
import os
import signal
import sys
from pathlib import Path

import timm
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import timm_contconv as tcc
from tests.models_for_tests import awake, layers_of

STEPS = 5  # of the trainings that are compared
CHECKPOINT_EVERY, KILLED_AT, LAST_STEP = 2, 3, 4


def make_model(name="test_convnext_dcls"):
    """Positions shared by the layers of a stage, many at the border that they are clamped to; the same everywhere."""
    torch.manual_seed(0)
    model = awake(timm.create_model(name, num_classes=10)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("position"):
                parameter.mul_(12)
    tcc.constrain_(model)
    return model


def make_optimizer(model):
    groups = tcc.param_groups(model, lr=0.05, weight_decay=0.05)  # large, so that positions reach the border
    for group in groups:
        group["lr"] *= group.pop("lr_scale")
    return torch.optim.AdamW(groups)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return (
        torch.randn(8, 3, 32, 32, generator=generator, dtype=torch.float64),
        torch.randint(10, (8,), generator=generator),
    )


def share_of_batch(step):
    images, labels = batch(step)
    half = slice(dist.get_rank(), None, 2)
    return images[half], labels[half]


def shard(model, blocks=False, **options):
    """As docs/distributed.md says: stages, which hold the shared geometry, then the rest; blocks inside if wanted."""
    for stage in model.stages:
        for block in stage.blocks if blocks else ():
            fully_shard(block, **options)
        fully_shard(stage, **options)
    return fully_shard(model, **options)


def backward(model, images, labels):
    torch.nn.functional.cross_entropy(model(images), labels).backward()


def train(model, steps, of_step, optimizer=None):
    optimizer = optimizer or make_optimizer(model)
    for step in steps:
        optimizer.zero_grad()
        backward(model, *of_step(step))
        optimizer.step()
    return optimizer


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def weights(model):
    return {name: whole(p.detach()).clone() for name, p in model.named_parameters()}


def gradients(model):
    return {name: whole(p.grad).clone() for name, p in model.named_parameters()}


def geometry_of_all_ranks(model):
    """By rank, the positions that every layer uses."""
    mine = [whole(layer.geometry["position"].detach()).clone() for layer in layers_of(model)]
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return gathered


def compare_gradients():
    alone = make_model()
    data_parallel, sharded, sharded_blocks = (copy.deepcopy(alone) for _ in range(3))
    backward(alone, *batch(0))
    backward(DistributedDataParallel(data_parallel), *share_of_batch(0))
    backward(shard(sharded), *share_of_batch(0))
    backward(shard(sharded_blocks, blocks=True), *share_of_batch(0))
    models = {"alone": alone, "DDP": data_parallel, "FSDP2": sharded, "FSDP2 by block": sharded_blocks}
    return {name: gradients(model) for name, model in models.items()}


def compare_trainings(folder):
    alone = make_model()
    data_parallel, sharded = copy.deepcopy(alone), shard(copy.deepcopy(alone))
    train(alone, range(STEPS), batch)
    train(DistributedDataParallel(data_parallel), range(STEPS), share_of_batch)
    optimizer = train(sharded, range(STEPS), share_of_batch)
    save(sharded, optimizer, folder / "sharded")
    return {
        "weights": {"alone": weights(alone), "DDP": weights(data_parallel), "FSDP2": weights(sharded)},
        "geometry": {"DDP": geometry_of_all_ranks(data_parallel), "FSDP2": geometry_of_all_ranks(sharded)},
        "penalty": {"alone": tcc.penalty(alone).item(), "FSDP2": tcc.penalty(sharded).item()},
        "borders": [
            (layer.kernel_size[0] // 2, float(layer.geometry["position"].abs().max())) for layer in layers_of(alone)
        ],
    }


def compare_smp():
    """Points that the filters of a layer share: one process holds all of them, the other none."""
    alone = make_model("test_convnext_smp")
    sharded = shard(copy.deepcopy(alone))
    train(alone, range(2), batch)
    train(sharded, range(2), share_of_batch)
    return {"alone": weights(alone), "FSDP2": weights(sharded)}


def dtypes_under_mixed_precision():
    """Of what a layer computes with and gives, when weights are cast to bfloat16 and geometry is not."""
    model = make_model().float()
    geometry = {id(parameter) for layer in layers_of(model) for parameter in layer.geometry.values()}
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16,
        reduce_dtype=torch.float32,
        param_dtype_override_fn=lambda parameter: torch.float32 if id(parameter) in geometry else None,
    )
    shard(model, mp_policy=policy)
    seen = []
    layer = model.stages[1].blocks[0].conv_dw
    layer.register_forward_hook(
        lambda module, _, output: seen.append(
            (module.geometry["position"].dtype, module.kernel.weight.dtype, output.dtype)
        )
    )
    images, labels = share_of_batch(0)
    backward(model, images.float(), labels)
    return seen[0]


def load_what_one_process_saved(folder):
    sharded = shard(make_model())
    optimizer = make_optimizer(sharded)
    load(sharded, optimizer, folder / "single")
    return weights(sharded)


def save(model, optimizer, checkpoint, **options):
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(state, checkpoint_id=checkpoint, **options)


def load(model, optimizer, checkpoint, **options):
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(state, checkpoint_id=checkpoint, **options)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def train_with_checkpoints(folder, killed_at=None):
    """From the last checkpoint in the folder, if there is one, to LAST_STEP."""
    model = shard(make_model())
    optimizer = make_optimizer(model)
    done = max((int(path.parent.name) for path in folder.glob("*/.metadata")), default=0)
    if done:
        load(model, optimizer, folder / str(done))
    for step in range(done, LAST_STEP):
        if step == killed_at and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        train(model, [step], share_of_batch, optimizer)
        if (step + 1) % CHECKPOINT_EVERY == 0:
            save(model, optimizer, folder / str(step + 1))
    return {"started from": done, "weights": weights(model)}


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    first_time = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first_time:
        findings = {
            "gradients": compare_gradients(),
            "trainings": compare_trainings(folder),
            "smp": compare_smp(),
            "mixed precision": dtypes_under_mixed_precision(),
            "loaded": load_what_one_process_saved(folder),
            "never killed": train_with_checkpoints(folder / "never_killed"),
        }
        if dist.get_rank() == 0:
            torch.save(findings, folder / "findings.pt")
        dist.barrier()
    result = train_with_checkpoints(folder / "killed", killed_at=KILLED_AT if first_time else None)
    if dist.get_rank() == 0:
        torch.save(result, folder / "killed.pt")
    dist.destroy_process_group()
    # FSDP2 keeps gloo's threads alive, and one that drops a tensor while the interpreter shuts down aborts the process
    # (pytorch issue 190489).
    os._exit(0)


if __name__ == "__main__":
    main()
