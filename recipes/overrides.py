"""Dotted keys into the nested mappings of a recipe: what overrides, variants and phases are made of.

In: a mapping and assignments. Out: the mapping changed, or a :class:`RecipeError` that names the assignment.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from pipeline.models.config import ModelConfig
from pipeline.quantizers import QuantizerConfig
from pipeline.quantizers.residual import LevelConfig


class RecipeError(ValueError):
    """A recipe that can't be run; the message names the key, the value and what would be accepted."""


def parse_override(text: str) -> tuple[str, Any]:
    """``"quantizer.grid=[8,8]"`` → ``("quantizer.grid", [8, 8])``; the value is YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"override {text!r} is not key=value: write for example batch.micro_batches=8")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"override {text!r}: the value is not YAML ({error})") from error


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping's values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def assign(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key. A new ``kind`` drops the old one's options that mean nothing in it, and ``dim``."""
    *parents, last = key.split(".")
    section = values
    for parent in parents:
        below = section.setdefault(parent, {})
        if not isinstance(below, dict):
            raise RecipeError(f"override {key}={value}: {parent} holds {below!r}, which has no keys below it")
        section = below
    if last == "kind" and section.get("kind") not in (None, value):
        config = kinds_of(".".join(parents)).get(value)
        for name in [name for name in section if config is not None and not _carries_over(config, name, section[name])]:
            del section[name]
    section[last] = value


def kinds_of(section: str) -> dict[str, type[BaseModel]]:
    """The configurations that ``section`` ("model", "quantizer" or "quantizer.level") can hold, by kind."""
    union = {"model": ModelConfig, "quantizer": QuantizerConfig, "quantizer.level": LevelConfig}.get(section)
    if union is None:
        return {}
    members = get_args(get_args(union)[0])
    return {get_args(member.model_fields["kind"].annotation)[0]: member for member in members}


def _carries_over(config: type[BaseModel], name: str, value: Any) -> bool:
    """Whether another kind's option means something in ``config`` too; the size of vectors is each kind's own."""
    field = config.model_fields.get(name)
    if field is None or name == "dim":
        return False
    try:
        TypeAdapter[Any](field.annotation or Any).validate_python(value)
    except ValidationError:  # a temperature that falls is three numbers
        return False
    return True
