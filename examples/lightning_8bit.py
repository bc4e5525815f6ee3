# SPDX-License-Identifier: Apache-2.0
"""Train with Lightning and an optimizer whose moments take two bytes a parameter."""

from __future__ import annotations

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lowbits.optim import AdamW8bit, state_report

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


class Regression(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return AdamW8bit(self.parameters(), lr=3e-3)


def main() -> None:
    lightning.seed_everything(0, verbose=False)
    x = torch.randn(256, 64)
    model = Regression()
    data = DataLoader(TensorDataset(x, x.roll(1, 1)), batch_size=32)
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=5, **QUIET)
    trainer.fit(model, data)
    print(f"{state_report(trainer.optimizers[0], model).bytes_per_element:.2f} bytes of state a parameter")


if __name__ == "__main__":
    main()
