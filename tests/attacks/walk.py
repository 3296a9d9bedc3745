"""Random sequences of everything that is done to a model. After each step it equals one rebuilt from its state dict."""

from __future__ import annotations

import copy
import io
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import timm_contconv as tcc

from ..models_for_tests import Snapshot, create, layers_of, output
from .interrupts import Interrupted, interrupted_at

__all__ = ["COUNTS", "ModelWalk"]

#: what was done and how it ended: {"merge, interrupted: as before": 12}
COUNTS: Counter[str] = Counter()
BASES = {"test_convnext": ("dcls", "dcls_gauss", "smp", "flex"), "test_resnet": ("genv", "cc")}
SETTINGS: dict[str, dict[str, Any]] = {
    "dcls": {"kernel_size": 9, "kernel_count": 6},
    "dcls_gauss": {"kernel_size": 7, "kernel_count": 6},
    "smp": {"kernel_size": 9, "kernel_count": 6},
    "flex": {"kernel_size": 7},
}
#: largest difference of outputs, relative to their scale
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05}
State = dict[str, Tensor]
#: one step in three is interrupted, at a call whose number is as often small as large
interrupts = st.none() | st.none() | st.integers(0, 11).flatmap(lambda power: st.integers(2**power, 2 ** (power + 1)))


class Change(NamedTuple):
    """A change of the model's structure: the verb, its patch, and the state dict that it found."""

    verb: str
    patch: Any
    state: State


