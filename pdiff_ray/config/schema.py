"""The typed schema of an experiment.

A section is hashed into the key of the stage it determines (`keyed`), so fields that only say where or how fast things
run are listed in `unkeyed`, and fields that later versions brought in `added`.
"""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, SerializeAsAny, field_validator, model_validator

from pdiff_ray.config.section import CHOICES, Choice, Known, Section
from pdiff_ray.config.split import Split, held_out


def _share(gpus: float) -> float:
    """Returns a number of GPUs that Ray can give."""
    if gpus > 1 and not gpus.is_integer():
        raise ValueError(f"{gpus:g} is more than one GPU and no whole number, which Ray cannot give")
    return gpus


GPUs = Annotated[float, Field(ge=0), AfterValidator(_share)]
OwnName = Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]  # module:attribute


MAX_NETWORKS = 100_000  # of a group: each is a row, and an entry of lists
# What is known of each member without test data, as its row in the store has it.
Condition = Literal["train_accuracy", "train_loss", "validation_accuracy", "validation_loss", "step"]
SEEDED = ("training", "zoo", "generator", "sampling")  # sections that follow the experiment's seed


class Data(Section):
    """Images, their splits, and what happens to a training batch."""

    unkeyed = frozenset({"root", "download", "max_cache_gib", "loader_workers"})

    name: Annotated[str, Known("pdiff_ray.data.sources:DATASETS")] = Field(
        "digits", description="which images; custom: those under root, read as source says"
    )
    source: Literal["auto", "torchvision", "parquet", "folder"] = Field(
        "auto", description="where images are read from; auto: torchvision's own format, scikit-learn for digits"
    )
    root: str = Field("data", description="folder that holds (or receives) the data set")
    download: bool = Field(False, description="let torchvision download what is missing under root")
    channels: Literal[1, 3] | None = Field(None, description="convert images to this number of channels")
    image_size: int | None = Field(None, ge=4, le=4096, description="resize images to this edge, in pixels")
    validation_fraction: float = Field(0.1, gt=0, lt=0.9, description="share of the training data kept for validation")
    selection_images: int = Field(10_000, ge=1, description="training images on which the best network is selected")
    pixel_noise: float = Field(0.0, ge=0, description="fixed noise on every image, in standard deviations")
    augment: Literal["none", "flip", "crop_flip", "resized_crop_flip"] = Field(
        "none", description="augmentation of training batches: flips, crops shifted by an eighth, parts of any size"
    )
    train_noise: float = Field(0.0, ge=0, description="fresh noise on training batches, in standard deviations")
    seed: int = Field(0, description="seed of the validation and selection splits and of pixel_noise")
    max_cache_gib: float = Field(32.0, ge=0, description="decoded images beyond this size stream through a DataLoader")
    loader_workers: int = Field(2, ge=0, le=1000, description="DataLoader processes per worker when streaming")


class Network(Section):
    name: str = Field("convnet", description="a timm or torchvision name, a paper network, or module:function")
    source: Annotated[str, Known("pdiff_ray.networks.build:SOURCES")] = Field("auto", description="who builds it")
    pretrained: bool = Field(False, description="start from timm's or torchvision's published weights")
    cifar_stem: bool = Field(False, description="ResNets: 3 x 3 first convolution without stride or pooling")
    args: dict[str, Any] = Field(default_factory=dict, description="further arguments of the network's constructor")

    @field_validator("name")
    @classmethod
    def _possible(cls, name: str) -> str:
        """Refuses what no library calls a network, before these are imported to look for it."""
        if ":" not in name and not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"{name!r} is no name of a network; your own is named as module:function")
        return name


