"""The recipes: what --recipe puts in the place of defaults, for each script; docs/recipes.md has reasons and sources.

A flag that is given wins over the recipe, and so does --quick, which keeps a run small: --quick --recipe record
rehearses a recipe on the CPU.
"""

from __future__ import annotations

from typing import Any

# The same training as the default, faster: four times the batch and four times lr (0.1 and 0.01 at 128), so that
# lr * steps, and with it the pull of BR and of weight decay, stays nearly what it was.
_FAST = {
    "batch_size": 512,
    "val_fraction": 0.02,
    "amp": "bf16",
    "channels_last": True,
    "compile": "default",
    "drop_last": True,
    "lr_warmup": 0.05,
}
# Few epochs, and not compiled: compiling both phases takes longer than it could save in so few.
_RECORD = {
    "batch_size": 512,
    "val_fraction": 0.02,
    "amp": "bf16",
    "channels_last": True,
    "drop_last": True,
    "lr_schedule": "onecycle",
    "lr_warmup": 0.2,
    "nesterov": True,
    "label_smoothing": 0.1,
}
BASELINE: dict[str, dict[str, Any]] = {
    "default": {},
    "fast": {**_FAST, "epochs": 100, "lr": 0.4},
    "record": {**_RECORD, "epochs": 15, "lr": 0.4},
}
# Seven epochs of BR are 665 steps at a mean lr of 0.073: lambda 0.5 would move a bin of 1,000 weights a third of its
# way, 4.5 moves it all the way, and 2 * lambda * lr <= 1.31 stays below 1.36, where a bin of one weight starts to
# oscillate under Nesterov's momentum (strength.limit). BR of activations has cost accuracy wherever it was measured.
QAT: dict[str, dict[str, Any]] = {
    "default": {},
    "fast": {**_FAST, "lr": 0.04, "lr_alpha_act": 0.2, "lambda_br_act": 0.1, "alpha_init": "mse"},
    "record": {
        **_RECORD,
        "alpha_init": "mse",
        "qat_epochs": 12,
        "warmup_epochs": 5,
        "lr": 0.2,
        "lr_alpha": 0.02,
        "lr_alpha_act": 0.2,
        "lambda_br": 4.5,
        "lambda_br_act": 0.0,
        "freeze_weight_alpha_epoch": 6,
        "freeze_act_alpha_epoch": 10,
    },
}
NAMES = tuple(QAT)
