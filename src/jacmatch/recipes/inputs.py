"""What a run was begun with besides its settings: the contents behind the names of its data and its teacher."""

from torch import nn

from jacmatch.datasets import Data
from jacmatch.errors import InputError
from jacmatch.runs import Run
from jacmatch.runs.differences import differences
from jacmatch.runs.files import load
from jacmatch.teachers import ModuleTeacher
from jacmatch.training.distributed import Ranks
from jacmatch.training.identity import named

INPUTS = "inputs.json"


def same_inputs(run: Run, data: Data, teacher: nn.Module | None = None) -> None:
    """Writes the fingerprints of data and teacher into the run, or compares them if it goes on.

    Args:
        run: The run.
        data: Its data.
        teacher: Its teacher, if it has one.

    Raises:
        InputError: The run was begun with others.
    """
    here = {"data": data.fingerprint, "teacher": None if teacher is None else named(ModuleTeacher(teacher))}
    file, ranks = run.path / INPUTS, Ranks.here()
    ranks.same("data and teacher", str(here))
    if run.follows:
        return
    if not file.is_file():
        run.write_json(INPUTS, here)
    elif (there := load(file)) != here:
        rule = f"The run in {run.path} must go on with the data and the teacher that it was begun with."
        do = "Bring them back, or choose another --out."
        raise InputError(rule, got=f"others: {differences(there, here)}", do=do)
