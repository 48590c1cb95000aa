"""The table of verbs: a new verb is one file with its job, and one line here or in the entry points of a distribution.

Names of jobs and printers are strings, so that the table is read without importing them.
"""

from jacmatch import plugins
from jacmatch.plugins import Verb

_JOBS, _SHOW = "jacmatch.jobs", "jacmatch.cli.summary"
VERBS = {
    "distill": Verb(
        f"{_JOBS}.distill:Distill",
        f"{_SHOW}:students",
        "train a student on its teacher's outputs and Jacobians; by default on handwritten digits, in about a minute",
    ),
    "train": Verb(f"{_JOBS}.train:Train", f"{_SHOW}:network", "train one network with labels: a teacher or a baseline"),
    "robust": Verb(
        f"{_JOBS}.robust:Robust",
        f"{_SHOW}:tables",
        "train with a Jacobian penalty or with noise, and measure the accuracy under input noise",
    ),
    "transfer": Verb(
        f"{_JOBS}.transfer:Transfer",
        f"{_SHOW}:tables",
        "train a student of another architecture with a pretrained teacher and few labeled images",
    ),
    "surrogate": Verb(
        f"{_JOBS}.surrogate.command:Surrogate",
        f"{_SHOW}:tables",
        "fit a network to the values and derivatives of a function",
    ),
    "cache": Verb(
        f"{_JOBS}.cache:Cache",
        f"{_SHOW}:cache",
        "store a teacher's outputs and Jacobian products on disk (build, check, info)",
    ),
    "evaluate": Verb(f"{_JOBS}.compare:Evaluate", f"{_SHOW}:network", "measure a trained network on test data"),
    "compare": Verb(
        f"{_JOBS}.compare:Compare", f"{_SHOW}:pair", "measure how well two models agree in outputs and Jacobians"
    ),
    "export": Verb(
        f"{_JOBS}.export:Export",
        f"{_SHOW}:exported",
        "export a trained network to ONNX, torch.export, safetensors or the Hugging Face Hub, and check the files",
    ),
    "doctor": Verb(
        f"{_JOBS}.compare:Doctor", f"{_SHOW}:diagnosis", "check which derivative engines are correct for a model"
    ),
    "report": Verb(f"{_JOBS}.report:Report", f"{_SHOW}:nothing", "rewrite the HTML report of a finished run"),
    "list": Verb(f"{_JOBS}.list:List", f"{_SHOW}:names", "list every name that the command line accepts"),
}


def verbs() -> dict[str, Verb]:
    """Return the verbs of this package, then those of other installed distributions, which cannot replace them."""
    return {**VERBS, **{name: verb for name, verb in plugins.verbs().items() if name not in VERBS}}
