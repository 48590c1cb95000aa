"""Coverage-guided fuzzing of a reader, by atheris: python tests/fuzz/run.py NAME [SECONDS]

What it finds is written to the folder `findings` with the name of the reader before it; mend it, and put the input into
`tests/fuzz/corpus/NAME`, where the unit tests read it again.
"""

import os
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]
with atheris.instrument_imports(include=["jacmatch", "zipfile", "numpy.lib", "json", "yaml", "tarfile", "PIL"]):
    from tests.fuzz.readers import READERS, survives


def main(name: str, seconds: str = "600") -> None:
    warnings.simplefilter("ignore")
    scratch = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    os.environ["JACMATCH_CACHE"] = str(scratch / "kept")
    work, corpus = scratch / "work", scratch / "corpus"
    for folder in (work, corpus, findings := Path("findings")):
        folder.mkdir(exist_ok=True)
    for number, seed in enumerate(READERS[name].seeds(work)):
        (corpus / f"seed{number}").write_bytes(seed)
    longest = max(file.stat().st_size for file in corpus.iterdir())
    options = [f"-max_total_time={seconds}", f"-max_len={2 * longest}", "-timeout=30", "-rss_limit_mb=4096"]
    corpora = [str(folder) for folder in [ROOT / "tests" / "fuzz" / "corpus" / name] if folder.is_dir()]
    atheris.Setup(
        [sys.argv[0], *options, f"-artifact_prefix={findings}/{name}-", "-print_final_stats=1", str(corpus), *corpora],
        lambda data: survives(name, data, work),
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
