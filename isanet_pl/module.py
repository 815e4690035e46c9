"""The LightningModule: what a step does, metrics, optimiser groups."""

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import LambdaLR

from isanet_pl.agreement import check_agreement, different_views
from isanet_pl.errors import InputError
from isanet_pl.explain import SLIDING, out_of_memory
from isanet_pl.finite import first_not_finite, largest
from isanet_pl.inference import Inference
from isanet_pl.losses import SegmentationLoss, mean_over_ranks
from isanet_pl.metrics import MeanLoss, SegmentationMetrics
from isanet_pl.models import ISANet, fuse_for_inference
from isanet_pl.optimisation import StepImages, fit_lr_to_batch, poly_schedule

log = logging.getLogger(__name__)

# What the convs of a network compute in, by the trainer's precision.
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
OVERFLOWS = 50
"""Steps in a row that the gradient scaler of 16-mixed may skip; it halves its factor in each."""
STATEFUL = ("amsgrad", "centered", "fused", "capturable")
"""Options of PyTorch's optimisers that their state goes with."""


class SegmentationModule(pl.LightningModule):
    """Trains and evaluates a segmentation network.

    A batch has `image` uint8 (N, 3, H, W) RGB, `mask` uint8 or int64 (N, H, W), classes 0..K-1 and
    255 for ignored pixels, and `name`, N names of files; in `predict` no mask.

    Args:
        network: The network.
        loss: The training loss.
        class_names: Names of the classes 0..K-1; the command line takes them from the data.
        palette: RGB colours of the classes, 0..255; the command line takes them from the data.
        optimizer: The optimiser, given parameter groups; SGD as in the literature by default.
        new_layers_lr_factor: Learning rate of everything that no loaded weights were found for
            (the head, and what the backbone's file lacks), as a factor of the optimiser's.
        poly_power: Power of the polynomial decay.
        end_lr_factor: Learning rate at the last step, as a factor of the base (mmsegmentation
            ends at 0.01, the authors at 0).
        warmup_fraction: Share of the steps over which the learning rate rises linearly from zero.
        reference_batch_size: Images of an optimiser step (devices x batch_size x accumulation) that
            the learning rate was set for; a run with another number warns. None: not checked.
        scale_lr: Scale the learning rate linearly with the images of a step, from
            `reference_batch_size`.
        inference: How images are seen in validate, test and predict.
        compile: Train the network through torch.compile: its first steps take minutes.
        freeze_bn: Keep BatchNorm's statistics as they are at the start, in training too: those that
            were loaded, and in new layers mean 0 and variance 1. For batches of so few images that
            their own are of no use. Its scales and shifts are still trained.

    Raises:
        InputError: There are not as many class weights as classes, the warm-up takes all steps or
            less than none, a factor or the power is negative, the reference is below 1, or
            `scale_lr` lacks it.
    """

    hparams: Any
    deployed: ISANet | None
    """The folded network, while `validate`, `test` or `predict` runs."""
    compiled: Callable[[Tensor], dict[str, Tensor]] | None
    """The network through torch.compile, for training steps."""

    def __init__(
        self,
        network: ISANet,
        loss: SegmentationLoss,
        class_names: Sequence[str],
        palette: Sequence[Sequence[int]],
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(
            params, lr=0.01, momentum=0.9, weight_decay=5e-4
        ),
        new_layers_lr_factor: float = 1.0,
        poly_power: float = 0.9,
        end_lr_factor: float = 0.01,
        warmup_fraction: float = 0.0,
        reference_batch_size: int | None = None,
        scale_lr: bool = False,
        inference: Inference = Inference(),
        compile: bool = False,
        freeze_bn: bool = False,
    ) -> None:
        super().__init__()
        factors = {
            "new_layers_lr_factor": new_layers_lr_factor,
            "poly_power": poly_power,
            "end_lr_factor": end_lr_factor,
        }
        _check(loss, class_names, factors, warmup_fraction, reference_batch_size, scale_lr)
        self.save_hyperparameters(logger=False)
        # CPU and GPU convs alike run fastest, in mixed precision, with channels last.
        self.network = network.to(memory_format=torch.channels_last)
        self.loss = loss
        self.class_names = list(class_names)
        self.palette = [tuple(colour) for colour in palette]
        self.optimizer = optimizer
        self.new_layers_lr_factor = new_layers_lr_factor
        self.poly_power = poly_power
        self.end_lr_factor = end_lr_factor
        self.warmup_fraction = warmup_fraction
        self.reference_batch_size = reference_batch_size
        self.scale_lr = scale_lr
        self.inference = inference
        self.compile_network = compile
        self.freeze_bn = freeze_bn
        self.predict_probabilities = False
        object.__setattr__(self, "deployed", None)
        object.__setattr__(self, "compiled", None)
        self.loaded_step = 0
        self.overflows = 0  # steps in a row whose gradient was not finite
        self.seen: list[str] = []  # the images behind the gradients of now
        self.seen_losses: list[Tensor] = []  # of their batches
        self.metrics = nn.ModuleDict(
            {
                stage: SegmentationMetrics(len(class_names), self.class_names, loss.ignore_index)
                for stage in ("val", "test")
            }
        )
        self.losses = nn.ModuleDict({stage: MeanLoss() for stage in ("val", "test")})
        self.train()

    def train(self, mode: bool = True) -> Self:
        """Returns itself, in training or evaluation mode."""
        super().train(mode)
        if self.freeze_bn:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    @property
    def trained_steps(self) -> int:
        """Returns the optimiser steps behind the weights, those of a loaded checkpoint included."""
        return self.global_step or self.loaded_step

    def setup(self, stage: str) -> None:
        """Forgets earlier scores; compiles the network for training, not for images of any size."""
        # What an evaluation that failed has left: no hook is called at its end.
        self.teardown(stage)
        for scores in (*self.metrics.values(), *self.losses.values()):
            scores.reset()  # type: ignore[operator]
        if self.compile_network and stage == "fit":
            # Not a part of this module: it shares the weights, under other names.
            object.__setattr__(self, "compiled", torch.compile(self.network))

    def teardown(self, stage: str) -> None:
        """Lets go of the folded network."""
        object.__setattr__(self, "deployed", None)

    def _forward(self, image: Tensor) -> dict[str, Tensor]:
        network = self.network if self.compiled is None else self.compiled
        outputs: dict[str, Tensor] = network(self.network.normalise(image))
        return outputs

    def _infer(self, image: Tensor) -> dict[str, Tensor]:
        return {"out": self.inference(self.deployed or self.network, image)}

    def on_test_start(self) -> None:
        """Folds the network for what follows; its weights do not change any more."""
        if isinstance(self.network, ISANet):
            dtype = AUTOCAST.get(self.trainer.precision)
            # Not a part of this module: its parameters are copies.
            object.__setattr__(self, "deployed", fuse_for_inference(self.network, dtype))

    on_predict_start = on_test_start

    def on_validation_start(self) -> None:
        """Folds the network, unless it is in training."""
        if self.trainer.state.fn != "fit":
            self.on_test_start()

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Returns the loss of a batch."""
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.seen.clear()
            self.seen_losses.clear()
        loss: Tensor = self.loss(self._forward(batch["image"]), batch["mask"])
        self.seen += batch["name"]
        self.seen_losses.append(loss.detach())
        self.log("train/loss", mean_over_ranks(loss))
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Logs the norm of the gradient, before clipping; stops if something is not finite.

        Raises:
            InputError: The loss, a gradient or a statistic of BatchNorm is NaN or infinite.
        """
        gradients = {name: p.grad for name, p in self.named_parameters() if p.grad is not None}
        norm = torch.nn.utils.get_total_norm(list(gradients.values()))
        unscales_itself = hasattr(optimizer, "_step_supports_amp_scaling")  # as fused ones do
        if self.trainer.precision == "16-mixed" and unscales_itself:
            precision: Any = self.trainer.precision_plugin
            norm = norm / precision.scaler.get_scale()
        self.log("train/grad_norm", norm)
        # A variance may overflow under a loss that does not, and would never recover.
        statistics = dict(self.named_buffers())
        numbers = torch.stack([*self.seen_losses, norm, largest(statistics.values())])
        if numbers.isfinite().all():  # waits for the device
            self.overflows = 0
            return
        for loss in self.seen_losses:
            if not loss.isfinite():
                self._stop(f"the loss is {loss.item()}")
        # The gradient scaler of 16-mixed expects overflows, and skips the step; not for ever.
        self.overflows += 1
        most = OVERFLOWS if self.trainer.precision == "16-mixed" else 0
        if self.overflows > most and not norm.isfinite():
            row = f" for the step number {self.overflows} in a row" if most else ""
            self._stop(f"a gradient is not finite ({first_not_finite(gradients)}){row}")
        wrong = first_not_finite(statistics)
        if wrong is not None:
            self._stop(f"a statistic is not finite ({wrong})")

    def _stop(self, reason: str) -> None:
        seen = f" on {', '.join(self.seen)}" if self.seen else ""
        half = self._trainer is not None and self._trainer.precision == "16-mixed"
        raise InputError(
            f"training stopped at step {self.global_step}: {reason}{seen}. "
            "Nothing of it is saved, and earlier checkpoints are kept. Try a lower learning rate, "
            f"--trainer.gradient_clip_val 5, a warm-up{', or precision bf16-mixed' * half}"
        )

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Returns the class map (N, H, W) of a batch and adds it to the metric."""
        return self._evaluate(batch, "val")

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Returns the class map (N, H, W) of a batch and adds it to the metric."""
        return self._evaluate(batch, "test")

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Any]:
        """Returns `classes` (N, H, W) of a batch, and, if they are wanted, `probabilities`.

        The probabilities, (N, K, H, W) float16, are wanted where `predict_probabilities` is set. A
        batch without images, whose file could not be read, gives nothing, and one that the memory
        does not suffice for gives `error`, a list of messages.
        """
        if "image" not in batch:
            return {}
        try:
            return self._predict(batch["image"])
        except (RuntimeError, MemoryError) as error:
            reason = out_of_memory(error)
            if reason is None:
                raise
            h, w = batch["image"].shape[2:]
            fix = f"; try {SLIDING}" if self.inference.mode == "whole" else ""
            return {"error": [f"{', '.join(batch['name'])}: {reason} at {w}x{h}{fix}"]}

    def _predict(self, image: Tensor) -> dict[str, Tensor]:
        scores = self._infer(image)["out"]
        result = {"classes": scores.argmax(dim=1)}
        if self.predict_probabilities:
            result["probabilities"] = scores.float().softmax(dim=1).half()
        return result

    def _evaluate(self, batch: Mapping[str, Any], stage: Literal["val", "test"]) -> Tensor:
        outputs = self._infer(batch["image"])
        loss = self.loss(outputs, batch["mask"])
        # Not Lightning's own mean, which is wrong where processes have unequal shares.
        labelled = (batch["mask"] != self.loss.ignore_index).flatten(1).any(dim=1).sum()
        self.losses[stage].update(loss, labelled)  # type: ignore[operator]
        prediction = outputs["out"].argmax(dim=1)
        self.metrics[stage].update(prediction, batch["mask"])  # type: ignore[operator]
        return prediction

    def on_validation_epoch_end(self) -> None:
        """Logs the scores of the whole split."""
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Logs the scores of the whole split."""
        self._log_scores("test")

    def _log_scores(self, stage: Literal["val", "test"]) -> None:
        metrics = self.metrics[stage]
        assert isinstance(metrics, SegmentationMetrics)
        # `compute` has already summed the confusion matrix over all processes.
        scores = {"loss": self.losses[stage].compute(), **metrics.compute()}  # type: ignore[operator]
        self.log_dict({f"{stage}/{name}": score for name, score in scores.items()})
        if not metrics.confusion.any() and self.trainer.is_global_zero:
            log.warning("no pixel of the %s split has a label: there is nothing to score", stage)
        # Loggers take this for the step: without it, they would see that of the batch before.
        self.log("step", float(self.trained_steps))
        metrics.reset()
        self.losses[stage].reset()  # type: ignore[operator]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns the parameters with loaded weights, and all others, as optimiser groups."""
        network = self.network
        loaded = {id(p) for name, p in network.named_parameters() if name in network.loaded}
        groups: list[dict[str, Any]] = [
            {"name": "pretrained", "params": [p for p in self.parameters() if id(p) in loaded]},
            {"name": "new", "params": [p for p in self.parameters() if id(p) not in loaded]},
        ]
        return [group for group in groups if group["params"]]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Returns the optimiser and the schedule, which steps with it.

        Raises:
            InputError: The optimiser refuses an argument, or the number of steps is not known.
        """
        try:
            optimizer = self.optimizer(self.parameter_groups())
        except ValueError as error:
            raise InputError(f"model.optimizer: {error}") from error
        for group in optimizer.param_groups:
            if group["name"] == "new":
                group["lr"] *= self.new_layers_lr_factor
        total_steps = self.trainer.estimated_stepping_batches
        if not 0 < total_steps < math.inf:
            raise InputError(
                "the schedule needs the length of the run: set trainer.max_steps or max_epochs"
            )
        if self.reference_batch_size is not None:
            images = self._images_of_a_step()
            fit_lr_to_batch(optimizer, images, self.reference_batch_size, self.scale_lr)
        # A checkpoint brings its own: `on_train_start` goes back to these.
        self._settings = [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        factor = poly_schedule(
            int(total_steps), self.poly_power, self.end_lr_factor, self.warmup_fraction
        )
        scheduler = LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_train_start(self) -> None:
        """Gives the optimiser the config's settings; those of a checkpoint came with its state.

        Raises:
            InputError: The state of the checkpoint's optimiser is not of these settings.
        """
        schedule = self.trainer.lr_scheduler_configs[0].scheduler
        assert isinstance(schedule, LambdaLR)
        schedule.base_lrs = [own["lr"] for own in self._settings]
        groups = zip(schedule.optimizer.param_groups, self._settings, strict=True)
        for (group, own), factor in zip(groups, schedule.lr_lambdas, strict=True):
            for name in STATEFUL:
                if bool(group.get(name)) != bool(own.get(name)):
                    raise InputError(
                        f"model.optimizer: {name} was {group.get(name)} in the checkpoint, whose "
                        f"state cannot be used with {own.get(name)}; go on with the same"
                    )
            group.update(own, initial_lr=own["lr"], lr=own["lr"] * factor(schedule.last_epoch))

    def _images_of_a_step(self) -> StepImages:
        trainer = self.trainer
        trainer.fit_loop.setup_data()  # or there is no loader yet when max_steps is given
        batch_size: int = trainer.train_dataloader.batch_size  # type: ignore[union-attr]
        return StepImages(trainer.world_size, batch_size, trainer.accumulate_grad_batches)

    def description(self) -> dict[str, Any]:
        """Returns what a file must say of the network to be used without this project's config."""
        return {
            "network": {**self.network.arguments, "pretrained": False, "weights_path": None},
            "inference": dataclasses.asdict(self.inference),
            "class_names": self.class_names,
            "palette": [list(colour) for colour in self.palette],
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Makes the checkpoint complete by itself: it needs no weights file to be rebuilt.

        Raises:
            InputError: A weight or a statistic of BatchNorm is NaN or infinite.
        """
        for key in ("state_dict", "current_model_state"):  # the second beside an average
            wrong = first_not_finite(checkpoint.get(key, {}))
            if wrong:
                self._stop(f"a weight is not finite ({wrong}) after a step")
        saved = dict(checkpoint.get("hyper_parameters", {}))
        # From Python these two are objects, not the command line's description of them.
        for name in ("loss", "optimizer"):
            if not isinstance(saved.get(name), Mapping):
                saved.pop(name, None)
        checkpoint["hyper_parameters"] = saved | self.description()
        checkpoint["pretrained_names"] = sorted(self.network.loaded)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another network; restores which weights were pretrained.

        An evaluation that sees images otherwise than the checkpoint says tells so. (Of a fit all
        differences are told by `RunConfig`.)

        Raises:
            InputError: Classes or network of the checkpoint differ from this module's, or training
                cannot go on from it.
        """
        trainer = self._trainer
        fits = trainer is not None and trainer.state.fn == "fit"
        if trainer and fits and "optimizer_states" not in checkpoint:
            raise InputError(
                f"{trainer.ckpt_path} holds weights alone, no run to go on with: train them "
                "further with --model.network.weights_path instead of --ckpt_path"
            )
        check_agreement(checkpoint, self.network.arguments, self.class_names, self.state_dict())
        self.network.loaded = frozenset(checkpoint.get("pretrained_names", ()))
        self.loaded_step = int(checkpoint.get("global_step", 0))
        saved = checkpoint.get("hyper_parameters", {}).get("inference", {})
        differences = different_views(saved, dataclasses.asdict(self.inference))
        if differences and trainer and trainer.is_global_zero and not fits:
            log.info(
                "images are seen otherwise than by the checkpoint's own settings:\n  %s",
                "\n  ".join(differences),
            )


def _check(
    loss: SegmentationLoss,
    class_names: Sequence[str],
    factors: Mapping[str, float],
    warmup_fraction: float,
    reference_batch_size: int | None,
    scale_lr: bool,
) -> None:
    """Raises the module's InputError."""
    if loss.class_weights is not None and len(loss.class_weights) != len(class_names):
        raise InputError(
            f"model.loss.class_weights has {len(loss.class_weights)} entries for "
            f"{len(class_names)} classes: {', '.join(class_names)}"
        )
    if not 0 <= warmup_fraction < 1:
        raise InputError(
            f"model.warmup_fraction must be at least 0 and below 1, got {warmup_fraction}"
        )
    for name, value in factors.items():
        if not 0 <= value < math.inf:
            raise InputError(f"model.{name} must be a number of at least 0, got {value}")
    if reference_batch_size is not None and reference_batch_size < 1:
        raise InputError(
            f"model.reference_batch_size must be at least 1, got {reference_batch_size}"
        )
    if scale_lr and reference_batch_size is None:
        raise InputError("model.scale_lr needs model.reference_batch_size to scale from")
