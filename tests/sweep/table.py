"""The committed table: a line for each configuration, and what must hold of it."""

import csv
from collections.abc import Iterable
from pathlib import Path

ENGINES = ("auto", "forward", "reverse", "differences")
DERIVATIVES = ("vjp", *ENGINES, "jacobian")
BASELINES = ("torch vjp", "torch jvp")
TABLE = Path(__file__).with_name("table.csv")
COLUMNS = ("configuration", *DERIVATIVES, *BASELINES, "doctor", "faults")
RANKS = {"right": 0, "none": 1, "refused": 1, "raw": 2, "wrong": 3}
Row = dict[str, str]


def row(name: str, cells: dict[str, str]) -> Row:
    """The line of a configuration: the first words of its cells."""
    if "none" in cells:
        return {"configuration": name} | dict.fromkeys(COLUMNS[1:], "none")
    words = {column: cells[column].partition(":")[0] for column in (*DERIVATIVES, *BASELINES)}
    doctor, _, faults = cells["doctor"].partition(" | ")
    if doctor.startswith(("refused", "raw")):
        return {"configuration": name} | words | {"doctor": doctor.partition(":")[0], "faults": ""}
    states = (state.partition("=") for state in doctor.split(", ") if "=" in state)
    doctor_states = " ".join(f"{engine}={'right' if state == 'right' else 'fault'}" for engine, _, state in states)
    return {"configuration": name} | words | {"doctor": doctor_states, "faults": faults}


def read() -> dict[str, Row]:
    """The lines of the committed table by configuration; none before it is written."""
    if not TABLE.exists():
        return {}
    with TABLE.open(encoding="utf-8", newline="") as file:
        return {line["configuration"]: line for line in csv.DictReader(file)}


def write(rows: Iterable[Row]) -> None:
    """Replaces the committed table."""
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def family(configuration: str) -> str:
    """The entry of PyTorch's databases that a configuration belongs to."""
    words = configuration.split(" ")
    return " ".join(words[: 2 if words[1].startswith("(") else 1])


def worse(now: Row, before: Row) -> list[str]:
    """The derivatives that were better in the committed table."""
    return [name for name in DERIVATIVES if RANKS[now[name]] > RANKS[before[name]]]
