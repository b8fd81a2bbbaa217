"""Training: `fit`, and the losses, optimisers, schedules and callbacks that it takes."""

from .callbacks import Callback, EarlyStopping
from .fit import evaluate, fit
from .history import History
from .losses import BinaryCrossEntropy, CrossEntropy, Loss, MeanSquaredError
from .metrics import accuracy, binary_accuracy
from .optimizers import SGD, AdamW, Optimizer
from .schedules import Constant, Schedule, WarmupCosine

__all__ = [
    "SGD",
    "AdamW",
    "BinaryCrossEntropy",
    "Callback",
    "Constant",
    "CrossEntropy",
    "EarlyStopping",
    "History",
    "Loss",
    "MeanSquaredError",
    "Optimizer",
    "Schedule",
    "WarmupCosine",
    "accuracy",
    "binary_accuracy",
    "evaluate",
    "fit",
]
