"""Every setting of a search: what it varies around a training, how long it looks, and when a trial is given up."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from pspnet.sizes import notation
from segfleet.config import DataConfig, TrainingConfig, require


@dataclass(frozen=True, kw_only=True, slots=True)
class SpaceConfig:
    """What the search varies: learning rate (log scale), auxiliary-loss weight and crop size."""

    min_base_lr: float = 1e-3
    max_base_lr: float = 1e-1
    min_aux_loss_weight: float = 0.0
    max_aux_loss_weight: float = 1.0
    crop_sizes: tuple[int | str, ...] = (473, 593, 713)
    """Candidates for data.crop_size."""
    also: tuple[str, ...] = ()
    """Other settings to vary: PATH=log:LOW..HIGH, PATH=linear:LOW..HIGH or PATH=choice:A,B, such as
    optim.weight_decay=log:1e-5..1e-3 or model.backbone=choice:resnet18,resnet50."""

    def __post_init__(self) -> None:
        require(
            0 < self.min_base_lr <= self.max_base_lr,
            f"space.min_base_lr and max_base_lr must satisfy 0 < min <= max, but got {self.min_base_lr} and "
            f"{self.max_base_lr}.",
        )
        require(
            0 <= self.min_aux_loss_weight <= self.max_aux_loss_weight,
            f"space.min_aux_loss_weight and max_aux_loss_weight must satisfy 0 <= min <= max, but got "
            f"{self.min_aux_loss_weight} and {self.max_aux_loss_weight}.",
        )
        require(len(self.crop_sizes) >= 1, "space.crop_sizes must name at least one crop size, but got none.")
        object.__setattr__(self, "crop_sizes", tuple(notation(size) for size in self.crop_sizes))
        require(
            len(set(self.crop_sizes)) == len(self.crop_sizes),
            f"space.crop_sizes must differ from each other, but got {self.crop_sizes}.",
        )
        for crop_size in self.crop_sizes:
            DataConfig(crop_size=crop_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """One search: the base configuration, what varies around it, and when a trial is given up."""

    training: Annotated[TrainingConfig, tyro.conf.arg(name="")] = field(default_factory=TrainingConfig)
    space: SpaceConfig = field(default_factory=SpaceConfig)

    study: str = "pspnet"
    """Name of the study: the same name continues it, with the same data, base configuration and space."""

    study_storage: str = ""
    """Where the study is kept: empty for a journal file below storage_dir, or a database: sqlite:///FILE, or
    postgresql://USER:PASSWORD@HOST/DATABASE (needs pip install 'segfleet[postgresql]')."""

    score_trials_on: Literal["selection", "val"] = "selection"
    """Where the store cuts train in two, trials train on the one part and are scored on the other, `selection`, and
    only the winner is ever scored on data.val_split; "val" scores every trial there, which flatters the winner."""

    num_trials: int = 16
    """Total number of trials of the study, those of earlier calls counted in."""

    extend: int = 0
    """So many trials more than the study has, instead of num_trials; each call adds as many."""

    narrow: tuple[str, ...] = ()
    """Searches a part of the study's space in a study of its own that begins with the trials that lie in it:
    base_lr=1e-3..1e-2, aux_loss_weight=0.2..0.6, crop_size=473,593 or a setting of space.also likewise."""

    objective: Literal["quality", "quality,cost"] = "quality"
    """What the study looks for: the highest mIoU, or the front of trials than which none is better and as cheap, or
    cheaper and as good, in worker-seconds (GPU-seconds on GPUs). The front is reported; the best in mIoU still wins."""

    sampler: Literal["tpe", "gp", "random", "grid"] = "tpe"
    """Who proposes: TPE (multivariate, constant liar), a Gaussian process, chance, or every point of a grid."""

    num_startup_trials: int = 8
    """Trials drawn at random before TPE or the Gaussian process proposes."""

    grid_points: int = 3
    """Values of each range in a grid; a choice has all of its own."""

    scheduler: Literal["asha", "median", "none"] = "asha"
    """Who prunes: ASHA at its rungs; the median of the complete trials at the same epoch, after five of them;
    or nobody."""

    min_epochs: int = 0
    """Epochs that every trial may train before it can be pruned (ASHA's grace period); 0: a ninth of num_epochs. Too
    early a look takes those for the best that learn fast, not those that learn much (benchmarks/README.md)."""

    reduction_factor: int = 3
    """At each rung, one in so many trials goes on (ASHA's eta)."""

    fidelity: Literal["pixels", "epochs"] = "pixels"
    """What trials are compared at, and how long they train: as many pixels as the base configuration sees in its
    epochs, so that a trial with a smaller crop trains more epochs and costs as much; or equally many epochs."""

    num_finalists: int = 3
    """After the search, so many of its best trials are trained again, each with num_seeds other seeds, and the winner
    is the one whose mean mIoU has the highest lower confidence bound; 0 takes the best trial as it is."""

    num_seeds: int = 2
    """Seeds that each finalist is trained again with; their spread tells a lead from luck."""

    max_concurrent_trials: int = 0
    """Trials that train side by side; 0 takes as many as the cluster's resources hold."""

    seed: int = 0
    """Seed of the sampler."""

    def __post_init__(self) -> None:
        for name in ("num_trials", "grid_points", "num_seeds"):
            value = getattr(self, name)
            require(value >= 1, f"{name} must be at least 1, but got {value}.")
        for name in ("min_epochs", "num_startup_trials", "max_concurrent_trials", "extend", "num_finalists"):
            value = getattr(self, name)
            require(value >= 0, f"{name} must be 0 or more, but got {value}.")
        require(
            self.reduction_factor >= 2,
            f"reduction_factor must be at least 2, but got {self.reduction_factor}.",
        )
        require(
            self.objective == "quality" or self.scheduler == "none",
            f"objective quality,cost needs every trial at its end, to know what it costs, but got scheduler "
            f"{self.scheduler}. Give --scheduler none.",
        )
        require(
            self.study.strip() != "" and "/" not in self.study,
            f"study must be a name without slashes, but got {self.study!r}.",
        )
