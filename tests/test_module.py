"""Optimiser groups and what training keeps and stops at."""

import copy
import math
from contextlib import nullcontext
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from conftest import fails_naming
from torch import nn
from torch.utils.data import DataLoader

from isanet_pl.errors import InputError
from isanet_pl.inference import Inference
from isanet_pl.losses import SegmentationLoss
from isanet_pl.models import ISANet, fuse_for_inference
from isanet_pl.module import SegmentationModule
from isanet_pl.optimisation import poly_schedule

NAMES, PALETTE = ("a", "b", "c"), ((0, 0, 0), (255, 0, 0), (0, 255, 0))


def make_module(optimizer=None, loss=None, **options):
    network = ISANet(3, "resnet18", last_stage=1, key_channels=4, value_channels=4, out_channels=4)
    if optimizer is not None:
        options["optimizer"] = optimizer
    return SegmentationModule(network, loss or SegmentationLoss(), NAMES, PALETTE, **options)


def make_loader(count=8, size=16, batch_size=2):
    """Noise of three brightnesses, from top to bottom; the class is the brightness."""
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(size) * 3 // size).to(torch.uint8)[:, None].expand(size, size)
    samples = [
        {
            "image": (
                80 * mask + torch.randint(0, 60, (3, size, size), generator=generator)
            ).byte(),
            "mask": mask.clone(),
            "name": f"image{i}",
        }
        for i in range(count)
    ]
    return DataLoader(samples, batch_size=batch_size)


def make_trainer(tmp_path, **options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "default_root_dir": tmp_path}
    return pl.Trainer(**(quiet | {"max_steps": 4, "max_epochs": -1} | options))


def test_new_layers_get_their_own_learning_rate(tmp_path):
    module = make_module(new_layers_lr_factor=10)
    state = module.network.backbone.net.state_dict()
    part = {k: v for k, v in state.items() if not k.startswith("layer1.1")}
    torch.save(part, tmp_path / "part.pth")
    module.network.load_file(tmp_path / "part.pth")
    module.trainer = make_trainer(tmp_path, max_steps=10)
    module.trainer.fit_loop.setup_data = lambda: None
    groups = {group["name"]: group for group in module.parameter_groups()}
    names = {id(p): name for name, p in module.named_parameters()}
    pretrained = {names[id(p)] for p in groups["pretrained"]["params"]}
    new = {names[id(p)] for p in groups["new"]["params"]}
    assert pretrained | new == set(names.values())
    assert not pretrained & new
    assert all(name.startswith("network.backbone.net") for name in pretrained)
    assert "network.backbone.net.layer1.1.conv1.weight" in new
    assert "network.classifier.weight" in new


def test_learning_rates_follow_the_schedule_each_optimiser_step(tmp_path):
    seen = []

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append({g["name"]: g["lr"] for g in optimizer.param_groups})

    module = make_module(new_layers_lr_factor=10, end_lr_factor=0.0)
    torch.save(module.network.backbone.net.state_dict(), tmp_path / "all.pth")
    module.network.load_file(tmp_path / "all.pth")
    trainer = make_trainer(tmp_path, callbacks=[Watch()], accumulate_grad_batches=2)
    trainer.fit(module, make_loader())
    expected = [0.01 * (1 - step / 4) ** 0.9 for step in range(4)]
    assert [rates["pretrained"] for rates in seen] == pytest.approx(expected)
    assert [rates["new"] for rates in seen] == pytest.approx([10 * rate for rate in expected])


def test_default_optimiser_is_the_literatures_sgd(tmp_path):
    module = make_module()
    make_trainer(tmp_path, max_steps=1).fit(module, make_loader())
    optimizer = module.optimizers().optimizer
    assert type(optimizer) is torch.optim.SGD
    group = optimizer.param_groups[0]
    assert (group["initial_lr"], group["momentum"], group["weight_decay"]) == (0.01, 0.9, 5e-4)


# The batch that the learning rate was set for


