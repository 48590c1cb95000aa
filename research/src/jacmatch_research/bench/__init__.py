"""`jacmatch bench`: measurements of the claims about speed and memory; one file for each benchmark."""

from jacmatch_research.bench.cache import CACHE
from jacmatch_research.bench.claims import Benchmark
from jacmatch_research.bench.compiled import COMPILED_STEP
from jacmatch_research.bench.loop import LOOP
from jacmatch_research.bench.memory import CHUNKED, MEMORY
from jacmatch_research.bench.peers import PEERS
from jacmatch_research.bench.products import ATTENTION, DIRECTIONS, DUAL, PRODUCTS
from jacmatch_research.bench.scale import SCALE
from jacmatch_research.bench.step import OPTIMIZER, PROFILE, STEP
from jacmatch_research.bench.surrogates import SURROGATES

BENCHMARKS: dict[str, Benchmark] = {
    "products": PRODUCTS,
    "attention": ATTENTION,
    "directions": DIRECTIONS,
    "step": STEP,
    "dual": DUAL,
    "optimizer": OPTIMIZER,
    "profile": PROFILE,
    "compiled": COMPILED_STEP,
    "cache": CACHE,
    "loop": LOOP,
    "memory": MEMORY,
    "chunks": CHUNKED,
    "scale": SCALE,
    "peers": PEERS,
    "surrogates": SURROGATES,
}
"""The benchmarks by name."""
