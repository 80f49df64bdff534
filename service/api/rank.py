"""Elastic rank: how much of the corrections a call's sequences get, and how its answer says so."""

import logging
from typing import TypeVar

from fastapi.responses import Response

from models.errors import QerveError
from models.reconstruct import corrects_finished_codes

from ..deps import Context
from ..engine.rank_policy import RankPolicy
from ..errors import bad_request
from ..model_info import ModelInfo
from ..settings import Settings

logger = logging.getLogger("qerve.server")

RANK_HEADER = "X-Qerve-Rank"
R = TypeVar("R", bound=Response)


def check_rank(context: Context, requested: int | None) -> None:
    """Raise 400 when more is asked for than the model has."""
    full = context.ranks.full
    if requested is not None and requested > full:
        what = f"rank {full}" if full else "no low-rank correction: rank 0"
        raise bad_request(f"rank {requested} is more than there is. This model has {what}.", "rank")


def rank_of(context: Context, requested: int | None, num_sequences: int, *, is_scored: bool = False) -> int:
    """The rank of a call's ``num_sequences``, which have seats already: what it asks for, or the policy's.

    is_scored: the prompt gets log-probabilities: a measurement, which is made with all of the model whoever waits
    """
    if requested is not None:
        return requested
    if is_scored:
        return context.ranks.full
    rank = context.ranks.give(max(0, context.engine.num_waiting - num_sequences))
    if rank < context.ranks.full:
        context.metrics.rank_shed(num_sequences)
    return rank


def rank_in_engine(context: Context, rank: int) -> int | None:
    """``rank`` as the engine has it: None for all of every correction, whether that was asked for or not."""
    return None if rank >= context.ranks.full else rank


def with_rank(response: R, rank: int) -> R:
    """``response`` with the rank that it was made with in its header."""
    response.headers[RANK_HEADER] = str(rank)
    return response


def rank_policy(info: ModelInfo, settings: Settings) -> RankPolicy:
    """What decides the rank of requests that leave it open.

    Raises:
        QerveError: the settings want a floor that is more than the model has.
    """
    floor, shed_at = settings.shed_rank_floor, settings.shed_rank_queue
    method = info.manifest.build.reconstruct.method
    if floor > info.rank:
        raise QerveError(
            f"shed_rank_floor {floor} is more than the artifact's rank of {info.rank}: choose at most that"
        )
    if shed_at is not None and not corrects_finished_codes(method):
        logger.warning(
            "shed_rank_queue: %s takes its correction out of the weights before it quantizes them; measure what is "
            "left with rank %d (POST /v1/perplexity) before you let the server shed the rest",
            method,
            floor,
        )
    return RankPolicy(info.rank, floor, shed_at)
