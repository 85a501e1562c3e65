"""Resharding: arrays from one sharding to another, on the devices."""

from __future__ import annotations

from .gather import gather
from .report import LeafPlan, ReshardPlan
from .resharder import Resharder, prepare_reshard, reshard

__all__ = ["LeafPlan", "ReshardPlan", "Resharder", "gather", "prepare_reshard", "reshard"]
