"""Data, arguments and a model for the Trainer of Hugging Face."""

import torch

from .cases import X, Y

DATA = [{"pixel_values": x, "labels": y} for x, y in zip(X, Y, strict=True)]


def arguments(out, **settings):
    import transformers

    return transformers.TrainingArguments(
        str(out),
        **{
            "per_device_train_batch_size": 4,
            "num_train_epochs": 1,
            "learning_rate": 0.1,
            "optim": "sgd",
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "report_to": [],
            "use_cpu": True,
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "train_sampling_strategy": "sequential",
            "dataloader_pin_memory": False,
            **settings,
        },
    )


def vit(width=8):
    import transformers

    torch.manual_seed(width)
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=width,
        num_labels=10,
    )
    return transformers.ViTForImageClassification(config)
