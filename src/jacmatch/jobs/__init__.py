"""Jobs: one verb each, as a frozen dataclass whose fields are the flags of the command line."""

from jacmatch.jobs.cache.command import Cache
from jacmatch.jobs.catalogue import List
from jacmatch.jobs.compare import Compare
from jacmatch.jobs.distill import Distill
from jacmatch.jobs.doctor import Doctor
from jacmatch.jobs.evaluate import Evaluate
from jacmatch.jobs.networks import load_student
from jacmatch.jobs.robust import Robust
from jacmatch.jobs.surrogate.command import Surrogate
from jacmatch.jobs.train import Train
from jacmatch.jobs.transfer import Transfer
from jacmatch.jobs.write_report import Report

JOBS = {
    "distill": Distill,
    "train": Train,
    "robust": Robust,
    "transfer": Transfer,
    "surrogate": Surrogate,
    "cache": Cache,
    "evaluate": Evaluate,
    "compare": Compare,
    "doctor": Doctor,
    "report": Report,
    "list": List,
}

__all__ = [
    "JOBS",
    "Cache",
    "Compare",
    "Distill",
    "Doctor",
    "Evaluate",
    "List",
    "Report",
    "Robust",
    "Surrogate",
    "Train",
    "Transfer",
    "load_student",
]
