"""The loss of training, against its definition in float64."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from integrations.corpus import Row
from integrations.loss import Distillation, num_targets, summed_loss
from integrations.transformers import load_dense

ROWS = [
    Row(torch.tensor([0, 40, 41, 42, 43, 1], dtype=torch.int32), num_prompt=3),
    Row(torch.tensor([0, 90, 91], dtype=torch.int32)),
]


@pytest.fixture
def pair(tiny_model: Path) -> tuple[nn.Module, nn.Module]:
    """Return a student and a teacher that differ."""
    student = load_dense(str(tiny_model), dtype=torch.float32)
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return student, teacher


def log_probabilities(model: nn.Module, row: Row) -> torch.Tensor:
    """Return those of each token that carries loss, alone and unpadded."""
    logits = model(input_ids=row.tokens.long()[None]).logits[0, row.num_prompt - 1 : -1]
    return logits.double().log_softmax(-1)


def expected(student: nn.Module, teacher: nn.Module, *, fraction: float) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for row in ROWS:
        predicted, taught = log_probabilities(student, row), log_probabilities(teacher, row).detach()
        chosen = predicted.gather(1, row.tokens.long()[row.num_prompt :, None])
        divergence = (taught.exp() * (taught - predicted)).sum()
        total = total + fraction * divergence - (1 - fraction) * chosen.sum()
    return total


@pytest.mark.parametrize("fraction", [0.3, 1.0])
def test_distillation_is_its_definition(pair: tuple[nn.Module, nn.Module], fraction: float) -> None:
    student, teacher = pair
    exact = expected(student, teacher, fraction=fraction)
    found = Distillation(teacher, fraction=fraction)(student, ROWS)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    weights = list(student.parameters())
    for left, right in zip(
        torch.autograd.grad(found, weights), torch.autograd.grad(exact, weights), strict=True
    ):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)


def test_without_a_fraction_it_is_the_cross_entropy(pair: tuple[nn.Module, nn.Module]) -> None:
    student, teacher = pair
    loss = summed_loss(student, ROWS)
    torch.testing.assert_close(Distillation(teacher, fraction=0.0)(student, ROWS), loss)
    torch.testing.assert_close(loss.double(), expected(student, teacher, fraction=0.0), rtol=1e-5, atol=1e-5)
    assert num_targets(ROWS) == 5


def test_a_teacher_is_frozen_and_teaches_itself_nothing(pair: tuple[nn.Module, nn.Module]) -> None:
    _, teacher = pair
    teacher.train()
    itself = copy.deepcopy(teacher)
    assert Distillation(teacher, fraction=1.0)(itself, ROWS).item() == pytest.approx(0.0, abs=1e-5)
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