class Optimizer(Section):
    name: Annotated[str, Known("pdiff_ray.training.trainer:OPTIMIZERS")] = Field(
        "adamw", description="who makes steps from gradients: torch.optim's AdamW, Adam or SGD"
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    weight_decay: float = Field(0.0, ge=0, description="decoupled for adamw, else L2")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD only")
    schedule: Annotated[str, Known("pdiff_ray.training.trainer:SCHEDULES")] = Field(
        "constant", description="of the learning rate over all steps"
    )


class Training(Section):
    """Training of the base network (stage `base`)."""

    epochs: int = Field(10, ge=0, description="0 keeps the initial (for example pretrained) weights")
    batch_size: int = Field(128, ge=2, description="images per step over all workers")
    optimizer: Optimizer = Optimizer(lr=3e-3, weight_decay=5e-4, schedule="onecycle")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all classes")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="autocast of forward and backward")
    seed: int | None = Field(None, description="default: the experiment's seed")


class SubsetRule(Section):
    """Which parameters are generated: exactly one of the fields."""

    added = frozenset({"function"})

    all: Literal[True] | None = Field(None, description="every parameter")
    last_norm_layers: int | None = Field(None, ge=1, description="the last n normalization layers")
    norm_layers: tuple[int, int] | None = Field(
        None, description="normalization layers start to stop - 1 of the main path, counted from 1"
    )
    names: tuple[str, ...] | None = Field(None, min_length=1, description="globs on parameter names")
    function: Annotated[str, Known("pdiff_ray.networks.subset:FUNCTIONS")] | None = Field(
        None, description="module:attribute of a function of the network that returns names of parameters"
    )

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return {"all": True} if value == "all" else value

    @model_validator(mode="after")
    def _exactly_one(self) -> SubsetRule:
        given = self.model_dump(exclude_none=True)
        if len(given) != 1:
            raise ValueError(
                f"a subset takes exactly one of {', '.join(type(self).model_fields)}; this one has "
                f"{', '.join(given) or 'none'}"
            )
        if self.norm_layers and not 1 <= self.norm_layers[0] < self.norm_layers[1]:
            raise ValueError(f"norm_layers is [start, stop) counted from 1; [{self.norm_layers[0]}, "
                             f"{self.norm_layers[1]}] holds no layer")  # fmt: skip
        return self

    @property
    def counts_layers(self) -> bool:
        """Whether the rule chooses layers by their place among others."""
        return bool(self.last_norm_layers or self.norm_layers)

    @property
    def chosen(self) -> tuple[str, Any]:
        """The field that is given, and its value."""
        return next((name, value) for name, value in self if value is not None)

    def __str__(self) -> str:
        rule, value = self.chosen
        if rule == "all":
            return "all parameters"
        if rule == "norm_layers":
            return f"norm layers {value[0]} to {value[1] - 1}"
        if rule == "last_norm_layers":
            return f"last {value} norm layers"
        return ", ".join(value) if rule == "names" else value


class Zoo(Section):
    """The zoo of networks that the generator learns from (stage `zoo`)."""

    unkeyed = frozenset({"runs_per_program", "held_out", "second_run"})
    renamed: ClassVar[dict[str, str]] = {"vmap": "runs_per_program"}

    members: int = Field(200, ge=1, le=MAX_NETWORKS, description="K, the number of networks kept")
    regime: Literal["trajectory", "branches", "independent"] = Field(
        "trajectory", description="one run from the base; several runs from it; or a fresh network per member"
    )
    branches: int = Field(4, ge=2, description="regime branches: the number of runs")
    held_out: float = Field(
        0.2, ge=0, lt=1, description="share of the members that no generator and no baseline sees; 0: none"
    )
    second_run: int | None = Field(
        None,
        ge=0,
        le=MAX_NETWORKS,
        description="regime trajectory: members of a second run, with another seed, that nothing learns from either; "
        "default: a fifth of members",
    )
    subset: SubsetRule = Field(SubsetRule(last_norm_layers=2), description="which parameters are generated")
    batchnorm: Literal["frozen", "included", "recalibrated"] = Field(
        "frozen",
        description="running statistics: the base's, part of the vector, or measured anew before evaluation, the "
        "default of independent members",
    )
    warmup_steps: int = Field(100, ge=0, description="steps before those of the first member")
    steps_per_member: int | Literal["epoch"] = Field(10, description="steps between members")
    batch_size: int = Field(128, ge=2, description="images per step of a run")
    runs_per_program: int | None = Field(
        None, ge=1, description="branches that a worker trains at once by vmap; default: by memory on a GPU, else 1"
    )
    optimizer: Optimizer = Optimizer(lr=0.03, weight_decay=5e-4)
    precision: Literal["float32", "bfloat16"] = Field("float32", description="autocast of forward and backward")
    imported: str | None = Field(None, description="label of a zoo that `pdiff import` brought in; nothing is trained")
    seed: int | None = Field(None, description="default: the experiment's seed")

    @model_validator(mode="before")
    @classmethod
    def _statistics(cls, value: Any) -> Any:
        """Has statistics measured anew where members share no base: what lies between them has others than they."""
        independent = isinstance(value, dict) and value.get("regime") == "independent"
        return {"batchnorm": "recalibrated", **value} if independent else value

    @model_validator(mode="after")
    def _possible(self) -> Zoo:
        if isinstance(self.steps_per_member, int) and self.steps_per_member < 1:
            raise ValueError(f"steps_per_member is {self.steps_per_member}; it must be 1 or more, or 'epoch'")
        if self.regime == "independent" and not self.subset.all:
            raise ValueError(
                "regime independent makes networks that share no parameter, so subset must be 'all' "
                f"(it is {self.subset})"
            )
        if self.regime == "independent" and self.batchnorm == "frozen":
            raise ValueError(
                "regime independent has no base whose statistics could stay frozen; set batchnorm to 'included' or "
                "'recalibrated'"
            )
        if self.regime == "branches" and self.branches > self.members:
            raise ValueError(f"branches is {self.branches}, more than members ({self.members}); lower it")
        if (self.second_run or 0) > self.members:
            raise ValueError(f"second_run is {self.second_run}, more than members ({self.members}); lower it")
        return self

    def keyed(self) -> dict[str, Any]:
        count = len(self.second_run_ids)
        return super().keyed() | ({"second_run": count} if count else {})

    @property
    def second_run_ids(self) -> range:
        """The ids of the second run's members, which follow the others'."""
        count = round(self.members / 5) if self.second_run is None else self.second_run
        has_one = self.regime == "trajectory" and not self.imported
        return range(self.members, self.members + (count if has_one else 0))

    @property
    def size(self) -> int:
        """How many networks are stored: all members."""
        return self.second_run_ids.stop

    @property
    def held_out_ids(self) -> frozenset[int]:
        """The ids of the members that are held out, by `seed`."""
        return held_out(self.regime, self.members, self.branches, self.held_out, self.seed or 0)


class Alignment(Section):
    """Members permuted so that their units stand where a reference has them (stage `alignment`)."""

    method: Literal["none", "weight_matching"] = Field(
        "none", description="permutation of units that change no function, found by matching weights"
    )
    reference: Literal["first", "mean"] = Field(
        "mean", description="what members are matched to: the first that is learned, or their mean as it becomes"
    )
    scales: Literal["kept", "balanced"] = Field(
        "kept",
        description="of units before a ReLU: the weights into and out of each as they are, or brought to equal norms "
        "before matching, which changes no function",
    )


GeneratorName = Annotated[str, Known("pdiff_ray.generators.table:GENERATORS")]


class Generator(Choice):
    """What learns the distribution of the zoo's vectors (stage `generator`): what all generators have.

    Attributes:
        memory_fields: names the fields that lower what fitting takes of a GPU's memory, for messages.
    """

    memory_fields: ClassVar[str] = "generator.members"

    name: GeneratorName = Field("latent_diffusion", description="which generator; the others' fields do not exist then")
    members: int | None = Field(None, ge=1, description="K, how many of the zoo's members are learned; default: all")
    seed: int | None = Field(None, description="default: the experiment's seed")

    def check_sampling(self, sampling: Sampling) -> None:
        """Raises ValueError if the generator cannot draw samples in this way."""
        if self.condition is None and (sampling.condition is not None or sampling.guidance != 1):
            field = "guidance" if sampling.condition is None else "condition"
            raise ValueError(
                f"sampling.{field} is {getattr(sampling, field)}, but the generator has learned no condition; set "
                "generator.process.condition of a diffusion or a flow (generator.name: latent), or leave it out"
            )
        highest = 1.0 if "accuracy" in (self.condition or "") else float("inf")
        if self.condition != "step" and not all(0 <= value <= highest for value in sampling.asked):
            raise ValueError(
                f"sampling.condition is {sampling.condition}, which is no {self.condition}; accuracies are fractions, "
                "losses mean cross-entropies"
            )

    def check_dimension(self, dimension: int) -> None:
        """Raises ConfigError if the generator cannot learn vectors with this number of values."""

    def check_fitting(self) -> None:
        """Raises ConfigError if the generator is one that cannot be fitted."""

    @property
    def sampler(self) -> str | None:
        """The sampler where `sampling.sampler` says none."""
        return "ddpm"

    @property
    def condition(self) -> Condition | None:
        """What samples can be asked for."""
        return None

    @property
    def lossy(self) -> bool:
        """Whether it decodes latents, and vectors do not come back as they were encoded."""
        return False

    @property
    def in_memory(self) -> bool:
        """Whether it is fitted to all vectors at once."""
        return True

    def __str__(self) -> str:
        return self.name

    def cost(self, values: int, members: int, sampling: Sampling) -> tuple[float, float, float]:
        """Estimates what learning vectors (K, D) and drawing new ones takes.

        Args:
            values: D, numbers in a vector.
            members: K, vectors to learn.

        Returns:
            FLOPs of fitting and of drawing all samples, and bytes that fitting holds beside the vectors.
        """
        return 0.0, 0.0, 0.0


EncoderName = Annotated[str, Known("pdiff_ray.generators.encoders:ENCODERS")]
ProcessName = Annotated[str, Known("pdiff_ray.generators.processes:PROCESSES")]


class Encoder(Choice):
    """How a vector becomes a latent, and comes back: what all encoders have.

    Attributes:
        section: where its fields stand, for messages.
        in_memory: whether it is fitted to all vectors at once.
    """

    section: ClassVar[str] = "generator.encoder"
    in_memory: ClassVar[bool] = True

    name: EncoderName = Field("subspace", description="what makes latents of vectors; each has fields of its own")

    @property
    def lossy(self) -> bool:
        """Whether members do not come back as they were encoded."""
        return True

    def most_latents(self, values: int, members: int) -> int:
        """Returns how many values a latent of vectors (K, D) has at most."""
        return values

    def check_dimension(self, dimension: int) -> None:
        """Raises ConfigError if vectors with this number of values cannot be encoded."""

    def cost(self, values: int, members: int, samples: int) -> tuple[float, float, float]:
        """Estimates FLOPs of fitting vectors (K, D) and of decoding samples, and bytes that fitting holds."""
        return 0.0, 0.0, 0.0


class Process(Choice):
    """How latents are drawn: what all processes have.

    Attributes:
        section: where its fields stand, for messages.
        samplers: names of those it can draw with; the first is its own choice.
    """

    section: ClassVar[str] = "generator.process"
    samplers: ClassVar[tuple[str, ...]] = ()

    name: ProcessName = Field("flow", description="what learns the latents and draws new ones; likewise")

    def check_sampling(self, sampling: Sampling) -> None:
        """Raises ValueError if it cannot draw latents in this way."""
        sampler = sampling.sampler
        if sampler is not None and sampler not in self.samplers and not (self.samplers and ":" in sampler):
            wanted = f"take one of {', '.join(self.samplers)}, or leave it out" if self.samplers else "leave it out"
            raise ValueError(f"sampling.sampler is {sampler!r}, which is none of process {self.name}; {wanted}")

    def check_latents(self, num_latents: int) -> None:
        """Raises ConfigError if latents with this number of values cannot be learned."""

    def cost(self, num_latents: int, members: int, sampling: Sampling) -> tuple[float, float]:
        """Estimates FLOPs of learning latents (K, Z) and of drawing all samples."""
        return 0.0, 0.0


CHOICES.update(generator=Generator, encoder=Encoder, process=Process)


class Sampling(Section):
    """Drawing new vectors from the generator (stage `samples`)."""

    added = frozenset({"condition", "guidance"})

    samples: int = Field(100, ge=1, le=MAX_NETWORKS, description="number of new networks")
    sampler: Annotated[str, Known("pdiff_ray.generators.samplers:SAMPLERS")] | None = Field(
        None, description="how noise becomes latents; default: ddpm of a diffusion, midpoint of a flow"
    )
    steps: int | None = Field(None, ge=1, description="of the sampler; default: all timesteps, or 50 of a flow")
    condition: float | Annotated[tuple[float, ...], Field(min_length=1)] | None = Field(
        None,
        description="what is asked for of the generator's condition: a number, or several in turn; default: what "
        "members have, evenly spread over their ranks",
    )
    guidance: float = Field(
        1.0, ge=0, description="how much samples follow what is asked for: 0 not at all, 1 as was learned, or more"
    )
    seed: int | None = Field(None, description="default: the experiment's seed")

    @property
    def asked(self) -> tuple[float, ...]:
        """The numbers that `condition` gives."""
        if self.condition is None:
            return ()
        return self.condition if isinstance(self.condition, tuple) else (self.condition,)


class Evaluation(Section):
    """Judging the generated networks beside baselines (stage `evaluation`)."""

    unkeyed = frozenset({"batch_size", "networks_per_task", "networks_per_program"})
    added = frozenset({"baselines", "metrics"})
    renamed: ClassVar[dict[str, str]] = {
        "stack": "networks_per_task",
        "vmap": "networks_per_program",
        "noise_networks": "baseline_networks",
    }

    batch_size: int | None = Field(None, ge=1, description="images per forward pass; default: by memory")
    networks_per_task: int = Field(
        20, ge=1, description="networks that an actor judges, or a file holds, at a time; fewer toward the end"
    )
    networks_per_program: int | None = Field(
        None, ge=1, description="networks of a task that run at once by vmap; default: by memory on a GPU, else 1"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="autocast of what is judged here; the predictions it changes are counted"
    )
    noise_sigmas: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        (0.15, 0.5),
        max_length=100,
        description="noise-added baseline: sigmas, in standard deviations of each tensor's values",
    )
    baseline_networks: int | None = Field(
        None, ge=0, le=MAX_NETWORKS, description="networks of each baseline that is drawn; default: as many as samples"
    )
    fine_tuned_networks: int = Field(10, ge=0, le=MAX_NETWORKS, description="members trained further")
    fine_tuned_steps: int = Field(50, ge=1, description="training steps of each of them")
    baselines: tuple[OwnName, ...] = Field((), description="your own, each as module:Class; see extending.md")
    metrics: tuple[OwnName, ...] = Field((), description="your own, each as module:function; see extending.md")


