"""Learning rates step by step, and who decays."""

import pytest
import torch

from model import InfiMMHD, preset
from train.config import OptimizerConfig, ScheduleConfig
from train.optim import LearningRate, learning_rate, parameter_groups
from train.recipes import CPT, PT


def test_schedule_of_cpt():
    c = CPT()
    lr = [learning_rate(step, c.optimizer, c.schedule) for step in range(8_001)]
    assert lr[1] == pytest.approx(1e-5 / 400)
    assert lr[200] == pytest.approx(5e-6)
    assert lr[400] == pytest.approx(1e-5)
    assert lr[4_200] == pytest.approx((1e-5 + 1e-6) / 2)
    assert lr[8_000] == pytest.approx(1e-6)
    assert all(a < b for a, b in zip(lr[1:400], lr[2:401], strict=True))
    assert all(a > b for a, b in zip(lr[400:8_000], lr[401:], strict=True))


def test_pt_is_constant_after_its_warmup():
    c = PT()
    rates = {learning_rate(step, c.optimizer, c.schedule) for step in (6_000, 6_001, 50_000, 120_000)}
    assert rates == {1e-4}


def test_warmup_may_be_nothing_or_everything():
    optimizer = OptimizerConfig(lr_peak=1.0, lr_min=0.5)
    assert learning_rate(1, optimizer, ScheduleConfig(steps=1, warmup_steps=0)) == 0.5
    assert learning_rate(4, optimizer, ScheduleConfig(steps=4, warmup_steps=4)) == 1.0


def test_every_group_gets_every_step_its_rate():
    config = OptimizerConfig(lr_peak=1e-2, lr_min=1e-3, lr_scale={"vision": 0.5})
    schedule = ScheduleConfig(steps=6, warmup_steps=2)
    weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[:1], "lr": 1e-2}, {"params": weights[1:], "lr": 5e-3}])
    rates = LearningRate(optimizer, config, schedule)
    for step in (1, 2, 3, 4, 5, 6, 2):
        assert rates.set(optimizer, step) == learning_rate(step, config, schedule)
        expected = learning_rate(step, config, schedule)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([expected, expected / 2])


def test_groups_hold_every_trainable_parameter_once():
    model = InfiMMHD(preset("tiny"))
    model.set_trainable(("vision", "gated_cross_attention"))
    groups = parameter_groups(
        model, OptimizerConfig(lr_peak=1.0, lr_scale={"vision": 0.25}, weight_decay=0.1)
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    members = [
        (names[id(p)], group["lr"], group["weight_decay"]) for group in groups for p in group["params"]
    ]
    assert sorted(name for name, *_ in members) == sorted(
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    )
    for name, lr, weight_decay in members:
        assert lr == (0.25 if name.startswith("vision.") else 1.0)
        vector = model.get_parameter(name).ndim < 2
        assert weight_decay == (0.0 if vector or name == "vision.position_table" else 0.1), name
