"""What works without the extra `train`: derivatives, losses, teachers and objectives in a loop of one's own."""

import importlib.metadata
import importlib.util
import subprocess
import sys
from importlib import resources
from pathlib import Path

import torch

import jacmatch
from jacmatch import losses

TRAIN = ("tyro", "rich", "lightning_fabric", "safetensors", "matplotlib", "sklearn", "PIL", "yaml")


def is_bare() -> None:
    """Nothing of the extra is here, and the package that is tested is the one that was built."""
    assert not [name for name in TRAIN if importlib.util.find_spec(name)]
    assert "site-packages" in jacmatch.__file__
    assert importlib.metadata.version("jacmatch") == jacmatch.__version__
    assert resources.files("jacmatch").joinpath("py.typed").is_file()


def trains() -> None:
    """Ten lines: a student gets nearer to its teacher in outputs and in derivatives."""
    torch.manual_seed(0)
    teacher = torch.nn.Sequential(torch.nn.Linear(6, 32), torch.nn.Tanh(), torch.nn.Linear(32, 3))
    student = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    objective = jacmatch.Distillation(student, teacher, probe=jacmatch.RandomOutputs(1), labels=0)
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.01)
    before, x = distance(student, teacher), torch.randn(64, 6)
    for _ in range(200):
        optimizer.zero_grad()
        objective(x)["loss"].backward()
        optimizer.step()
    assert distance(student, teacher) < before / 4


def distance(student: torch.nn.Module, teacher: torch.nn.Module) -> float:
    """‖J_S − J_T‖²_F at points of its own, by the exact Jacobians and by a loss."""
    x = torch.randn(100, 6, generator=torch.Generator().manual_seed(1))
    rows, wanted = (jacmatch.jacobian(module, x)[1] for module in (student, teacher))
    return float(losses.squared_error(rows.detach(), wanted.detach()).mean())


def speaks() -> None:
    """What needs the extra says so, and how to get it."""
    said = ""
    try:
        jacmatch.load_student("nowhere")
    except jacmatch.UnsupportedError as error:
        said = str(error)
    assert "pip install 'jacmatch[train]'" in said, said
    command = Path(sys.executable).with_name("jacmatch")
    assert subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    for words in ([], ["--help"], ["distill"], ["list"]):
        done = subprocess.run([command, *words], capture_output=True, text=True)
        assert done.returncode == 2, (words, done)
        (line,) = done.stderr.strip().splitlines()
        assert "pip install 'jacmatch[train]'" in line, line


if __name__ == "__main__":
    for check in (is_bare, trains, speaks):
        check()
        print(f"{check.__name__}: {check.__doc__}")
