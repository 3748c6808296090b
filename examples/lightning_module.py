"""A LightningModule whose optimizer merges; it also clips, which Lightning refuses to do for it in mixed precision.

Here the model is tiny and random, so that it runs on a CPU in seconds.
"""

import copy
import tempfile

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fused_merge as fm

torch.manual_seed(0)
base = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64))
sft = copy.deepcopy(base)
with torch.no_grad():  # In place of supervised fine-tuning.
    for parameter in sft.parameters():
        parameter.add_(0.01 * torch.randn_like(parameter))
delta = fm.ReferenceDelta.from_models(base, sft)


class Module(lightning.LightningModule):
    """Predicts the next token from the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.model = copy.deepcopy(sft)

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        """Return the loss of a batch of token rows."""
        loss = nn.functional.cross_entropy(self.model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        print(f"loss {loss:.4f}")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Pass the parameters of the model by name; `max_grad_norm` stands for Lightning's gradient_clip_val."""
        return fm.OnDAREAdamW(
            self.model.named_parameters(),
            reference_delta=delta,
            lr=1e-3,
            reserve_rate=0.1,
            alpha=1e-3,
            max_grad_norm=1.0,
        )


rows = torch.randint(0, 64, (32, 9))
trainer = lightning.Trainer(
    max_steps=8,
    accelerator="cpu",
    precision="bf16-mixed",
    default_root_dir=tempfile.mkdtemp(),
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
)
trainer.fit(Module(), DataLoader(rows, batch_size=8))
