"""Train compiled steps in a framework and eager ones in a plain loop; print what came of it as JSON."""

import copy
import json
import sys
import tempfile

from .cases import X, Y, difference, networks, objective, plain_loop, steps


def huggingface(objective):
    from jacmatch.integrations import JacmatchTrainer

    from .transformers_cases import DATA, arguments

    with tempfile.TemporaryDirectory() as out:
        settings = arguments(out, torch_compile=True, torch_compile_backend="aot_eager")
        JacmatchTrainer(objective, settings, train_dataset=DATA[:20]).train()


def lightning(objective):
    from jacmatch.objectives import CompiledSteps

    from .lightning_cases import fit

    objective.compiled = CompiledSteps(backend="aot_eager")
    fit(objective, X[:20], Y[:20])


def accelerate(objective):
    from jacmatch.objectives import CompiledSteps

    from .test_accelerate import train

    objective.compiled = CompiledSteps(backend="aot_eager")
    train(objective, samples=20)


def timm():
    """The task compiled as timm's training script does, against a loop over an eager objective and the criterion."""
    import torch
    from torch.nn.functional import cross_entropy

    from jacmatch import Distillation

    from . import test_timm
    from .test_timm import GradientShare, Model, batch, task

    settings = {"jacobians": GradientShare(0.3), "objective_settings": {"measure_every": 2}}
    student, teacher = test_timm.networks()
    teacher = Model(12, student.pretrained_cfg["mean"])  # the input of both is normalized alike
    plain, trained = copy.deepcopy(student), task(student, teacher, **settings).train()
    trained.compile(backend="aot_eager")
    weights = {"labels": 0, "outputs": 0.6, "output_loss": "kl", "temperature": 2.0, "measure_every": 2}
    eager = Distillation(plain, teacher, jacobians=GradientShare(0.3), **weights)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (student, plain)]
    x, y = batch(24)
    for rows in torch.arange(24).split(6) * 2:
        terms = eager(x[rows], y[rows])
        (terms.loss + 0.4 * cross_entropy(terms.student_outputs, y[rows], label_smoothing=0.1)).backward()
        trained(x[rows], y[rows])["loss"].backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        evaluated = float((trained.get_eval_model().eval()(x) - plain.eval()(x)).abs().max())
    report = trained.objective.compiled.report()
    moved = difference(student, test_timm.networks()[0])
    print(json.dumps({**report, "difference": difference(student, plain), "evaluation": evaluated, "moved": moved}))


def main(framework):
    student, teacher = networks()
    plain, trained = copy.deepcopy(student), objective(student, teacher)
    globals()[framework](trained)
    plain_loop(objective(plain, teacher), steps(20, 4))
    print(json.dumps({**trained.compiled.report(), "difference": difference(student, plain)}))


if __name__ == "__main__":
    timm() if sys.argv[1] == "timm" else main(sys.argv[1])
