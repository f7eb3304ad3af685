"""The picture of the theory page: the loss of a positive and its gradient over the logit."""

from pathlib import Path

import torch
from matplotlib.figure import Figure

from sc_bce import sc_bce_with_logits

PRODUCTS = (0.0, 0.1, 0.2, 0.5, 1.0)  # alpha * beta
# Okabe and Ito's palette, told apart by colour-blind readers too; dashes tell it in grey.
LINES = (("#000000", "-"), ("#0072B2", "-"), ("#009E73", "--"), ("#D55E00", "-."), ("#CC79A7", ":"))


def curves(product: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, the loss of target 1 at each, and its derivative."""
    x = torch.linspace(-4, 8, 601, requires_grad=True)
    loss = sc_bce_with_logits(x, torch.ones_like(x), product / 2, beta=2.0, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    return x.detach(), loss.detach(), gradient


def figure() -> Figure:
    made = Figure(figsize=(8, 3.6), dpi=150, layout="constrained")
    left, right = made.subplots(1, 2)
    for product, (colour, dashes) in zip(PRODUCTS, LINES, strict=True):
        x, loss, gradient = curves(product)
        style = {"color": colour, "linestyle": dashes, "linewidth": 1.6}
        left.plot(x, loss, label=rf"$\alpha\beta = {product:g}$", **style)
        right.plot(x, gradient, **style)
        if product > 0:  # plain BCE has no minimum
            best = int(loss.argmin())
            left.plot(x[best], loss[best], "o", color=colour, markersize=5)
            right.plot(x[best], 0, "o", color=colour, markersize=5)
    right.axhline(0, color="#999999", linewidth=0.8, zorder=0)
    left.set(title="loss of a positive", xlabel="logit $x$", ylabel="BCE$(x, q)$", ylim=(0, 4.2))
    right.set(title=r"its gradient, $\sigma(x) - q$", xlabel="logit $x$")
    left.legend(frameon=False)
    for axes in (left, right):
        axes.margins(x=0)
        axes.spines[["top", "right"]].set_visible(False)
    return made


if __name__ == "__main__":
    figure().savefig(Path(__file__).with_suffix(".png"), metadata={"Software": None})
