"""Reconstruction methods: one file per paper; adding one is its file and its line in the registry below."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from ..config import ReconstructConfig
from ..errors import SchemeError
from .base import LowRankReconstructor, Reconstructor
from .loftq import Loftq
from .lqer import L2qer, Lqer
from .lqlora import LqLora
from .none import NoReconstruction
from .qer import Qer
from .qera import QeraApprox, QeraExact
from .serq import Serq
from .srr import Srr
from .zeroquant import ZeroQuantV2

RECONSTRUCTORS: Mapping[str, Callable[[ReconstructConfig], Reconstructor]] = MappingProxyType(
    {
        "none": NoReconstruction,
        "rtn": NoReconstruction,  # what tables of results call the uncorrected base quantizer
        "zeroquant-v2": ZeroQuantV2,
        "lqer": Lqer,
        "l2qer": L2qer,
        "qer": Qer,
        "qera-approx": QeraApprox,
        "qera-exact": QeraExact,
        "loftq": Loftq,
        "lq-lora": LqLora,
        "serq": Serq,
        "srr": Srr,
    }
)


def corrects_finished_codes(method: str) -> bool:
    """``method`` quantizes the weight itself and only then approximates the error, so that codes without correction, or
    with its first components, are what the quantizer alone gives, or something between. Others take the correction out
    of the weight before they quantize: without it a part of the weight is missing.
    """
    create = RECONSTRUCTORS.get(method)
    return isinstance(create, type) and issubclass(create, LowRankReconstructor | NoReconstruction)


def get_reconstructor(config: ReconstructConfig) -> Reconstructor:
    """The method that ``config`` names, set up with its rank, factor dtype and options.

    Raises:
        SchemeError: no such method, or options that it does not have.
    """
    create = RECONSTRUCTORS.get(config.method)
    if create is None:
        raise SchemeError(f"method {config.method!r} is unknown; choose one of {', '.join(RECONSTRUCTORS)}")
    return create(config)