def fit_and_read_rate(tmp_path, caplog, reference, scale=False, **trainer):
    """Returns the first learning rate of a fit with batches of 2, and what was said about it."""
    module = make_module(reference_batch_size=reference, scale_lr=scale)
    with caplog.at_level("INFO", logger="isanet_pl.optimisation"):
        make_trainer(tmp_path, max_steps=1, **trainer).fit(module, make_loader())
    rate = module.optimizers().param_groups[0]["initial_lr"]
    ours = [record for record in caplog.records if record.name == "isanet_pl.optimisation"]
    return rate, " ".join(record.getMessage() for record in ours)


def test_another_batch_than_the_learning_rate_was_set_for_is_said(tmp_path, caplog):
    rate, said = fit_and_read_rate(tmp_path, caplog, 8, accumulate_grad_batches=2)
    assert rate == 0.01
    assert "a step sees 4 images (1 devices x batch_size 2 x accumulate_grad_batches 2)" in said
    assert "was set for 8" in said
    assert "--data.batch_size 4 or --trainer.accumulate_grad_batches 4 or --model.scale_lr" in said


def test_what_cannot_be_reached_is_not_proposed(tmp_path, caplog):
    _, said = fit_and_read_rate(tmp_path, caplog, 3, accumulate_grad_batches=2)
    assert said.endswith("; set --model.scale_lr true")


@pytest.mark.parametrize(("reference", "accumulated"), [(4, 2), (2, 1), (None, 1)])
def test_the_right_batch_is_not_mentioned(tmp_path, caplog, reference, accumulated):
    rate, said = fit_and_read_rate(tmp_path, caplog, reference, accumulate_grad_batches=accumulated)
    assert rate == 0.01
    assert said == ""


def test_learning_rate_scales_with_the_batch(tmp_path, caplog):
    rate, said = fit_and_read_rate(tmp_path, caplog, 8, scale=True, accumulate_grad_batches=2)
    assert rate == pytest.approx(0.005)
    assert "multiplied by 0.5" in said


def test_scaling_needs_a_reference():
    with pytest.raises(InputError, match=r"scale_lr needs model\.reference_batch_size"):
        make_module(scale_lr=True)


@pytest.mark.parametrize("share", [-0.1, 1.0, 500.0])
def test_a_warm_up_that_is_no_share_of_the_steps_is_refused(share):
    with pytest.raises(InputError, match=f"warmup_fraction must be .* below 1, got {share}"):
        make_module(warmup_fraction=share)


def test_nothing_of_an_evaluation_is_left_for_the_next(tmp_path):
    module, trainer = make_module(), make_trainer(tmp_path)
    trainer.validate(module, make_loader(), verbose=False)
    assert module.deployed is None
    with torch.no_grad():
        module.network.classifier.bias.add_(torch.tensor([0.0, 0.0, 100.0]))
    module.eval()
    batch = next(iter(make_loader()))
    assert (module.predict_step(batch, 0)["classes"] == 2).all()  # the weights of now


# How evaluation sees images


def test_evaluation_uses_the_inference_settings_and_training_does_not(tmp_path):
    inference = Inference(mode="slide", crop_size=(8, 8), stride=(5, 5), flip=True)
    module = make_module(inference=inference)
    seen = []
    module.network.backbone.register_forward_pre_hook(
        lambda _, inputs: seen.append((module.training, tuple(inputs[0].shape[2:])))
    )
    trainer = make_trainer(tmp_path, max_steps=1, limit_val_batches=1)
    trainer.fit(module, make_loader())
    assert seen == [(True, (16, 16))]
    trainer.validate(module, make_loader(), verbose=False)
    # Windows at 0, 5 and 8 of 16 pixels in both directions, for each of two views.
    assert seen[1:] == [(False, (8, 8))] * 18
    batch = next(iter(make_loader()))
    module.eval()
    with torch.no_grad():
        expected = inference(module.network, batch["image"]).argmax(1)
        assert torch.equal(module.predict_step(batch, 0)["classes"], expected)


