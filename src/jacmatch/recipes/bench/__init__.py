"""`jacmatch bench`: what is claimed about speed and memory, measured; one file for each benchmark."""

from jacmatch.recipes.bench.cache import CACHE
from jacmatch.recipes.bench.claims import Benchmark
from jacmatch.recipes.bench.loop import LOOP
from jacmatch.recipes.bench.memory import MEMORY
from jacmatch.recipes.bench.peers import PEERS
from jacmatch.recipes.bench.products import PRODUCTS
from jacmatch.recipes.bench.scale import SCALE
from jacmatch.recipes.bench.step import STEP

BENCHMARKS: dict[str, Benchmark] = {
    "products": PRODUCTS,
    "step": STEP,
    "cache": CACHE,
    "loop": LOOP,
    "memory": MEMORY,
    "scale": SCALE,
    "peers": PEERS,
}
"""The benchmarks by name."""
