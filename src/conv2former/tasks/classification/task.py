"""Image classification: loss with MixUp and CutMix, top-1 and top-5, classifiers in timm's layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, resolve_model_data_config
from timm.data.random_erasing import RandomErasing
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

from conv2former import checkpoints
from conv2former.checkpoints.exported import ExportedNetwork
from conv2former.config import ModelSection
from conv2former.data.images import shown
from conv2former.data.loading import Normalizer
from conv2former.data.recognise import read_for
from conv2former.errors import UserError, or_left_out
from conv2former.tasks.base import Evaluation, Exportable, Line, Prediction, Prepared, Reported, Task, Words
from conv2former.tasks.classification import probe
from conv2former.tasks.classification.config import AugmentSection, ClassificationRecipe
from conv2former.tasks.classification.data import NO_TARGET, Batch, ImageDataset, eval_transform, train_transform
from conv2former.tasks.classification.layouts import Splits, open_eval_source, open_splits
from conv2former.tasks.classification.network import build_model, check_answers, class_names, classifier_names
from conv2former.tasks.classification.sources import ImageSource
from conv2former.viz.drawing import with_bars

if TYPE_CHECKING:
    from conv2former.tasks.classification.metrics import ClassificationMetric

MAX_MATRIX_CLASSES = 2000  # beyond this the matrix neither fits an image nor, at 21,841 classes, the memory


class ClassificationTask(Task):
    """A timm classifier.

    Attributes:
        top_k: Classes that a prediction names, at most.
        source: How labelled images lie, a ``data.source``.
        kept_classifier: Whether the classifier is the weights' own.
        split: Which part of them is evaluated: 'train', 'val', 'test'; None for what is validated on, or all.

    Args:
        model: A timm classifier.
        recipe: Gives the loss, the optimizer and the schedule.
        classes: K names; numbers unless given.
        model_args: Arguments of ``timm.create_model`` that rebuild it.
        data_config: How images are prepared, in timm's words; as the recipe says unless given.
    """

    name = "classification"
    config_class = ClassificationRecipe
    monitor = "top1"
    reported = (Reported("accuracy", "top-1, %", ("top1",)), Reported("accuracy", "top-5, %", ("top5",)))
    words = Words(
        tags=("image-classification", "timm"),
        purpose="to say which one of its classes an image shows",
        unknown="every image gets a class",
        heading="Top classes",
    )
    options = frozenset({"batch_size", "source", "split", "top_k"})
    one_at_a_time = False
    assumed_classes = 1000
    top_k: int = 5
    kept_classifier: bool = False
    source: str = "folder"
    split: str | None = None

    def __init__(
        self,
        model: Any,
        recipe: ClassificationRecipe,
        classes: Sequence[str] | None = None,
        *,
        model_args: dict[str, Any] | None = None,
        data_config: dict[str, Any] | None = None,
    ) -> None:
        classes = list(classes or class_names(model))
        if len(classes) != model.num_classes:
            raise UserError(f"{len(classes)} names of classes for a model of {model.num_classes}: they must be as many")
        super().__init__(model, recipe, classes, model_args=model_args)
        self.data_config = data_config or recipe.data.timm_config()
        self.normalizer = Normalizer(self.data_config["mean"], self.data_config["std"])
        self.transform = eval_transform(self.data_config)
        self.mixup, self.criterion = _loss(recipe.augment, model.num_classes)

    @classmethod
    def build(cls, recipe: Any, classes: Sequence[str], *, section: ModelSection | None = None) -> Self:
        model, args, kept = build_model(section or recipe.model, classes=list(classes))
        task = cls(model, recipe, classes, model_args=args)
        task.kept_classifier = kept
        return task

    @classmethod
    def load(cls, path: Path) -> Self:
        """A classifier in timm's layout; raises UserError."""
        task = cls.of(checkpoints.load_pretrained(path), name=str(path))
        args = checkpoints.saved_config(path).get("model_args", {})
        check_answers(task.model, task.data_config, args, str(path))
        return task

    @classmethod
    def of_exported(cls, network: ExportedNetwork) -> Self:
        return cls.of(network, name=str(network.path))

    @classmethod
    def of(cls, model: Any, *, name: str = "the model") -> Self:
        """A timm classifier as it is, with the preprocessing that it brings.

        Args:
            model: Built by timm.
            name: What messages call it.

        Raises:
            UserError: It has no classifier.
        """
        if not model.num_classes:
            raise UserError(f"{name} has no classifier: give a model that was trained with classes")
        recipe = ClassificationRecipe.around(model.pretrained_cfg.get("architecture", ""))
        return cls(model, recipe, data_config=resolve_model_data_config(model)).eval()

    def save(self, folder: Path, *, state: dict[str, Tensor], note: dict[str, Any]) -> None:
        """A folder for timm's ``local-dir:``."""
        checkpoints.save_pretrained(
            self.built,
            folder,
            state_dict=state,
            label_names=self.classes,
            model_args=self.model_args,
            pretrained_cfg=self.data_config,
            extra={"conv2former": note},
        )

    @classmethod
    def open_splits(cls, recipe: ClassificationRecipe, root: Path | None) -> Splits:
        """Class folders, archives, datasets: see ``layouts``."""
        with read_for(cls.name, root):
            return open_splits(recipe.data, root, seed=recipe.engine.seed)

    def eval_source(self, root: Path | None) -> ImageSource:
        return open_eval_source(root, self.classes, kind=self.source, split=self.split)

    def train_dataset(self, source: ImageSource, *, on_bad_image: Literal["error", "replace"]) -> ImageDataset:
        transform = train_transform(self.recipe.data, self.recipe.augment)
        return ImageDataset(source, transform, **self.train_options(on_bad_image))

    def eval_dataset(
        self, source: ImageSource, *, on_bad_image: Literal["error", "mask"], max_pixels: int
    ) -> ImageDataset:
        return ImageDataset(source, self.transform, on_bad_image=on_bad_image, max_pixels=max_pixels)

    def preprocess(self, image: Image.Image) -> Prepared:
        image = shown(image)
        return Prepared(np.array(self.transform(image)), (image.height, image.width))

    def example_batch(self, count: int) -> Batch:
        side = self.recipe.data.input_size
        numbers = torch.zeros(count, dtype=torch.long)
        return Batch(torch.zeros(count, 3, side, side, dtype=torch.uint8), numbers, numbers)

    def training_step(self, batch: Batch) -> Tensor:
        """The mean loss of a batch; erasing and MixUp take the random numbers that the trainer has keyed."""
        images, targets = self.prepared(batch.images), batch.targets
        if erasing := self.recipe.augment.random_erasing:
            images = RandomErasing(erasing, mode="pixel", device=images.device)(images)
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        return self.criterion(self.model(images), targets)

    def in_head(self, name: str) -> bool:
        """The classifier."""
        return name.startswith(classifier_names(self.built))

    @torch.no_grad()
    def cannot_fit_head(self) -> str | None:
        if self.kept_classifier:
            return "the classifier of the weights is for the same classes and is kept"
        classifier, side = self.built.get_classifier(), self.recipe.data.input_size
        if not isinstance(classifier, nn.Linear):
            return f"the classifier of {self.recipe.model.name} is no linear layer"
        mode = self.model.training
        maps = self.model.eval().forward_features(torch.zeros(1, 3, side, side))
        logits, features = self.model.forward_head(maps), self.model.forward_head(maps, pre_logits=True)
        self.model.train(mode)
        same = features.ndim == 2 and torch.allclose(classifier(features), logits, atol=1e-4)
        return None if same else f"{self.recipe.model.name} computes more than a linear layer from its features"

    def head_features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the classifier sees of the images that count, and their classes."""
        counted = batch.targets != NO_TARGET
        maps = self.model.forward_features(self.prepared(batch.images[counted]))
        return self.model.forward_head(maps, pre_logits=True), batch.targets[counted]

    def fit_head(self, features: Tensor, targets: Tensor, *, stopped: Callable[[], bool]) -> str:
        """Logistic regression, its regularisation chosen by cross-validation."""
        fitted = probe.fit(features, targets, len(self.classes), stopped=stopped)
        classifier = self.built.get_classifier()
        with torch.no_grad():
            classifier.weight.copy_(fitted.weight)
            if classifier.bias is not None:
                classifier.bias.copy_(fitted.bias)
        line = f"the new classifier was fitted to the features of {len(targets):,} training images"
        return line if fitted.accuracy is None else f"{line}: {fitted.accuracy:.1%} by cross-validation"

    def metric(self, source: Any, *, distributed: bool = False) -> ClassificationMetric:
        from conv2former.tasks.classification.metrics import ClassificationMetric  # torchmetrics loads for seconds

        return ClassificationMetric(self.classes, distributed=distributed)

    def eval_step(self, batch: Batch, metric: ClassificationMetric) -> None:
        metric.update(self.evaluated(self.prepared(batch.images)), batch.targets, batch.indices)

    @torch.inference_mode()
    def predict(self, batch: Sequence[Prepared]) -> list[Prediction]:
        """The top classes: ``top`` is a list of ``label``, ``index`` and ``probability``, most probable first."""
        pixels = torch.from_numpy(np.stack([prepared.pixels for prepared in batch])).permute(0, 3, 1, 2)
        images = self.prepared(pixels.to(self.normalizer.mean.device))
        found = []
        for row in self.model(images).float().softmax(dim=1).cpu():
            values, indices = row.topk(min(self.top_k, len(self.classes)))
            pairs = zip(values.tolist(), indices.tolist(), strict=True)
            top = [dict(label=self.classes[index], index=index, probability=value) for value, index in pairs]
            bars = [(str(entry["label"]), float(entry["probability"])) for entry in top]
            lines = [Line(*bar) for bar in bars]
            found.append(Prediction(dict(top=top), partial(with_bars, bars=bars), lines, plain=True))
        return found

    def draw(self, evaluation: Evaluation, source: ImageSource, folder: Path) -> None:
        """``mistakes.csv``, ``confusion_matrix.png`` and ``predictions.png``."""
        from conv2former.viz import plots  # matplotlib loads for a second

        with or_left_out("mistakes.csv"):
            evaluation.records.list_mistakes(self.classes, source, folder / "mistakes.csv")
        if len(self.classes) <= MAX_MATRIX_CLASSES:
            matrix = evaluation.records.matrix(len(self.classes))
            with or_left_out("confusion_matrix.png"):
                plots.confusion_matrix(matrix, self.classes, folder / "confusion_matrix.png")
        with or_left_out("predictions.png"):
            mistakes, others = evaluation.records.sheet(self.classes, source)
            plots.prediction_sheet(mistakes, others, folder / "predictions.png")

    def scores(self) -> nn.Module:
        return self.model

    def exportable(self, size: tuple[int, int] | None = None) -> Exportable:
        """The whole network."""
        config = dict(self.data_config)
        if size:
            if size[0] != size[1]:
                raise UserError(
                    f"--size {size[0]} {size[1]}: a classifier's preprocessing makes squares, give one number twice"
                )
            config["input_size"] = (3, *size)
        own = {key: config[key] for key in ("interpolation", "mean", "std", "crop_pct", "crop_mode")}
        return Exportable(self.model, ["logits"], config["input_size"][1:], eval_transform(config), own)


def _loss(augment: AugmentSection, num_classes: int) -> tuple[Mixup | None, nn.Module]:
    """MixUp with CutMix if the recipe has them, and the loss."""
    if not (augment.mixup or augment.cutmix):
        return None, nn.CrossEntropyLoss(label_smoothing=augment.label_smoothing)
    mixup = Mixup(
        augment.mixup,
        augment.cutmix,
        prob=augment.mix_prob,
        label_smoothing=augment.label_smoothing,
        num_classes=num_classes,
    )
    return mixup, SoftTargetCrossEntropy()
