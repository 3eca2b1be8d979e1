"""AdaLoRA's rank allocation as naive float64 loops over dicts of `SVDFactors` of numpy arrays; no code of the packages.

Formulas: arXiv:2303.10512, section 3, in PEFT's order of events. Of a step t that comes after the optimizer's: measure
importance with the new values if t < last = total_step - tfinal; if t is an allocation, set E = 0 wherever the score is
at most the k-th smallest; at `last` forget the importance; from then on, apply the last mask at every step.
"""

import dataclasses

import numpy as np

from interop import SVDFactors


@dataclasses.dataclass
class State:
    """What the allocator carries from step to step, by layer."""

    step: int
    ipt: dict  # SVDFactors of moving averages
    unc: dict
    mask: dict  # a list of bools


def start(trainable):
    """The state before the first step."""
    zeros = {name: SVDFactors(*(np.zeros(part.shape) for part in factors)) for name, factors in trainable.items()}
    return State(0, zeros, zeros, {name: [True] * len(factors.E) for name, factors in trainable.items()})


def step(state, config, trainable, grads):
    """State and values after one more step, whose optimizer gave `trainable` by `grads`."""
    t, last = state.step + 1, config.total_step - config.tfinal
    ipt, unc, mask = state.ipt, state.unc, state.mask
    if t < last:
        averages = {
            name: [
                smooth(*arrays, beta1=config.beta1, beta2=config.beta2)
                for arrays in zip(ipt[name], unc[name], trainable[name], grads[name], strict=True)
            ]
            for name in trainable
        }
        ipt, unc = ({name: SVDFactors(*(pair[i] for pair in averages[name])) for name in averages} for i in (0, 1))
    if t == last or (config.tinit < t < last and t % config.deltaT == 0):
        mask = keep(scores(ipt, unc), count(trainable) - budget(config, len(trainable), t))
    if t == last:
        ipt, unc = start(trainable).ipt, start(trainable).unc
    if t >= last or (config.tinit < t and t % config.deltaT == 0):
        trainable = {name: masked(factors, mask[name]) for name, factors in trainable.items()}
    return State(t, ipt, unc, mask), trainable


def smooth(ipt, unc, value, grad, *, beta1, beta2):
    """Moving averages of the importance |value * grad| of each entry, and of its distance from the former."""
    ipt, unc = ipt.copy(), unc.copy()
    for index in np.ndindex(value.shape):
        now = abs(float(value[index]) * float(grad[index]))
        ipt[index] = beta1 * ipt[index] + (1 - beta1) * now
        unc[index] = beta2 * unc[index] + (1 - beta2) * abs(now - ipt[index])
    return ipt, unc


def scores(ipt, unc):
    """By layer, the score of each triplet: that of its E, and the means of those of its row of A and column of B."""
    found = {}
    for name in ipt:
        A, E, B = (a * u for a, u in zip(ipt[name], unc[name], strict=True))
        found[name] = [E[i, 0] + sum(A[i]) / len(A[i]) + sum(B[:, i]) / len(B) for i in range(len(E))]
    return found


def keep(scores, excess):
    """By layer, which triplets score above the `excess`-th smallest score of all; with none in excess, every one."""
    ordered = sorted(score for layer in scores.values() for score in layer)
    threshold = ordered[excess - 1] if excess > 0 else -np.inf
    return {name: [bool(score > threshold) for score in layer] for name, layer in scores.items()}


def budget(config, num_weights, t):
    """Triplets that all layers may have together at step t <= last."""
    first, final = config.init_r * num_weights, config.target_r * num_weights
    if t <= config.tinit:
        return first
    left = 1 - (t - config.tinit) / (config.total_step - config.tfinal - config.tinit)
    return int((first - final) * left**3 + final)


def count(trainable):
    """Triplets that there are."""
    return sum(len(factors.E) for factors in trainable.values())


def masked(factors, mask):
    """The factors with E = 0 where the mask is False."""
    E = factors.E.copy()
    for i, kept in enumerate(mask):
        if not kept:
            E[i] = 0
    return SVDFactors(factors.A, E, factors.B)


def delta_gradients(factors, scaling, upstream):
    """Gradients of `sum(upstream * dW)`; dW itself is `oracle.svd_delta_weight`."""
    A, E, B = (np.asarray(part).astype(np.float64) for part in factors)
    grads = SVDFactors(np.zeros_like(A), np.zeros_like(E), np.zeros_like(B))
    for i in range(len(E)):
        grads.A[i] = scaling * E[i, 0] * (B[:, i] @ upstream)
        grads.E[i, 0] = scaling * (B[:, i] @ upstream @ A[i])
        grads.B[:, i] = scaling * E[i, 0] * (upstream @ A[i])
    return grads


def orthogonal_loss(trainable, weight):
    """`weight` times the mean Frobenius norm of A A^T - I and B^T B - I over all layers."""
    norms = []
    for A, _, B in trainable.values():
        for vectors in (np.asarray(A, np.float64), np.asarray(B, np.float64).T):
            squares = 0.0
            for i, x in enumerate(vectors):
                for j, y in enumerate(vectors):
                    squares += (x @ y - (i == j)) ** 2
            norms.append(squares**0.5)
    return weight * sum(norms) / len(norms)
