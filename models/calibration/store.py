"""Input statistics on disk, so that several builds from the same inputs collect them once.

One safetensors file per decoder layer. Values are kept in float64, bit for bit: a build from the store must equal a
build without it. A matrix that is exactly symmetric is stored as its upper triangle, row after row, which halves it;
tensors that several linear layers share (q, k and v read the same input) are stored once.

The layout, in the file's metadata: which tensor is which statistic of which layer, the store's fingerprint and a
sha256 of every tensor. Whatever does not match is as good as absent: the statistics are collected again.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CalibrationError
from ..types import InputStatistics, Statistic

VERSION = 1
_TENSOR_FIELDS = tuple(item.name for item in fields(InputStatistics) if item.name != "num_tokens")
_FIELDS = {statistic: (statistic.value,) for statistic in Statistic} | {
    Statistic.FISHER: ("fisher_rows", "fisher_columns"),
    Statistic.OUTPUT_GRADIENT: ("output_gradient", "input_energy"),
}
_Children: TypeAlias = dict[str, InputStatistics]


class StatisticsStore:
    """The statistics of one calibration set on its way through one dense network.

    directory:   made when something is saved
    fingerprint: of everything that the statistics depend on: checkpoint, tokens, transforms, activations
    num_loaded, num_saved: decoder layers that were taken from the store, or collected and put into it
    """

    def __init__(self, directory: Path, fingerprint: str) -> None:
        self.directory = directory
        self.fingerprint = fingerprint
        self.num_loaded = 0
        self.num_saved = 0

    def has(self, layer_index: int, requires: frozenset[Statistic]) -> bool:
        """Whether ``load`` would return the statistics of ``layer_index``: every byte is compared with its hash."""
        return self._load(layer_index, requires) is not None

    def load(
        self, layer_index: int, requires: frozenset[Statistic], device: torch.device | str = "cpu"
    ) -> dict[str, InputStatistics] | None:
        """Statistics of decoder layer ``layer_index`` by child path (``self_attn.q_proj``), on ``device``.

        Linear layers with the same statistics share one object, as ``collect_statistics`` gives them.

        Returns:
            What ``requires`` names (and the flattening, where there is one), no more; None when the layer is absent,
            damaged, of another fingerprint, or lacks something.
        """
        children = self._load(layer_index, requires, device)
        self.num_loaded += children is not None
        return children

    def save(self, layer_index: int, statistics: Mapping[str, InputStatistics]) -> None:
        """Put the statistics of one decoder layer, by child path, beside those that are there already.

        The file is complete or absent: an interrupted save leaves the former one.

        Raises:
            CalibrationError: it cannot be written.
        """
        children = _merged(self._read(layer_index, set(_TENSOR_FIELDS)) or {}, statistics)
        tensors, layout = _encode(children)
        layout |= {"version": VERSION, "fingerprint": self.fingerprint}
        layout["sha256"] = {name: _sha256(tensor) for name, tensor in tensors.items()}
        text = json.dumps(layout, sort_keys=True)
        path = self._path(layer_index)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            save_file(tensors, temporary, metadata={"layout": text, "layout_sha256": _text_sha256(text)})
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise CalibrationError(
                f"{path}: statistics cannot be kept: {error}; make room, or build without a statistics store"
            ) from error
        self.num_saved += 1

    def _load(
        self, layer_index: int, requires: frozenset[Statistic], device: torch.device | str = "cpu"
    ) -> _Children | None:
        wanted = {name for statistic in requires for name in _FIELDS[statistic]}
        children = self._read(layer_index, wanted | {"flattening"}, device)
        if not children or any(getattr(item, name) is None for item in children.values() for name in wanted):
            return None
        return children

    def _path(self, layer_index: int) -> Path:
        return self.directory / f"layer-{layer_index:05d}.safetensors"

    def _read(self, layer_index: int, wanted: set[str], device: torch.device | str = "cpu") -> _Children | None:
        """The fields ``wanted`` of every linear layer, as far as they are there; None: nothing that can be trusted."""
        path = self._path(layer_index)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                layout = self._layout(file.metadata() or {})
                return None if layout is None else _decode(layout, file, wanted, device)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError):
            return None

    def _layout(self, metadata: Mapping[str, str]) -> dict[str, Any] | None:
        text = metadata.get("layout", "")
        if metadata.get("layout_sha256") != _text_sha256(text):
            return None
        layout: dict[str, Any] = json.loads(text)
        is_ours = layout["version"] == VERSION and layout["fingerprint"] == self.fingerprint
        return layout if is_ours else None


def _merged(kept: Mapping[str, InputStatistics], added: Mapping[str, InputStatistics]) -> _Children:
    """``added``, and of ``kept`` what it does not have, as long as both have seen equally many tokens."""
    children = {path: item for path, item in kept.items() if path not in added}
    for path, item in added.items():
        former = kept.get(path)
        if former is None or former.num_tokens != item.num_tokens:
            children[path] = item
            continue
        values = {name: getattr(item, name) for name in _TENSOR_FIELDS}
        values = {name: getattr(former, name) if value is None else value for name, value in values.items()}
        children[path] = InputStatistics(num_tokens=item.num_tokens, **values)
    return children


def _encode(children: Mapping[str, InputStatistics]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by number, each once, and the layout that says what they are."""
    names: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    objects: dict[str, Any] = {}
    for path, item in children.items():
        described: dict[str, str] = {}
        for field in _TENSOR_FIELDS:
            tensor = getattr(item, field)
            if tensor is None:
                continue
            if id(tensor) not in names:
                name = names[id(tensor)] = f"{len(names):03d}.{field}"
                tensors[name], shapes[name] = _pack(tensor.detach().cpu()), list(tensor.shape)
            described[field] = names[id(tensor)]
        objects[path] = {"num_tokens": item.num_tokens, "tensors": described}
    return tensors, {"children": objects, "shapes": shapes}


def _decode(layout: Mapping[str, Any], file: Any, wanted: set[str], device: torch.device | str) -> _Children | None:
    """What ``_encode`` took apart; None when a tensor is not what it was."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, InputStatistics] = {}
    children: _Children = {}
    for path, described in layout["children"].items():
        names = {field: name for field, name in described["tensors"].items() if field in wanted}
        for name in names.values():
            if name not in tensors:
                stored = file.get_tensor(name)
                if _sha256(stored) != layout["sha256"][name]:
                    return None
                tensors[name] = _unpack(stored, layout["shapes"][name]).to(device)
        values = {field: tensors[name] for field, name in names.items()}
        identity = json.dumps([described["num_tokens"], names], sort_keys=True)
        children[path] = shared.setdefault(identity, InputStatistics(described["num_tokens"], **values))
    return children


def _pack(tensor: Tensor) -> Tensor:
    """The upper triangle, row after row, of an exactly symmetric matrix; anything else as it is."""
    is_symmetric = tensor.dim() == 2 and tensor.shape[0] == tensor.shape[1] and torch.equal(tensor, tensor.T)
    return torch.cat([row[index:] for index, row in enumerate(tensor)]) if is_symmetric else tensor.contiguous().clone()


def _unpack(stored: Tensor, shape: list[int]) -> Tensor:
    if list(stored.shape) == shape:
        return stored
    size = shape[0]
    matrix, start = stored.new_empty(size, size), 0
    for index in range(size):
        row = stored[start : start + size - index]
        matrix[index, index:] = row
        matrix[index:, index] = row
        start += size - index
    return matrix


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()


def _text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
