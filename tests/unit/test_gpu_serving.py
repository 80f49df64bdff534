"""What only a GPU can prove: the paged kernels, captured graphs and loading on one. `make gpu-check` runs it."""

from pathlib import Path

import pytest
import torch

from models.artifact.load import load_artifact
from models.llama.cuda_graphs import CudaGraphDevice
from models.llama.paged_network import PagedLlama
from service.gpu import CudaGauge, GpuServing
from service.settings import Settings
from tests.support.native_network import network_of, save
from tests.support.paged_steps import next_tokens, paged_case, scattered
from tests.unit.test_paged_attention import bound, wanted
from tests.unit.test_paged_network import texts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
CUDA = torch.device("cuda")
NUM_BLOCKS = 24


def loaded(folder: Path) -> PagedLlama:
    save(folder / "art", network_of(num_hidden_layers=2))
    model = load_artifact(folder / "art", CUDA).model
    assert isinstance(model, PagedLlama)
    return model


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize(
    ("contexts", "num_rows", "window"), [((1, 300, 2000), (1, 1, 1), None), ((90, 500), (4, 8), 70)]
)
@pytest.mark.parametrize(("group", "head_dim"), [(1, 128), (4, 128), (8, 64), (3, 80)])
def test_the_kernel_computes_attention_on_the_card(group, head_dim, contexts, num_rows, window, is_int8) -> None:
    from models.kernels.paged import PagedLayer, PagedRows
    from models.kernels.triton.paged import TritonPagedAttention, splits_for

    case = paged_case(
        contexts, num_rows, group=group, kv_heads=2, head_dim=head_dim, dtype=torch.bfloat16, is_int8=is_int8
    )
    layer, rows = case.layer, case.rows
    scales = [None if it is None else it.to(CUDA) for it in (layer.key_scales, layer.value_scales)]
    query = case.query.to(CUDA)
    output = torch.empty_like(query)
    tensors = (it.to(CUDA) for it in (rows.row_starts, rows.num_rows, rows.context_lens, rows.block_tables))
    processors = torch.cuda.get_device_properties(CUDA).multi_processor_count
    TritonPagedAttention(splits_for(processors, 2))(
        query,
        PagedLayer(layer.keys.to(CUDA), layer.values.to(CUDA), scales[0], scales[1], layer.block_size),
        PagedRows(*tensors, rows.max_rows),
        window,
        output,
    )
    expected = wanted(case, window)
    assert bool(((output.cpu().double() - expected).abs() <= bound(case, expected)).all())


def test_decode_steps_replay_what_running_them_gives(tmp_path: Path) -> None:
    """Every size, as sequences come and go; kernels of another size may round otherwise."""
    model = loaded(tmp_path)
    plain = PagedLlama(model.layers, model.attention)
    cache, other = model.new_cache(NUM_BLOCKS), plain.new_cache(NUM_BLOCKS)
    model.record_decodes(cache, (1, 2, 4), 64, CudaGraphDevice(CUDA), has_ranks=True)
    pairs = [scattered(texts(*[30] * 4), NUM_BLOCKS) for _ in range(2)]
    for step in range(20):
        going = range(1 + step % 4)
        batches = [next_tokens([(sequences[index], 1) for index in going]) for sequences in pairs]
        replayed, eager = model.step(batches[0], cache), plain.step(batches[1], other)
        assert replayed is not None
        assert eager is not None
        torch.testing.assert_close(replayed, eager, rtol=0, atol=0.05 * float(eager.abs().max()))


def test_memory_is_what_was_planned(tmp_path: Path) -> None:
    model = loaded(tmp_path)
    settings = Settings(max_num_seqs=4, max_num_batched_tokens=64, gpu_memory_utilization=0.5, max_model_len=64)
    gpu = GpuServing(model, settings, CudaGauge(CUDA), has_ranks=True)
    total = torch.cuda.mem_get_info(CUDA)[1]
    assert gpu.memory.budget == total // 2
    cache = model.new_cache(gpu.memory.kv_cache // model.cache_block_bytes - 1)
    assert cache.nbytes == gpu.memory.kv_cache
    gpu.record(cache, 64)
    assert gpu.rows["decode graphs"].startswith("batch sizes")
    assert torch.cuda.memory_reserved(CUDA) <= gpu.memory.budget


def test_loading_leaves_nothing_on_the_card_but_what_stays(tmp_path: Path) -> None:
    before = torch.cuda.memory_allocated(CUDA)
    save(tmp_path / "art", network_of(num_hidden_layers=2))
    model = load_artifact(tmp_path / "art", CUDA)
    held = torch.cuda.memory_allocated(CUDA) - before
    assert held <= 1.2 * sum(model.resident_bytes.values()) + (1 << 20)  # the allocator rounds up
