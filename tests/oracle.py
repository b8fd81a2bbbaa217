"""The naive reference: loops and NumPy in float64, importing nothing of nblora.

Everything is in logical shapes: weights (in, out), samples as rows. The equations are those of `docs/mathematics.md`.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

ACTIVATIONS = ("identity", "relu", "gelu", "tanh", "sigmoid", "silu", "gelu_tanh", "quick_gelu")


@dataclass
class State:
    """One layer or adapter: what is absent is None."""

    weight: np.ndarray | None = None
    bias: np.ndarray | None = None
    A: np.ndarray | None = None
    B: np.ndarray | None = None
    delta: np.ndarray | None = None
    velocity: np.ndarray | None = None
    scaling: float = 1.0
    delta_scaling: float = 0.1
    momentum: float = 0.9
    activation: str = "identity"
    train_base: bool = False
    train_own: bool = True
    mask: np.ndarray | None = None


def matmul(left, right):
    """left @ right by its definition, in float64."""
    rows, inner, columns = left.shape[0], left.shape[1], right.shape[1]
    left, right = left.astype(np.float64).tolist(), right.astype(np.float64).tolist()
    product = np.zeros((rows, columns))
    for n in range(rows):
        for o in range(columns):
            total = 0.0
            for i in range(inner):
                total += left[n][i] * right[i][o]
            product[n, o] = total
    return product


def fast_matmul(left, right):
    """left @ right as NumPy computes it in float64: for shapes on which the loops take too long."""
    return left.astype(np.float64) @ right.astype(np.float64)


def act(z, name):
    """One value through an activation function."""
    if name == "relu":
        return max(z, 0.0)
    if name == "gelu":
        return 0.5 * z * (1.0 + math.erf(z / math.sqrt(2.0)))
    if name == "tanh":
        return math.tanh(z)
    if name == "sigmoid":
        return 1.0 / (1.0 + math.exp(-z)) if z >= 0 else math.exp(z) / (1.0 + math.exp(z))
    if name == "silu":
        return z * act(z, "sigmoid")
    if name == "quick_gelu":
        return z * act(1.702 * z, "sigmoid")
    if name == "gelu_tanh":
        return 0.5 * z * (1.0 + math.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)))
    return z


def act_derivative(z, name):
    """The derivative at one value; that of relu at 0 is 0."""
    if name == "relu":
        return 1.0 if z > 0 else 0.0
    if name == "gelu":
        return 0.5 * (1.0 + math.erf(z / math.sqrt(2.0))) + z * math.exp(-z * z / 2.0) / math.sqrt(2.0 * math.pi)
    if name == "tanh":
        return 1.0 - math.tanh(z) ** 2
    if name == "sigmoid":
        return act(z, name) * act(-z, name)
    if name == "silu":
        return act(z, "sigmoid") * (1.0 + z * act(-z, "sigmoid"))
    if name == "quick_gelu":
        return act(1.702 * z, "sigmoid") * (1.0 + 1.702 * z * act(-1.702 * z, "sigmoid"))
    if name == "gelu_tanh":
        t = math.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3))
        return 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * math.sqrt(2.0 / math.pi) * (1.0 + 3 * 0.044715 * z * z)
    return 1.0


def each(function, z, name):
    """`function` over every element of `z`."""
    return np.array([function(value, name) for value in z.ravel().tolist()]).reshape(z.shape)


def masked(x, state):
    """The samples on their way into the low-rank path."""
    return x if state.mask is None else x * state.mask


def pre_activation(x, state, dot=matmul):
    """z = x W + b + s (mask∘x A) B + c (x D) for rows x."""
    columns = (state.weight if state.weight is not None else state.B).shape[1]
    z = np.zeros((x.shape[0], columns))
    if state.weight is not None:
        z += dot(x, state.weight)
    if state.bias is not None:
        z += state.bias
    if state.A is not None:
        z += state.scaling * dot(dot(masked(x, state), state.A), state.B)
    if state.delta is not None:
        z += state.delta_scaling * dot(x, state.delta)
    return z


def forward(x, state, dot=matmul):
    """y = act(z), for samples of any leading axes."""
    x = np.asarray(x, np.float64)
    z = pre_activation(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), state, dot)
    return each(act, z, state.activation).reshape((*x.shape[:-1], z.shape[1]))


def gradients(x, grad_output, state, dot=matmul):
    """All gradients by name: of the trainable parameters, and "x" of the input."""
    x, grad_output = np.asarray(x, np.float64), np.asarray(grad_output, np.float64)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    gz = grad_output.reshape(rows.shape[0], grad_output.shape[-1])
    gz = gz * each(act_derivative, pre_activation(rows, state, dot), state.activation)
    found = {}
    gx = np.zeros(rows.shape)
    if state.weight is not None:
        gx += dot(gz, state.weight.T)
        if state.train_base:
            found["weight"] = dot(rows.T, gz)
            if state.bias is not None:
                found["bias"] = gz.sum(axis=0)
    if state.A is not None:
        back = dot(gz, state.B.T)
        found["lora_A"] = state.scaling * dot(masked(rows, state).T, back)
        found["lora_B"] = state.scaling * dot(dot(masked(rows, state), state.A).T, gz)
        gx += masked(state.scaling * dot(back, state.A.T), state)
    if state.delta is not None:
        found["delta"] = state.delta_scaling * dot(rows.T, gz)
        gx += state.delta_scaling * dot(gz, state.delta.T)
    if not state.train_own:
        found = {name: value for name, value in found.items() if name in ("weight", "bias")}
    return found | {"x": gx.reshape(x.shape)}


def update(state, grads, lr):
    """The state after one update, from gradients taken before it."""
    new = replace(state)
    for field, name in (("weight", "weight"), ("bias", "bias"), ("A", "lora_A"), ("B", "lora_B")):
        if name in grads:
            setattr(new, field, getattr(state, field) - lr * grads[name])
    if "delta" in grads:
        new.velocity = state.momentum * state.velocity + (1.0 - state.momentum) * grads["delta"]
        new.delta = state.delta - lr * new.velocity
    return new


def merge(state, dot=matmul):
    """The state of the plain layer that computes the same: W' = W + s A B + c D, b' = b."""
    weight = state.weight.astype(np.float64)
    if state.A is not None:
        weight = weight + state.scaling * dot(state.A, state.B)
    if state.delta is not None:
        weight = weight + state.delta_scaling * state.delta
    return State(weight=weight, bias=state.bias, activation=state.activation)


# --- convolutions and embeddings ---------------------------------------------------------------------------------


@dataclass
class Slide:
    """A convolution's kernel on images: each a pair for rows and columns."""

    kernel: tuple
    stride: tuple = (1, 1)
    padding: tuple = (0, 0)
    dilation: tuple = (1, 1)

    def places(self, height, width):
        """Rows and columns of the output."""
        sizes = zip((height, width), self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes)

    def sources(self, height, width):
        """(patch, number in it without its channel, row, column) of all that lies inside an image."""
        (rows, columns), (kh, kw) = self.places(height, width), self.kernel
        for h in range(rows):
            for w in range(columns):
                for i in range(kh):
                    for j in range(kw):
                        y = h * self.stride[0] - self.padding[0] + i * self.dilation[0]
                        x = w * self.stride[1] - self.padding[1] + j * self.dilation[1]
                        if 0 <= y < height and 0 <= x < width:
                            yield h * columns + w, i * kw + j, y, x


