"""Every option of a training that is off by default and works on a CPU in seconds."""

from typing import Any

EVERY_FLAG: dict[str, Any] = {
    "schedule.accumulation_steps": 2,
    "optim.max_gradient_norm": 1.0,
    "optim.warm_up_iterations": 5,
    "model.freeze_stages": 2,
    "model.freeze_batch_norm": "backbone",
    "loss.label_smoothing": 0.1,
    "loss.class_balance": "median",
    "loss.ohem_threshold": 0.7,
    "loss.ohem_min_kept": 100,
    "optim.ema_decay": 0.9,
    "workers.recompute": True,
}
