"""Settings refuse what they cannot be, made by a call or composed by Hydra, in the same words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass, replace
from typing import Annotated, Any

import pytest

from fl_wb.adaptation import Adaptation
from fl_wb.app.config import checked, compose
from fl_wb.app.overrides import ConfigError
from fl_wb.app.schema import Config
from fl_wb.settings import Field, Settings, above, fields_of
from fl_wb.training.wgan import Training

TRIES: list[Any] = [-1, 0, 1, 2, -0.5, 1.5, "nonsense", [], [0], [0, 0, 0], [[]], [[-1]]]
OF_ANOTHER_TYPE: dict[Any, Any] = {int: 1.5, float: "much", str: [1], bool: "perhaps"}


def all_fields(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any, Field]]:
    """Yield the full key of every setting, the object that it is of, and what it may be."""
    for name, field in fields_of(type(settings)).items():
        if is_dataclass(field.kind):
            yield from all_fields(getattr(settings, name), f"{prefix}{name}.")
        else:
            yield prefix + name, settings, field


FIELDS = list(all_fields(Config()))
KEYS = [key for key, _, _ in FIELDS]


def refused(key: str, settings: Any, value: Any) -> tuple[str, str]:
    """Return what a call and a composition say of a value."""
    group, _, name = key.rpartition(".")
    with pytest.raises(ValueError, match=" must be ") as called:
        replace(settings, **{name: value})
    with pytest.raises(ConfigError, match=" must be ") as composed:
        compose([f"{key}={json.dumps(value)}"])
    return f"{group}{'.' if group else ''}{called.value}", str(composed.value)


@pytest.mark.parametrize(("key", "settings", "field"), FIELDS, ids=KEYS)
def test_every_number_has_a_range_which_holds_on_every_path(
    key: str, settings: Any, field: Field
) -> None:
    if not field.rules:
        assert field.kind in (str, bool), "a number needs a range"
        return
    (rule,) = field.rules
    typed = Field(field.kind, (), optional=False)
    value = next(v for v in TRIES if not typed.refusal(v) and not rule.holds(v))
    if field.kind is float:
        value = float(value)

    called, composed = refused(key, settings, value)

    assert called == composed == f"{key}={value!r} must be {rule.words}"


@pytest.mark.parametrize(("key", "settings", "field"), FIELDS, ids=KEYS)
def test_every_type_holds_on_every_path(key: str, settings: Any, field: Field) -> None:
    value = OF_ANOTHER_TYPE.get(field.kind, 3)

    called, composed = refused(key, settings, value)

    assert called == f"{key}={value!r} must be {field.type_words}"
    if field.kind is not str:  # Hydra's own words are for texts that look like lists
        assert composed.endswith(f" must be {field.type_words}")


def test_all_that_is_wrong_is_said_in_one_line() -> None:
    with pytest.raises(ValueError) as error:
        Training(ema=7, iterations=-5, penalty=-10)

    assert str(error.value) == (
        "iterations=-5 must be at least 0; penalty=-10 must be at least 0; "
        "ema=7 must be at least 0 and less than 1"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, True, "1"])
def test_a_range_takes_finite_numbers_alone(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^anchor=.* must be "):
        Adaptation(anchor=value)


def test_settings_within_settings_are_settings() -> None:
    with pytest.raises(ValueError, match="training=None must be settings of class Training"):
        Adaptation(training=None)  # type: ignore[arg-type]


def test_a_configuration_may_come_as_plain_values() -> None:
    config = compose("network=conv")

    assert checked(asdict(config)) == config


def test_a_rule_is_inherited() -> None:
    class Base(Settings):
        share: Annotated[float, above(0, below=1)] | None = None

    class Derived(Base):
        more: str = ""

    assert fields_of(Derived)["share"].refusal(1.0) == "more than 0 and less than 1"
    assert fields_of(Derived)["share"].refusal(None) is None