def patches(images, slide):
    """Images (N, channels, height, width) as rows (N·H'·W', channels·kh·kw)."""
    count, channels, height, width = images.shape
    rows, size = slide.places(height, width), slide.kernel[0] * slide.kernel[1]
    found = np.zeros((count, rows[0] * rows[1], channels, size))
    for place, number, y, x in slide.sources(height, width):
        found[:, place, :, number] = images[:, :, y, x]
    return found.reshape(count * rows[0] * rows[1], channels * size)


def unpatch(rows, shape, slide):
    """The transpose of `patches`: each number added to where it came from in images of this shape."""
    count, channels, height, width = shape
    out, size = slide.places(height, width), slide.kernel[0] * slide.kernel[1]
    rows = rows.reshape(count, out[0] * out[1], channels, size)
    images = np.zeros(shape)
    for place, number, y, x in slide.sources(height, width):
        images[:, :, y, x] += rows[:, place, :, number]
    return images


def last(images):
    """(N, channels, ...) as rows of channels."""
    return np.moveaxis(images, 1, -1).reshape(-1, images.shape[1])


def convolve(images, state, slide):
    """y = act(conv(x, W + s A B + c D) + b), (N, out, H', W')."""
    images = np.asarray(images, np.float64)
    rows = forward(patches(images, slide), rows_state(state, images, slide))
    return np.moveaxis(rows.reshape(len(images), *slide.places(*images.shape[2:]), rows.shape[1]), -1, 1)


def rows_state(state, images, slide):
    """The state with the dropout's mask on images as one on patches."""
    return state if state.mask is None else replace(state, mask=patches(state.mask, slide))


def convolution_gradients(images, grad_output, state, slide):
    """All gradients by name, and "x" of the images."""
    images = np.asarray(images, np.float64)
    found = gradients(patches(images, slide), last(grad_output), rows_state(state, images, slide))
    return found | {"x": unpatch(found["x"], images.shape, slide)}


