"""The library's exact Jacobian of 100 outputs ÷ a loop of 100 backward passes, in evaluation mode.

Without gradients by the parameters, as for a teacher or a measurement, and with them, as in training. The rows named
`peak` show the memory of a fresh process as `chunk_size` grows.
"""

import torch

import method
from jacmatch import jacobian
from jacmatch.models import build

NETWORKS = {"mlp": (784,), "resnet20": (3, 32, 32), "vgg4": (3, 32, 32)}
OUTPUTS = 100
MEMORY = """
from jacmatch import jacobian
from jacmatch.models import build
network = build("resnet20", 100, (3, 32, 32)).eval().requires_grad_(False)
jacobian(network, torch.rand(2, 3, 32, 32), chunk_size={})
"""


def loop(network, x, *, create_graph=False):
    leaf = x.clone().requires_grad_()
    y = network(leaf)
    rows = [
        torch.autograd.grad(y[:, k].sum(), leaf, create_graph=create_graph, retain_graph=True)[0]
        for k in range(y.shape[1])
    ]
    return torch.stack(rows, 1)


def rows(quick):
    found = []
    for name, shape in NETWORKS.items():
        network = build("mlp" if quick else name, OUTPUTS, shape).eval()
        for batch in (1, 2, 8):
            x = torch.rand(batch, *shape)
            network.requires_grad_(False)
            times = method.ratio(
                lambda n=network, x=x: jacobian(n, x), lambda n=network, x=x: loop(n, x), 3 if quick else 9
            )
            found.append({"case": f"{name}, values", "batch": batch, **times})
        network.requires_grad_(True)
        x = torch.rand(2, *shape)

        def ours(network=network, x=x):
            network.zero_grad()
            jacobian(network, x)[1].square().sum().backward()

        def theirs(network=network, x=x):
            network.zero_grad()
            loop(network, x, create_graph=True).square().sum().backward()

        found.append({"case": f"{name}, training", "batch": 2, **method.ratio(ours, theirs, 3 if quick else 9)})
    for chunk in (1, 32) if quick else (1, 2, 4, 8, 16, 32):
        found.append(
            {"case": f"peak, chunk_size={chunk}", "batch": 2, "bytes": method.peak_memory(MEMORY.format(chunk))}
        )
    return found


if __name__ == "__main__":
    method.main("full_jacobian", "exact Jacobian of 100 outputs ÷ a loop of 100 backward passes", 0.8, rows)