def test_checkpoint_keeps_the_inference_settings(tmp_path):
    module = make_module(inference=Inference(scales=[0.5, 1.0], base_size=(20, 10)))
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(module, make_loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]["inference"]
    assert Inference(**saved) == module.inference


def test_training_lowers_the_loss(tmp_path):
    losses = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(float(outputs["loss"]))

    torch.manual_seed(0)
    module = make_module()
    make_trainer(tmp_path, max_steps=30, callbacks=[Watch()]).fit(module, make_loader())
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])


def test_checkpoint_written_from_python_is_plain_data(tmp_path):
    module = make_module()
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(module, make_loader())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    loaded = ISANet.from_checkpoint(tmp_path / "x.ckpt")  # reads with weights_only
    for name, value in module.network.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])


def test_pretrained_names_survive_the_checkpoint(tmp_path):
    module = make_module()
    torch.save(module.network.backbone.net.state_dict(), tmp_path / "all.pth")
    module.network.load_file(tmp_path / "all.pth")
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(module, make_loader())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    fresh = make_module()
    make_trainer(tmp_path, max_steps=2).fit(
        fresh, make_loader(), ckpt_path=tmp_path / "x.ckpt", weights_only=True
    )
    assert fresh.network.loaded == module.network.loaded
    assert [group["name"] for group in fresh.parameter_groups()] == ["pretrained", "new"]


def test_nan_loss_names_the_step_and_the_images(tmp_path):
    module = make_module(loss=SegmentationLoss(class_weights=[1, 1, float("inf")]))
    with pytest.raises(InputError, match=r"step 0: the loss is nan on image0, image1"):
        make_trainer(tmp_path).fit(module, make_loader())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("new_layers_lr_factor", -3),
        ("poly_power", -1),
        ("end_lr_factor", float("nan")),
        ("reference_batch_size", 0),
    ],
)
def test_schedules_that_climb_or_divide_by_zero_are_refused(option, value):
    with pytest.raises(InputError, match=f"model.{option} must be .*, got {value}"):
        make_module(**{option: value})


def test_the_loss_of_an_evaluation_is_that_of_labelled_images_and_hides_no_nan():
    module = make_module()
    logits = torch.zeros(2, 3, 4, 4)
    module._infer = lambda image: {"out": logits}
    image, mask = torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.uint8)
    for labels in (mask, torch.full_like(mask, 255)):
        module._evaluate({"image": image, "mask": labels}, "val")
    assert module.losses["val"].compute() == pytest.approx(math.log(3))
    logits = torch.full_like(logits, torch.nan)
    module._evaluate({"image": image, "mask": mask}, "val")
    assert module.losses["val"].compute().isnan()


def test_infinite_gradient_stops_before_it_reaches_the_weights(tmp_path):
    module = make_module()
    module.network.classifier.weight.register_hook(lambda grad: grad * float("inf"))
    before = module.network.classifier.weight.detach().clone()
    with pytest.raises(InputError, match="step 0: a gradient is not finite"):
        make_trainer(tmp_path).fit(module, make_loader())
    assert torch.equal(module.network.classifier.weight, before)


