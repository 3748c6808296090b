"""Lightning: the run of its gradients, resumed from its checkpoints, clipped where Lightning refuses to."""

from __future__ import annotations

import pytest
import torch
from bits import assert_same_bits
from lightning_module import OPTIONS, Module, fit
from models import Model, trained

import fused_merge as fm


def weights(module):
    return dict(module.model.named_parameters())


class Recording(Module):
    """Keeps what every step sees."""

    seen: list

    def on_before_optimizer_step(self, optimizer):
        rate = optimizer.param_groups[0]["lr"]
        self.seen.append((rate, [p.grad.clone() for p in self.model.parameters()]))


def recording(**options):
    module = Recording(**options)
    module.seen = []
    return module


def replayed(seen, **options):
    model = trained().cpu()
    delta = fm.ReferenceDelta.from_models(Model(0), trained())
    optimizer = fm.OnDAREAdamW(model.named_parameters(), reference_delta=delta, **OPTIONS | options)
    for rate, grads in seen:
        for param, grad in zip(model.parameters(), grads, strict=True):
            param.grad = grad
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    return dict(model.named_parameters())


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}])
def test_a_run_takes_the_steps_of_its_gradients(options, tmp_path):
    module = recording()
    fit(module, tmp_path, **options)
    assert [rate for rate, _ in module.seen] == pytest.approx([1e-3, 3.25e-3, 5.5e-3, 7.75e-3])
    assert_same_bits(weights(module), replayed(module.seen))


def test_a_checkpoint_goes_on(tmp_path):
    whole, first, second = (Module(merge_every=3, rounding="stochastic") for _ in range(3))
    fit(whole, tmp_path, steps=8)
    fit(first, tmp_path, steps=4).save_checkpoint(tmp_path / "four.ckpt")
    fit(second, tmp_path, steps=8, resume=tmp_path / "four.ckpt")
    assert_same_bits(weights(second), weights(whole))


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_where_lightning_refuses_to_clip_the_optimizer_clips(precision, tmp_path, monkeypatch):
    from lightning.pytorch.plugins import MixedPrecision

    def plugin():
        # On the CPU Lightning has no scaler of its own for fp16.
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if precision == "16-mixed" else None
        return {"plugins": MixedPrecision(precision, "cpu", scaler)}

    # The documentation of `max_grad_norm` names Lightning.
    with pytest.raises(RuntimeError, match="OnDAREAdamW, does not allow for gradient clipping because it performs"):
        fit(Module(), tmp_path, gradient_clip_val=0.01, **plugin())
    module = recording(max_grad_norm=0.01)
    fit(module, tmp_path, **plugin())
    scale = 8.0 if precision == "16-mixed" else 1.0
    clipped = []
    for rate, grads in module.seen:
        # Lightning shows gradients as scaled, which the optimizer undoes.
        norm = torch.nn.utils.get_total_norm([grad / scale for grad in grads])
        assert norm > 0.01
        clipped.append((rate, [grad / scale for grad in grads]))
    assert_same_bits(weights(module), replayed(clipped, max_grad_norm=0.01))
    free = Module()
    fit(free, tmp_path, **plugin())
    assert not torch.equal(free.model.head.weight, module.model.head.weight)
