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


def main(framework):
    student, teacher = networks()
    plain, trained = copy.deepcopy(student), objective(student, teacher)
    globals()[framework](trained)
    plain_loop(objective(plain, teacher), steps(20, 4))
    print(json.dumps({**trained.compiled.report(), "difference": difference(student, plain)}))


if __name__ == "__main__":
    main(sys.argv[1])
