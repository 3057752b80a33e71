"""Rules for arguments and settings: values of Python callers are checked and settled by tables of such rules."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import numbers
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, ParamSpec, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

from longsana.runtime.errors import InputError, did_you_mean
from longsana.runtime.settings import check_bounds

SHOWN = 60  # characters of a value in a message


class Rule(Protocol):
    """Says which values an argument takes."""

    def settle(self, name: str, value: Any) -> Any:
        """The value that is meant.

        Raises:
            InputError: the argument takes no such value; the message names it.
        """


EXACT = 2.0**53
"""Below it a float is the whole number that was written; from it on, perhaps one beside it."""


@dataclass(frozen=True)
class Whole:
    """A whole number, also as a float below `EXACT`; at least `least` and at most `most`."""

    least: int | None = None
    most: int | None = None

    def settle(self, name: str, value: Any) -> int:
        number = _number(value)
        rounded = isinstance(number, float) and abs(number) >= EXACT
        if isinstance(number, float) and number.is_integer():
            number = int(number)
        if not isinstance(number, int):
            raise InputError(f"{name}={_shown(value)}: must be a whole number")
        number = _within(name, number, self.least, self.most)
        if rounded:
            raise InputError(f"{name}={_shown(value)}: is rounded, as large floats are; write a whole number's digits")
        return number


@dataclass(frozen=True)
class Number:
    """A finite number; above `above`, at least `least` and at most `most`."""

    least: float | None = None
    most: float | None = None
    above: float | None = None

    def settle(self, name: str, value: Any) -> float:
        number = _number(value)
        try:
            number = math.nan if number is None else float(number)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise InputError(f"{name}={_shown(value)}: must be a finite number")
        if self.above is not None and not number > self.above:
            raise InputError(f"{name}={number:g}: must be {'positive' if self.above == 0 else f'above {self.above:g}'}")
        return _within(name, number, self.least, self.most)


@dataclass(frozen=True)
class Flag:
    """True or False; `written` is how a message writes them."""

    written: str = "True or False"

    def settle(self, name: str, value: Any) -> bool:
        value = _plain(value)
        if not isinstance(value, bool):
            raise InputError(f"{name}={_shown(value)}: must be {self.written}")
        return value


@dataclass(frozen=True)
class OneOf:
    """One of several texts."""

    options: Sequence[str]

    def settle(self, name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in self.options:
            short = isinstance(value, str) and len(value) < SHOWN
            raise InputError(
                f"{name}={value if short else _shown(value)}: must be one of {', '.join(self.options)}"
                f"{did_you_mean(value, self.options) if short else ''}"
            )
        return value


@dataclass(frozen=True)
class Is:
    """An object of a class, or of one of several; `what` is what a message calls it."""

    classes: type | tuple[type, ...]
    what: str

    def settle(self, name: str, value: Any) -> Any:
        if not isinstance(value, self.classes):
            raise InputError(f"{name}={_shown(value)}: must be {self.what}")
        return value


TEXT = Is(str, "a text")


@dataclass(frozen=True)
class Callback:
    """Something that can be called."""

    def settle(self, name: str, value: Any) -> Any:
        if not callable(value):
            raise InputError(f"{name}={_shown(value)}: must be a function")
        return value


@dataclass(frozen=True)
class Several:
    """A list, or another sequence, of what `each` takes; `count` of them, or any number."""

    each: Rule
    count: int | None = None

    def settle(self, name: str, value: Any) -> tuple[Any, ...]:
        if callable(getattr(value, "tolist", None)):  # arrays and tensors
            value = value.tolist()
        if isinstance(value, str | bytes) or not isinstance(value, Sequence):
            raise InputError(f"{name}={_shown(value)}: must be a list")
        if self.count not in (None, len(value)):
            raise InputError(f"{name}={_shown(value)}: must be {self.count} values")
        return tuple(self.each.settle(f"{name}[{index}]", item) for index, item in enumerate(value))


@dataclass(frozen=True)
class _OrNone:
    rule: Rule

    def settle(self, name: str, value: Any) -> Any:
        return None if value is None else self.rule.settle(name, value)


@dataclass(frozen=True)
class _Anything:
    def settle(self, name: str, value: Any) -> Any:
        return value


P = ParamSpec("P")
R = TypeVar("R")


def checked(rules: Mapping[str, Rule]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function whose arguments are settled by the rules of their names before it runs.

    None is taken where it is an argument's default. An argument without a rule passes as it is.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        own = {
            name: _OrNone(rules[name]) if parameter.default is None else rules[name]
            for name, parameter in signature.parameters.items()
            if name in rules
        }

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            bound = signature.bind(*args, **kwargs)
            for name, value in bound.arguments.items():
                if name in own:
                    bound.arguments[name] = own[name].settle(name, value)
            return function(*bound.args, **bound.kwargs)

        return call

    return decorate


Settings = TypeVar("Settings")


def settled(settings: Settings, name: str = "") -> Settings:
    """A config dataclass whose values have the types and bounds of its fields, as those of `load_config` have.

    name: of the section, which a message puts before the setting's.

    Raises:
        InputError: it is no such object, or a value has another type or is out of bounds.
    """
    if not dataclasses.is_dataclass(settings) or isinstance(settings, type):
        raise InputError(f"{name or 'config'}={_shown(settings)}: must be a config, not a {type(settings).__name__}")
    hints = get_type_hints(type(settings))
    values = {}
    for field in dataclasses.fields(settings):
        path, value = f"{name}.{field.name}" if name else field.name, getattr(settings, field.name)
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, hint):  # type: ignore[arg-type]
                raise InputError(f"{path}={_shown(value)}: must be a {getattr(hint, '__name__', hint)}")
            values[field.name] = settled(value, path)
        else:
            values[field.name] = _rule_of(hint).settle(path, value)
    settings = dataclasses.replace(settings, **values)
    check_bounds(settings, f"{name}." if name else "")
    return settings


def _rule_of(hint: Any) -> Rule:
    """The rule of a field's type."""
    plain: dict[Any, Rule] = {int: Whole(), float: Number(), bool: Flag(), str: TEXT}
    if hint in plain:
        return plain[hint]
    parts = get_args(hint)
    if get_origin(hint) is Literal:
        return OneOf(parts)
    if get_origin(hint) in (types.UnionType, Union) and len(parts) == 2 and parts[1] is type(None):
        return _OrNone(_rule_of(parts[0]))
    if get_origin(hint) is tuple:
        return Several(_rule_of(parts[0]), None if parts[1] is Ellipsis else len(parts))
    return _Anything()


def _plain(value: Any) -> Any:
    """Python's own number for that of an array or tensor without dimensions."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _number(value: Any) -> int | float | None:
    """A number as Python's; None if it is none. True and False are none."""
    value = _plain(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    return int(value) if isinstance(value, numbers.Integral) else float(value)


N = TypeVar("N", int, float)


def _within(name: str, number: N, least: N | None, most: N | None) -> N:
    if least is not None and number < least:
        raise InputError(f"{name}={_shown(number)}: must be at least {least}")
    if most is not None and number > most:
        raise InputError(f"{name}={_shown(number)}: must be at most {most}")
    return number


def _shown(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if shape is not None and tuple(shape):  # not its numbers
        return f"a {type(value).__name__} of shape {tuple(shape)}"
    if isinstance(value, int) and value.bit_length() > 8 * SHOWN:  # of more digits than Python prints
        return f"{'-' if value < 0 else ''}2^{value.bit_length() - 1}..."
    text = " ".join(repr(value).split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
