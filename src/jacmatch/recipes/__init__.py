"""Recipes: one job each, as a frozen dataclass whose fields are the flags of the command line."""

from jacmatch.recipes.bench.command import Bench
from jacmatch.recipes.cache.command import Cache
from jacmatch.recipes.catalogue import List
from jacmatch.recipes.compare import Compare
from jacmatch.recipes.distill import Distill
from jacmatch.recipes.evaluate import Evaluate
from jacmatch.recipes.examine import Doctor
from jacmatch.recipes.networks import load_student
from jacmatch.recipes.reproduce.command import Reproduce
from jacmatch.recipes.robust import Robust
from jacmatch.recipes.surrogate.command import Surrogate
from jacmatch.recipes.train import Train
from jacmatch.recipes.transfer import Transfer
from jacmatch.recipes.write_report import Report

RECIPES = {
    "distill": Distill,
    "train": Train,
    "robust": Robust,
    "transfer": Transfer,
    "surrogate": Surrogate,
    "cache": Cache,
    "evaluate": Evaluate,
    "compare": Compare,
    "doctor": Doctor,
    "reproduce": Reproduce,
    "bench": Bench,
    "report": Report,
    "list": List,
}

__all__ = [
    "RECIPES",
    "Bench",
    "Cache",
    "Compare",
    "Distill",
    "Doctor",
    "Evaluate",
    "List",
    "Report",
    "Reproduce",
    "Robust",
    "Surrogate",
    "Train",
    "Transfer",
    "load_student",
]
