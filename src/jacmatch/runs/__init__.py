"""Run folders: what a job leaves behind, written as it goes and checked when it is opened. Needs no torch."""

from jacmatch.runs.folder import CHECKPOINT, RESULT, TRAINING_JOBS, Run, environment, read_metrics, spread, threads

__all__ = ["CHECKPOINT", "RESULT", "TRAINING_JOBS", "Run", "environment", "read_metrics", "spread", "threads"]