class Resources(Section):
    """Where and how wide things run.

    Results depend on it by rounding alone, but for the number of workers that train the base: each augments its share
    of a batch with its own random numbers, and its BatchNorm layers see that share.
    """

    address: str | None = Field(None, description="Ray cluster; default: RAY_ADDRESS, else a local Ray")
    workers: int = Field(1, ge=1, le=10_000, description="Ray Train workers for base and zoo")
    cpus_per_worker: int = Field(1, ge=1, description="cores and threads of each")
    gpus_per_worker: GPUs | Literal["auto"] = Field(
        "auto", description="auto: one, or a share such that all find a place, where the cluster has GPUs"
    )
    actors: int = Field(2, ge=1, le=10_000, description="evaluation actors")
    cpus_per_actor: int = Field(1, ge=1, description="cores and threads of each")
    gpus_per_actor: GPUs | Literal["auto"] = Field("auto", description="likewise")
    cpus_per_trial: int = Field(1, ge=1, description="cores and threads of each trial of a sweep")
    gpus_per_trial: GPUs | Literal["auto"] = Field(
        "auto", description="of a sweep; auto: one, or a share such that sweep.max_concurrent find a place"
    )
    max_failures: int = Field(3, ge=0, description="restarts of lost workers")


class Tracking(Section):
    uri: str | None = Field(None, description="MLflow; default: MLFLOW_TRACKING_URI, else SQLite in the storage folder")
    experiment: str | None = Field(None, description="MLflow experiment; default: the experiment's name")