def test_training_after_an_evaluation_that_failed_validates_its_own_weights(tmp_path):
    class Fails(pl.Callback):
        def on_validation_batch_end(self, trainer, pl_module, *_):
            raise InputError("the data is broken")

    module, loader = make_module(), make_loader()
    with pytest.raises(InputError, match="the data is broken"):
        make_trainer(tmp_path, callbacks=[Fails()]).validate(module, loader, verbose=False)
    losses = []
    trainer = make_trainer(tmp_path, max_steps=2, val_check_interval=2, num_sanity_val_steps=0)
    trainer.fit(module, loader, loader)
    losses.append(float(trainer.callback_metrics["val/loss"]))
    trainer = make_trainer(tmp_path)
    trainer.validate(module, loader, verbose=False)
    losses.append(float(trainer.callback_metrics["val/loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_schedule_without_a_length_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"set trainer\.max_steps"):
        make_trainer(tmp_path, max_steps=-1).fit(make_module(), make_loader())


def test_class_weights_must_fit_the_classes():
    with pytest.raises(InputError, match="2 entries for 3 classes: a, b, c"):
        make_module(loss=SegmentationLoss(class_weights=[1, 2]))


@pytest.mark.parametrize("clip", [None, 0.05])
def test_accumulated_batches_are_one_larger_batch(tmp_path, clip):
    modules = []
    for batch_size, accumulated in ((4, 1), (2, 2)):
        torch.manual_seed(0)
        module = make_module(freeze_bn=True)
        module.network.context.dropout.p = 0.0
        options = {"accumulate_grad_batches": accumulated, "gradient_clip_val": clip}
        loader = make_loader(batch_size=batch_size)
        make_trainer(tmp_path, max_steps=3, **options).fit(module, loader)
        modules.append(module)
    for name, tensor in modules[0].state_dict().items():
        assert torch.allclose(modules[1].state_dict()[name], tensor, atol=1e-6), name
    torch.manual_seed(0)
    untrained = make_module().network
    for name in ("classifier", "backbone.net.conv1"):
        trained = modules[0].network.get_submodule(name)
        assert not torch.allclose(untrained.get_submodule(name).weight, trained.weight, atol=1e-5)


def test_frozen_statistics_stay_while_scales_are_trained(tmp_path):
    module = make_module(freeze_bn=True)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    make_trainer(tmp_path, max_steps=2, val_check_interval=1).fit(
        module, make_loader(), make_loader()
    )
    for name, tensor in module.state_dict().items():
        if "running" in name or "num_batches_tracked" in name:
            assert torch.equal(tensor, before[name])
    assert not torch.equal(
        module.network.backbone.net.bn1.weight, before["network.backbone.net.bn1.weight"]
    )
    assert module.training
    assert make_module().network.backbone.net.bn1.training


def test_on_going_on_the_optimisers_settings_are_those_of_the_config(tmp_path):
    def sgd(**options):
        return make_module(lambda p: torch.optim.SGD(p, momentum=0.9, **options))

    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(sgd(lr=0.1, weight_decay=0.01), make_loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    trainer = make_trainer(tmp_path, max_steps=4)
    trainer.fit(sgd(lr=0.4, weight_decay=0.02), make_loader(), ckpt_path=tmp_path / "a.ckpt")
    factor = poly_schedule(4, 0.9, 0.01, 0)
    for group in trainer.optimizers[0].param_groups:
        assert group["weight_decay"] == 0.02
        assert group["lr"] == pytest.approx(0.4 * factor(4))
        # Its momentum is still that of the steps before.
        assert all("momentum_buffer" in trainer.optimizers[0].state[p] for p in group["params"])


def test_on_going_on_the_optimisers_state_must_go_with_its_settings(tmp_path):
    def adam(**options):
        return make_module(lambda p: torch.optim.AdamW(p, lr=0.01, **options))

    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(adam(), make_loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    trainer = make_trainer(tmp_path, max_steps=4)
    with fails_naming("amsgrad was False", "with True"):
        trainer.fit(adam(amsgrad=True), make_loader(), ckpt_path=tmp_path / "a.ckpt")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_precisions_train(tmp_path, precision):
    module, computed = make_module(), set()
    conv, norm = module.network.backbone.net.conv1, module.network.backbone.net.bn1
    for layer in (conv, norm):
        layer.register_forward_hook(lambda _, inputs, out: computed.add(out.dtype))
    trainer = make_trainer(tmp_path, max_steps=2, precision=precision)
    trainer.fit(module, make_loader())
    assert computed == {torch.bfloat16 if precision == "bf16-mixed" else torch.float32}
    state = module.state_dict().values()
    assert {t.dtype for t in state if t.is_floating_point()} == {torch.float32}
    assert all(t.isfinite().all() for t in state)
    assert trainer.callback_metrics["train/loss"].dtype == torch.float32


def test_an_overflow_of_16_mixed_is_left_to_its_scaler(monkeypatch):
    # Which skips the step; a GPU is needed for the rest.
    module = make_module()
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    for precision, stops in (("16-mixed", False), ("bf16-mixed", True)):
        module.trainer = SimpleNamespace(precision=precision, global_step=3)
        weight = module.network.classifier.weight
        weight.grad = torch.full_like(weight, torch.inf)
        with pytest.raises(InputError) if stops else nullcontext():
            module.on_before_optimizer_step(None)
    module.trainer = SimpleNamespace(precision="16-mixed", global_step=3)
    module.network.backbone.net.bn1.running_var.fill_(torch.inf)  # nothing would repair that
    with pytest.raises(InputError, match="statistic is not finite"):
        module.on_before_optimizer_step(None)


def test_overflows_of_16_mixed_in_every_step_end_the_run(monkeypatch):
    module = make_module()
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    module.trainer = SimpleNamespace(precision="16-mixed", global_step=3)
    weight = module.network.classifier.weight
    for value, steps in ((torch.nan, 50), (1.0, 1), (torch.inf, 50)):
        weight.grad = torch.full_like(weight, value)
        for _ in range(steps):
            module.on_before_optimizer_step(None)
    with pytest.raises(InputError, match=r"classifier\.weight.*step number 51 in a row"):
        module.on_before_optimizer_step(None)


def test_the_norm_is_that_of_the_gradient_where_a_fused_step_unscales_it(monkeypatch):
    module, logged = make_module(), {}
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.update({name: value}))
    scaler = SimpleNamespace(get_scale=lambda: 1024.0)
    module.trainer = SimpleNamespace(
        precision="16-mixed", global_step=3, precision_plugin=SimpleNamespace(scaler=scaler)
    )
    weight = module.network.classifier.weight
    weight.grad = torch.full_like(weight, 1024.0)
    expected = weight.numel() ** 0.5
    fused = torch.optim.AdamW([weight], fused=True)
    for optimizer, scale in ((fused, 1), (torch.optim.AdamW([weight]), 1024)):
        module.on_before_optimizer_step(optimizer)
        assert float(logged["train/grad_norm"]) == pytest.approx(scale * expected)


def test_synchronised_norms_are_frozen_folded_and_evaluated_as_others(monkeypatch):
    # Training with them needs GPUs.
    plain = make_module(freeze_bn=True)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain)).train()
    norms = [m for m in synced.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert norms
    assert not any(norm.training for norm in norms)
    image = torch.randn(1, 3, 32, 40)
    with torch.no_grad():
        expected = plain.network.eval()(image)["out"]
        found = fuse_for_inference(synced.network.eval())(image)["out"]
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))


def test_compiled_network_computes_the_same_under_the_same_names(monkeypatch):
    # The graph is captured as for real; only the generation of machine code, which takes a minute,
    # is left out.
    compile_for_real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **_: compile_for_real(f, backend="eager"))
    plain, compiled = make_module().double(), make_module(compile=True).double()
    compiled.load_state_dict(plain.state_dict())
    names = list(plain.state_dict())
    compiled.setup("fit")
    assert list(compiled.state_dict()) == names
    batch = next(iter(make_loader()))
    results = []
    torch._dynamo.utils.counters.clear()
    for module in (plain, compiled):
        module.network.train()
        out = module._forward(batch["image"])["out"]
        out.square().sum().backward()
        results.append([out, *(p.grad for p in module.network.parameters())])
    for mine, theirs in zip(*results, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-9)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0


def test_compiled_training_validates_uncompiled(monkeypatch, tmp_path):
    calls = []

    def counted(network):
        def call(x):
            calls.append(network.training)
            return network(x)

        return call

    monkeypatch.setattr(torch, "compile", counted)
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(make_module(compile=True), make_loader(), make_loader())
    assert calls == [True, True]