def one_hot(indices, count):
    """Rows with a single 1."""
    rows = np.zeros((np.size(indices), count))
    rows[np.arange(np.size(indices)), np.reshape(indices, -1)] = 1
    return rows


# --- beside the linear step: loops again, in float64 ---------------------------------------------------------------


def norm(x, weight, bias=None, eps=1e-5, centred=True):
    """LayerNorm, or RMSNorm where not `centred`, of rows."""
    y = np.zeros(x.shape)
    for n, row in enumerate(np.asarray(x, np.float64)):
        mean = sum(row.tolist()) / len(row) if centred else 0.0
        variance = sum((value - mean) ** 2 for value in row.tolist()) / len(row)
        y[n] = (row - mean) / math.sqrt(variance + eps) * weight + (0.0 if bias is None else bias)
    return y


def norm_gradients(x, weight, grad, eps=1e-5, centred=True):
    """Gradients of input, weight and bias, from the derivative of each output by each input of a row."""
    x, grad = np.asarray(x, np.float64), np.asarray(grad, np.float64)
    gx, gw = np.zeros(x.shape), np.zeros(x.shape[1])
    for n, row in enumerate(x):
        count = len(row)
        mean = row.mean() if centred else 0.0
        spread = math.sqrt(((row - mean) ** 2).mean() + eps)
        hat = (row - mean) / spread
        jacobian = (np.eye(count) - (1.0 / count if centred else 0.0) - np.outer(hat, hat) / count) / spread
        gx[n] = jacobian.T @ (grad[n] * weight)
        gw += grad[n] * hat
    return gx, gw, grad.sum(axis=0)


def rotated(x, positions, size, theta, dtype=np.float64, back=False):
    """Rotary positions of one head's rows (N, size): pairs (i, i + size / 2)."""
    out = np.array(x, np.float64)
    half = size // 2
    for n, place in enumerate(positions):
        for i in range(half):
            power = np.float32(theta ** float(np.float32(2 * i) / np.float32(size)))
            angle = dtype(place) * dtype(np.float32(1) / power)
            c, s = math.cos(angle), math.sin(angle) * (-1 if back else 1)
            out[n, i] = x[n, i] * c - x[n, i + half] * s
            out[n, i + half] = x[n, i + half] * c + x[n, i] * s
    return out


def attention(q, k, v, causal, scale):
    """One head of one sequence: output and weights; the last query sees all keys."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    o, weights = np.zeros((len(q), v.shape[1])), np.zeros((len(q), len(k)))
    for i in range(len(q)):
        seen = [j for j in range(len(k)) if not causal or j <= i + len(k) - len(q)]
        if not seen:
            continue
        scores = [scale * float(q[i] @ k[j]) for j in seen]
        exponentials = [math.exp(score - max(scores)) for score in scores]
        for j, value in zip(seen, exponentials, strict=True):
            weights[i, j] = value / sum(exponentials)
            o[i] += weights[i, j] * v[j]
    return o, weights


def attention_gradients(q, k, v, grad, causal, scale):
    """Gradients of q, k and v of one head of one sequence."""
    weights = attention(q, k, v, causal, scale)[1]
    gq, gk, gv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    for i in range(len(q)):
        along = [float(grad[i] @ v[j]) for j in range(len(k))]
        mean = sum(weight * value for weight, value in zip(weights[i], along, strict=True))
        for j in range(len(k)):
            slope = scale * weights[i, j] * (along[j] - mean)
            gq[i] += slope * k[j]
            gk[j] += slope * q[i]
            gv[j] += weights[i, j] * grad[i]
    return gq, gk, gv


def pooled(x, maximum, kernel, stride, padding):
    """Windows of images (N, C, H, W): output, and the gradient function of it."""
    (kh, kw), (sh, sw), (ph, pw) = kernel, stride, padding
    images, channels, height, width = x.shape
    rows, columns = (height + 2 * ph - kh) // sh + 1, (width + 2 * pw - kw) // sw + 1
    y, jacobian = np.zeros((images, channels, rows, columns)), {}
    for place in np.ndindex(*y.shape):
        n, c, h, w = place
        inside = [
            (h * sh - ph + i, w * sw - pw + j)
            for i in range(kh)
            for j in range(kw)
            if 0 <= h * sh - ph + i < height and 0 <= w * sw - pw + j < width
        ]
        if maximum:
            best = max(inside, key=lambda at: x[n, c, at[0], at[1]])
            shares = {best: 1.0}
        else:
            shares = dict.fromkeys(inside, 1.0 / (kh * kw))
        y[place] = sum(share * x[n, c, i, j] for (i, j), share in shares.items())
        jacobian[place] = shares
    return y, jacobian
