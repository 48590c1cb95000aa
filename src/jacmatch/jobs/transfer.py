"""`jacmatch transfer`: a pretrained teacher → a student of another architecture, on a small target set."""

import copy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from jacmatch.datasets import Data, Split, of_classes, per_class
from jacmatch.errors import InputError
from jacmatch.jacobian import ESTIMATORS, BatchNormPolicy, Estimator, NoiseAveraged, PCAFeatures, SubspaceInputs
from jacmatch.jobs import networks, study, transfer_results
from jacmatch.jobs.adaptation import HeadTeacher, basis_of, finetuned, probed
from jacmatch.jobs.networks import Description, same_inputs
from jacmatch.jobs.settings import (
    SMOKE_JACOBIANS,
    SMOKE_STEPS,
    SMOKE_TRAIN,
    TrainingFields,
    flag,
    load,
    mixed,
    positive,
    without_labels,
)
from jacmatch.jobs.study import Cell, Done, Progress, Result, Task, over_seeds
from jacmatch.jobs.teachers import Pretrained, check_teacher, pretrained, trained_first
from jacmatch.jobs.train import Train
from jacmatch.jobs.transfer_results import METHODS, RECIPES, Method
from jacmatch.losses import JacobianLoss, OutputLoss
from jacmatch.models import FirstOutputs, ValuesOnly, count_parameters
from jacmatch.objectives import AtMixedPairs, Distillation, GradientShare
from jacmatch.objectives.transfer import Pair
from jacmatch.objectives.transfer import Transfer as Objective
from jacmatch.runs import Run
from jacmatch.teachers import MemoizedTeacher, ModuleTeacher, Teacher, as_teacher
from jacmatch.training import Training, evaluate
from jacmatch.training.state import channels_last

_NO_LABEL = -100
FAR = 300
"""Number of unseen images for distances and the bound."""
_OF_BASIS = 1000  # training images from which principal components are computed
_JUDGED = 2000  # test images on which the teacher's own outputs are evaluated
_FINE_TUNED = 200  # steps of fine-tuning that is compared with a probe
_LABELS_ALONE = ("labels", "mixup", "oracle")  # methods that neither query a teacher nor use images without labels


@dataclass(frozen=True)
class Ready:
    """Data, teacher and layers of a job, which all students share."""

    data: Data  # the target; its test images are in a fixed random order, so that the first are of mixed classes
    teacher: Pretrained
    answers: Teacher  # the network as a teacher; a memoized one is made for each set of training images
    description: Description  # how a student is built for the target
    pairs: tuple[Pair, ...]  # layers that are compared
    unlabelled: Split | None = None  # images without labels of another data set, not of the target's own
    learned_from: Split | None = None  # training images of a method, once it is taught
    memories: dict[int, MemoizedTeacher] = field(default_factory=dict)  # the teacher with its memory, by seed
    adapted: dict[int, tuple[nn.Module, Teacher]] = field(default_factory=dict)  # the adapted network, by seed

    @property
    def classes(self) -> int:
        """Number of classes of the target."""
        return self.data.outputs

    @property
    def some_test(self) -> Split:
        """The test images on which a teacher is evaluated."""
        return self.data.test.subset(torch.arange(min(_JUDGED, len(self.data.test))))

    def student(self, second: int | None = None) -> nn.Module:
        """Return a new student with the target's outputs and, after them, `second` others: the teacher's if None."""
        second = self.teacher.description.outputs if second is None else second
        return replace(self.description, outputs=self.classes + second).build()


