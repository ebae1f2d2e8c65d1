"""The configuration is checked once, when it is made, and every message names its field."""

import copy
import dataclasses

import pytest

from edkm import DKMConfig


@pytest.mark.parametrize("field", ["bits", "embedding_bits", "overrides"])
@pytest.mark.parametrize("bits", [-1, 0, 9, 16])
def test_bits_outside_one_to_eight_are_refused(field: str, bits: int) -> None:
    value = {"lm_head": bits} if field == "overrides" else bits
    with pytest.raises(ValueError, match=rf"DKMConfig\.{field}.* is {bits}: give 1 to 8"):
        DKMConfig(**{field: value})


@pytest.mark.parametrize("value", [3.0, True, "3", None])
def test_bits_that_are_no_integer_are_refused(value: object) -> None:
    with pytest.raises(TypeError, match=r"DKMConfig\.bits is .* give an integer"):
        DKMConfig(bits=value)


@pytest.mark.parametrize("field", ["vector_length", "num_groups", "iterations", "num_steps"])
def test_counts_are_one_or_more(field: str) -> None:
    with pytest.raises(ValueError, match=rf"DKMConfig\.{field} is 0: give 1 or more"):
        DKMConfig(**{field: 0})


@pytest.mark.parametrize(
    ("first", "last"), [(0.1, 0.2), (0.1, 0.0), (float("inf"), 0.1), (float("nan"), 0.1), (0.1, float("nan"))]
)
def test_temperatures_fall_and_stay_above_zero(first: float, last: float) -> None:
    with pytest.raises(ValueError, match=r"DKMConfig\.temperature falls from"):
        DKMConfig(temperature=first, final_temperature=last)


@pytest.mark.parametrize("epsilon", [-1e-9, float("nan"), float("inf")])
def test_epsilon_is_finite(epsilon: float) -> None:
    with pytest.raises(ValueError, match=r"DKMConfig\.epsilon is"):
        DKMConfig(epsilon=epsilon)


@pytest.mark.parametrize("name", ["float32", "torch.bfloat16", 16])
def test_a_table_is_of_16_bits(name: object) -> None:
    with pytest.raises(
        ValueError, match=r"DKMConfig\.table_dtype is .*: give one of \(None, 'float16', 'bfloat16'\)"
    ):
        DKMConfig(table_dtype=name)


def test_the_temperature_falls_geometrically_from_first_to_last_step() -> None:
    config = DKMConfig(temperature=0.08, final_temperature=0.02, num_steps=3)
    assert [config.temperature_at(step) for step in range(5)] == pytest.approx([0.08, 0.04, 0.02, 0.02, 0.02])
    assert DKMConfig(temperature=0.08, num_steps=1).temperature_at(0) == pytest.approx(0.08)


def test_it_is_frozen_and_keeps_its_own_overrides() -> None:
    overrides = {"a": 4}
    config = DKMConfig(overrides=overrides)
    overrides["a"] = 5
    assert config.overrides == {"a": 4}
    assert copy.deepcopy(config) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.bits = 4
