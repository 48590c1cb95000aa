"""A Lightning Trainer for tests."""

import torch
from torch.utils.data import DataLoader, TensorDataset


def fit(objective, x, y, *, batch_size=4, rate=0.1, checkpoint=None, callbacks=(), **settings):
    """Train for an epoch on batches in order; return the module and the Trainer."""
    from lightning.pytorch import Trainer

    from jacmatch.integrations import DistillationModule

    module = DistillationModule(objective, lambda parameters: torch.optim.SGD(parameters, lr=rate))
    settings = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "logger": False, "barebones": False, **settings}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(callbacks=list(callbacks), enable_checkpointing=bool(callbacks), **settings)
    loader = DataLoader(TensorDataset(x, y), batch_size=batch_size, shuffle=False)
    trainer.fit(module, loader, ckpt_path=checkpoint)
    return module, trainer
