"""The end-to-end phase: its loss and gradient against autograd's, and what it may change."""

import pytest
import torch
from torch import Tensor, nn

from models.config import TrainingConfig
from models.errors import CalibrationError
from models.llama.model import RMSNorm
from models.quant.rtn import quantize_rtn
from models.scheme import QuantScheme
from models.train.end_to_end import ScaleTrainer
from models.train.linear import TrainableLinear
from models.train.loop import TrainingBatch
from models.train.weight import ScaledWeight
from models.types import LinearWeights

WIDTH, VOCAB, TOKENS = 16, 300, 150


class Case:
    """Two linear layers with a nonlinearity between them, quantized to three bits, and a head."""

    def __init__(self, seed: int = 0, head_dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.dense = [torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5 for _ in range(2)]
        quantized = [quantize_rtn(weight, QuantScheme(3, -1)) for weight in self.dense]
        self.linears = {
            f"layers.{index}": TrainableLinear(
                ScaledWeight(it, use_scales=True),
                LinearWeights(it),
                None,
                torch.ones(WIDTH),
                precision=torch.float32,
            )
            for index, it in enumerate(quantized)
        }
        self.norm = RMSNorm(torch.rand(WIDTH, generator=generator) + 0.5, 1e-5)
        self.head = torch.randn(VOCAB, WIDTH, generator=generator).to(head_dtype)
        inputs = [torch.randn(TOKENS, WIDTH, generator=generator) for _ in range(4)]
        blocks = [nn.Sequential(linear, nn.Tanh()) for linear in self.linears.values()]
        self.batches = [TrainingBatch(x, self.run_dense(x), blocks) for x in inputs]

    def run_dense(self, x: Tensor) -> Tensor:
        for weight in self.dense:
            x = torch.tanh(x @ weight.T)
        return x

    def trainer(self, precision: torch.dtype = torch.float32) -> ScaleTrainer:
        config = TrainingConfig(end_to_end_epochs=4, end_to_end_learning_rate=1e-2)
        return ScaleTrainer(self.linears, self.norm, self.head, config, precision=precision)

    def divergence(self, batch: TrainingBatch) -> Tensor:
        """The definition, by torch's own loss."""
        given = self.norm(batch.run(use_checkpointing=False)) @ self.head.float().T
        wanted = self.norm(batch.targets) @ self.head.float().T
        return nn.functional.kl_div(
            given.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean"
        )


@pytest.mark.parametrize("head_dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_the_divergence_in_nats_per_token_and_its_gradient_is_autograds(head_dtype: torch.dtype) -> None:
    case = Case(head_dtype=head_dtype)
    batch = case.batches[0]
    parameters = list(nn.ModuleList(case.linears.values()).parameters())
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    loss = case.divergence(batch)
    gradients = torch.autograd.grad(loss, parameters)
    assert case.trainer().backward(batch, 0.5) == pytest.approx(float(loss.detach()), rel=1e-4)
    assert case.trainer().measure(batch) == pytest.approx(float(loss.detach()), rel=1e-4)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


def test_lower_precision_rounds_the_way_back_through_the_head_and_leaves_the_loss_alone() -> None:
    case = Case()
    batch = case.batches[0]
    normed = case.norm(batch.run(use_checkpointing=False)).detach()
    loss, gradient = case.trainer()._divergence(normed, batch.targets)
    rounded_loss, rounded = case.trainer(torch.bfloat16)._divergence(normed, batch.targets)
    given, wanted = ((rows @ case.head.T).softmax(-1) for rows in (normed, case.norm(batch.targets)))
    # Each factor and the product are off by at most half a unit in the last of 8 bits.
    bound = 3 * 2**-8 * ((given - wanted).abs() @ case.head.abs()) / len(normed)
    assert rounded_loss == loss
    assert not torch.equal(rounded, gradient)
    assert bool(((rounded - gradient).abs() <= bound + 1e-7).all())


def test_training_brings_the_distributions_closer_and_changes_scales_only() -> None:
    case = Case()
    codes = [linear.merged().quantized.codes.clone() for linear in case.linears.values()]
    start = [linear.merged().quantized.scale.clone() for linear in case.linears.values()]
    result = case.trainer().train(case.batches, torch.Generator().manual_seed(0))
    reached = sum(float(case.divergence(batch).detach()) for batch in case.batches) / len(case.batches)
    assert result.loss_after < 0.95 * result.loss_before
    assert result.loss_after == pytest.approx(reached, rel=1e-3)
    for linear, before, scale in zip(case.linears.values(), codes, start, strict=True):
        merged = linear.merged().quantized
        assert torch.equal(merged.codes, before)
        assert merged.scale.dtype == torch.float16
        assert not torch.equal(merged.scale, scale)


def test_progress_is_told_step_by_step() -> None:
    case, seen = Case(), []
    case.trainer().train(case.batches, torch.Generator(), lambda done, total: seen.append((done, total)))
    assert seen == [(step, 16) for step in range(1, 17)]


def test_a_teacher_that_is_not_finite_is_refused_before_the_first_step() -> None:
    case = Case()
    case.batches[0].targets[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="end-to-end phase: the loss before training is nan"):
        case.trainer().train(case.batches, torch.Generator())
