"""Run folders: the files of a job, written while it runs and checked when they are read. Needs no torch."""

from jacmatch.runs.folder import CHECKPOINT, RESULT, TRAINING_JOBS, Run, environment, read_metrics, spread, threads

__all__ = ["CHECKPOINT", "RESULT", "TRAINING_JOBS", "Run", "environment", "read_metrics", "spread", "threads"]