@dataclass(frozen=True)
class Transfer(TrainingFields):
    """Transfer from a pretrained teacher to a student of another architecture, with few labeled images.

    The default trains a linear probe for the target's classes on the teacher's features, and distills this teacher.
    Other recipes compare the teacher's own outputs (learning without forgetting), its features, or terms of the paper.
    """

    main: ClassVar[str] = "data teacher student per_class recipe unlabelled seeds device out smoke"
    examples: ClassVar[tuple[str, ...]] = ("--unlabelled digits", "--data folder:photos@64 --teacher runs/teacher")

    data: str = "digits"
    """Target: digits, cifar10:DIR, folder:DIR[@SIZE], npz:FILE, … (see `jacmatch distill --help`)."""
    teacher: str = "cnn5"
    """Pretrained teacher: a run folder, or timm:NAME, torchvision:NAME or another model with --teacher-weights. Without
    weights the teacher is trained first, on the first --source-classes of the data; the target is the other classes."""
    student: str = "cnn3"
    """Student: a model name."""
    teacher_weights: Path | None = None
    """Weights of the teacher: safetensors, a torch checkpoint (.pth), or a folder of either."""
    teacher_outputs: int = 1000
    """Number of outputs of the teacher, with --teacher-weights."""
    teacher_size: int | None = None
    """With --teacher-weights: side length in pixels to which images are resized for the teacher. By default they are
    not resized."""
    teacher_mean: tuple[float, ...] | None = None
    """Mean of the teacher's input normalization. Not needed for timm: and torchvision: models."""
    teacher_std: tuple[float, ...] | None = None
    """Standard deviation of the teacher's input normalization."""
    steps: int = 200
    """Number of optimizer steps."""
    teacher_steps: int = 400
    """Number of optimizer steps of a teacher that is trained first."""
    source_classes: int = 0
    """Number of classes of the data on which a teacher is trained first; 0 for half of them."""
    per_class: int = 10
    """Number of training images of the target per class, 0 for all."""
    seeds: int = 3
    """Number of seeds. Subset, initial weights and batches differ between seeds; they are the same for all methods of a
    seed."""
    recipe: Literal["adapt", "lwf", "features", "paper"] = "adapt"
    """adapt: the student learns the outputs of the teacher with a linear probe. lwf: a second head learns the teacher's
    own outputs. features: a second head learns principal components of the teacher's pooled features. paper: the six
    methods of the paper."""
    methods: tuple[Method, ...] = ()
    """Methods to compare; by default those of the recipe. oracle is the teacher itself, fine-tuned."""
    unlabelled: str | None = None
    """Data set whose images are used without labels; it may be an npz with `x_train` alone, or a folder of image files.
    If it is the same as --data, these are the training images of the target that are neither labeled nor held out."""
    unlabelled_count: int = 0
    """Number of images without labels, selected by the seed; 0 for all."""
    adapt_steps: int | None = None
    """Number of steps that fine-tune the teacher's last block and linear probe, at a tenth of --oracle-lr. By default,
    two teachers are compared on the held-out images, and the better one is used: with a linear probe only, and with all
    layers fine-tuned for 200 steps. Without --validation, the first one."""
    feature_layer: str | None = None
    """Layer of the teacher whose pooled features the student learns; by default the input of the teacher's last
    layer."""
    feature_components: int = 32
    """Number of principal components of the features; at most one less than the number of images."""
    whiten: bool = False
    """Scale each principal component to unit variance."""
    point: Literal["auto", "data", "mixed-pairs"] = "auto"
    """Inputs at which student and teacher are compared: the images, or mixed pairs of them. auto: as in the recipe."""
    probe: Literal["random-outputs", "random-inputs", "data-pairs", "subspace-inputs", "noise-averaged"] = (
        "random-outputs"
    )
    """Derivatives that the methods adapt and features compare: rows of the Jacobian, its products with input
    directions, or rows that are averaged over four noisy inputs."""
    probe_basis: Literal["dct", "pca", "data"] = "dct"
    """Directions of subspace-inputs: low frequencies, principal components of the images, or their differences."""
    probe_dimensions: int = 48
    """Dimensions of subspace-inputs; of pca and data at most one less than the number of training images."""
    noise: float = 0.1
    """Standard deviation of the noise of --probe noise-averaged, in units of the raw input."""
    pairs: tuple[str, ...] = ()
    """Pairs of layers whose attention maps are compared, STUDENT_LAYER:TEACHER_LAYER; by default the last layer of each
    resolution, matched by relative depth."""
    depths: int = 2
    """Number of pairs of layers; the deepest ones are used."""
    pool: int | None = None
    """Side length in pixels to which all maps are pooled; by default that of the smaller map of each pair."""
    p: float = 2.0
    """Exponent of the attention maps."""
    labels_weight: float | None = None
    """Weight of the label term. By default 1; with adapt 0.3, because the probe has learned the labels, and 0 with
    --unlabelled."""
    outputs_share: float = 0.3
    """Share of the output term in the gradient norm."""
    outputs_weight: float | None = None
    """Fixed weight of the output term, instead of a share."""
    attention_share: float = 0.1
    """Share of the attention term in the gradient norm."""
    attention_weight: float | None = None
    """Fixed weight of the attention term, instead of a share."""
    jacobian_share: float = 0.1
    """Share of the Jacobian term in the gradient norm."""
    jacobian_weight: float | None = None
    """Fixed weight of the Jacobian term, instead of a share."""
    output_loss: Literal["auto", OutputLoss] = "auto"
    """Loss of the output term: squared error, or KL divergence. auto: as in the recipe."""
    temperature: float | None = None
    """Temperature of kl; by default as in the recipe."""
    jacobian_loss: Literal["auto", JacobianLoss] = "auto"
    """Loss of the Jacobian term. auto: normalized for attention maps, bounded for outputs and features."""
    every: int = 1
    """Compute the Jacobian term only in every n-th step, with n times its weight."""
    oracle_lr: float = 1e-3
    """Learning rate of the fine-tuned teacher."""
    oracle_steps: int | None = None
    """Number of steps that fine-tune the teacher; by default as many as the students have."""
    batch_norm: BatchNormPolicy = "frozen"
    """How derivatives treat the statistics of BatchNorm. frozen: as constants, so that samples are independent. batch:
    as functions of the batch."""

    def run(self, progress: Progress | None = None) -> Result:
        """Train and measure, and return the result that is written to the run folder."""
        self.check()
        with progress or Progress() as shown:
            ready = self.ready(shown)
            if self.teacher_weights is not None or self.teacher.startswith(("hf:", "onnx:")):
                check_teacher(ready.teacher.network, ready.data, shown, smoke=self.smoke, other_classes=True)
            for method in self.chosen:  # incompatible settings are refused before anything is trained
                self.objective(method, self.network_of(method, ready), ready)
            subset, _ = self.parts(ready.data, self.per_class, self.seed)
            run = self.begin("transfer")
            same_inputs(run, ready.data, ready.teacher.network, (ready.description,))
            seeds = range(self.seed, self.seed + (1 if self.smoke else self.seeds))
            cells = [self._cell(seed, method, ready) for seed in seeds for method in self.chosen]
            prepare, conclude = partial(self._prepare, ready), partial(self._conclude, run, ready, subset)
            end: dict[str, Any] = {"progress": shown, "tables": transfer_results.tables}
            return study.run_cells(run, cells, prepare, conclude, device=self.device, **end)

    def _cell(self, seed: int, method: str, ready: Ready) -> Cell:
        network = None if method == "oracle" else ready.description
        return Cell(seed, method, METHODS[method], self.training_of(method, seed), network)

    def _prepare(self, ready: Ready, cell: Cell) -> Task:
        labelled, held_out = self.parts(ready.data, self.per_class, cell.seed)
        images = self.unlabelled_images(ready, labelled, cell.seed)
        ready = self.taught(cell.method, ready, labelled, images, cell.seed, held_out)
        network, objective = self.network_and_objective(cell.method, cell.seed, ready)

        def finish() -> tuple[nn.Module, dict[str, Any]]:
            student: Any = objective.student
            validation = evaluate(student, held_out, device=self.device)["accuracy"] if held_out else None
            teacher = None
            if cell.method.startswith("adapt"):
                teacher = study.measured(ready.teacher.network, ready.some_test, self.device)
                teacher["accuracy_of"] = "the probed teacher"
            fields = {
                "teacher": teacher,
                "student": study.measured(student, ready.data.test, self.device)
                | {"parameters": count_parameters(network), "validation_accuracy": validation},
                **self.judged(cell.method, network, ready, labelled, objective),
            }
            if isinstance(student, FirstOutputs):
                device = next(student.parameters()).device
                student = student.cut(ready.description.build(), labelled.inputs(torch.arange(2)).to(device))
            return student, fields

        return Task(objective, self.training_images(cell.method, labelled, images), held_out, finish)

    def _conclude(self, run: Run, ready: Ready, subset: Split, done: Done) -> Result:
        """The result; the best student on held-out images represents the run, or the last one where there are none."""
        rows = {method: transfer_results.row(METHODS[method], study.of_method(done, method)) for method in self.chosen}
        students = [method for method in self.chosen if method != "oracle"] or list(self.chosen)
        held_out = {method: rows[method]["validation_accuracy"] for method in students}
        main = max(students, key=lambda each: held_out[each]["mean"]) if all(held_out.values()) else students[-1]
        teacher, test = ready.teacher, ready.some_test
        if main != "oracle":
            study.save_main(run, next(cell for cell, _ in done if cell.method == main))
        adapted = {cell.seed: result["teacher"] for cell, result in done if result["teacher"] is not None}
        probes = [each["accuracy"] for each in adapted.values()]  # one for all methods of a seed
        near, far = self.images(ready, subset)
        others = {"unseen": far}
        if teacher.source is not None:
            others["source"] = mixed(teacher.source.train, len(far)).inputs()
        layer = ready.pairs[-1][1] if ready.pairs else None
        distances = {name: transfer_results.distances(teacher.network, layer, near, x) for name, x in others.items()}
        return {
            "teacher": {
                "accuracy": transfer_results.nearest_mean_accuracy(teacher.network, subset, test, ready.classes),
                "accuracy_of": "nearest class mean of its outputs",
                "probe_accuracy": over_seeds(probes),
                "parameters": count_parameters(teacher.network),
            },
            **study.main_fields(study.of_method(done, main), rows[main]),
            "method": main,
            "rows": list(rows.values()),
            "pairs": [list(pair) for pair in ready.pairs],
            "distances": distances,
            "train_samples": len(subset),
            "validation_samples": len(self.parts(ready.data, self.per_class, self.seed)[1] or ()),
            "unlabelled_samples": len(self.unlabelled_images(ready, subset, self.seed) or ()),
            "test_samples": len(ready.data.test),
            "resolved": {"point": self.at, "output_loss": self.compared[0], "temperature": self.compared[1]},
            "notes": [
                *transfer_results.larger_student(self.network_of("mixup", ready), teacher.network),
                *transfer_results.useless_probe(rows, probes),
                *transfer_results.not_converged(run, done),
            ],
        }

    def check(self) -> None:
        """Check the settings that need no data.

        Raises:
            InputError: A setting is out of range, or settings are incompatible.
        """
        names = ("seeds", "every", "depths", "teacher_steps", "teacher_outputs", "oracle_steps", "feature_components")
        positive("transfer", **{name: getattr(self, name) for name in (*names, "probe_dimensions", "pool")})
        self.training()
        self.training(lr=self.oracle_lr, **({"steps": self.oracle_steps} if self.oracle_steps else {}))
        for name in ("unlabelled_count", "adapt_steps"):
            if (getattr(self, name) or 0) < 0:
                raise InputError(f"`{flag(name)}` of `transfer` must be at least 0.", got=getattr(self, name))
        if len(set(self.methods)) < len(self.methods):
            raise InputError("`--methods` of `transfer` must name each method once.", got=" ".join(self.methods))
        named = [name for name in ("teacher_size", "teacher_mean", "teacher_std") if getattr(self, name) is not None]
        if named and self.teacher_weights is None and not self.teacher.startswith(("onnx:", "hf:")):
            flags = ", ".join(f"`{flag(name)}`" for name in named)
            raise InputError(f"{flags} of `transfer` must be used with --teacher-weights.")
        for settings, used, needed in self._uses():
            given = [name for name in settings.split() if getattr(self, name) != getattr(Transfer, name)]
            if given and not used:
                name = flag(given[0])
                got = f"{name} {getattr(self, given[0])} and {' '.join(self.chosen)}"
                rule = f"`{name}` of `transfer` must be used with {needed}."
                raise InputError(rule, got=got, do=f"Leave out {name}.")
        if self.teacher.startswith("onnx:") and (rest := set(self.chosen) - {"labels", "mixup", "lwf"}):
            rule = "`--methods` of `transfer` must be labels, mixup or lwf for a teacher without gradients."
            do = "Add for example --methods labels lwf: an ONNX file has no features that a probe could use."
            raise InputError(rule, got=f"{', '.join(sorted(rest))}", do=do)

    def _uses(self) -> tuple[tuple[str, bool, str], ...]:
        """Return the settings that only some jobs use, whether this one does, and what they need."""
        there = self.teacher_weights is not None or self.teacher.startswith(("hf:", "onnx:"))
        trained = there or networks.is_run(self.teacher)
        taught, kl = any(each not in _LABELS_ALONE for each in self.chosen), self.compared[0] == "kl"
        rows = bool({"adapt+jacobians", "features+jacobians"} & set(self.chosen))
        kinds = {each.partition("+")[0] for each in self.chosen}
        attention, jacobians = (any(term in each for each in self.chosen) for term in ("attention", "jacobians"))
        pixels = attention or "lwf+jacobians" in self.chosen
        derivatives = "a method that compares such derivatives: adapt+jacobians or features+jacobians"
        maps = "a method that compares attention maps, for example lwf+attention"
        return (
            ("unlabelled", taught, "a method that has a teacher, for example adapt"),
            ("unlabelled_count", self.unlabelled is not None, "--unlabelled"),
            ("source_classes teacher_steps", not trained, "a teacher that is trained first"),
            ("teacher_outputs", self.teacher_weights is not None, "--teacher-weights"),
            ("adapt_steps", "adapt" in kinds, "--methods adapt"),
            ("oracle_steps", "oracle" in kinds, "--methods oracle"),
            ("feature_layer feature_components whiten", "features" in kinds, "--methods features"),
            ("outputs_share", bool(kinds & {"lwf", "features"}), "lwf or features: adapt has --outputs-weight"),
            ("outputs_weight output_loss labels_weight", taught, "a method that has a teacher, for example adapt"),
            ("temperature", taught and kl, "an output term of kl: --output-loss kl"),
            ("attention_share attention_weight", attention, maps),
            ("pairs depths pool p", pixels, maps),
            ("jacobian_share jacobian_weight jacobian_loss every", jacobians, "a method with Jacobians"),
            ("probe", rows, derivatives),
            ("noise", rows and self.probe == "noise-averaged", "--probe noise-averaged"),
            ("probe_basis probe_dimensions", rows and self.probe == "subspace-inputs", "--probe subspace-inputs"),
        )

    @property
    def chosen(self) -> tuple[str, ...]:
        """The methods that are compared."""
        return self.methods or RECIPES[self.recipe].methods

    @property
    def at(self) -> str:
        """Point at which student and teacher are compared."""
        return RECIPES[self.recipe].point if self.point == "auto" else self.point

    @property
    def compared(self) -> tuple[OutputLoss, float]:
        """The loss of the output term, and its temperature."""
        own = RECIPES[self.recipe]
        loss = own.output_loss if self.output_loss == "auto" else self.output_loss
        return loss, own.temperature if self.temperature is None else self.temperature

    def ready(self, progress: Progress) -> Ready:
        """Return target, teacher, layers and other images. A teacher without weights is trained first and cached."""
        data = load(self.data, self.seed, self.smoke)
        if data.classes is None:
            raise InputError("`--data` of `transfer` must have classes.", got="a regression")
        if len(data.shape) != 3:
            raise InputError("`--data` of `transfer` must be images.", got=f"samples of shape {data.shape}")
        whole = data.train
        teacher, data = self._teacher(data, progress)
        if self.channels_last:
            channels_last(teacher.network)
        data = replace(data, test=mixed(data.test))
        description = Description.of(self.student, data)
        others = None
        if self.unlabelled not in (None, self.data):
            loaded = without_labels(str(self.unlabelled), self.seed)
            if loaded.shape != data.shape:
                rule = f"`--unlabelled` of `transfer` must be images of shape {data.shape}, as --data has."
                raise InputError(rule, got=loaded.shape, do="Resize them, for example folder:DIR@SIZE.")
            ratio = max(loaded.std) / max(data.std)
            if not 0.1 < ratio < 10:
                rule = "`--unlabelled` of `transfer` must be on the scale of --data, for example pixels in [0, 1]."
                raise InputError(rule, got=f"{ratio:.3g} times its standard deviation", do="Rescale them.")
            same = len(loaded.train) == len(whole) and loaded.train.digests["x"] == whole.digests["x"]
            others = None if same else loaded.train  # the target under another name has images that are held out
        ready = Ready(data, teacher, as_teacher(teacher.network), description, (), others)
        if not any("attention" in method or method == "lwf+jacobians" for method in self.chosen):
            return ready
        return replace(ready, pairs=self.layers(ready))

    def layers(self, ready: Ready) -> tuple[Pair, ...]:
        """Return the layers that are compared: as named, or chosen by resolution."""
        student, teacher = ready.student(), ready.teacher.network
        if self.pairs:
            return transfer_results.named_pairs(self.pairs, student, teacher)
        return transfer_results.chosen_pairs(student, teacher, ready.data.shape, self.depths)

    def _teacher(self, data: Data, progress: Progress) -> tuple[Pretrained, Data]:
        if networks.is_run(self.teacher):
            of_run = Run.open(self.teacher, finished=False).settings.get("data")
            if of_run == self.data and networks.describe(Path(self.teacher)).outputs == data.outputs:
                rule = "`--teacher` of `transfer` must have been trained on classes other than those of --data."
                do = f"Use `jacmatch distill --data {self.data} --teacher {self.teacher}`."
                raise InputError(rule, got=f"a run on {of_run}", do=do)
        weights = networks.Weights(self.teacher_weights, self.teacher_mean, self.teacher_std, self.teacher_size)
        own = pretrained(self.teacher, self.teacher_outputs, data.shape, weights, allow_code=self.allow_code)
        if own is not None:
            return own, data
        count, classes = self.source_classes or data.outputs // 2, data.outputs
        if not 2 <= count <= classes - 2:
            rule = "`--source-classes` of `transfer` must leave two classes each for teacher and target."
            raise InputError(rule, got=f"{count} of {classes}", do="Give a teacher that is trained already.")
        recipe = Train(**self.teacher_settings())
        source = of_classes(data, range(count))
        return trained_first(self.teacher, source, recipe, progress), of_classes(data, range(count, classes))

    def unlabelled_images(self, ready: Ready, labelled: Split, seed: int) -> Split | None:
        """Return the images that are learned from without labels; None without `--unlabelled`.

        Raises:
            InputError: No image is left.
        """
        if self.unlabelled is None:
            return None
        split = ready.unlabelled
        if split is None:
            whole, _ = self.parts(ready.data, 0, seed)
            count = min(self.per_class, SMOKE_TRAIN - 2) if self.smoke else self.per_class
            rest = torch.ones(len(whole), dtype=torch.bool)
            rest[per_class(whole.y, count, seed) if count else slice(None)] = False
            split = whole.subset(rest.nonzero()[:, 0])
        if not len(split):
            rule = "`--unlabelled` of `transfer` must leave images that are not labeled."
            raise InputError(rule, got="none", do="Give a smaller --per-class, or other data.")
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
        return split.subset(order[: self.unlabelled_count or len(split)])

    @staticmethod
    def training_images(method: str, labelled: Split, images: Split | None) -> Split:
        """Return the training images of a method: the labeled ones, and the others if it uses them."""
        if images is None or method in _LABELS_ALONE:
            return labelled
        y = torch.cat([labelled.y, torch.full((len(images),), _NO_LABEL)])
        return Split(torch.cat([labelled.stored(), images.stored()]), y)

    def taught(
        self, method: str, ready: Ready, labelled: Split, images: Split | None, seed: int, held_out: Split | None = None
    ) -> Ready:
        """Return the teacher of a method: the teacher itself, the adapted one, or its features in a small basis.

        Methods of a seed share the memory of the pretrained network, and the adapted teacher.
        """
        teacher, known = ready.teacher, (ready.memories, ready.adapted)
        for each in known:
            for other in set(each) - {seed}:
                del each[other]
        memory = ready.memories.setdefault(seed, MemoizedTeacher(as_teacher(teacher.network), draws=self.views > 0))
        network: Any = teacher.network
        answers: Teacher = memory
        if method.startswith("adapt"):
            if seed not in ready.adapted:
                ready.adapted[seed] = self._adapted(ready, memory, labelled, held_out, seed)
            network, answers = ready.adapted[seed]
        elif method.startswith("features"):
            both = self.training_images(method, labelled, images)
            count = min(self.feature_components, len(both) - 1)
            network = basis_of(teacher, both, self.feature_layer, count, self.whiten)
            answers = HeadTeacher(network, memory, network.readout.layers[0], network.readout)
        elif method == "lwf" and not isinstance(network, ValuesOnly):
            answers = HeadTeacher.of_last_layer(network, memory, labelled)
        images = self.training_images(method, labelled, images)
        return replace(ready, teacher=replace(teacher, network=network), answers=answers, learned_from=images)

    def _adapted(
        self, ready: Ready, memory: MemoizedTeacher, labelled: Split, held_out: Split | None, seed: int
    ) -> tuple[nn.Module, Teacher]:
        """Return the teacher of the target's classes; without --adapt-steps the best one on the held-out images."""
        network = probed(ready.teacher, labelled, ready.classes, seed)
        teacher = HeadTeacher.of_last_layer(network, memory, labelled)
        if self.adapt_steps == 0 or (self.adapt_steps is None and held_out is None):
            return network, teacher
        steps, whole = self.adapt_steps or _FINE_TUNED, self.adapt_steps is None
        other = copy.deepcopy(network)
        steps = SMOKE_STEPS if self.smoke else steps
        short = {"steps": steps, "warmup": min(self.warmup, steps // 2)}  # --warmup is for --steps
        settings = self.training(**short, batch_size=32, doctor=False, views=0)
        settings = replace(settings, lr=self.oracle_lr if whole else self.oracle_lr / 10)
        finetuned(other, labelled, settings, seed, self.device, whole=whole)
        if whole and held_out is not None:
            accuracies = [evaluate(each, held_out, device=self.device)["accuracy"] for each in (network, other)]
            if accuracies[0] >= accuracies[1]:
                return network, teacher
        return other, MemoizedTeacher(ModuleTeacher(other), draws=memory.draws)

    def network_of(self, method: str, ready: Ready) -> nn.Module:
        """Return a new student of a method with all its outputs."""
        if method == "oracle":
            return ready.teacher.with_outputs(ready.classes)
        if method == "mixup" or method.startswith("adapt"):
            return ready.student(0)
        if not method.startswith("features"):
            return ready.student()
        readout = getattr(ready.teacher.network, "readout", None)  # there is none before the features are computed
        return ready.student(readout.k if isinstance(readout, PCAFeatures) else self.feature_components)

    def objective(self, method: str, student: nn.Module, ready: Ready) -> Distillation | Objective:
        """Return the objective of one method; `student` is the fine-tuned teacher for the oracle."""
        kind = method.partition("+")[0]
        point = AtMixedPairs() if self.at == "mixed-pairs" and kind != "labels" else None
        if method in ("oracle", "mixup"):
            return Distillation(student, labels=1.0, point=None if method == "oracle" else AtMixedPairs())
        loss: JacobianLoss
        labels = 1.0 if kind != "adapt" else 0.3 if self.unlabelled is None else 0.0
        shared: dict[str, Any] = {
            "labels": labels if self.labels_weight is None or kind == "labels" else self.labels_weight,
            "outputs": 1.0 if kind == "adapt" and self.outputs_weight is None else self._weight("outputs"),
            "jacobians": self._weight("jacobian") if "jacobians" in method else 0.0,
        }
        shared |= {"every": self.every, "batch_norm": self.batch_norm, "point": point}
        shared["output_loss"], shared["temperature"] = self.compared
        if kind in ("labels", "lwf") or "attention" in method:
            loss = "normalized" if self.jacobian_loss == "auto" else self.jacobian_loss
            attention = self._weight("attention") if "attention" in method else 0.0
            shared |= {"attention": attention, "size": self.pool, "p": self.p, "jacobian_loss": loss}
            shared |= {"classes": ready.classes, "pairs": ready.pairs, "shared": kind == "adapt"}
            return Objective(student, None if method == "labels" else ready.answers, **shared)
        loss = "bounded" if self.jacobian_loss == "auto" else self.jacobian_loss
        shared["classes"] = None if kind == "adapt" else ready.classes
        return Distillation(student, ready.answers, probe=self._probe(ready), jacobian_loss=loss, **shared)

    def _weight(self, term: str) -> float:
        """Return the weight of a term, or its share in the gradient norm."""
        given: float | None = getattr(self, f"{term}_weight")
        return GradientShare(getattr(self, f"{term}_share")) if given is None else given

    def _probe(self, ready: Ready) -> Estimator:
        """Return the probe of adapt and features; principal components are those of the method's training images."""
        if self.probe == "noise-averaged":
            return NoiseAveraged(sigma=self.noise)  # type: ignore[return-value]  # its side is that of another probe
        if self.probe != "subspace-inputs":
            return ESTIMATORS[self.probe]()
        images = mixed(ready.learned_from or ready.data.train, _OF_BASIS).inputs()
        count = self.probe_dimensions if self.probe_basis == "dct" else min(self.probe_dimensions, len(images) - 1)
        return SubspaceInputs(count, self.probe_basis).fitted(images)

    def training_of(self, method: str, seed: int) -> Training:
        """Return the settings of the training loop; the first seed alone runs the pre-flight check."""
        changes = {"lr": self.oracle_lr, "steps": self.oracle_steps or self.steps} if method == "oracle" else {}
        return self.training(**changes, doctor=self.checked(seed, method == self.chosen[-1]))

    def network_and_objective(self, method: str, seed: int, ready: Ready) -> tuple[nn.Module, Any]:
        """Return a new network with all its outputs, and the objective that trains it."""
        torch.manual_seed(seed)
        network = self.network_of(method, ready)
        return network, self.objective(method, network, ready)

    def judged(
        self, method: str, network: nn.Module, ready: Ready, train: Split, objective: Any, *, some: int = 128,
        far: int = FAR,
    ) -> dict[str, Any]:  # fmt: skip
        """Return the agreement with the teacher on `some` unseen images, and the terms of the bound for `far` of them.

        The oracle has no agreement. There is no bound where the teacher is not compared.
        """
        keys = ("top1", "jacobian_cosine", "jacobian_relative_error", "attention_cosine")
        result: dict[str, Any] = {"agreement": dict.fromkeys(keys), "bound": None}
        if method in ("oracle", "mixup"):
            return result
        teacher, test = ready.teacher.network, ready.data.test
        device = next(network.parameters()).device
        shown = test.subset(torch.arange(min(SMOKE_JACOBIANS if self.smoke else some, len(test))))
        first = 0 if method.startswith("adapt") else ready.classes
        if isinstance(objective, Objective):
            maps: dict[str, Any] = {"size": self.pool, "p": self.p, "shared": not first}
            result["agreement"] = transfer_results.head_agreement(
                network, teacher, ready.classes, ready.pairs, shown, **maps
            )
        else:
            result["agreement"] |= transfer_results.matched_rows(objective, shown)
        if method != "labels":
            near, unseen = (each.to(device) for each in self.images(ready, train, far))
            result["bound"] = transfer_results.bound(network, teacher.to(device), first, *self.compared, near, unseen)
        return result

    def images(self, ready: Ready, train: Split, count: int = FAR) -> tuple[torch.Tensor, torch.Tensor]:
        """Return training images and unseen images of the target, at most `count` of each, of mixed classes."""
        count = 10 if self.smoke else count
        return mixed(train, count).inputs(), ready.data.test.inputs(torch.arange(min(count, len(ready.data.test))))
