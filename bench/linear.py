"""Linear classifiers of fixed features: the L2-SVM that probes D (Radford et al. 2016, Sec. 5), logistic regression."""

import torch
from torch.nn import functional as F

COSTS = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)  # to choose from, as in the authors' svhn_semisup_analysis.py


def logistic(margin):
    """-log of the probability of the right class."""
    return F.softplus(-margin)


def squared_hinge(margin):
    """The loss of an L2-SVM."""
    return (1 - margin).clamp(min=0) ** 2


def fit(x, targets, loss, cost):
    """Classifiers of x (N, features) for targets +-1 (N, classes): weights (features, classes) and bias (classes,).

    They minimise |weights|^2 / 2 + cost * sum of loss(target * (x @ weights + bias)).
    """
    weights = torch.zeros(x.shape[1], targets.shape[1], requires_grad=True)
    bias = torch.zeros(targets.shape[1], requires_grad=True)
    optimiser = torch.optim.LBFGS([weights, bias], max_iter=200, line_search_fn="strong_wolfe")

    def objective():
        optimiser.zero_grad()
        value = (weights**2).sum() / 2 + cost * loss(targets * (x @ weights + bias)).sum()
        value.backward()
        return value

    optimiser.step(objective)
    return weights.detach(), bias.detach()


def accuracy(model, x, labels):
    """The share of x (N, features) whose highest score is that of their label."""
    weights, bias = model
    return (x @ weights + bias).argmax(1).eq(labels).double().mean().item()


def subsets(labels, count, repeats, seed=0):
    """`repeats` random choices of `count` examples of each class. -> list of index tensors (classes * count,)."""
    rng = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(repeats):
        order = torch.randperm(len(labels), generator=rng)
        found.append(torch.cat([order[labels[order] == label][:count] for label in labels.unique()]))
    return found


def probe(features, labels, chosen):
    """Test accuracy of one-vs-rest L2-SVMs: the mean over `chosen` subsets of "train", the deviation, and the cost.

    `features` (N, n) and `labels` (N,) are dicts of the splits train, valid and test. The cost is the best for "valid".
    Features are divided by their root mean square over "train", so that a cost means the same for all kinds.
    """
    scale = features["train"].square().mean().sqrt()
    x = {split: found / scale for split, found in features.items()}
    targets = 2.0 * F.one_hot(labels["train"]) - 1
    scores = {}  # of a cost: those of each subset, for "valid" and for "test"
    for cost in COSTS:
        models = [fit(x["train"][some], targets[some], squared_hinge, cost) for some in chosen]
        both = [[accuracy(model, x[split], labels[split]) for model in models] for split in ("valid", "test")]
        scores[cost] = torch.tensor(both, dtype=torch.float64)
    cost = max(COSTS, key=lambda cost: scores[cost][0].mean())
    test = scores[cost][1]
    return test.mean().item(), test.std(correction=0).item(), cost
