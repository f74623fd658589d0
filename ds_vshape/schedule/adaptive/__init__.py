"""Schedules that know the real times, under any memory limit; `planner` says how."""

from ds_vshape.schedule.adaptive.planner import plan
from ds_vshape.schedule.adaptive.problem import LimitError, Plan, Problem

__all__ = ["LimitError", "Plan", "Problem", "plan"]
