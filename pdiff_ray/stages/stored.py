"""Networks in storage, opened: as vectors, state dicts, tables, and safetensors files that other code loads."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor

from pdiff_ray.common.errors import ConfigError, PdiffError, StorageError
from pdiff_ray.common.progress import console
from pdiff_ray.config.split import MEMBER_GROUPS
from pdiff_ray.networks.subset import Subset
from pdiff_ray.stages.base import NETWORK_FILE
from pdiff_ray.stages.exports import Reported, Trial
from pdiff_ray.storage.artifacts import Artifact, Manifest, find, finished, is_finished, opened, read_manifest
from pdiff_ray.storage.files import Storage
from pdiff_ray.storage.parameters import ParameterStore, Record, without_vector
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
            ConfigError: whole networks are asked for whose running statistics are measured by an evaluation that is
                not there.
        """
        chosen = self.ids if ids is None else ids
        needed = self._measured_anew and not subset_only
        return self._state_dicts(chosen, subset_only, self._reported(chosen) if needed else {})

    def _state_dicts(
        self, ids: Sequence[int], subset_only: bool, reported: Mapping[int, Reported]
    ) -> Iterator[dict[str, Tensor]]:
        base = {} if subset_only else self._base()
        for id_ in ids:
            own = self.subset.under_all_names(self.subset.unflatten(self.vectors([id_])[0]))
            yield {**base, **own, **(reported[id_].statistics if id_ in reported else {})}

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
        # What was found with statistics measured anew says nothing of a subset without them.
        reported = {} if self._measured_anew and subset_only else self._reported(chosen)
        names = {record.id: f"{record.group}-{record.id:04d}.safetensors" for record in self._store.records(chosen)}
        there = [id_ for id_ in chosen if not overwrite and (folder / names[id_]).exists()]
        for id_, tensors in zip(there, self._state_dicts(there, subset_only, reported), strict=True):
            if (folder / names[id_]).read_bytes() != save_tree(tensors):
                raise ConfigError(
                    f"{folder / names[id_]}: is there already, with another content; choose another folder, or replace "
                    "it with --overwrite"
                )
        trial = self._trial()
        if trial and (trial.labels is None or len(reported) < len(chosen)):
            why = "no evaluation of them is there" if trial.labels is not None else "an earlier version kept no images"
            if self._measured_anew and subset_only:
                why = "that was found with statistics measured anew (zoo.batchnorm), which whole networks have"
            console.print(
                f"note: predictions are compared with the judged networks', not with what was reported: {why}"
            )
        for id_, tensors in zip(chosen, self._state_dicts(chosen, subset_only, reported), strict=True):
            target = folder / names[id_]
            temporary = target.with_name(f".{target.name}.tmp")
            try:
                folder.mkdir(parents=True, exist_ok=True)
                temporary.write_bytes(save_tree(tensors))
                if trial:
                    trial.check(temporary, self.vectors([id_])[0], reported.get(id_))
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

    def _reported(self, ids: Sequence[int]) -> dict[int, Reported]:
        """Returns, by id, what was reported of networks.

        Raises:
            ConfigError: their running statistics were to be measured anew, and are not there.
        """
        anew = self._measured_anew
        found: dict[int, Reported] = {}

        def note(records: Iterable[Record], precision: str) -> None:
            for record in records:
                if record.number in wanted and record.wrong and (record.statistics or not anew):
                    tree = load_tree(record.statistics, f"network {record.number}") if record.statistics else {}
                    found.setdefault(record.number, Reported(record.wrong, precision, tree))

        storage, wanted = self.artifact.storage, set(ids)
        if self.artifact.stage != "samples":
            note(self._store.records(ids), "float32")
        for folder in finished(storage):
            if wanted <= found.keys():
                break
            if not folder.startswith("evaluation/"):
                continue
            try:
                made_from = list(dict(lineage(storage, folder)))
                if anew and self.artifact.stage != "samples":  # statistics are in the order of the members' units
                    made_from = [name for name in made_from if name.startswith(("alignment/", "zoo/"))][:1]
                if self.artifact.folder in made_from:
                    evaluation = opened(storage, read_manifest(storage, folder))
                    own = (row for row in ParameterStore(evaluation).records() if row.group in self._groups)
                    note(own, str(evaluation.config.get("precision")))
            except StorageError as error:  # a damaged evaluation, maybe of other networks
                console.print(f"note: {error}", markup=False)
        if anew and (missing := sorted(wanted - found.keys())):
            raise ConfigError(
                f"{self.artifact.folder}: there are no running statistics of network {missing[0]}, which are measured "
                "when it is judged (zoo.batchnorm is recalibrated); run its experiment to the evaluation (delete one "
                "of an earlier version, which has not kept them), or export with --subset-only"
                + ("; or export the zoo as it was before it was aligned" if self.artifact.stage == "alignment" else "")
            )
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

    def _base(self) -> dict[str, Tensor]:
        """Returns the tensors of the base network."""
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
