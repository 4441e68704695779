"""Networks in storage, opened: as vectors, state dicts, tables, and safetensors files that other code loads."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor

from pdiff_ray.common.errors import ConfigError, PdiffError, StorageError
from pdiff_ray.networks.subset import Subset
from pdiff_ray.stages.base import NETWORK_FILE
from pdiff_ray.storage.artifacts import Artifact, Manifest, find, is_finished, opened, read_manifest
from pdiff_ray.storage.files import Storage
from pdiff_ray.storage.parameters import ParameterStore, without_vector
from pdiff_ray.storage.trees import load_tree, save_tree


class Networks:
    """The networks of a finished zoo or of finished samples.

    Shapes: n networks, D values in the subset.

    Args:
        artifact: of stage `zoo` or `samples`.

    Raises:
        StorageError: the artifact is not there, or holds no networks.
    """

    def __init__(self, artifact: Artifact) -> None:
        if artifact.stage not in ("zoo", "samples"):
            raise StorageError(f"{artifact.folder}: holds no networks; the stages zoo and samples do")
        artifact.manifest()  # says so if it is not there
        self.artifact, self._store = artifact, ParameterStore(artifact)

    @classmethod
    def find(cls, storage: Storage, prefix: str) -> Networks:
        """Opens the networks of the artifact whose key (or stage/key) starts with `prefix`."""
        return cls(opened(storage, find(storage, prefix)))

    def __len__(self) -> int:
        return len(self._store.ids)

    @property
    def ids(self) -> list[int]:
        """The networks' numbers, in order."""
        return self._store.ids

    @functools.cached_property
    def subset(self) -> Subset:
        """The manifest of the vectors: name, shape and offset of every tensor."""
        return self._store.subset()

    def vectors(self, ids: Sequence[int] | None = None) -> Tensor:
        """Returns the flattened parameters (n, D), float32, of the networks `ids` (default: all)."""
        return torch.from_numpy(self._store.vectors(ids))

    def table(self, ids: Sequence[int] | None = None) -> pa.Table:
        """Returns what is known of each network as an Arrow table, one row each, without the vectors.

        Accuracies are fractions, losses mean cross-entropies in nats. `.to_pandas()` makes it a data frame.
        """
        return pa.Table.from_pylist([without_vector(record) for record in self._store.records(ids)])

    def state_dicts(
        self, ids: Sequence[int] | None = None, *, subset_only: bool = False
    ) -> Iterator[dict[str, Tensor]]:
        """Yields state dicts of the networks `ids` (default: all), one at a time.

        Args:
            subset_only: gives the generated tensors alone, for `load_state_dict(strict=False)`.

        Raises:
            ConfigError: whole networks are asked for that have no running statistics of their own.
        """
        base = {} if subset_only else self._base()
        for id_ in self.ids if ids is None else ids:
            yield {**base, **self.subset.unflatten(self.vectors([id_])[0])}

    def export(
        self, folder: Path, ids: Sequence[int] | None = None, *, subset_only: bool = False, overwrite: bool = False
    ) -> Iterator[Path]:
        """Writes `state_dicts` into a folder, a safetensors file each; yields the files as they are written.

        Args:
            overwrite: replaces files that are there with another content.

        Raises:
            ConfigError: there is such a file, and nothing was written.
        """
        chosen = dict.fromkeys(self.ids if ids is None else ids)
        names = {record.id: f"{record.group}-{record.id:04d}.safetensors" for record in self._store.records([*chosen])}
        there = [id_ for id_ in chosen if not overwrite and (folder / names[id_]).exists()]
        for id_, tensors in zip(there, self.state_dicts(there, subset_only=subset_only), strict=True):
            if (folder / names[id_]).read_bytes() != save_tree(tensors):
                raise ConfigError(
                    f"{folder / names[id_]}: is there already, with another content; choose another folder, or replace "
                    "it with --overwrite"
                )
        for id_, tensors in zip(chosen, self.state_dicts([*chosen], subset_only=subset_only), strict=True):
            target = folder / names[id_]
            temporary = target.with_name(f".{target.name}.tmp")
            try:
                folder.mkdir(parents=True, exist_ok=True)
                temporary.write_bytes(save_tree(tensors))
                temporary.replace(target)
            except OSError as error:
                raise PdiffError(f"{target}: cannot be written: {error.strerror}; choose another folder") from None
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink()
            yield target

    def _base(self) -> dict[str, Tensor]:
        """Returns the tensors of the base network."""
        storage, name = self.artifact.storage, self.artifact.folder
        ways = {folder.split("/")[0]: manifest for folder, manifest in lineage(storage, name)}
        zoo, base = ways["zoo"], ways.get("base")
        if zoo is not None and zoo.config.get("batchnorm") == "recalibrated":
            raise ConfigError(
                f"{name}: zoo.batchnorm is recalibrated, so these networks have no running statistics of their own; "
                "export with --subset-only, and measure them on training images"
            )
        if base is None:
            raise StorageError(f"{name}: the base network that it was made from is not in {storage.place} any more")
        artifact = opened(storage, base)
        return load_tree(artifact.read(NETWORK_FILE), artifact.location)


def lineage(storage: Storage, folder: str) -> list[tuple[str, Manifest | None]]:
    """Returns the artifact's folder and those it was made from, with their manifests (None: no longer there)."""
    chain: list[tuple[str, Manifest | None]] = []
    while True:
        manifest = read_manifest(storage, folder) if is_finished(storage, folder) else None
        chain.append((folder, manifest))
        if manifest is None or manifest.input is None:
            return chain
        folder = manifest.input
