"""Nothing is unpickled, no text is run, and no page is fetched: read from the syntax of every file of the package."""

import ast

from . import source

FORBIDDEN = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "urllib", "requests", "http")
RUNS_TEXT = {
    "research/src/jacmatch_research/bench/claims.py": "a new process runs a text of our own",
    "src/jacmatch/cli/flags.py": "types and defaults in the source of this package, which an import would run",
}
IMPORTS_BY_NAME = {
    "src/jacmatch/__init__.py": "the public names, when they are used",
    "src/jacmatch/jobs/__init__.py": "the jobs, when they are used",
    "src/jacmatch/integrations/__init__.py": "adapters and their frameworks, when they are used",
    "src/jacmatch/cli/flags.py": "what a job's source imports for its settings",
    "src/jacmatch/plugins.py": "verbs of this package and of installed distributions",
    "src/jacmatch/models/catalog.py": "--model PACKAGE.MODULE:CALLABLE, optional packages by names in the code",
    "src/jacmatch/errors.py": "--data and surrogate --teacher PACKAGE.MODULE:CALLABLE; optional packages by names",
    "src/jacmatch/former_names.py": "former names, for one release",
}
"""Where text becomes code, and what it is for."""

SAFE = {
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
    "torch.load": ("weights_only", True),
}
FILES = source.files("src", "research/src")


def calls(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def wrong_calls(tree):
    """Calls that would unpickle, and `yaml` with a loader that runs what it reads."""
    wrong = []
    for call in calls(tree):
        name = source.dotted(call.func)
        keywords = {each.arg: each.value for each in call.keywords}
        if name in SAFE:
            keyword, value = SAFE[name]
            given = keywords.get(keyword)
            if not (isinstance(given, ast.Constant) and given.value is value):
                wrong.append(name)
        if name.startswith("yaml.") and name.endswith(("load", "load_all", "Loader")) and "safe" not in name.lower():
            loader = call.args[1] if len(call.args) > 1 else keywords.get("Loader")
            if source.dotted(loader) not in ("_Loader", "yaml.SafeLoader"):
                wrong.append(name)
    return wrong


def imported(tree):
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    return names + [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]


def test_nothing_is_unpickled_and_nothing_fetched():
    for path in FILES:
        tree = source.tree(path)
        assert not wrong_calls(tree), path
        assert not [name for name in imported(tree) if name.partition(".")[0] in FORBIDDEN], path


def test_text_becomes_code_only_where_it_is_listed():
    runs, imports = set(), set()
    for path in FILES:
        for call in calls(source.tree(path)):
            name = source.dotted(call.func)
            runs |= {source.name(path)} if name in ("eval", "exec", "compile", "os.system") else set()
            imports |= {source.name(path)} if name in ("importlib.import_module", "__import__") else set()
    assert runs == set(RUNS_TEXT)
    assert imports == set(IMPORTS_BY_NAME)


def test_a_wrong_call_is_reported():
    for text in ("np.load(f)", "np.load(f, allow_pickle=True)", "torch.load(f, weights_only=safe)", "yaml.load(f)"):
        assert wrong_calls(ast.parse(text)), text
    assert wrong_calls(ast.parse("yaml.load(f, yaml.Loader)"))
    assert not wrong_calls(ast.parse("torch.load(f, weights_only=True); yaml.load(f, _Loader); yaml.safe_load(f)"))
