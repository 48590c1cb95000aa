"""A training pass with one Jv (forward engine) ÷ a plain pass over a doubled batch, the floor by operations."""

import torch

import method
from jacmatch.jacobian import push
from jacmatch.models import build

CASES = {
    "VGG-4, 28×28, training": ("vgg4", (1, 28, 28), 64, True),
    "VGG-4, 28×28, evaluation": ("vgg4", (1, 28, 28), 64, False),
    "ResNet-20, 32×32, training": ("resnet20", (3, 32, 32), 64, True),
    "ResNet-20, 32×32, evaluation": ("resnet20", (3, 32, 32), 64, False),
    "ViT-Tiny, 32×32": ("vit-tiny", (3, 32, 32), 4, True),
}


def rows(quick):
    found = []
    for name, (model, shape, batch, training) in CASES.items():
        network = build("cnn3" if quick else model, 10, shape).train(training)
        x, v = torch.rand(batch, *shape), torch.randn(1, batch, *shape)
        doubled = torch.cat([x, x + 0.1])

        def with_jv(network=network, x=x, v=v):
            network.zero_grad()
            result = push(network, x, v, engine="forward")
            (result.outputs.square().sum() + result.products.square().sum()).backward()

        def plain(network=network, doubled=doubled):
            network.zero_grad()
            network(doubled).square().sum().backward()

        found.append({"case": name, "batch": batch, **method.ratio(with_jv, plain, 3 if quick else 11)})
    return found


if __name__ == "__main__":
    method.main("jv_pass", "one Jv (forward) with backward ÷ plain pass over a doubled batch", 1.35, rows)
