"""Schedules fitted to a model: grids, times asked and tables of solvers, and what may be saved."""

from diffjax.search.aligner import Aligned
from diffjax.search.methods import Evolution, Found, Gradient, Method, PredictorSearch, Problem
from diffjax.search.objective import FineSolution, Objective, Statistic
from diffjax.search.optimise import optimise_schedule
from diffjax.search.schedule import (
    Schedule,
    ScheduleError,
    aligned,
    describe,
    load_schedule,
)
from diffjax.search.space import Plan, Space, schedule_space, table_space
from diffjax.search.statistics import load_statistics, model_statistics, save_statistics

__all__ = [
    "Aligned",
    "Evolution",
    "FineSolution",
    "Found",
    "Gradient",
    "Method",
    "Objective",
    "Plan",
    "PredictorSearch",
    "Problem",
    "Schedule",
    "ScheduleError",
    "Space",
    "Statistic",
    "aligned",
    "describe",
    "load_schedule",
    "load_statistics",
    "model_statistics",
    "optimise_schedule",
    "save_statistics",
    "schedule_space",
    "table_space",
]
