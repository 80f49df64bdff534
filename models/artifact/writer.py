"""Writes an artifact: one shard per decoder layer, final once written, so that a build can go on where it stopped.

    NAME.partial/artifact/     the files of the artifact so far; becomes NAME when the build finishes
    NAME.partial/progress/     build.json: which build this is; layer-00000.json ...: records of the finished layers

An artifact that bears its final name is whole, and has been opened and verified by ``ArtifactReader``.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from ..config import BuildConfig
from ..errors import ArtifactError
from ..llama.config import LlamaConfig
from ..types import LinearWeights
from .assemble import ShardProgress, build_manifest, index_bytes, plain_files
from .files import hash_file, write_bytes
from .format import (
    FORMAT,
    INDEX_FILE,
    MANIFEST_FILE,
    REPORT_FILE,
    FileRecord,
    Manifest,
    Probe,
    qerve_version,
    shard_name,
)
from .jsonio import canonical_json
from .layout import (
    DTYPE_NAMES,
    ExpectedTensor,
    StoredTensor,
    TensorError,
    check_tensors,
    expected_layer,
    expected_rest,
)
from .linear import check_finite, decode_linear, encode_linear
from .partial import PartialDirectory
from .reader import ArtifactReader
from .record import LinearRecord
from .shard import Shard, write_shard

_REST = "final norm, embedding and head"


class ArtifactWriter:
    """One build's output. Reopens what an interrupted build with an equal ``build_fingerprint`` left, else starts anew.

    Raises:
        ArtifactError: ``directory`` is taken and ``overwrite`` is false, or cannot be written.
    """

    def __init__(self, directory: Path, config: LlamaConfig, build_fingerprint: str, overwrite: bool = False) -> None:
        self._config = config
        identity = {"format": FORMAT, "qerve_version": qerve_version(), "build_fingerprint": build_fingerprint}
        self._partial = PartialDirectory(directory, canonical_json(identity), overwrite)
        self._shards: dict[int, ShardProgress] = {}

    @property
    def hidden_directory(self) -> Path:
        """Where a build may keep hidden states; it goes when the artifact gets its name."""
        return self._partial.progress / "hidden"

    def finished_layers(self) -> int:
        """Number of leading decoder layers whose shard and records are on disk and whose hash still matches."""
        for layer_index in range(self._config.num_hidden_layers):
            if not self._is_finished(layer_index):
                return layer_index
        return self._config.num_hidden_layers

    def write_layer(
        self,
        layer_index: int,
        linears: Mapping[str, LinearWeights],
        tensors: Mapping[str, Tensor],
        records: Mapping[str, LinearRecord],
    ) -> None:
        """Write one decoder layer, complete or not at all.

        Args:
            layer_index: counted from 0
            linears: every linear layer of the decoder layer by module path
            tensors: its unquantized tensors (norms) by Hugging Face name, stored in the type they have
            records: one per linear layer

        Raises:
            ArtifactError: a tensor is missing, not finite, of a wrong shape or type, or the file cannot be written.
        """
        stored: dict[str, Tensor] = dict(tensors)
        with self._partial.blaming(f"decoder layer {layer_index}"):
            for path, weights in linears.items():
                stored |= encode_linear(path, weights)
            self._write(layer_index, stored, expected_layer(self._config, layer_index, records), dict(records))

    def read_layer(self, layer_index: int) -> dict[str, LinearWeights]:
        """The linear layers of a finished decoder layer by module path, on the CPU.

        Raises:
            ArtifactError: the layer is not finished, or its shard is damaged.
        """
        return self._read_linears(layer_index, f"decoder layer {layer_index}")

    def write_rest(
        self,
        tensors: Mapping[str, Tensor],
        linears: Mapping[str, LinearWeights] | None = None,
        records: Mapping[str, LinearRecord] | None = None,
    ) -> None:
        """Write what belongs to no decoder layer: final norm, embedding and, unless it is tied, the head.

        Args:
            tensors: as far as unquantized, by Hugging Face name
            linears: embedding and head by module path, as far as the network's configuration lists them
            records: one for each of these

        Raises:
            ArtifactError: as ``write_layer``.
        """
        stored: dict[str, Tensor] = dict(tensors)
        with self._partial.blaming(_REST):
            for path, weights in (linears or {}).items():
                stored |= encode_linear(path, weights)
            records = dict(records or {})
            self._write(self._config.num_hidden_layers, stored, expected_rest(self._config, records), records)

    def has_rest(self) -> bool:
        """What belongs to no decoder layer is on disk, and its hash still matches."""
        return self._is_finished(self._config.num_hidden_layers)

    def read_vocabulary(self) -> dict[str, LinearWeights]:
        """The quantized embedding and head, as far as there are any, by module path, on the CPU.

        Raises:
            ArtifactError: the last shard is not written, or damaged.
        """
        return self._read_linears(self._config.num_hidden_layers, _REST)

    def write_scales(self, scales: Mapping[str, Tensor]) -> None:
        """Keep the scales (out_features, num_groups) that every linear layer will get, before the first one does."""
        with self._partial.blaming("trained scales"):
            write_shard(self._scales_path(), scales)

    def read_scales(self) -> dict[str, Tensor] | None:
        """What ``write_scales`` kept, by module path; None: nothing.

        Raises:
            ArtifactError: the file is damaged.
        """
        if not self._scales_path().is_file():
            return None
        with self._partial.blaming("trained scales"), Shard(self._scales_path()) as shard:
            return {path: shard.read(path) for path in self._config.linear_shapes()}

    def finish(
        self,
        *,
        build: BuildConfig,
        hf_config: Mapping[str, Any],
        generation_config: Mapping[str, Any],
        tokenizer_files: Mapping[str, bytes],
        checkpoint_fingerprint: str,
        calibration_fingerprint: str | None,
        evaluation: Mapping[str, int | float],
        probe: Probe | None = None,
        report: Callable[[Manifest], bytes] | None = None,
    ) -> Manifest:
        """Write everything else, verify the whole artifact, and give it its name.

        Nothing that differs between two equal builds (times, paths) may go into ``evaluation``. ``report`` makes an
        HTML page for people of the manifest as it is without that page; None: there is none.

        Raises:
            ArtifactError: a layer is missing, a file name or value cannot be stored, or a file cannot be written.
        """
        shards = self._finished_shards()
        with self._partial.blaming("configuration and tokenizer"):
            contents = plain_files(hf_config, generation_config, tokenizer_files)
            contents[INDEX_FILE] = index_bytes(
                {name: record for shard in shards for name, record in shard.tensors.items()}
            )
            files = {name: self._write_file(name, data) for name, data in contents.items()}
            describe = partial(
                build_manifest,
                self._config,
                shards,
                build=build,
                checkpoint_fingerprint=checkpoint_fingerprint,
                calibration_fingerprint=calibration_fingerprint,
                evaluation=dict(evaluation),
                probe=probe,
            )
            manifest = describe(files)
            if report is not None:
                files[REPORT_FILE] = self._write_file(REPORT_FILE, report(manifest))
                manifest = describe(files)
            self._write_file(MANIFEST_FILE, manifest.to_bytes())
        self._partial.keep_only({MANIFEST_FILE, *manifest.files})
        ArtifactReader.open(self._partial.artifact).close()
        self._partial.publish()
        return manifest

    def _write(
        self,
        shard_index: int,
        tensors: Mapping[str, Tensor],
        expected: Mapping[str, ExpectedTensor],
        linears: dict[str, LinearRecord],
    ) -> None:
        check_tensors({name: _stored(name, tensor) for name, tensor in tensors.items()}, expected)
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                check_finite(name, tensor)
        self._progress_path(shard_index).unlink(missing_ok=True)
        written = write_shard(self._shard_path(shard_index), tensors)
        progress = ShardProgress(file=written.file, tensors=written.tensors, linears=linears)
        write_bytes(self._progress_path(shard_index), canonical_json(progress.model_dump(mode="json")))
        self._shards[shard_index] = progress

    def _read_linears(self, shard_index: int, part: str) -> dict[str, LinearWeights]:
        if shard_index not in self._shards and not self._is_finished(shard_index):
            raise ArtifactError(f"{self._partial.path}: {part} is not finished; build it first")
        with self._partial.blaming(part), Shard(self._shard_path(shard_index)) as shard:
            records = self._shards[shard_index].linears
            return {path: decode_linear(path, record, shard.read) for path, record in records.items()}

    def _write_file(self, name: str, data: bytes) -> FileRecord:
        return write_bytes(self._partial.artifact / name, data)

    def _is_finished(self, shard_index: int) -> bool:
        try:
            progress = ShardProgress.model_validate_json(self._progress_path(shard_index).read_bytes(), strict=True)
            is_finished = hash_file(self._shard_path(shard_index)) == progress.file
        except (OSError, ValidationError, ArtifactError):
            return False
        if is_finished:
            self._shards[shard_index] = progress
        return is_finished

    def _finished_shards(self) -> list[ShardProgress]:
        num_shards = self._config.num_hidden_layers + 1
        for shard_index in range(num_shards):
            if shard_index not in self._shards and not self._is_finished(shard_index):
                missing = f"decoder layer {shard_index}" if shard_index < num_shards - 1 else "the unquantized rest"
                raise ArtifactError(f"{self._partial.path}: {missing} is not written; the artifact cannot be finished")
        return [self._shards[shard_index] for shard_index in range(num_shards)]

    def _shard_path(self, shard_index: int) -> Path:
        return self._partial.artifact / shard_name(shard_index, self._config.num_hidden_layers + 1)

    def _scales_path(self) -> Path:
        return self._partial.progress / "scales.safetensors"

    def _progress_path(self, shard_index: int) -> Path:
        return self._partial.progress / f"layer-{shard_index:05d}.json"


def _stored(name: str, tensor: Tensor) -> StoredTensor:
    if tensor.dtype not in DTYPE_NAMES:
        raise TensorError(name, f"type {tensor.dtype} cannot be stored")
    return StoredTensor(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
