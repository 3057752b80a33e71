"""Settings as people write them: YAML files, `section.key=value`, and the bounds that stand beside defaults."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from longsana.runtime.errors import InputError

# Bounds ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bounds:
    """The bounds of a number; above and below are exclusive. Any number must be finite."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def complaint(self, value: float) -> str | None:
        """Say what the number must be and is not; None if it is within them."""
        if math.isnan(value):
            return "a finite number"
        if self.least is not None and not value >= self.least:
            return f"at least {self.least}"
        if self.above is not None and not value > self.above:
            return f"above {self.above}"
        if self.most is not None and not value <= self.most:
            return f"at most {self.most}"
        if self.below is not None and not value < self.below:
            return f"below {self.below}"
        return None if math.isfinite(value) else "a finite number"


def bounded(
    default: Any,
    least: float | None = None,
    most: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field with a default and its bounds; those of a tuple hold for each of its numbers."""
    return field(default=default, metadata={"bounds": Bounds(least, most, above, below)})


def check_bounds(config: Any, prefix: str = "") -> None:
    """Make sure that every number of a config is within its bounds, and finite.

    Raises:
        InputError: the first that is not, by name, with what it must be.
    """
    for item in dataclasses.fields(config):
        value, name = getattr(config, item.name), f"{prefix}{item.name}"
        if dataclasses.is_dataclass(value):
            check_bounds(value, f"{name}.")
            continue
        bounds = item.metadata.get("bounds", Bounds())
        for number in value if isinstance(value, tuple) else (value,):
            is_number = isinstance(number, int | float) and not isinstance(number, bool)
            if is_number and (complaint := bounds.complaint(number)):
                raise InputError(f"{name}={number}: must be {complaint}")


# Files ----------------------------------------------------------------------------------------------------------------

_OTHER_BASE = re.compile(r"[-+]?0[0-9_]+")
_SIXTIES = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")


def read_yaml(path: Path, kinds: Mapping[str, str]) -> dict[str, Any]:
    """The settings in a YAML file, by their dotted names.

    kinds: types of settings by name; what stands for a text is taken as it is written.

    Raises:
        InputError: the file is missing, no YAML or no mapping; or a value is not what it seems: a number with a leading
            zero or colons, which YAML reads in base 8 or 60, an environment variable, or ???.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such config file")
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path))
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except Exception as error:  # yaml's error classes are not part of omegaconf's interface
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict):
        raise InputError(f"{path}: expected a mapping of settings, found a {type(loaded).__name__}")
    settings = dict(_leaves({str(key): value for key, value in loaded.items()}))
    for key, node in _scalars(root):
        if kinds.get(key) in (*TEXT, PARTS) and node.style is None and isinstance(settings.get(key), int | float):
            settings[key] = node.value
        elif _other_number(node):
            raise InputError(f"{path}: {key}: {node.value}: write a decimal number, or a text in quotes")
        elif node.value == "???":
            raise InputError(f"{path}: {key}: ???: must be set")
        elif calls_a_resolver(node.value):
            raise InputError(
                f"{path}: {key}: {node.value}: configs take nothing from the environment or other functions; write the "
                "value, or \\${ for a text with ${ in it"
            )
        elif kinds.get(key) == "float" and isinstance(settings.get(key), str):
            number = decimal(node.value)  # 24000/1001
            settings[key] = node.value if number is None else number
    return settings


def _other_number(node: Any) -> bool:
    """Tell whether YAML reads a number in another base than ten, or in another spelling than decimal."""
    if node.style is None and (_OTHER_BASE.fullmatch(node.value) or _SIXTIES.fullmatch(node.value)):
        return True
    if not node.tag.endswith((":int", ":float")) or re.fullmatch(r"[-+]?\.(inf|nan)", node.value, re.IGNORECASE):
        return False
    return decimal(node.value) is None or _OTHER_BASE.fullmatch(node.value) is not None


def calls_a_resolver(text: str) -> bool:
    """Tell whether OmegaConf would call a function for the text: `${name:...}`, however it is spelt or nested."""
    depth = 0
    for match in re.finditer(r"(\\*)(\$\{)|[:}]", text):
        if match[2]:
            depth += len(match[1]) % 2 == 0  # after an odd number of backslashes it is text
        elif match[0] == "}":
            depth = max(depth - 1, 0)
        elif depth:
            return True
    return False


def _scalars(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every scalar of a YAML tree with its dotted name; those of a list have the list's."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = str(getattr(key, "value", ""))
            yield from _scalars(value, prefix if name == "<<" else f"{prefix}.{name}".lstrip("."))
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _scalars(value, prefix)
    elif isinstance(node, yaml.ScalarNode):
        yield prefix, node


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# The command line -------------------------------------------------------------------------------------------------

TEXT = ("str", "str | None")
PARTS = "text or parts"
"""The type of a text that may also be written as a list of its parts."""


def parse_overrides(overrides: Sequence[str], kinds: Mapping[str, str]) -> dict[str, Any]:
    """`section.key=value` items, flat; texts and numbers are what was typed, other values are read as YAML.

    kinds: types of settings by name. Numbers are decimal; 24000/1001 is one.

    Raises:
        InputError: an item has another form, or its value cannot be read.
    """
    values: dict[str, Any] = {}
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not re.fullmatch(r"[\w.]+", key):
            raise InputError(f"'{item}': a setting has the form section.key=value")
        try:
            values[key] = typed(text, kinds.get(key, ""))
        except (yaml.YAMLError, ValueError) as error:
            raise InputError(f"the command line: {key}={text}: {' '.join(str(error).split())}") from error
    return values


def typed(text: str, kind: str) -> Any:
    """The value that was typed for a setting of this type; "" is an unknown one.

    Raises:
        ValueError, yaml.YAMLError: it is none, or a number that is not decimal.
    """
    if kind == "str" or (kind == "str | None" and text != "null"):
        return text
    if kind == PARTS:
        return yaml.safe_load(text) if text.startswith("[") else text
    if not text.strip():
        raise ValueError("no value; give one, or null where that is one")
    number = decimal(text)
    if number is not None:
        return number
    if re.search(r"(?<![\w.])[-+]?0[0-9_]+(?![\w.])", text):
        raise ValueError("write decimal numbers, without leading zeros")
    if _SIXTIES.fullmatch(text):
        return text
    value = yaml.safe_load(text)
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        raise ValueError("write a decimal number")  # 0x10, 1_000
    return value


def decimal(text: str) -> int | float | None:
    """The number that a text is, in base ten; None for another text."""
    if re.fullmatch(r"[-+]?[0-9]+", text):
        return int(text)
    if re.fullmatch(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", text):
        return float(text)
    if re.fullmatch(r"[0-9]+/0*[1-9][0-9]*", text):
        return float(Fraction(text))
    return None
