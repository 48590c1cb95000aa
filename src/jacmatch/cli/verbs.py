"""The table of verbs: a new verb is one file with its job, and one line here or in the entry points of a distribution.

Names of jobs and printers are texts, so that the table is read without importing them.
"""

from jacmatch import plugins
from jacmatch.plugins import Verb

_JOBS, _SHOW = "jacmatch.jobs", "jacmatch.cli.summary"
VERBS = {
    "distill": Verb(
        f"{_JOBS}.distill:Distill",
        f"{_SHOW}:students",
        "train a student on its teacher's outputs and Jacobians; without options on the embedded digits, in a minute",
    ),
    "train": Verb(f"{_JOBS}.train:Train", f"{_SHOW}:network", "train one network from labels: a teacher or a baseline"),
    "robust": Verb(
        f"{_JOBS}.robust:Robust",
        f"{_SHOW}:tables",
        "train with a Jacobian penalty or with noise, and test under noise on the input",
    ),
    "transfer": Verb(
        f"{_JOBS}.transfer:Transfer",
        f"{_SHOW}:tables",
        "train a student of another architecture on few labeled images, with a pretrained teacher",
    ),
    "surrogate": Verb(
        f"{_JOBS}.surrogate.command:Surrogate",
        f"{_SHOW}:tables",
        "fit a network to a function by its values and derivatives, known or estimated",
    ),
    "cache": Verb(
        f"{_JOBS}.cache:Cache",
        f"{_SHOW}:cache",
        "store a teacher's outputs and Jacobian products on disk: build, check, info",
    ),
    "evaluate": Verb(f"{_JOBS}.compare:Evaluate", f"{_SHOW}:network", "test a trained network"),
    "compare": Verb(
        f"{_JOBS}.compare:Compare", f"{_SHOW}:pair", "measure how far two models agree in value and Jacobian"
    ),
    "export": Verb(
        f"{_JOBS}.export:Export",
        f"{_SHOW}:exported",
        "write a trained network as ONNX, exported program, safetensors or for the Hub, checked, with a model card",
    ),
    "doctor": Verb(
        f"{_JOBS}.doctor:Doctor", f"{_SHOW}:diagnosis", "check which derivative engines are correct for a model"
    ),
    "report": Verb(f"{_JOBS}.report:Report", f"{_SHOW}:nothing", "write the HTML report of a finished run again"),
    "list": Verb(f"{_JOBS}.list:List", f"{_SHOW}:names", "list every name that the command line accepts"),
}


def verbs() -> dict[str, Verb]:
    """Return the verbs of this package, then those of other installed distributions, which cannot replace them."""
    return {**VERBS, **{name: verb for name, verb in plugins.verbs().items() if name not in VERBS}}
