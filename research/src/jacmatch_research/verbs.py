"""The verbs that this distribution adds to `jacmatch`, one entry point of `jacmatch.verbs` each."""

from jacmatch.plugins import Verb

REPRODUCE = Verb(
    job="jacmatch_research.reproduce.command:Reproduce",
    show="jacmatch.cli.summary:tables",
    help="measure a table of the paper or of the documentation again",
    names={"experiments": "jacmatch_research.reproduce:EXPERIMENTS"},
)
BENCH = Verb(
    job="jacmatch_research.bench.command:Bench",
    show="jacmatch_research.bench.summary:benchmarks",
    help="measure ratios of time and memory on this machine, and compare them with the claimed ones",
    names={"benchmarks": "jacmatch_research.bench:BENCHMARKS"},
)
