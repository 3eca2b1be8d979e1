"""AdaLoRA's layers (arXiv:2303.10512): singular values E and vectors A, B of each adapter."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interop.adalora import SVDFactors, factor_shapes
from interop.delta import Factors
from randlora_torch.gradients import product_dtype
from randlora_torch.layer import AdapterLayer, compute_device
from randlora_torch.svd import apply_delta, delta_weight
from randlora_torch.weights import ConvolutionWeight, PlainWeight


class AdaLoraLayer(AdapterLayer):
    """A frozen base layer and the AdaLoRA adapters on it (arXiv:2303.10512).

    The update is `lora_alpha / (r + 1e-5) * B (E * A)`, with the rank r that the adapter starts with, whatever is left
    of it. Parameters stand under PEFT's names: `lora_A[adapter_name]` (r, in), `lora_E` (r, 1) and `lora_B` (out, r).

    Args:
        base_layer: The layer to adapt.
        adapter_name: Name of the first adapter.
        r: Triplets to start with, at least 0.
        lora_alpha: See above.
        lora_dropout: Probability of zeroing an input of the adapter branch while training.
        init_lora_weights: True starts at dW = 0, False at a random update, None with zeros for `set_factors` to fill.

    Raises:
        ValueError: r is negative.
    """

    adapter_layer_names = ("lora_A", "lora_E", "lora_B")
    dropout_name = "lora_dropout"
    lora_A: nn.ParameterDict
    lora_E: nn.ParameterDict
    lora_B: nn.ParameterDict
    lora_dropout: nn.ModuleDict

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        r: int = 0,
        lora_alpha: int | float = 1,
        lora_dropout: float = 0.0,
        init_lora_weights: bool | None = True,
    ) -> None:
        super().__init__(base_layer, adapter_name)
        self.update_layer(adapter_name, r, lora_alpha, lora_dropout, init_lora_weights)

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        lora_alpha: int | float,
        lora_dropout: float = 0.0,
        init_lora_weights: bool | None = True,
    ) -> None:
        """Add an adapter; see the class."""
        if r < 0:
            raise ValueError(f"r={r}: must be at least 0; a layer with r=0 computes as its base does.")
        self.scaling[adapter_name] = lora_alpha / (r + 1e-5)
        self._add_dropout(adapter_name, lora_dropout)
        device = compute_device(self.base_layer)
        draw = torch.zeros if init_lora_weights is None else torch.randn
        A, E, B = (draw(shape, device=device) for shape in factor_shapes(r, (self.out_features, self.in_features)))
        if init_lora_weights:
            A, E, B = 0.02 * A, torch.zeros_like(E), 0.02 * B
        self.set_factors(adapter_name, SVDFactors(A, E, B))

    def set_factors(self, adapter_name: str, factors: Factors | SVDFactors) -> None:
        """Replace A, E and B of an adapter, on the device that the layer computes on; their rank may be another."""
        assert isinstance(factors, SVDFactors)
        super().set_factors(adapter_name, factors)
        self.r[adapter_name] = len(factors.E)

    def factors(self, adapter_name: str) -> SVDFactors:
        """A (r, in), E (r, 1) and B (out, r) of an adapter."""
        return SVDFactors(self.lora_A[adapter_name], self.lora_E[adapter_name], self.lora_B[adapter_name])

    def get_delta_weight(self, adapter_name: str) -> Float[Tensor, "outputs inputs"]:
        """The update of an adapter in the (out, in) orientation of nn.Linear, in float32 or wider."""
        return delta_weight(*self.factors(adapter_name), scaling=self.scaling[adapter_name])

    def _update(self, adapter_name: str, x: Tensor) -> Tensor:
        factors = (part.to(x.device) for part in self.factors(adapter_name))
        return apply_delta(self._dropped(adapter_name, x), *factors, scaling=self.scaling[adapter_name])


class SVDLinear(PlainWeight, AdaLoraLayer):
    """AdaLoRA on `nn.Linear` or on transformers' `Conv1D`, whose weight is stored (in, out)."""


class SVDConv2d(ConvolutionWeight, AdaLoraLayer):
    """AdaLoRA on `nn.Conv2d`, of any stride, padding, dilation and number of groups."""

    def _update(self, adapter_name: str, x: Tensor) -> Tensor:
        """The convolution of x with dW, in the dtype of x or autocast's."""
        dtype = product_dtype(x)
        kernel = self._stored(self.get_delta_weight(adapter_name)).to(x.device, dtype)
        return self.base_layer._conv_forward(self._dropped(adapter_name, x).to(dtype), kernel, None)
