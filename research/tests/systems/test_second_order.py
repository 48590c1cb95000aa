"""L-BFGS over the parameters of any network, against closed forms."""

import torch

from jacmatch_research.systems.second_order import minimize_by_lbfgs


def linear_problem():
    """A linear network without offset, its inputs and noisy targets."""
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(20, size, generator=generator, dtype=torch.float64) for size in (3, 1))
    network = torch.nn.Linear(3, 1, bias=False, dtype=torch.float64)
    torch.nn.init.constant_(network.weight, 0.5)
    return network, x, x @ torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64) + 0.3 * noise


def test_a_linear_network_ends_at_the_ridge_solution_about_where_it_began():
    network, x, y = linear_problem()
    origin = network.weight.detach().clone()
    measured = minimize_by_lbfgs(
        network,
        lambda ids: (network(x[ids]) - y[ids]).square().sum(1).mean(),
        20,
        evaluations=200,
        seed=0,
        decays=(0.5,),
    )
    normal = 2 / 20 * x.T @ x + 0.5 * torch.eye(3, dtype=torch.float64)
    expected = torch.linalg.solve(normal, 2 / 20 * x.T @ y + 0.5 * origin.T)
    torch.testing.assert_close(network.weight.detach().T, expected, atol=1e-8, rtol=0)
    assert measured["weight_decay"] == 0.5
    assert 0 < measured["evaluations"] <= 400


def test_the_decay_is_the_one_with_the_lowest_loss_on_the_samples_held_out():
    network, x, y = linear_problem()
    held_out = set(torch.randperm(20, generator=torch.Generator().manual_seed(1))[:4].tolist())
    truth = torch.tensor([[0.5], [0.5], [0.5]], dtype=torch.float64)
    y = torch.stack([x[i] @ truth if i in held_out else y[i] for i in range(20)])  # best where nothing is learned

    def loss(ids):
        return (network(x[ids]) - y[ids]).square().mean()

    measured = minimize_by_lbfgs(network, loss, 20, evaluations=100, seed=1, decays=(100.0, 1e-6))
    assert measured["weight_decay"] == 100.0
