"""What is imported when: the command line starts without torch; what trains or draws is imported where it is used."""

import subprocess
import sys

import pytest

from .architecture import source

SLOW = {"torch", "numpy", "lightning_fabric", "matplotlib", "sklearn", "scipy", "yaml", "tyro"}


def imported(statements):
    """The modules that a new Python has imported after these statements."""
    command = [sys.executable, "-c", f"import sys\n{statements}\nprint(*sys.modules)"]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    return set(out.splitlines()[-1].split())


@pytest.mark.parametrize("words", [["--version"], ["-V"], ["--help"], ["nonsense"]])
def test_the_command_line_starts_without_torch(words):
    modules = imported(f"from jacmatch.cli import main; main({words})")
    assert not modules & SLOW
    assert len(modules) < 250  # Python itself has 30, rich has 70, torch has 1100


@pytest.mark.parametrize("words", [["distill", "--help-all"], ["train", "--epochs", "3"]])
def test_the_options_of_a_verb_need_no_torch(words):
    modules = imported(f"from jacmatch.cli import main; main({words})")
    assert not modules & (SLOW - {"tyro", "yaml"})
    assert len(modules) < 400


@pytest.mark.ci
def test_the_options_of_every_verb_need_no_torch():
    modules = imported(
        "from jacmatch.cli import main\nfrom jacmatch.cli.verbs import verbs\n"
        "for verb in verbs(): main([verb, '--help-all'])"
    )
    assert not modules & (SLOW - {"tyro", "yaml"})


def test_import_jacmatch_imports_no_torch():
    modules = imported("import jacmatch; dir(jacmatch); jacmatch.InputError, jacmatch.load_student")
    assert not modules & SLOW
    assert sum(name.startswith("jacmatch") for name in modules) == 4  # the package, errors, version, former names


@pytest.mark.ci
def test_the_public_names_import_little_beyond_torch():
    names = imported("import jacmatch\nfor name in jacmatch.__all__: getattr(jacmatch, name)")
    more = {name for name in names - imported("import torch") if not name.startswith(("jacmatch", "jaxtyping"))}
    assert not more & SLOW
    assert len(more) < 30  # torch has 1100


def test_what_takes_long_is_imported_by_what_uses_it():
    """Lightning Fabric takes a second, FSDP2 and matplotlib half of one: `VERB --help` needs none of them."""
    slow = ("lightning_fabric", "matplotlib", "torch.distributed.fsdp", "torch.distributed.tensor", "torch._dynamo")
    assert not [
        f"{source.name(path)}:{line} {name}"
        for path in source.files("src")
        for name, line in source.at_top(source.tree(path))
        if name.startswith(slow)
    ]
