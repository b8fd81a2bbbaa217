"""Losses and their gradients by the model's output, in one pass; sums are taken in float64, row after row."""

import math

from ..common.jit import kernel


@kernel
def mean_squared_error(output, target, gradient, total):
    """total[0] = Σ (y - t)² / (N·out); gradient = 2 (y - t) / (N·out). All (N, out)."""
    samples, outputs = output.shape
    scale = 1.0 / (samples * outputs)
    value = 0.0
    for n in range(samples):
        for o in range(outputs):
            error = float(output[n, o]) - float(target[n, o])
            value += error * error
            gradient[n, o] = 2.0 * scale * error
    total[0] = value * scale


@kernel
def softmax_cross_entropy(logits, labels, gradient, total):
    """total[0] = Σ_n (log Σ_o exp z_no - z_n,label) / N; gradient = (softmax(z) - onehot(label)) / N.

    logits and gradient (N, out), labels (N,) int64. The largest logit of a row is taken out before exp.
    """
    samples, outputs = logits.shape
    scale = 1.0 / samples
    value = 0.0
    for n in range(samples):
        row, label = logits[n], labels[n]
        largest = float(row[0])
        for o in range(1, outputs):
            if row[o] > largest:
                largest = float(row[o])
        normaliser = 0.0
        for o in range(outputs):
            normaliser += math.exp(float(row[o]) - largest)
        value += math.log(normaliser) + largest - float(row[label])
        for o in range(outputs):
            probability = math.exp(float(row[o]) - largest) / normaliser
            gradient[n, o] = scale * (probability - (1.0 if o == label else 0.0))
    total[0] = value * scale


@kernel
def binary_cross_entropy(logits, target, gradient, total):
    """total[0] = Σ (max(z, 0) - z t + log(1 + exp(-|z|))) / (N·out); gradient = (sigmoid(z) - t) / (N·out).

    All (N, out); t in [0, 1].
    """
    samples, outputs = logits.shape
    scale = 1.0 / (samples * outputs)
    value = 0.0
    for n in range(samples):
        for o in range(outputs):
            z, t = float(logits[n, o]), float(target[n, o])
            e = math.exp(-abs(z))
            value += (z if z > 0 else 0.0) - z * t + math.log1p(e)
            probability = (1.0 if z >= 0 else e) / (1.0 + e)
            gradient[n, o] = scale * (probability - t)
    total[0] = value * scale