class ModelWalk(RuleBasedStateMachine):
    """A model, and the changes that lead from timm's model to its structure."""

    @initialize(base=st.sampled_from(sorted(BASES)), seed=st.integers(0, 3))
    def start(self, base: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.base = base
        self.model = create(base, num_classes=3)
        self.changes: list[Change] = []
        self.images = torch.randn(2, 3, 32, 32)
        self.folder = tempfile.TemporaryDirectory()
        self.saved: list[tuple[State, list[Change]]] = []  # what the folder may hold
        self.has_stood = False  # a whole save, under the folder's name
        self.saves = 0

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()

    # changes of the structure: wholly or not at all

    @precondition(lambda self: not layers_of(self.model) and len(self.changes) < 4)
    @rule(data=st.data(), init=st.sampled_from(["random", "random", "fit"]), number=interrupts)
    def patch(self, data: st.DataObject, init: Any, number: int | None) -> None:
        recipe = data.draw(st.sampled_from(BASES[self.base]))
        self._change("patch", lambda: tcc.patch(self.model, recipe, init=init, **SETTINGS.get(recipe, {})), number)

    @precondition(lambda self: layers_of(self.model))
    @rule(number=interrupts)
    def merge(self, number: int | None) -> None:
        before = output(self.model, self._images())
        if self._change("merge", lambda: tcc.merge(self.model, inplace=True), number):
            self._assert_close(output(self.model, self._images()), before)

    @precondition(lambda self: layers_of(self.model))
    @rule(number=interrupts)
    def merge_a_copy(self, number: int | None) -> None:
        self._pure("merge a copy", lambda: tcc.merge(self.model), number)

    @precondition(lambda self: layers_of(self.model))
    @rule(number=interrupts)
    def unpatch(self, number: int | None) -> None:
        before = output(self.model, self._images())
        if self._change("unpatch", lambda: tcc.unpatch(self.model), number):
            self._assert_close(output(self.model, self._images()), before)

    def _change(self, verb: str, call: Callable[[], Any], number: int | None) -> bool:
        """Run a verb that changes all or nothing; whether it changed."""
        state, before = _state(self.model), Snapshot(self.model)
        how = self._attempt(call, number)
        is_changed = bool(before.differences())
        COUNTS[f"{verb}, {how}: {'done' if is_changed else 'as before'}"] += 1
        assert is_changed or how != "not interrupted"
        assert not is_changed or how != "refused"
        if is_changed:
            patch = tcc.report(self.model).patch if layers_of(self.model) else None
            self.changes.append(Change(verb, patch, state))
        self._check()
        return is_changed

    def _attempt(self, call: Callable[[], Any], number: int | None) -> str:
        try:
            interrupted_at(number, call)
        except Interrupted:
            return "interrupted"
        except ValueError:
            return "refused"
        return "not interrupted"

    def _pure(self, verb: str, call: Callable[[], Any], number: int | None) -> None:
        """Run something that changes nothing, interrupted or not."""
        before = Snapshot(self.model)
        COUNTS[f"{verb}, {self._attempt(call, number)}: as before"] += 1
        assert before.differences() == []
        self._check()

    # files

    @precondition(lambda self: layers_of(self.model) and self.saves < 2)
    @rule(number=interrupts)
    def save(self, number: int | None) -> None:
        self.saves += 1
        how = self._attempt(lambda: tcc.save_pretrained(self.model, self._path()), number)
        now = (_state(self.model), list(self.changes))
        if how == "not interrupted":
            self.saved = [now]
        elif how == "interrupted":
            self.saved = [*self.saved, now]
        self.has_stood = self.has_stood or self._path().exists()
        COUNTS[f"save, {how}"] += 1
        self._check()

    @precondition(lambda self: self.saved)
    @rule(number=interrupts)
    def load(self, number: int | None) -> None:
        if not self.has_stood:
            return  # all saves were interrupted before the first folder stood
        loaded: list[nn.Module] = []
        how = self._attempt(lambda: loaded.append(tcc.from_pretrained(self._path())), number)
        COUNTS[f"load, {how}"] += 1
        if loaded:
            self.model = loaded[0].eval()
            state = _state(self.model)
            matches = [(saved, changes) for saved, changes in self.saved if _equal(state, saved)]
            assert matches, "the folder holds neither the old nor the new model"
            self.changes = list(matches[0][1])
        self._check()

    def _path(self) -> Path:
        return Path(self.folder.name) / "model"

    # changes of values

    @rule()
    def train_step(self) -> None:
        COUNTS["train step"] += 1
        self.model.train()
        optimizer = torch.optim.AdamW(tcc.param_groups(self.model, lr=1e-3, weight_decay=0.05))
        optimizer.zero_grad()  # `to_empty` leaves gradients without values
        self.model(self._images()).float().square().mean().backward()
        optimizer.step()
        tcc.constrain_(self.model)
        self.model.eval()
        self._check()

    @rule()
    def average(self) -> None:
        COUNTS["EMA"] += 1
        ema = ModelEmaV3(self.model, decay=0.5)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.data.mul_(0.95)
        ema.update(self.model)
        self._check()
        self.model = ema.module.requires_grad_(True).eval()
        self._check()

    @rule(number=interrupts)
    def deepcopy(self, number: int | None) -> None:
        self._pure("deepcopy", lambda: copy.deepcopy(self.model), number)
        self.model = copy.deepcopy(self.model)
        self._check()

    @rule()
    def pickle(self) -> None:
        COUNTS["pickle"] += 1
        file = io.BytesIO()
        torch.save(self.model, file)
        file.seek(0)
        self.model = torch.load(file, weights_only=False)
        self._check()

    @rule(dtype=st.sampled_from(sorted(TOLERANCE, key=str)))
    def move_dtype(self, dtype: torch.dtype) -> None:
        COUNTS["dtype move"] += 1
        self.model.to(dtype)
        self._check()

    @rule()
    def move_device(self) -> None:
        """To the accelerator and back; without one, to a model on the meta device that gets its values again."""
        COUNTS["device move"] += 1
        if torch.cuda.is_available():
            self.model.cuda()
            self._check()
            self.model.cpu()
        else:
            state = _state(self.model)
            self.model.to("meta").to_empty(device="cpu")
            self.model.load_state_dict(state)
        self._check()

    @rule(channels_last=st.booleans())
    def move_layout(self, channels_last: bool) -> None:
        COUNTS["layout move"] += 1
        self.model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        self._check()

    # what holds after each step

    def _images(self) -> Tensor:
        parameter = next(self.model.parameters())
        return self.images.to(parameter.device, parameter.dtype)

    def _check(self) -> None:
        """Twice, since a kernel that was kept is used the second time."""
        with torch.no_grad():
            expected = output(self._rebuilt(), self._images())
            for _ in range(2):
                self._assert_close(output(self.model, self._images()), expected)

    def _rebuilt(self) -> nn.Module:
        """timm's model, with the same changes of its structure, and the state dict."""
        model = create(self.base, num_classes=3)
        for verb, patch, state in self.changes:
            _load(model, state)
            if verb == "patch":
                tcc.patch(model, patch, init="random")
            elif verb == "merge":
                tcc.merge(model, inplace=True)
            else:
                tcc.unpatch(model)
        return _load(model, _state(self.model))

    def _assert_close(self, found: Tensor, expected: Tensor) -> None:
        assert expected.isfinite().all()
        scale = float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[found.dtype] * scale)


def _state(model: nn.Module) -> State:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _load(model: nn.Module, state: State) -> nn.Module:
    """With the dtype and the device of the state."""
    value = next(value for value in state.values() if value.is_floating_point())
    model.to(value.device, value.dtype).load_state_dict(state)
    return model.eval()


def _equal(loaded: State, saved: State) -> bool:
    return loaded.keys() == saved.keys() and all(
        torch.equal(value, saved[name].to(value.dtype)) for name, value in loaded.items()
    )
