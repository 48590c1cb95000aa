"""The documentation site, `make docs`: every public name is in its reference, and a plain search answers questions."""

import importlib
import json
import math
import re
import zlib
from collections import Counter
from functools import lru_cache
from pathlib import Path

import pytest

from jacmatch.errors import UnsupportedError

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "site"
PACKAGES = sorted(path.parent.name for path in (ROOT / "src" / "jacmatch").glob("*/__init__.py"))
INTERNAL = {"cli"}  # packages without public names
built = pytest.mark.skipif(not (SITE / "objects.inv").is_file(), reason="the site is not built: run `make docs`")

# What somebody types into the search field, and the page that answers it.
QUESTIONS = {
    "RandomOutputs": "reference/jacobian/",
    "jvp": "reference/jacobian/",
    "hinton_kl": "reference/losses/",
    "load_student": "reference/jacmatch/",
    "--jacobian-share": "explanation/gradient-shares/",
    "--resume": "how-to/resume/",
    "--cache": "how-to/teacher-cache/",
    "lightning": "how-to/lightning/",
    "hugging face trainer compute_loss": "how-to/hugging-face/",
    "batchnorm training mode derivative": "explanation/batch-norm/",
    "npz x_train j_train my own data": "how-to/data/",
    "known derivatives of my simulator": "how-to/surrogate/",
    "does the penalty help against noise": "results/robustness/",
    "FSDP2 DDP several machines": "how-to/distributed/",
    "export onnx": "how-to/export/",
    "fine-tune ImageNet weights for my own photos": "how-to/photos/",
    "black box function as teacher by name": "how-to/models/",
    "reasons with a command": "how-to/reasons/",
    "what does a step cost": "explanation/cost/",
    "is proposition 1 of the paper exact": "explanation/paper/",
    "checkpoint pth of another script as teacher": "how-to/weights/",
    "network fails in forward mode, which engine": "explanation/engines/",
    "GridSearchCV cross-validation uncertainty of predictions": "how-to/surrogate/",
    "student and teacher with different tokenizer or embedding size": "how-to/text/",
    "push to Hugging Face Hub with a model card": "how-to/export/",
    "resume_from_checkpoint does the checkpoint contain the teacher": "how-to/hugging-face/",
    "loss is NaN": "explanation/verification/",
    "CUDA out of memory with many Jacobian rows": "how-to/compile/",
    "attention mask token type ids extra arguments": "how-to/inputs-and-outputs/",
    "my own LightningModule training_step": "how-to/lightning/",
    "how to cite": "",
}


def words(text: str) -> list[str]:
    """Lower-case words without markup; identifiers whole, and their parts."""
    plain = re.sub(r"<[^>]*>", " ", text)
    names = re.findall(r"\w+", plain)
    parts = [part for name in names for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", name)]
    return [word.lower() for word in names + [part for part in parts if part not in names]]


@lru_cache
def sections() -> tuple[list[str], list[Counter[str]]]:
    """Address and words of each section in the search index, the words of its title three times."""
    index = json.loads((SITE / "search" / "search_index.json").read_text(encoding="utf-8"))["docs"]
    return [each["location"] for each in index], [
        Counter(words(each["text"]) + 3 * words(each["title"])) for each in index
    ]


def search(question: str) -> list[str]:
    """The pages of the site by BM25 over the sections of its search index, the best first."""
    locations, bags = sections()
    lengths = [sum(bag.values()) for bag in bags]
    mean = sum(lengths) / len(lengths)
    scores: dict[str, float] = {}
    for word in set(words(question)):
        matching = [number for number, bag in enumerate(bags) if word in bag]
        rare = math.log(1 + (len(bags) - len(matching) + 0.5) / (len(matching) + 0.5))
        for number in matching:
            count = bags[number][word]
            weight = rare * count * 2.2 / (count + 1.2 * (0.25 + 0.75 * lengths[number] / mean))
            scores[locations[number]] = scores.get(locations[number], 0.0) + weight
    ranked = sorted(scores, key=lambda location: -scores[location])
    return list(dict.fromkeys(location.partition("#")[0] for location in ranked))


@built
@pytest.mark.parametrize(("question", "page"), QUESTIONS.items(), ids=lambda text: text.replace(" ", "-"))
def test_a_question_leads_to_its_page(question, page):
    assert page in search(question)[:3]


def inventory() -> set[str]:
    """The names that the site documents, from the inventory that Sphinx reads too."""
    content = (SITE / "objects.inv").read_bytes().split(b"\n", 4)[4]
    return {line.split()[0] for line in zlib.decompress(content).decode().splitlines()}


@built
@pytest.mark.parametrize("package", ["", *(name for name in PACKAGES if name not in INTERNAL)])
def test_every_public_name_is_in_the_reference(package):
    """A name of `jacmatch` itself is documented with the package that it is imported from."""
    module = importlib.import_module(f"jacmatch.{package}" if package else "jacmatch")
    documented = inventory()
    last = {name.rpartition(".")[2] for name in documented}
    for name in (name for name in module.__all__ if not name.startswith("__")):
        try:
            defined = f"{getattr(getattr(module, name), '__module__', None)}.{name}"
        except UnsupportedError:  # of a framework that is not installed
            defined = ""
        assert {f"{module.__name__}.{name}", defined} & documented or (not package and name in last), name


def test_every_package_has_a_page_of_the_reference():
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md")}
    missing = [name for name in PACKAGES if name not in INTERNAL and f"::: jacmatch.{name}" not in pages.get(name, "")]
    assert not missing


def test_the_site_takes_nothing_from_the_network():
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "font: false" in settings
    assert not re.findall(r"https?://", settings)


@built
def test_built_pages_load_nothing_from_elsewhere():
    loaded = re.compile(r"<(?:script|img|iframe)[^>]*src=\"?https?://|<link[^>]*rel=\"?stylesheet[^>]*https?://")
    assert not [page for page in SITE.rglob("*.html") if loaded.search(page.read_text(encoding="utf-8"))]
