"""What a package index shows: absolute links, addresses, extras, and a command that pipx finds."""

import configparser
import email
import re
import zipfile

import pytest

from . import sizes


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    with zipfile.ZipFile(sizes.build(tmp_path_factory.mktemp("wheel"))) as opened:
        yield opened


def read(archive, name):
    (path,) = [each for each in archive.namelist() if each.endswith(f".dist-info/{name}")]
    return archive.read(path).decode()


@pytest.mark.ci
def test_the_long_description_has_absolute_links_only(archive):
    metadata = email.message_from_string(read(archive, "METADATA"))
    text = metadata.get_payload()
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert len(text) > 1000
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links
    assert not [link for link in links if not link.startswith(("https://", "#"))]


@pytest.mark.ci
def test_addresses_classifiers_and_extras_are_listed(archive):
    metadata = email.message_from_string(read(archive, "METADATA"))
    named = {each.partition(",")[0] for each in metadata.get_all("Project-URL")}
    assert {"Documentation", "Repository", "Changelog", "Issues"} <= named
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert {"train", "timm", "hf", "lightning", "onnx", "surrogate"} <= set(metadata.get_all("Provides-Extra"))
    assert "jacmatch/py.typed" in archive.namelist()


@pytest.mark.ci
def test_pipx_finds_the_command(archive):
    points = configparser.ConfigParser()
    points.read_string(read(archive, "entry_points.txt"))
    assert points["pipx.run"]["jacmatch"] == points["console_scripts"]["jacmatch"] == "jacmatch.cli:main"
