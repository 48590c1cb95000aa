"""Plants faults into a copy of the package, one at a time, and demands that the unit tests notice each.

Run it as `python tests/planted_faults.py [NAME ...]`. A fault is an exact replacement of text in one file; if the text
is not there exactly once, the script fails, so that it cannot go stale. The tests see the copy through PYTHONPATH.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Fault(NamedTuple):
    """One fault: where, what becomes what, and the tests that must fail."""

    file: str
    old: str
    new: str
    tests: str


FAULTS = {
    "one difference shows any engine to be right": Fault(
        "jacobian/finite_differences.py",
        "return STRICT if self.single else",
        "return 0.99 if self.single else",
        "tests/jacobian/test_verification.py",
    ),
    "the pre-flight check accepts any gradient": Fault(
        "diagnostics/isolation.py",
        "if error <= (allowed if exact else max(allowed, _LOOSE)):",
        "if True:",
        "tests/diagnostics/test_preflight.py",
    ),
    "student's rows are detached": Fault(
        "jacobian/engines.py",
        "    return row\n\n\ndef _cut_off",
        "    return row.detach()\n\n\ndef _cut_off",
        "tests/jacobian/test_parameter_gradients.py",
    ),
    "what is read ahead is the next batch": Fault(
        "training/data.py",
        "self._pool.submit(self._read, plan)",
        "self._pool.submit(self._read, self._plan(one + 1))",
        "tests/training/test_prefetch.py",
    ),
    "each row of metrics is waited for": Fault(
        "training/state.py",
        "if not (wait or first.arrival.query()):",
        "if False:",
        "tests/training/test_no_waiting.py",
    ),
    "the first image of a shard is sought in the one before": Fault(
        "datasets/shards.py",
        'side="right"',
        'side="left"',
        "tests/datasets/test_shards.py",
    ),
    "rows have no units": Fault(
        "objectives/regression.py",
        "step.unit = self.input_scale.to(step.rows)",
        "step.unit = torch.ones_like(self.input_scale).to(step.rows)",
        "tests/objectives/test_regression.py",
    ),
    "kinks within a step are not seen": Fault(
        "jobs/surrogate/functions.py",
        "(sides.abs() > NON_SMOOTH *",
        "(sides.abs() > 1e6 *",
        "tests/jobs/surrogate/test_functions.py",
    ),
    "active points lie where student and teacher agree": Fault(
        "jobs/surrogate/points.py",
        "weights = disagreement.double().clamp_min(0)",
        "weights = 1 / (disagreement.double() + 1e-9)",
        "tests/jobs/surrogate/test_points.py",
    ),
    "no graph of the rows": Fault(
        "jacobian/engines.py",
        "_gradient(nonzero or each, leaf, create_graph=differentiable, retain_graph=keep)",
        "_gradient(nonzero or each, leaf, create_graph=False, retain_graph=keep)",
        "tests/jacobian/test_parameter_gradients.py",
    ),
    "frozen statistics leak into the rows": Fault(
        "jacobian/rules/batch_norm.py",
        "        if frozen\n        else applied(_Projected",
        "        if False\n        else applied(_Projected",
        "tests/jacobian/test_module_policies.py tests/jacobian/test_parameter_gradients.py",
    ),
    "the weight's part of a row's derivative is lost": Fault(
        "jacobian/rules/convolution.py",
        "by_weight = ctx.needs_input_grad[1] and not (is_toward_input() and ctx.are_parameters)",
        "by_weight = False",
        "tests/jacobian/test_derivative_rules.py",
    ),
    "operators below Python are not replaced": Fault(
        "jacobian/rules/aten_kernels.py",
        "library.impl(name, key, kernel, False)",
        "library",
        "tests/jacobian/test_aten_kernels.py",
    ),
    "random numbers are not replayed": Fault(
        "jacobian/function.py",
        "            set_generator_states(start, x.device)\n",
        "",
        "tests/jacobian/test_one_mask.py",
    ),
    "one-sided difference": Fault(
        "jacobian/finite_differences.py",
        "difference = function(x + move) - function(x - move)\n        products.append(difference / (2 * ",
        "difference = function(x + move) - function(x)\n        products.append(difference / (1 * ",
        "tests/jacobian/test_differences.py",
    ),
    "buffers are written twice": Fault(
        "jacobian/callables.py",
        "                buffer.copy_(written[name])",
        "                buffer.copy_(written[name] + (written[name] - buffer))",
        "tests/jacobian/test_module_policies.py",
    ),
    "mean for sum": Fault(
        "losses/outputs.py",
        "return (precise(student) - precise(teacher)).square().flatten(1).sum(1)",
        "return (precise(student) - precise(teacher)).square().flatten(1).mean(1)",
        "tests/losses/test_contract.py",
    ),
    "norm for square": Fault(
        "losses/outputs.py",
        "return (precise(student) - precise(teacher)).square().flatten(1).sum(1)",
        "return (precise(student) - precise(teacher)).square().flatten(1).sum(1).sqrt()",
        "tests/losses/test_contract.py",
    ),
    "temperature without its square": Fault(
        "losses/outputs.py",
        "return temperature**2 * (log_p.exp()",
        "return temperature * (log_p.exp()",
        "tests/losses/test_contract.py",
    ),
    "the student's own top class": Fault(
        "objectives/differentiation.py",
        "context = Context(batch.label, answer.outputs, pixels, batch.arguments)",
        "context = Context(batch.label, run(student, batch.x)[0].detach(), pixels, batch.arguments)",
        "tests/objectives",
    ),
    "teacher in training mode": Fault(
        "teachers/functions.py",
        "if any(map(trains, layers_of(module))):",
        "if False:",
        "tests/teachers",
    ),
    "a damaged shard is believed": Fault(
        "teachers/cached/reader.py",
        "if _of_file(file, strong) != stored.get(name):",
        "if False:",
        "tests/teachers",
    ),
    "a cache of another teacher is believed": Fault(
        "teachers/cached/reader.py",
        "        apart = changed(there, expected)\n",
        "        apart = None\n",
        "tests/teachers/test_cached.py tests/jobs/test_cache.py",
    ),
    "other inputs than those of the cache": Fault(
        "teachers/cached/reader.py",
        "if bool(wrong.any()):",
        "if False:",
        "tests/teachers/test_cached.py",
    ),
    "the convolutions are laid out as ever": Fault(
        "training/state.py",
        "        channels_last(objective)\n",
        "        pass\n",
        "tests/training/test_layout.py",
    ),
    "every is not rescaled": Fault(
        "objectives/base.py",
        "        repeated = self.every if self.training else 1",
        "        repeated = 1",
        "tests/objectives",
    ),
    "terms do not add up": Fault(
        "objectives/base.py",
        "total = torch.stack(list(values.values())).sum() if values",
        "total = torch.stack(list(unweighted.values())).sum() if values",
        "tests/objectives",
    ),
    "probes do not depend on the sample": Fault(
        "jacobian/probes.py",
        "of_draw), ids)",
        "of_draw), torch.zeros_like(ids))",
        "tests/jacobian/test_probes.py",
    ),
    "two samples share their probes": Fault(
        "jacobian/probes.py",
        "of_draw), ids)",
        "of_draw), ids // 2)",
        "tests/jacobian/test_probes.py",
    ),
    "share of the gradient measured wrongly": Fault(
        "jacobian/engines.py",
        "torch.linalg.vector_norm(torch.stack(parts))",
        "torch.linalg.vector_norm(torch.stack(parts)).square()",
        "tests/objectives/test_shares.py",
    ),
    "the student's own largest pixel": Fault(
        "objectives/transfer.py",
        "readout, v, first = self._maps(batch, 0), answer.cotangents, batch.part(slice(count))",
        "readout, v, first = self._maps(batch, 0), self._maps(batch, 0).largest, batch.part(slice(count))",
        "tests/objectives/test_transfer.py",
    ),
    "the heads are taken for each other": Fault(
        "objectives/transfer.py",
        "source = outputs if self.shared else outputs[:, classes:]",
        "source = outputs if self.shared else outputs[:, : outputs.shape[1] - classes]",
        "tests/objectives/test_transfer.py",
    ),
    "an answer about another image is remembered": Fault(
        "teachers/ensemble.py",
        "or not torch.equal(entry.x, x[row]):",
        "or entry.x.shape != x[row].shape:",
        "tests/teachers/test_memoized.py",
    ),
    "an answer to another question is remembered": Fault(
        "teachers/ensemble.py",
        "key = (question.readout, question.rule, *kinds,",
        "key = (question.readout, *kinds,",
        "tests/teachers/test_memoized.py",
    ),
    "a flipped bit in a checkpoint is read": Fault(
        "training/checkpoints.py",
        "if end != _MARK + hashlib.sha256(body).hexdigest().encode():",
        "if not end.startswith(_MARK):",
        "tests/training/test_checkpoints.py",
    ),
    "a run goes on with another teacher": Fault(
        "training/identity.py",
        '"none" if teacher is None else named(teacher)',
        '"none"',
        "tests/training/test_resume.py",
    ),
    "two processes have one run folder": Fault(
        "runs/files.py",
        "lock.acquire(timeout=_RETRY, poll_interval=_RETRY / 5)",
        "pass",
        "tests/test_run_lock.py",
    ),
    "the distance goes the other way": Fault(
        "datasets/distances.py",
        "nearest = matrix.min(1).values",
        "nearest = matrix.min(0).values",
        "tests/datasets/test_distances.py",
    ),
}


def caught(name: str) -> tuple[str, bool, str]:
    """Whether the tests notice this fault, and the end of what they print."""
    fault = FAULTS[name]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "jacmatch"
        shutil.copytree(ROOT / "src" / "jacmatch", copy, ignore=shutil.ignore_patterns("__pycache__"))
        file = copy / fault.file
        text = file.read_text()
        if text.count(fault.old) != 1:
            return name, False, f"{fault.file} holds the text to replace {text.count(fault.old)} times, not once"
        file.write_text(text.replace(fault.old, fault.new))
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-m",
            "not slow",
            "--tb=line",
            "-p",
            "no:cacheprovider",
            *fault.tests.split(),
        ]
        environment = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    # 1 is pytest's code for failed tests; anything else means that they did not run.
    return name, done.returncode == 1, "\n".join(done.stdout.splitlines()[-3:])


def main(names: list[str]) -> int:
    """Plants the named faults, or all, two at a time; returns how many were missed."""
    missed = 0
    with ThreadPoolExecutor(2) as pool:
        for name, noticed, end in pool.map(caught, names or list(FAULTS)):
            print(f"{'caught' if noticed else 'MISSED'}  {name}", flush=True)
            if not noticed:
                missed += 1
                print(end)
    print(f"{len(names or FAULTS) - missed} passed, {missed} failed")
    return missed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) > 0)
