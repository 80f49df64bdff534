"""What the manifest says of one linear layer."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from ..config import FactorDtype
from ..errors import ArtifactError, SchemeError
from ..scheme import ActivationScheme, QuantScheme
from ..transform.hadamard import check_rotation
from ..types import LinearWeights
from .factors import FactorShape, factor_dtype_of, factor_shapes
from .jsonio import first_problem

Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=1)]
Width = Annotated[int, Field(ge=0, le=1 << 20)]
LoraForm = Literal["none", "two-factor", "single-factor"]


class Record(BaseModel):
    """Base of everything in the manifest: immutable, no unknown fields, no conversions, no NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _located(value: object, handler: ValidatorFunctionWrapHandler) -> object:
    """Let pydantic say in which record a scheme is impossible: it adds the place to a ValueError only."""
    try:
        return handler(value)
    except SchemeError as error:
        raise ValueError(str(error)) from error


class LinearRecord(Record):
    """What one quantized linear layer consists of, and how well it stands for the dense one.

    lora_form:             ``single-factor``: no lora_down, the correction reads the first ``rank`` channels (SERQ)
    rotation_block:        width of the Hadamard blocks that the input is multiplied with; 0: not rotated
    activations:           how the input is quantized; None: not at all
    relative_weight_error: ``|W - W'| / |W|`` (Frobenius) with W' the quantized weight and its correction
    relative_output_error: the same of the layer's outputs over the calibration inputs; None: not calibrated
    effective_bits:        stored bits per weight, as ``LinearWeights.effective_bits``
    """

    scheme: Annotated[QuantScheme, WrapValidator(_located)]
    in_features: Size
    out_features: Size
    rank: Count
    lora_form: LoraForm
    factor_dtype: FactorDtype | None
    has_bias: bool
    has_input_scale: bool
    has_channel_order: bool
    rotation_block: Width
    activations: Annotated[ActivationScheme, WrapValidator(_located)] | None
    relative_weight_error: Annotated[float, Field(ge=0)]
    relative_output_error: Annotated[float, Field(ge=0)] | None
    effective_bits: Annotated[float, Field(gt=0)]

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if (self.rank == 0) != (self.lora_form == "none") or (self.rank == 0) != (self.factor_dtype is None):
            raise ValueError(f"rank {self.rank}, form {self.lora_form} and type {self.factor_dtype} contradict")
        try:
            self._check_shapes()
        except SchemeError as error:
            raise ValueError(str(error)) from error
        return self

    def _check_shapes(self) -> None:
        self.scheme.check(self.in_features, "weight")
        if self.activations is not None:
            self.activations.check(self.in_features, "input")
        if self.rotation_block:
            check_rotation(self.in_features, self.rotation_block, "input")
        if self.lora_form == "single-factor" and self.rank > self.in_features:
            raise SchemeError(f"a single factor reads {self.rank} channels of {self.in_features}")
        for name, shape in self.factors.items():
            if shape.scheme is not None:
                shape.scheme.check(shape.columns, name)

    @property
    def factors(self) -> dict[str, FactorShape]:
        """Its low-rank factors as they are stored, by name."""
        if self.factor_dtype is None:
            return {}
        is_single = self.lora_form == "single-factor"
        return factor_shapes(self.factor_dtype, self.rank, self.out_features, self.in_features, is_single)

    @classmethod
    def of(
        cls, weights: LinearWeights, relative_weight_error: float, relative_output_error: float | None = None
    ) -> Self:
        """The record of ``weights``. A correction of rank 0 is no correction.

        Raises:
            ArtifactError: the two factors differ in type, have one that the format does not store, or an error is not
                a finite number.
        """
        quantized, correction = weights.quantized, weights.correction
        rank = 0 if correction is None else correction.rank
        form: LoraForm = "none"
        factor_dtype: FactorDtype | None = None
        if correction is not None and rank > 0:
            form = "single-factor" if correction.lora_down is None else "two-factor"
            factor_dtype = factor_dtype_of(correction)
        values: dict[str, Any] = {
            "scheme": quantized.scheme,
            "in_features": quantized.in_features,
            "out_features": quantized.out_features,
            "rank": rank,
            "lora_form": form,
            "factor_dtype": factor_dtype,
            "has_bias": weights.bias is not None,
            "has_input_scale": weights.input_scale is not None,
            "has_channel_order": weights.channel_order is not None,
            "rotation_block": weights.rotation_block,
            "activations": weights.activations,
            "relative_weight_error": relative_weight_error,
            "relative_output_error": relative_output_error,
            "effective_bits": weights.effective_bits,
        }
        try:
            return cls(**values)
        except ValidationError as error:
            raise ArtifactError(f"a linear layer cannot be recorded: {first_problem(error)}") from error
