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
from pdiff_ray.common.progress import console
from pdiff_ray.config.split import MEMBER_GROUPS
from pdiff_ray.networks.subset import Subset
from pdiff_ray.stages.base import NETWORK_FILE
from pdiff_ray.stages.exports import Trial
from pdiff_ray.storage.artifacts import Artifact, Manifest, find, finished, is_finished, opened, read_manifest
from pdiff_ray.storage.files import Storage
from pdiff_ray.storage.parameters import ParameterStore, without_vector
from pdiff_ray.storage.trees import load_tree, save_tree


class Networks:
    """The networks of a finished zoo, as it is or aligned, or of finished samples.

    Shapes: n networks, D values in the subset.

    Args:
        artifact: of stage `zoo`, `alignment` or `samples`.

    Raises:
        StorageError: the artifact is not there, or holds no networks.
    """

    def __init__(self, artifact: Artifact) -> None:
        if artifact.stage not in ("zoo", "alignment", "samples"):
            raise StorageError(f"{artifact.folder}: holds no networks; the stages zoo, alignment and samples do")
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
            yield {**base, **self.subset.under_all_names(self.subset.unflatten(self.vectors([id_])[0]))}

    def export(
        self, folder: Path, ids: Sequence[int] | None = None, *, subset_only: bool = False, overwrite: bool = False
    ) -> Iterator[Path]:
        """Writes `state_dicts` into a folder, a safetensors file each; yields the files as they are written.

        Each is first loaded into a network that is built anew, which must compute what the judged network does, and
        predict what was reported of it, on a few test images. What could not be compared is printed.

        Args:
            overwrite: replaces files that are there with another content.

        Raises:
            ConfigError: there is such a file, and nothing was written.
            PdiffError: a network does not compute what it should; it has no file then.
        """
        chosen = list(dict.fromkeys(self.ids if ids is None else ids))
        names = {record.id: f"{record.group}-{record.id:04d}.safetensors" for record in self._store.records(chosen)}
        there = [id_ for id_ in chosen if not overwrite and (folder / names[id_]).exists()]
        for id_, tensors in zip(there, self.state_dicts(there, subset_only=subset_only), strict=True):
            if (folder / names[id_]).read_bytes() != save_tree(tensors):
                raise ConfigError(
                    f"{folder / names[id_]}: is there already, with another content; choose another folder, or replace "
                    "it with --overwrite"
                )
        if not subset_only:
            self._check_whole()
        trial, reported = self._trial(), self._reported(chosen)
        if trial and (trial.labels is None or len(reported) < len(chosen)):
            why = "no evaluation of them is there" if trial.labels is not None else "an earlier version kept no images"
            if self._measured_anew:
                why = "that was found with statistics measured anew (zoo.batchnorm)"
            console.print(
                f"note: predictions are compared with the judged networks', not with what was reported: {why}"
            )
        for id_, tensors in zip(chosen, self.state_dicts(chosen, subset_only=subset_only), strict=True):
            target = folder / names[id_]
            temporary = target.with_name(f".{target.name}.tmp")
            try:
                folder.mkdir(parents=True, exist_ok=True)
                temporary.write_bytes(save_tree(tensors))
                if trial:
                    trial.check(temporary, self.vectors([id_])[0], *reported.get(id_, ()))
                temporary.replace(target)
            except PdiffError as error:
                raise PdiffError(f"{target}: network {id_} is not exported: {error}") from None
            except OSError as error:
                raise PdiffError(f"{target}: cannot be written: {error.strerror}; choose another folder") from None
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink()
            yield target

    def _trial(self) -> Trial | None:
        """Returns what files are tried with, or prints why there is nothing."""
        try:
            return Trial(self._made_from("base"), self.subset)
        except PdiffError as error:
            console.print(f"note: the files are not tried: {error}", markup=False)
            return None

    def _reported(self, ids: Sequence[int]) -> dict[int, tuple[bytes, str]]:
        """Returns, by id, which test images networks were reported to get wrong, and the precision of that."""
        if self._measured_anew:  # with statistics that were measured for it
            return {}
        storage, wanted = self.artifact.storage, set(ids)
        found = {record.id: (record.wrong, "float32") for record in self._store.records(ids) if record.wrong}
        for folder in finished(storage):
            if wanted <= found.keys():
                break
            if not folder.startswith("evaluation/"):
                continue
            try:
                if self.artifact.folder in dict(lineage(storage, folder)):
                    evaluation = opened(storage, read_manifest(storage, folder))
                    for record in ParameterStore(evaluation).records():
                        if record.group in self._groups and record.number in wanted and record.wrong:
                            found.setdefault(record.number, (record.wrong, str(evaluation.config.get("precision"))))
            except StorageError as error:  # a damaged evaluation, maybe of other networks
                console.print(f"note: {error}", markup=False)
        return found

    @property
    def _groups(self) -> tuple[str, ...]:
        return ("generated",) if self.artifact.stage == "samples" else MEMBER_GROUPS

    @functools.cached_property
    def _measured_anew(self) -> bool:
        """Whether the networks were judged with running statistics that are not kept; no if the zoo is gone."""
        try:
            if self._made_from("zoo").config.get("batchnorm") != "recalibrated":
                return False
            base = self._made_from("base")
        except StorageError:
            return False
        return any(name.endswith(".running_mean") for name in load_tree(base.read(NETWORK_FILE), base.location))

    def _check_whole(self) -> None:
        """Raises ConfigError if the networks have no running statistics of their own."""
        if self._measured_anew:
            raise ConfigError(
                f"{self.artifact.folder}: zoo.batchnorm is recalibrated, so these networks have no running statistics "
                "of their own; export with --subset-only, and measure them on training images"
            )

    def _base(self) -> dict[str, Tensor]:
        """Returns the tensors of the base network."""
        self._check_whole()
        base = self._made_from("base")
        return load_tree(base.read(NETWORK_FILE), base.location)

    def _made_from(self, stage: str) -> Artifact:
        """Returns the artifact of a stage that the networks were made from, or themselves."""
        storage, name = self.artifact.storage, self.artifact.folder
        for _, manifest in lineage(storage, name):
            if manifest and manifest.stage == stage:
                return opened(storage, manifest)
        raise StorageError(f"{name}: the {stage} that it was made from is not in {storage.place} any more")


def lineage(storage: Storage, folder: str) -> list[tuple[str, Manifest | None]]:
    """Returns the artifact's folder and those it was made from, with their manifests (None: no longer there)."""
    chain: list[tuple[str, Manifest | None]] = []
    while True:
        manifest = read_manifest(storage, folder) if is_finished(storage, folder) else None
        chain.append((folder, manifest))
        if manifest is None or manifest.input is None:
            return chain
        folder = manifest.input
