"""Resharding: arrays from one sharding to any other, on the devices."""

from __future__ import annotations

from .gathering import gather
from .prepared import Resharder, prepare_reshard, reshard
from .report import LeafPlan, ReshardPlan

__all__ = ["LeafPlan", "ReshardPlan", "Resharder", "gather", "prepare_reshard", "reshard"]
