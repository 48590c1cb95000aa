"""Numbers that the authors printed; test accuracy in %, single runs without a spread.

Srinivas & Fleuret, "Local Affine Approximators for Improving Knowledge Transfer", NIPS 2017 LLD workshop, tables 1 and
2. The CIFAR-100 table is also table 1 of "Knowledge Transfer with Jacobian Matching", ICML 2018, arXiv:1803.00443.
"""

TEACHER = {"cifar10": 90.94, "cifar100": 64.78}
"""VGG-9 on all images."""


def _table(columns: str, **rows: tuple[float, ...]) -> dict[str, dict[str, float]]:
    return {row.replace("_", " + "): dict(zip(columns.split(), values, strict=True)) for row, values in rows.items()}


DISTILLATION: dict[str, dict[str, dict[str, float]]] = {
    "cifar10": _table(
        "5 10 50 100 500 1000 all",
        labels=(28.92, 33.8, 53.6, 61.05, 76.01, 77.63, 84.56),
        labels_outputs=(35.8, 40.79, 59.98, 67.22, 80.55, 81.77, 87.65),
        labels_Jacobians=(34.47, 39.43, 58.18, 65.05, 76.82, 78.21, 84.76),
        labels_outputs_Jacobians=(39.78, 43.4, 62.17, 69.15, 80.28, 82.23, 87.29),
        outputs=(36.73, 41.61, 60.71, 68.32, 82.19, 84.0, 88.64),
        outputs_Jacobians=(41.43, 46.03, 63.5, 70.17, 80.98, 82.75, 85.56),
    ),
    "cifar100": _table(
        "1 5 10 50 100 all",
        labels=(5.69, 13.9, 20.03, 37.6, 44.92, 54.28),
        labels_outputs=(12.13, 26.97, 33.92, 46.47, 50.92, 56.65),
        labels_Jacobians=(6.78, 23.94, 32.03, 45.71, 51.47, 53.44),
        labels_outputs_Jacobians=(13.78, 33.39, 39.55, 49.49, 52.43, 54.57),
        outputs=(10.73, 28.56, 33.6, 45.73, 50.15, 56.59),
        outputs_Jacobians=(13.09, 33.31, 38.16, 47.79, 50.06, 51.33),
    ),
}
"""VGG-9 → VGG-4 by images per class; CIFAR-100 has 500 of each in all, CIFAR-10 5,000."""

TRANSFER: dict[str, dict[str, float]] = {
    "labels": {"25": 35.19, "50": 46.38, "all": 59.33},
    "oracle": {"25": 57.65, "50": 64.18, "all": 71.42},
    "lwf": {"25": 45.08, "50": 55.22, "all": 65.22},
    "lwf+jacobians": {"25": 45.26, "50": 56.49, "all": 66.04},
    "lwf+attention": {"25": 46.01, "50": 57.8, "all": 67.24},
    "lwf+attention+jacobians": {"25": 47.31, "50": 58.35, "all": 67.31},
}
"""ImageNet → MIT Indoor Scenes (67 classes), pretrained ResNet → VGG-9, by images per class: "Knowledge Transfer with
Jacobian Matching", ICML 2018, arXiv:1803.00443; the columns 5 and 10 are not confirmed and left out."""
