"""Contraction plans: in which order a layer with an adapter multiplies x, W, B and the scaled A.

*Factored* is `x W' = x W + (x U) B`, two thin products beside the frozen layer's own; *folded* makes `W' = W + B U`
first and multiplies once. Folded costs O(D d^2) whatever the number of tokens T, factored O(T d^2), so one of them wins
by the shapes alone, which are static: the choice is made once per shape, for forward and for backward separately.
"""

from typing import Literal, NamedTuple, get_args

from interop.shapes import num_bases

PlanName = Literal["auto", "factored", "folded"]
PLANS: tuple[str, ...] = get_args(PlanName)

# Multiply-adds that a machine does in the time in which it moves one byte, in the order of magnitude.
CPU_BALANCE = 8.0
ACCELERATOR_BALANCE = 100.0


class Plan(NamedTuple):
    """Whether W' is made in the forward and in the backward pass."""

    fold_forward: bool
    fold_backward: bool


class Work(NamedTuple):
    """What a pass takes: multiply-adds, and elements read or written."""

    products: float
    elements: float


class Contraction(NamedTuple):
    """One layer and its input, as far as the costs depend on them.

    Attributes:
        shape: (out, in) of the weight.
        r: Rank of one basis.
        tokens: Rows of x.
        frozen: Whether the frozen layer's own product is a part of it; without, only the update is computed.
        needs_input_grad: Whether backward computes the gradient of x.
        keeps_weight: Whether a W' made in forward is still there in backward.
        product_price: Price of a multiply-add in `B U` and its gradient: below 1 for products that use B's zeros.
    """

    shape: tuple[int, int]
    r: int
    tokens: int
    frozen: bool = True
    needs_input_grad: bool = True
    keeps_weight: bool = False
    product_price: float = 1.0

    @property
    def _sizes(self) -> tuple[int, int, int, int]:
        """T, D, d and the number of columns of B."""
        return self.tokens, max(self.shape), min(self.shape), num_bases(min(self.shape), self.r) * self.r

    def _frozen(self) -> Work:
        T, D, d, _ = self._sizes
        return Work(T * D * d, D * d + T * (D + d)) if self.frozen else Work(0, 0)

    def _product(self) -> Work:
        """`B U`, or the projection `B^T dW'`, and the making of U or its projection on lambda and gamma."""
        _, D, d, k = self._sizes
        return Work(self.product_price * D * k * d, D * k + D * d + 3 * k * d)

    def factored_forward(self) -> Work:
        """`x W + (x U) B`."""
        T, D, d, k = self._sizes
        return _sum(self._frozen(), Work(T * k * (D + d), D * k + 3 * k * d + T * (D + d + 2 * k)))

    def folded_forward(self) -> Work:
        """`W' = W + B U`, then `x W'`."""
        T, D, d, _ = self._sizes
        return _sum(self._product(), Work(T * D * d, 2 * D * d + T * (D + d)))

    def factored_backward(self) -> Work:
        """Gradients of x through both branches, and of U through `x U` or `x B`."""
        T, D, d, k = self._sizes
        short_input = self.shape[1] == d
        products = k * (D + d)  # gradient of U, from two thin products
        if self.needs_input_grad:
            products += k * d if short_input else k * (D + d)
        frozen = self._frozen() if self.needs_input_grad else Work(0, 0)
        return _sum(frozen, Work(T * products, D * k + 5 * k * d + T * (2 * D + 2 * d + 4 * k)))

    def folded_backward(self) -> Work:
        """`dW' = g x^T` and its projection on U; W' made again for the gradient of x, unless it was kept."""
        T, D, d, _ = self._sizes
        outer = Work(T * D * d, D * d + T * (D + d))
        work = _sum(outer, self._product())
        if not self.needs_input_grad:
            return work
        return _sum(work, outer) if self.keeps_weight else _sum(work, outer, self._product(), Work(0, D * d))


def _sum(*parts: Work) -> Work:
    return Work(*map(sum, zip(*parts, strict=True)))


def choose_plan(plan: str, layer: Contraction, *, itemsize: int, balance: float) -> Plan:
    """What `plan` means for a layer and its input.

    "auto" takes for each pass what costs less, in `products + balance * itemsize * elements`. Results are the same up
    to rounding whatever is chosen.

    Args:
        plan: One of `PLANS`.
        layer: The layer and its input.
        itemsize: Bytes of an element in the products.
        balance: `CPU_BALANCE` or `ACCELERATOR_BALANCE`, or your machine's.

    Raises:
        ValueError: the plan is none of `PLANS`.

    Example:
        >>> choose_plan("auto", Contraction((1024, 1024), r=32, tokens=4096), itemsize=4, balance=CPU_BALANCE)
        Plan(fold_forward=True, fold_backward=True)
        >>> choose_plan("auto", Contraction((1024, 1024), r=32, tokens=16), itemsize=4, balance=CPU_BALANCE)
        Plan(fold_forward=False, fold_backward=False)
    """
    check_plan(plan)
    if plan != "auto":
        return Plan(plan == "folded", plan == "folded")

    def cost(work: Work) -> float:
        return work.products + balance * itemsize * work.elements

    fold_forward = cost(layer.folded_forward()) < cost(layer.factored_forward())
    if not fold_forward:
        layer = layer._replace(keeps_weight=False)
    return Plan(fold_forward, cost(layer.folded_backward()) < cost(layer.factored_backward()))


def check_plan(plan: str) -> None:
    """Raise a ValueError if this is no plan."""
    if plan not in PLANS:
        raise ValueError(f"plan={plan!r} is not known: choose one of {list(PLANS)}.")
