"""Run folders: what a job leaves behind, written as it goes and checked when it is opened. Needs no torch."""

from jacmatch.runs.environment import environment
from jacmatch.runs.folder import Run, read_metrics
from jacmatch.runs.result import TRAINING_JOBS, spread

__all__ = ["TRAINING_JOBS", "Run", "environment", "read_metrics", "spread"]
