"""Draws the picture of the README, `docs/gain.svg`, from the committed results of `jacmatch reproduce defaults`.

    python docs/picture.py

It shows the gain of the default of `Distillation` over the better of cross-entropy and plain KL at equal time, by the
number of images per class, for the convolutional networks. A test compares the committed file with this one.
"""

import csv
import re
from math import log10
from pathlib import Path

DOCS = Path(__file__).resolve().parent
PICTURE = DOCS / "gain.svg"
DATA = {
    "cifar10": ("CIFAR-10", "#0b5cad"),
    "fashion-mnist": ("Fashion-MNIST", "#b34700"),
    "digits": ("digits", "#00805a"),
}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 400, 70, 190, 50, 60
LARGEST, SMALLEST = 20.0, -3.0  # points, the ends of the vertical axis
Point = tuple[int, float, float]  # images per class, gain, standard error


def points(name: str) -> list[Point]:
    """Images per class, gain and standard error of the convolutional networks, by images per class."""
    with (DOCS / "results" / f"defaults-{name}-cpu" / "settings.csv").open(encoding="utf-8", newline="") as file:
        rows = [list(row.values()) for row in csv.DictReader(file)]
    result = []
    for setting, *_, gain in rows:
        if "convolutional" in setting:
            mean, error = (float(number) for number in re.findall(r"[+-]?\d+\.\d+", gain)[:2])
            result.append((int(re.findall(r"n = (\d+)", setting)[0]), mean, error))
    return sorted(result)


def across(count: int) -> float:
    """The horizontal position of a number of images per class, on a logarithmic axis from 5 to 1,000."""
    return LEFT + 20 + (WIDTH - LEFT - RIGHT - 20) * (log10(count) - log10(5)) / (3 - log10(5))


def up(gain: float) -> float:
    """The vertical position of a gain in points."""
    return TOP + (HEIGHT - TOP - BOTTOM) * (LARGEST - gain) / (LARGEST - SMALLEST)


def drawn() -> str:
    """The picture as SVG."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="18" fill="#222">',
        "<title>Gain of the default over the better of cross-entropy and plain KL, at equal time</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT - 50}" y="28">gain in test accuracy at equal time, points</text>',
        f'<text x="{across(70):.0f}" y="{HEIGHT - 12}" text-anchor="middle">training images per class</text>',
    ]
    for gain in (0, 5, 10, 15, 20):
        color, width = ("#222", 2) if gain == 0 else ("#ddd", 1)
        lines += [
            f'<path d="M{LEFT} {up(gain):.1f}H{WIDTH - RIGHT + 10}" stroke="{color}" stroke-width="{width}"/>',
            f'<text x="{LEFT - 8}" y="{up(gain) + 6:.1f}" text-anchor="end">{"+" if gain else ""}{gain}</text>',
        ]
    for count in (5, 10, 100, 1000):
        lines.append(f'<text x="{across(count):.1f}" y="{HEIGHT - 38}" text-anchor="middle">{count:,}</text>')
    for row, (name, (label, color)) in enumerate(DATA.items()):
        measured = points(name)
        path = "L".join(f"{across(count):.1f} {up(gain):.1f}" for count, gain, _ in measured)
        lines.append(f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="3"/>')
        for count, gain, error in measured:
            x = f"{across(count):.1f}"
            bar = f'<path d="M{x} {up(gain - error):.1f}V{up(gain + error):.1f}" stroke="{color}" stroke-width="3"/>'
            lines.append(f'{bar}<circle cx="{x}" cy="{up(gain):.1f}" r="5" fill="{color}"/>')
        lines.append(f'<text x="{WIDTH - RIGHT + 24}" y="{TOP + 30 + 28 * row}" fill="{color}">{label}</text>')
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(drawn(), encoding="utf-8")
