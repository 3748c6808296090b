"""A LightningModule whose optimizer merges, with the data that it is trained on."""

from __future__ import annotations

import lightning
import torch
from models import Model, trained
from torch.utils.data import DataLoader

import fused_merge as fm

OPTIONS = {"lr": 1e-2, "alpha": 0.1, "reserve_rate": 0.5}


class Module(lightning.LightningModule):
    def __init__(self, **options):
        super().__init__()
        self.model = trained().cpu()
        self.options = OPTIONS | options

    def training_step(self, batch, _):
        # Which rows come next after resuming is the business of the DataLoader: here the step says it.
        batch = (batch + 5 * self.global_step) % 11
        return torch.nn.functional.cross_entropy(self.model(batch), batch % 3)

    def configure_optimizers(self):
        delta = fm.ReferenceDelta.from_models(Model(0), trained())
        optimizer = fm.OnDAREAdamW(self.model.named_parameters(), reference_delta=delta, **self.options)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=4)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(module, folder, steps=4, resume=None, **options):
    """Train for some steps on the CPU."""
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
    trainer.fit(module, DataLoader(torch.arange(4).repeat(16), batch_size=4), ckpt_path=resume)
    return trainer
