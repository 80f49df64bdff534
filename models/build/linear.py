"""One linear layer of a build: rotate, aim, order, quantize, reconstruct, refit."""

from dataclasses import replace

from torch import Tensor

from ..config import BuildConfig
from ..reconstruct.base import permute_statistics
from ..reconstruct.loss import LayerErrors, layer_errors
from ..reconstruct.regression import output_target, refit
from ..scheme import QuantScheme
from ..train.initial import BuiltLinear
from ..transform.inputs import InputTransform
from ..transform.shrink import shrunk
from ..types import InputStatistics, QuantizeFn
from .recipe import LayerRecipe


class LinearBuilder:
    """Builds the linear layers that share one input: what depends on the input alone is worked out once."""

    def __init__(self, config: BuildConfig) -> None:
        self._config = config
        self._bound: dict[QuantScheme, QuantizeFn] = {}
        self._fitted: InputStatistics | None = None

    def build(
        self, weight: Tensor, statistics: InputStatistics, recipe: LayerRecipe
    ) -> tuple[BuiltLinear, LayerErrors]:
        """Quantize and correct ``weight`` (out_features, in_features) float32.

        Args:
            weight: dense, as the checkpoint has it.
            statistics: of the layer's rotated input, and gradients where the method needs them.
            recipe: the layer's.

        Raises:
            SchemeError, CalibrationError: as ``Reconstructor.reconstruct``.
        """
        weight = InputTransform(rotation_block=recipe.rotation_block).weight(weight)
        wanted, inputs = weight, statistics
        if self._config.objective == "output":
            wanted, inputs = output_target(weight, statistics), _of_quantized_inputs(statistics)
        fitted = self._shrunk(inputs, recipe.rotation_block)
        quantize = self._quantize_fn(recipe, fitted)
        order = recipe.reconstructor.channel_order(wanted, fitted)
        if order is not None:
            weight, wanted = weight[:, order], wanted[:, order]
            statistics, inputs = permute_statistics(statistics, order), permute_statistics(inputs, order)
            fitted = permute_statistics(fitted, order)
            quantize = recipe.quantizer.bind(fitted)
        weights = recipe.reconstructor.reconstruct(wanted, fitted, quantize)
        if self._config.reconstruct.refit and weights.correction is not None:
            weights = refit(weights, weight, statistics, self._config.reconstruct.factor_dtype)
        errors = layer_errors(wanted, weights, inputs)
        activations = self._config.activations
        weights = replace(weights, channel_order=order, rotation_block=recipe.rotation_block, activations=activations)
        return BuiltLinear(wanted, weights, inputs, quantize), errors

    def _shrunk(self, statistics: InputStatistics, rotation_block: int) -> InputStatistics:
        """What quantizer and method are fitted to; errors are measured with the statistics as they are."""
        if self._fitted is None:
            self._fitted = shrunk(statistics, self._config.calibration.shrinkage, rotation_block)
        return replace(statistics, autocorrelation=self._fitted.autocorrelation)

    def _quantize_fn(self, recipe: LayerRecipe, statistics: InputStatistics) -> QuantizeFn:
        if recipe.scheme not in self._bound:
            self._bound[recipe.scheme] = recipe.quantizer.bind(statistics)
        return self._bound[recipe.scheme]


def _of_quantized_inputs(statistics: InputStatistics) -> InputStatistics:
    """What a method takes for the input's statistics when it aims at outputs from quantized inputs."""
    quantized = statistics.quantized_autocorrelation
    mean_square = None if quantized is None else quantized.diagonal().clone()
    return replace(statistics, autocorrelation=quantized, mean_square=mean_square)
