"""Gradient statistics against automatic differentiation of the whole network in transformers."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from models.calibration.backward import collect_gradients
from models.calibration.gradients import num_skipped
from models.errors import CalibrationError
from models.llama.checkpoint import open_checkpoint
from models.types import Statistic
from tests.support.builds import inputs_of
from tests.support.tiny_checkpoints import VOCAB_SIZE, random_tensors, tiny_config, write_checkpoint

BOTH = frozenset({Statistic.FISHER, Statistic.OUTPUT_GRADIENT})
CPU = torch.device("cpu")
NUM_SEQUENCES, LENGTH = 3, 11
NUM_SKIPPED = 2  # of a sequence this short, a quarter
PATHS = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.v_proj",
    "model.layers.2.mlp.gate_proj",
    "model.layers.3.self_attn.o_proj",
    "model.layers.4.mlp.down_proj",
]


def exact_in_bfloat16(tensors):
    """Embedding and head as an artifact keeps them, so that 16 bits lose nothing."""
    names = {"model.embed_tokens.weight", "lm_head.weight"}
    return {name: value.bfloat16().float() if name in names else value for name, value in tensors.items()}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def directory(request, tmp_path_factory):
    """Five layers: segments of three and two."""
    values = tiny_config(num_hidden_layers=5, tie_word_embeddings=request.param, attention_bias=True)
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), values, exact_in_bfloat16(random_tensors(values)))


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(VOCAB_SIZE, (NUM_SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def summed_nll(model, sequence):
    logits = model(sequence[None]).logits[0, :-1]
    return F.cross_entropy(logits, sequence[1:], reduction="sum")


def weight_gradients(model, path, tokens):
    """(num_sequences, out_features, in_features) float64."""
    weight = model.get_submodule(path).weight
    return torch.stack([torch.autograd.grad(summed_nll(model, row), weight)[0].double() for row in tokens])


def output_gradients(model, path, tokens):
    """(num_sequences * length, out_features) float64."""
    outputs, gradients = [], []
    handle = model.get_submodule(path).register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    for row in tokens:
        loss = summed_nll(model, row)
        gradients.append(torch.autograd.grad(loss, outputs.pop())[0][0].double())
    handle.remove()
    return torch.cat(gradients)


def root_means_by_double_loop(gradients):
    """Row and column means of sqrt(F), element by element."""
    num_sequences, num_rows, num_columns = gradients.shape
    rows, columns = [0.0] * num_rows, [0.0] * num_columns
    values = gradients.tolist()
    for row in range(num_rows):
        for column in range(num_columns):
            fisher = sum(values[s][row][column] ** 2 for s in range(num_sequences)) / num_sequences
            rows[row] += fisher**0.5 / num_columns
            columns[column] += fisher**0.5 / num_rows
    return torch.tensor(rows, dtype=torch.float64), torch.tensor(columns, dtype=torch.float64)


@pytest.mark.parametrize("path", PATHS)
def test_statistics_are_those_of_automatic_differentiation_through_the_whole_network(directory, tokens, model, path):
    found = collect_gradients(open_checkpoint(str(directory)), tokens, CPU, BOTH)[path]
    rows, columns = root_means_by_double_loop(weight_gradients(model, path, tokens))
    gradients, inputs = output_gradients(model, path, tokens), inputs_of(model, path, tokens)
    is_counted = torch.arange(len(gradients)) % LENGTH >= NUM_SKIPPED
    gradients, inputs = gradients[is_counted], inputs[is_counted]
    output, sizes = gradients.square().mean(0), gradients.square().sum(1)
    energy = (sizes[:, None] * inputs.square()).sum(0) / sizes.sum()
    torch.testing.assert_close(found.fisher_rows, rows, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.fisher_columns, columns, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.output_gradient, output, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(found.input_energy, energy, rtol=1e-4, atol=1e-9)


def test_one_weight_at_a_time_the_gradient_is_the_slope_of_the_loss(directory, tokens, model):
    """With one sequence and one weight moved, sqrt(F) is the size of the finite difference."""
    path, row, step = "model.layers.2.mlp.up_proj", 5, 2e-2
    found = collect_gradients(open_checkpoint(str(directory)), tokens[:1], CPU, BOTH)[path]
    weight = model.get_submodule(path).weight.data
    slopes = []
    with torch.no_grad():
        for column in range(weight.shape[1]):
            losses, original = [], weight[row, column].item()
            for change in (step, -step):
                weight[row, column] = original + change
                losses.append(summed_nll(model, tokens[0]).item())
            weight[row, column] = original
            slopes.append(abs(losses[0] - losses[1]) / (2 * step))
    assert found.fisher_rows[row].item() == pytest.approx(sum(slopes) / len(slopes), rel=5e-3)


def test_with_rotation_the_gradient_is_that_of_the_rotated_weight(directory, tokens, model):
    path, block = "model.layers.4.mlp.down_proj", 16
    found = collect_gradients(
        open_checkpoint(str(directory)), tokens, CPU, BOTH, lambda name, _n: block if name == path else 0
    )
    plain = collect_gradients(open_checkpoint(str(directory)), tokens, CPU, BOTH)
    hadamard = torch.tensor([[1.0]], dtype=torch.float64)
    while len(hadamard) < block:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), hadamard)
    hadamard /= block**0.5
    gradients = weight_gradients(model, path, tokens)
    rotated = torch.cat([part @ hadamard for part in gradients.split(block, dim=2)], 2)
    rows, columns = root_means_by_double_loop(rotated)
    torch.testing.assert_close(found[path].fisher_rows, rows, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found[path].fisher_columns, columns, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found[path].output_gradient, plain[path].output_gradient)
    torch.testing.assert_close(found[path].input_energy.sum(), plain[path].input_energy.sum())
    assert not torch.allclose(found[path].input_energy, plain[path].input_energy, rtol=0.1)
    assert found[PATHS[0]].fisher_columns.equal(plain[PATHS[0]].fisher_columns)


@pytest.mark.parametrize("requires", [{Statistic.FISHER}, {Statistic.OUTPUT_GRADIENT, Statistic.ABSMAX}])
def test_only_what_was_asked_for_is_taken(directory, tokens, requires):
    checkpoint = open_checkpoint(str(directory))
    found = collect_gradients(checkpoint, tokens, CPU, frozenset(requires))
    assert list(found) == list(checkpoint.config.linear_shapes())
    for statistics in found.values():
        assert (statistics.fisher_rows is not None) == (Statistic.FISHER in requires)
        assert (statistics.fisher_columns is not None) == (Statistic.FISHER in requires)
        assert (statistics.output_gradient is not None) == (Statistic.OUTPUT_GRADIENT in requires)
        assert (statistics.input_energy is not None) == (Statistic.OUTPUT_GRADIENT in requires)


@pytest.mark.parametrize(("length", "expected"), [(1, 0), (3, 0), (4, 1), (15, 3), (16, 4), (2048, 4)])
def test_only_attention_sinks_are_skipped(length, expected):
    assert num_skipped(length) == expected


def test_progress_ends_at_its_total(directory, tokens):
    seen = []
    collect_gradients(
        open_checkpoint(str(directory)), tokens, CPU, BOTH, on_progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(done, 5) for done in range(1, 6)]


@pytest.mark.parametrize("shape", [(0, 8), (2, 1)])
def test_tokens_without_a_prediction_are_refused(directory, shape):
    tokens = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(CalibrationError, match="num_gradient_sequences"):
        collect_gradients(open_checkpoint(str(directory)), tokens, CPU, BOTH)


def test_gradients_that_are_not_finite_name_the_layer(tmp_path, tokens):
    values = tiny_config()
    tensors = random_tensors(values)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.inf
    directory = write_checkpoint(tmp_path / "broken", values, tensors)
    with pytest.raises(CalibrationError, match=r"model\.layers\.1\..* not finite"):
        collect_gradients(open_checkpoint(str(directory)), tokens, CPU, BOTH)


def test_no_layer_is_read_before_the_one_above_it_is_done_and_released(directory, tokens, monkeypatch):
    """Going back, every read of a decoder layer's weights is of the current one or of the segment below it."""
    checkpoint = open_checkpoint(str(directory))
    order = []
    read = checkpoint.tensor

    def tensor(name, narrow=False):
        if name.endswith("q_proj.weight"):
            order.append(int(name.split(".")[2]))
        return read(name, narrow)

    monkeypatch.setattr(checkpoint, "tensor", tensor)
    collect_gradients(checkpoint, tokens, CPU, BOTH)
    assert order == [0, 1, 2, 3, 4, 3, 4, 3, 0, 1, 2, 1, 0]
