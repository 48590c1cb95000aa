"""A cache for a job that trains: opened once the job is known to be the one that it was built for."""

from pathlib import Path

from torch import nn

from jacmatch.datasets import Data
from jacmatch.jobs.cache.checking import Found, check
from jacmatch.jobs.cache.source import Source, folder_of
from jacmatch.jobs.distillation_fields import TeachingFields
from jacmatch.teachers import CachedTeacher

_TRIED = 4
"""Entries of each run that are asked again when a cache is opened: code that has changed shows in no fingerprint."""


def opened(cache: Path, source: Source) -> CachedTeacher:
    """The teacher of a run, from the cache of this very run.

    Args:
        cache: The folder of all runs.
        source: What the run asks.

    Raises:
        InputError: The cache is another's, unfinished, damaged or too short.
    """
    return CachedTeacher(folder_of(cache, source.seed), expected=source.fingerprint, views=source.views)


def cached_teachers(job: TeachingFields, cache: Path, data: Data, teacher: nn.Module) -> dict[int, CachedTeacher]:
    """The teacher of each run of a job, by seed; a few entries are asked again.

    Args:
        job: The job.
        cache: The folder of all runs.
        data: Its data.
        teacher: The live teacher.

    Raises:
        InputError: As `opened`; or an entry is not what the teacher answers now.
    """
    teachers, found = {}, Found()
    for seed in job.runs:
        source = Source.of(job, data, teacher, seed)
        teachers[seed] = opened(cache, source)
        check(source, cache, _TRIED, found, strong=False)
    found.refuse(cache)
    return teachers
