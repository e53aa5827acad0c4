"""The average is its closed form, survives bf16, a resume and sharding, and never touches what trains."""

import copy
import io
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from mmllm.launch import join, launch
from tokenizer.ema import Average


class Small(nn.Module):
    """Parameters, float buffers, a count and tied weights."""

    usage: torch.Tensor
    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("usage", torch.rand(5))
        self.register_buffer("count", torch.zeros(3, dtype=torch.long))

    @torch.no_grad()
    def move(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        for value in [*self.parameters(), self.usage]:
            value.add_(torch.randn(value.shape, generator=generator).to(value.dtype))
        self.count += step


def test_the_average_is_its_closed_form() -> None:
    """Σ_n w_n x_n with w_n = (1 − d_n) Π_{m > n} d_m, and d_n = min(decay, (1 + n) / (10 + n))."""
    module = Small()
    average = Average(module, decay=0.3)
    states = [copy.deepcopy(module.state_dict())]
    for step in range(6):
        module.move(step)
        average.update(module)
        states.append(copy.deepcopy(module.state_dict()))
    decays = [min(0.3, (1 + n) / (10 + n)) for n in range(6)]
    assert decays[:3] == pytest.approx([0.1, 2 / 11, 0.25]) and decays[3:] == [0.3] * 3
    weights = [(1 - [0.0, *decays][n]) * math.prod(decays[n:]) for n in range(7)]
    assert sum(weights) == pytest.approx(1)
    for name in ("first.weight", "second.bias", "usage"):
        expected = torch.stack([w * state[name] for w, state in zip(weights, states, strict=True)]).sum(0)
        torch.testing.assert_close(average.tensors[name], expected)
    assert torch.equal(average.tensors["count"], module.count)


def test_copying_fills_another_module_and_leaves_training_alone() -> None:
    module, target = Small(), Small()
    average = Average(module, 0.9)
    for step in range(3):
        module.move(step)
        average.update(module)
    before = copy.deepcopy(module.state_dict())
    average.copy_to(target)
    with torch.no_grad():
        target.first.weight.zero_()  # its own memory
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert average.tensors["first.weight"].abs().sum() > 0
    assert torch.equal(target.first.bias, average.tensors["first.bias"]) and torch.equal(target.count, module.count)


def test_small_steps_are_not_lost_in_bf16() -> None:
    module = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.ones_(module.weight)
    average = Average(module, decay=0.999)
    average.updates = 100_000  # warmed up
    nn.init.zeros_(module.weight)
    for _ in range(1000):
        average.update(module)
    assert average.tensors["weight"].item() == pytest.approx(0.999**1000, rel=1e-3)
    average.copy_to(module)
    assert module.weight.dtype == torch.bfloat16 and module.weight.item() == pytest.approx(0.999**1000, rel=1e-2)


def test_what_does_not_move_stays_to_the_bit() -> None:
    module = Small()
    average = Average(module)
    for _ in range(20):
        average.update(module)
    assert all(torch.equal(average.tensors[name], value) for name, value in module.named_parameters())


def test_an_average_resumed_is_an_average_uninterrupted() -> None:
    module = Small()
    whole, first = Average(module), Average(module)
    for step in range(8):
        module.move(step)
        whole.update(module)
        if step == 4:
            file = io.BytesIO()
            torch.save(first.state_dict(), file)
            file.seek(0)
            first = Average(Small())  # a new process
            first.load_state_dict(torch.load(file, weights_only=True))
        first.update(module)
    assert first.updates == whole.updates == 8
    assert all(torch.equal(first.tensors[name], value) for name, value in whole.tensors.items())


def test_another_modules_average_is_refused_by_name() -> None:
    average = Average(Small())
    with pytest.raises(ValueError, match=r"^bias is missing in the average and \[4\] in the module to fill"):
        average.copy_to(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"weight is \[4, 4\] in the average and \[4, 5\] in the saved average"):
        Average(nn.Linear(4, 4)).load_state_dict(Average(nn.Linear(5, 4)).state_dict())


def moved(module: Small, average: Average) -> Small:
    """Three updates, alike on every rank and whichever way the weights are held → a module filled with the average."""
    for step in range(3):
        for number, value in enumerate(module.parameters()):
            with torch.no_grad():
                value.mul_(1.5 - number).add_(step)
        average.update(module)
    average.copy_to(module)
    return module


def on_each_rank(folder: str) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    join()
    module = Small()
    fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    average = Average(module, 0.5)
    assert isinstance(average.tensors["first.weight"], DTensor)
    full = {name: value.full_tensor() for name, value in moved(module, average).named_parameters() if isinstance(value, DTensor)}
    if dist.get_rank() == 0:
        Path(folder, "full.json").write_text(json.dumps({name: value.tolist() for name, value in full.items()}))


def test_sharded_weights_have_the_average_of_whole_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    launch("test_tokenizer_ema:on_each_rank", str(tmp_path), 2)
    module = Small()
    expected = dict(moved(module, Average(module, 0.5)).named_parameters())
    found = json.loads((tmp_path / "full.json").read_text())
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(torch.tensor(value), expected[name].detach())
