"""Block-wise training on a tiny block: never worse than the start, the best state kept, the same whenever it is run."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from models.config import TrainingConfig
from models.errors import CalibrationError
from models.train.blocks import TrainingResult, factor_learning_rate, relative_error
from tests.support.qer_cases import qer
from tests.support.training_cases import CONFIG, Case, make_case

MERGES = ["fixed-point", "shift", "direct", "ternary", "inside-rounding", "requantize", "none"]


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("merge", MERGES)
def test_the_loss_is_never_above_that_of_the_start_and_what_is_left_is_what_is_reported(merge: str) -> None:
    case = make_case(merge)
    start = case.served_loss()
    result = case.train()
    assert result.num_steps == 32
    assert result.loss_before == pytest.approx(start, rel=1e-5)
    if merge != "requantize":  # whose trained weights are not those that ship
        assert result.loss_after == pytest.approx(case.served_loss(), rel=1e-5)
    assert result.loss_after <= result.loss_before
    if merge in {"fixed-point", "inside-rounding", "none"}:
        assert result.loss_after < 0.95 * start


def test_low_rank_integers_reach_what_scales_and_clips_alone_do_not() -> None:
    config = replace(CONFIG, num_epochs=12, learning_rate=0.5, scale_learning_rate=5e-4)
    control, factors = (make_case(merge).train(config).loss_after for merge in ("none", "fixed-point"))
    assert factors < 0.9 * control


def test_a_training_that_only_spoils_leaves_everything_as_it_was() -> None:
    case = make_case()
    before = case.tensors()
    result = case.train(TrainingConfig(learning_rate=1e4, scale_learning_rate=2.0, clip_learning_rate=0.5))
    assert result.loss_after == result.loss_before
    assert_same(case.tensors(), before)


def test_the_best_state_that_was_seen_is_kept_not_the_last() -> None:
    rough = TrainingConfig(num_epochs=2, learning_rate=0.3)
    last, best = make_case(), make_case()
    final = last.train(replace(rough, num_checks=1)).loss_after
    result = best.train(replace(rough, num_checks=16))
    assert result.loss_after < final
    assert result.loss_after == pytest.approx(best.served_loss(), rel=1e-5)


@pytest.mark.parametrize("trained", ["scale", "clip", "factor"])
def test_factors_scales_and_clips_have_learning_rates_of_their_own(trained: str) -> None:
    case, start = make_case(), make_case()
    parameters = {id(it) for linear in case.linears.values() for it in linear.parameters()}
    assert len(parameters) == 3 * 3 + 2  # two clips for three layers
    result = case.train(
        replace(
            CONFIG,
            learning_rate=0.25 if trained == "factor" else 1e-30,
            scale_learning_rate=5e-3 if trained == "scale" else 0.0,
            clip_learning_rate=1e-2 if trained == "clip" else 0.0,
        )
    )
    assert result.loss_after < result.loss_before
    for path, linear in case.linears.items():
        moved, base = linear.merged(), start.linears[path].merged()
        assert moved.activations is not None
        assert torch.equal(moved.quantized.codes, base.quantized.codes) == (trained != "factor")
        assert torch.equal(moved.quantized.scale, base.quantized.scale) == (trained != "scale")
        assert (moved.activations == base.activations) == (trained != "clip")
    ratios = [it.merged().activations for it in case.linears.values()]
    assert ratios[0] == ratios[1]
    assert (ratios[0] == ratios[2]) == (trained != "clip")


def test_clip_ratios_stay_between_their_bounds_however_fast_they_learn() -> None:
    case = make_case("none")
    ratios: list[float] = []

    def watched(x: Tensor) -> Tensor:
        clips = [linear.clip for linear in case.linears.values()]
        ratios.extend(float(clip.ratio.detach()) for clip in clips if clip is not None)
        output: Tensor = case.block(x)
        return output

    watching = replace(case, batches=[replace(batch, blocks=[watched]) for batch in case.batches])
    watching.train(replace(CONFIG, scale_learning_rate=0.0, clip_learning_rate=5.0))
    assert min(ratios) == pytest.approx(0.1)
    assert max(ratios) == 1


def test_without_anything_to_train_nothing_changes() -> None:
    case = make_case("none", use_scales=False, use_clips=False)
    before = case.tensors()
    result = case.train()
    assert result == TrainingResult(result.loss_before, result.loss_before, 0)
    assert_same(case.tensors(), before)


def test_the_same_generator_gives_the_same_layers_and_another_one_another_order() -> None:
    cases = [make_case() for _ in range(3)]
    results = [case.train(seed=seed) for case, seed in zip(cases, (0, 0, 1), strict=True)]
    assert results[0] == results[1] != results[2]
    assert_same(cases[0].tensors(), cases[1].tensors())


def test_checkpointing_changes_no_bit() -> None:
    plain, checkpointed = make_case(), make_case()
    assert plain.train() == checkpointed.train(replace(CONFIG, use_checkpointing=True))
    assert_same(plain.tensors(), checkpointed.tensors())


def test_what_comes_out_of_inference_mode_can_be_trained_on() -> None:
    plain, frozen = make_case(), make_case()
    with torch.inference_mode():
        batches = [replace(it, inputs=it.inputs.clone(), targets=it.targets.clone()) for it in frozen.batches]
    assert Case(frozen.method, frozen.linears, batches).train() == plain.train()


def test_the_loss_is_measured_on_as_many_batches_and_as_often_as_asked() -> None:
    case = make_case(num_batches=7)
    case.train(TrainingConfig(num_epochs=2, num_check_batches=4, num_checks=3))
    assert case.block.num_runs == 4 * (1 + 3)


@pytest.mark.parametrize("penalty", ["rounding", "overflow"])
def test_penalties_are_part_of_what_is_learnt(penalty: str) -> None:
    def lost(weight: float) -> float:
        case = make_case("shift", shift=3, factor_bits=4)
        for linear in case.linears.values():  # starts with codes that leave the grid, so that any training helps
            with torch.no_grad():
                linear.weight.get_parameter("codes.lora_down").normal_(generator=torch.Generator().manual_seed(2))
        chosen: dict[str, Any] = {"rounding_penalty": 0.0, "overflow_penalty": 0.0, f"{penalty}_penalty": weight}
        case.train(replace(CONFIG, learning_rate=0.05, num_checks=1, **chosen))
        case.block(case.batches[0].inputs)
        left = [getattr(linear, f"penalty_of_{penalty}").detach() for linear in case.linears.values()]
        return float(sum(left))

    assert lost(30.0) < 0.5 * lost(0.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_targets_that_are_not_finite_are_refused_by_the_name_of_the_layers(value: float) -> None:
    case = make_case()
    case.batches[0].targets[3, 3] = value
    with pytest.raises(CalibrationError, match=r"^model\.layers\.5: the loss before training is nan"):
        case.train()
    case = make_case()
    case.batches[-1].targets[3, 3] = value
    with pytest.raises(CalibrationError, match=r"^model\.layers\.5: the loss in step \d of 8, calibration batch 7 is"):
        case.train(TrainingConfig(num_check_batches=2))


def test_a_training_that_diverges_says_what_to_do() -> None:
    with pytest.raises(CalibrationError, match=r"^model\.layers\.5: the loss in step 2 .* lower the learning rate"):
        make_case("requantize").train(TrainingConfig(learning_rate=1e30))


def test_a_calibration_set_without_sequences_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"^model\.layers\.5: training needs calibration sequences"):
        make_case(num_batches=0).train()


def test_each_merge_has_a_learning_rate_that_suits_its_factors_unless_one_is_given() -> None:
    rates = {merge: factor_learning_rate(qer(merge), TrainingConfig()) for merge in MERGES}
    assert rates["fixed-point"] == rates["shift"] == rates["direct"] == 0.06
    assert 0 < rates["requantize"] < rates["inside-rounding"] < rates["ternary"] < 0.06
    assert factor_learning_rate(qer("ternary"), TrainingConfig(learning_rate=0.7)) == 0.7


def test_every_token_counts_alike_in_the_loss_however_large_it_is() -> None:
    targets = torch.tensor([[3.0, 4.0], [3e4, 4e4], [0.06, 0.08]])
    outputs = targets + torch.tensor([[0.5, 0.0], [0.0, 1e4], [0.0, 0.02]])
    assert float(relative_error(outputs[:1], targets[:1])) == pytest.approx(0.01)
    assert float(relative_error(outputs[:2], targets[:2])) == pytest.approx((0.01 + 0.04) / 2, rel=1e-3)


def test_a_token_of_nothing_leaves_the_loss_finite() -> None:
    targets = torch.tensor([[3.0, 4.0], [0.0, 0.0], [4.0, 3.0]])
    assert float(relative_error(targets + 0.01, targets)) < 0.01
