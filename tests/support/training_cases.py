"""A tiny block of quantized layers in training, with its calibration set."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import Option, TrainingConfig
from models.kernels.reference import ReferenceBackend
from models.quant.rtn import quantize_rtn
from models.reconstruct.qer import Qer
from models.scheme import ActivationScheme, QuantScheme
from models.train.blocks import BlockTrainer
from models.train.initial import BuiltLinear, trainable_linear
from models.train.linear import ActivationClip, TrainableLinear
from models.train.loop import TrainingBatch, TrainingResult
from models.train.weight import TrainableWeight
from models.types import InputStatistics, LinearWeights, QuantizedWeight
from tests.support.qer_cases import qer

SCHEME = QuantScheme(3, 16)
ACTIVATIONS = ActivationScheme(4, -1)
HIDDEN, WIDE = 32, 48
CONFIG = TrainingConfig(num_epochs=4)
Run = Callable[[Tensor], Tensor]


class Mlp(nn.Module):
    """``x + down(silu(gate x) * up x)``: two layers share an input, a third has its own."""

    def __init__(self, gate: Run, up: Run, down: Run) -> None:
        super().__init__()
        self.linears = (gate, up, down)
        self.num_runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.num_runs += not torch.is_grad_enabled()
        gate, up, down = self.linears
        return x + down(F.silu(gate(x)) * up(x))


def quantize(weight: Tensor) -> QuantizedWeight:
    return quantize_rtn(weight, SCHEME)


@dataclass
class Case:
    """A block in training with its calibration set."""

    method: Qer
    linears: dict[str, TrainableLinear]
    batches: list[TrainingBatch]

    def train(self, config: TrainingConfig = CONFIG, seed: int = 0) -> TrainingResult:
        trainer = BlockTrainer(self.linears, self.method, config, "model.layers.5")
        return trainer.train(self.batches, torch.Generator().manual_seed(seed))

    @property
    def block(self) -> Mlp:
        (block,) = self.batches[0].blocks
        assert isinstance(block, Mlp)
        return block

    def tensors(self) -> list[Tensor]:
        """Codes, scales and clip ratios that ship."""
        merged = [linear.merged() for linear in self.linears.values()]
        clips = [torch.tensor(0.0 if it.activations is None else it.activations.clip_ratio) for it in merged]
        return [tensor for it in merged for tensor in (it.quantized.codes, it.quantized.scale)] + clips

    def served_loss(self) -> float:
        """Relative error of the merged layers on the reference backend, mean over all tokens."""
        backend = ReferenceBackend()
        layers = [backend.prepare(it.merged(), torch.device("cpu"), torch.float32) for it in self.linears.values()]
        block = Mlp(*layers)
        errors = [
            (block(batch.inputs) - batch.targets).double().square().sum(1) / batch.targets.double().square().sum(1)
            for batch in self.batches
        ]
        return float(torch.cat(errors).mean())


def formed(weight: TrainableWeight) -> Tensor:
    """The whole weight, with gradients."""
    return torch.cat([part.weight for part in weight.parts(torch.float32)])


def make_case(merge: str = "fixed-point", num_batches: int = 8, **options: Option) -> Case:
    """Quantized inputs beside dense targets; everything from its own generator, so that cases can be compared."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shapes = {"mlp.gate": (WIDE, HIDDEN), "mlp.up": (WIDE, HIDDEN), "mlp.down": (HIDDEN, WIDE)}
        dense = {path: torch.randn(shape) / shape[1] ** 0.5 for path, shape in shapes.items()}
        inputs = [torch.randn(24, HIDDEN) * torch.logspace(-1, 1, HIDDEN) for _ in range(num_batches)]
    target = Mlp(*[lambda x, w=weight: F.linear(x, w) for weight in dense.values()])
    method = qer(merge, 0 if merge == "none" else 4, **options)
    is_trained = method.options.use_clips
    shared, own = (ActivationClip(ACTIVATIONS, is_trained=is_trained, num_readers=count) for count in (2, 1))
    generator = torch.Generator().manual_seed(1)
    linears = {}
    for path, weight in dense.items():
        statistics = InputStatistics(24, mean_square=torch.ones(weight.shape[1], dtype=torch.float64))
        built = BuiltLinear(weight, LinearWeights(quantize(weight), activations=ACTIVATIONS), statistics, quantize)
        clip = own if path == "mlp.down" else shared
        linears[path] = trainable_linear(method, built, clip, generator=generator, precision=torch.float32)
    block = Mlp(*linears.values())
    noisy = [x + 0.02 * x.flip(0) for x in inputs]
    batches = [TrainingBatch(seen, target(x), [block]) for seen, x in zip(noisy, inputs, strict=True)]
    return Case(method, linears, batches)