class Experiment(Section):
    """One experiment: from data to judged generated networks."""

    name: str = Field(
        min_length=1, max_length=200, pattern=r"^[\w.-]+$", description="names the MLflow experiment and the report"
    )
    seed: int = Field(0, ge=0, strict=True, description="seed of every stage that states none")
    data: Data = Data()
    network: Network = Network()
    training: Training = Training()
    zoo: Zoo = Zoo()
    alignment: Alignment = Alignment()
    generator: SerializeAsAny[Generator] = Field(default_factory=lambda: Generator.model_validate({}))
    sampling: Sampling = Sampling()
    evaluation: Evaluation = Evaluation()
    resources: Resources = Resources()
    tracking: Tracking = Tracking()
    storage: str | None = Field(None, description="folder or URI; default: PDIFF_STORAGE, else ./pdiff-storage")

    @model_validator(mode="before")
    @classmethod
    def _seeds(cls, value: Any) -> Any:
        """Hands the experiment's seed to the sections that state none, so that their keys are complete."""
        if not isinstance(value, dict) or not isinstance(value.get("seed", 0), int):
            return value
        for section in SEEDED:
            content = value.get(section) or {}
            if isinstance(content, dict) and content.get("seed") is None:
                value = {**value, section: {**content, "seed": value.get("seed", 0)}}
        return value

    @model_validator(mode="after")
    def _possible(self) -> Experiment:
        there = self.zoo.members - len(self.zoo.held_out_ids)
        if (wanted := self.generator.members or 1) > there:
            kept_back = f"; {self.zoo.held_out:.0%} are held out (zoo.held_out)" if self.zoo.held_out_ids else ""
            raise ValueError(
                f"generator.members is {wanted}, but the zoo has {self.zoo.members} (zoo.members){kept_back}, so that "
                f"{there} can be learned; lower the first or raise the second"
            )
        if self.generator.condition == "step" and (self.zoo.imported or self.zoo.regime == "independent"):
            raise ValueError(
                "the generator's condition is step, but only members that were trained from the base one after another "
                "(zoo.regime trajectory or branches) have one; take another condition"
            )
        workers, batch_size = self.resources.workers, self.training.batch_size
        if workers > 1 and (batch_size % workers or batch_size < 2 * workers):
            raise ValueError(
                f"training.batch_size is {batch_size}, which {workers} workers (resources.workers) cannot share "
                "equally, two images each at least; change one of them"
            )
        if self.sampling.sampler is None:  # so that its key is complete
            chosen = self.sampling.model_copy(update={"sampler": self.generator.sampler})
            object.__setattr__(self, "sampling", chosen)
        self.generator.check_sampling(self.sampling)
        return self

    @property
    def split(self) -> Split:
        """Which of the zoo's members are learned, and which are kept back."""
        held_out = self.zoo.held_out_ids
        learned = [id_ for id_ in range(self.zoo.members) if id_ not in held_out]
        return Split(tuple(learned[: self.generator.members]), tuple(sorted(held_out)), tuple(self.zoo.second_run_ids))

    @property
    def num_members(self) -> int:
        """K: how many members the generator learns from."""
        return len(self.split.learned)

    @property
    def storage_uri(self) -> str:
        return self.storage or os.environ.get("PDIFF_STORAGE") or "pdiff-storage"
