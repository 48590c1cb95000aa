"""The look of reports and figures: one color for each method, and the CSS of the pages."""

from collections.abc import Sequence
from dataclasses import dataclass

PALETTE = {
    "grey": ("#4d5663", "#aab3c0"),
    "orange": ("#ad5200", "#f0a04b"),
    "blue": ("#0067ad", "#62b4f5"),
    "green": ("#00815e", "#35c79a"),
    "purple": ("#a8447d", "#e59ac6"),
    "olive": ("#7a6a00", "#d6c451"),
}
"""Colors after Okabe and Ito, which color-blind readers distinguish: on a light and on a dark background. Each has a
contrast of at least 4.5 to its background."""
METHODS = {
    "grey": ("labels", "labels only", "cross-entropy", "first guess", "student: not taught", "λ = 0", "penalty λ = 0"),
    "orange": (
        *("outputs", "labels + outputs", "lwf", "LwF: labels + outputs", "plain KL"),
        *("values", "values alone", "student: values", "energies"),
    ),
    "blue": (
        *("jacobians", "labels + outputs + Jacobians", "lwf+jacobians", "LwF + Jacobians", "default"),
        *(
            "slopes",
            "values + slopes",
            "values + derivatives",
            "values + partials",
            "values + Jacobians",
            "student: values + slopes",
        ),
    ),
    "green": ("lwf+attention", "LwF + attention"),
    "purple": ("lwf+attention+jacobians", "LwF + attention + Jacobians"),
    "olive": ("oracle", "teacher fine-tuned (oracle)"),
}
"""The color of each method, in every report and figure: grey learns from labels alone, orange from the teacher's
outputs or values too, blue from its derivatives too. A variant after a comma (`values, 4 × steps`) has the same color
and another dash. Other names get the unused colors."""
DASHES = ("2 2", "7 3", "", "9 3 2 3", "4 2", "12 3", "6 2 2 2 2 2", "1 3", "14 2 2 2", "3 5")
"""The first six belong to the colors, in their order: neither color nor dash alone distinguishes two methods."""


@dataclass(frozen=True)
class Style:
    """How a line of a method is drawn."""

    color: str  # A name of `PALETTE`
    dash: str  # lengths of strokes and gaps as in SVG, empty for a solid line


def styles(names: Sequence[str]) -> list[Style]:
    """Return the styles of methods that are shown together.

    Example:
        >>> [style.color for style in styles(["values", "values, 4 × steps", "something else"])]
        ['orange', 'orange', 'grey']
    """
    known = {name: color for color, methods in METHODS.items() for name in methods}
    colors = [known.get(name) or known.get(name.partition(", ")[0]) for name in names]
    free = [color for color in PALETTE if color not in colors] or list(PALETTE)
    unknown = 0
    dashes: list[str] = []
    chosen = []
    for color in colors:
        if color is None:
            color, unknown = free[unknown % len(free)], unknown + 1
        dash = DASHES[list(PALETTE).index(color)]
        if dash in dashes:
            dash = next((other for other in reversed(DASHES) if other not in dashes), dash)
        dashes.append(dash)
        chosen.append(Style(color, dash))
    return chosen


def _variables(scheme: int) -> str:
    return " ".join(f"--{name}: {pair[scheme]};" for name, pair in PALETTE.items())


STYLE = (
    f"""
:root {{ color-scheme: light dark; --ground: #fff; --text: #1b1e23; --soft: #5b626c; --line: #d9dde2; --card: #f6f7f9;
  {_variables(0)} }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ground: #14161a; --text: #e8eaed; --soft: #a2a9b3; --line: #343942; --card: #1c1f25;
    {_variables(1)} }} }}
"""
    + """
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text); font: 1rem/1.55 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: clamp(1.5rem, 4vw, 2rem); line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.015em; }
h1, h2, .note, tbody th, dd { overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.8rem 0 .8rem; } h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
.note { color: var(--soft); font-size: .9rem; margin: .7rem 0 0; max-width: 46rem; }
.warning { border-left: .25rem solid var(--orange); background: var(--card); padding: .6rem .9rem; margin: 1rem 0 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .95rem; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
thead th { color: var(--soft); font-size: .82rem; font-weight: 500; white-space: normal; vertical-align: bottom; }
th:first-child { text-align: left; padding-left: 0; min-width: 9rem; }
tbody th { font-weight: 500; white-space: normal; } td:last-child, thead th:last-child { padding-right: 0; }
.mark { width: 28px; height: 10px; margin-right: .35rem; vertical-align: middle; }
.mark path { fill: none; stroke-width: 3; }
figure { margin: 0; } .drawn { background: #fff; border-radius: .6rem; padding: 1rem; }
.drawn img { display: block; width: 100%; height: auto; } .drawn .whole { min-width: 42rem; }
.curves { background: var(--card); border-radius: .6rem; padding: 1rem; }
.curves svg { display: block; width: 100%; height: auto; } .curves .mark { display: inline; width: 28px; height: 10px; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .85rem; margin-bottom: .5rem; }
.on-phone { display: none; }
.jacobians { display: grid; grid-template-columns: repeat(var(--columns), minmax(3.2rem, 9rem)); gap: .7rem; }
.jacobians b { align-self: end; font-size: clamp(.68rem, 2vw, .82rem); font-weight: 500; line-height: 1.25; }
.jacobians b, .jacobians figcaption { color: var(--soft); text-align: center; }
.jacobians img { display: block; width: 100%; image-rendering: pixelated; border: 1px solid var(--line);
  border-radius: .25rem; }
.jacobians figcaption { font-size: clamp(.7rem, 2vw, .82rem); font-variant-numeric: tabular-nums; min-height: 1.5em; }
code { background: var(--card); padding: .15rem .4rem; border-radius: .3rem; font-size: .9rem;
  overflow-wrap: anywhere; } .flag { white-space: nowrap; }
details { border-top: 1px solid var(--line); padding: .7rem 0; } summary { cursor: pointer; font-weight: 500; }
dl { columns: 19rem; column-gap: 2.5rem; margin: .8rem 0 0; font-size: .88rem; }
dl div { display: flex; justify-content: space-between; gap: 1rem; border-bottom: 1px solid var(--line);
  padding: .25rem 0; break-inside: avoid; }
dt { color: var(--soft); } dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; }
@media (max-width: 40rem) { .on-desk { display: none; } .on-phone { display: block; } .curves { padding: .7rem .3rem; }
  .drawn { padding: .5rem; } main { padding-top: 1.5rem; } .jacobians { gap: .3rem; } }
@media print { details > * { display: block; } }
"""
)
