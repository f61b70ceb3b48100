"""A plan in the words of the class that is written (models/carriers.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dotexport.axes.plan import Plan
from dotexport.models.carriers import carried_config, is_carried, recast
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.shapes import read_sizes


def carry(source: Checkpoint, decided: Plan) -> tuple[Checkpoint, Plan]:
    """The source and its plan in the words of the class that is written.

    Raises:
        UnsupportedModelError: the carrier has no place for something in config.json.
    """
    config, carried = carry_config(source.config, decided)
    if carried is decided:
        return source, decided
    return recast(source, config, decided.family, carried.family), carried


def carry_config(config: Mapping[str, Any], decided: Plan) -> tuple[Mapping[str, Any], Plan]:
    """The same for a config.json alone.

    Raises:
        UnsupportedModelError: the carrier has no place for something in it.
    """
    family, carrier = decided.family, decided.carrier
    if decided.vocabulary_alone or not is_carried(config, family, carrier):
        return config, decided
    carried = carried_config(config, family, carrier)
    before = read_sizes(carrier, carried)
    return carried, replace(decided, family=carrier, before=before, after=decided.carried_after)


def planned_config(config: Mapping[str, Any], decided: Plan) -> dict[str, Any]:
    """config.json as shrink will write it.

    Raises:
        UnsupportedModelError: the carrier has no place for something in it.
    """
    carried, plan = carry_config(config, decided)
    return plan.config(carried)
