"""The verbs that this distribution adds to `jacmatch`, one entry point of `jacmatch.verbs` each."""

from jacmatch.plugins import Verb

REPRODUCE = Verb(
    job="jacmatch_research.reproduce.command:Reproduce",
    show="jacmatch.cli.summary:tables",
    help="one table of the paper, or one claim of this project, with its seeds",
    names={"experiments": "jacmatch_research.reproduce:EXPERIMENTS"},
)
BENCH = Verb(
    job="jacmatch_research.bench.command:Bench",
    show="jacmatch_research.bench.summary:benchmarks",
    help="ratios of time and memory on this machine, beside what is claimed about them",
    names={"benchmarks": "jacmatch_research.bench:BENCHMARKS"},
)
