"""Every setting of a training: frozen dataclasses that refuse nonsense.

override.py varies a configuration, config_json.py stores it; search_config.py has the settings of a search.
"""

from dataclasses import dataclass, field
from typing import Literal

from pspnet.errors import InputError
from pspnet.json_values import shown
from pspnet.sizes import notation, sides
from segfleet.secret import masked

Precision = Literal["fp32", "bf16", "fp16"]

LARGEST = 1e30
"""Of rates and weights: beyond lies where fp32 ends, and torch raises an error of its own instead of diverging."""

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "mobilenet_v2")
"""Those of pspnet.backbones, which is not imported here: it takes as long as torch."""


def require(ok: bool, message: str) -> None:
    """Raise InputError with `message` unless `ok`."""
    if not ok:
        raise InputError(message)


def nearest_crop_sizes(size: int) -> tuple[int, int]:
    """Return the next crop sizes of the form 8k + 1 at or below and above `size` (the smallest is 33)."""
    below = max(33, (size - 1) // 8 * 8 + 1)
    return below, below + 8


def _require_sides(crop_size: int | str, remainders: tuple[int, ...], rule: str, remedy: str) -> None:
    for side in sides(crop_size):
        below, above = nearest_crop_sizes(side)
        require(
            side % 8 in remainders and side >= 33,
            f"data.crop_size must be {rule}, but got {crop_size}. The nearest"
            f"{f' to {side}' if crop_size != side else ''} are {below} and {above}{remedy}.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What is read, and how a training window is drawn from it."""

    store: str = ""
    """Folder or address (s3://…, gs://…) of the ingested data set (made by jobs/ingest_*.py)."""

    train_split: str = "train"
    """Split of the store that is trained on."""

    val_split: str = "val"
    """Split of the store that is evaluated on."""

    crop_size: int | str = 713
    """Side of the square training crop in pixels, or HEIGHTxWIDTH: each 8k + 1, so that align_corners maps exactly;
    without model.align_corners 8k does, too. At model.output_stride 16 or 32 take 16k + 1 or 32k + 1: others are
    padded up to it."""

    min_scale: float = 0.5
    """Smallest random scale of the image before the crop is taken."""

    max_scale: float = 2.0
    """Largest random scale of the image before the crop is taken."""

    flip_probability: float = 0.5
    """Share of the windows that are mirrored left to right."""

    rotate_degrees: float = 0.0
    """Windows are rotated by a random angle of at most this many degrees, half of them (semseg: 10)."""

    blur_probability: float = 0.0
    """Share of the windows that are blurred with a 5x5 Gaussian (semseg: 0.5)."""

    photometric: bool = False
    """Brightness, contrast, saturation and hue of the windows are varied (mmsegmentation's PhotoMetricDistortion)."""

    max_class_share: float = 1.0
    """A window is placed anew, up to ten times, while one class has this share of its valid pixels or it has but one
    class (mmsegmentation's cat_max_ratio: 0.75); 1 takes every window."""

    class_uniform_share: float = 0.0
    """Share of the windows for which a class is drawn, each with the same chance, then an image that holds it and a
    window around it (NVIDIA's class-uniform sampling: 0.5); 0 turns it off."""

    num_prefetch_threads: int = 1
    """Threads of each worker that copy windows ahead of the training step."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "crop_size", notation(self.crop_size))
        require(
            masked(self.store) == self.store,
            f"data.store must be without a password, because it is recorded, but got {masked(self.store)}. Give the "
            "credentials as the cloud's own tools take them: in the environment or in a file.",
        )
        _require_sides(
            self.crop_size, (0, 1), "8k + 1, or 8k without model.align_corners, and at least 33", ""
        )
        require(
            0 < self.min_scale <= self.max_scale <= 10,
            f"data.min_scale and data.max_scale must satisfy 0 < min <= max <= 10, but got {self.min_scale} and "
            f"{self.max_scale}. The usual range is 0.5 to 2.",
        )
        for name in ("flip_probability", "blur_probability", "class_uniform_share"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"data.{name} must be between 0 and 1, but got {value}. 0 turns it off.")
        require(
            0 <= self.rotate_degrees <= 45,
            f"data.rotate_degrees must be between 0 and 45, but got {self.rotate_degrees}. semseg uses 10.",
        )
        require(
            0 < self.max_class_share <= 1,
            f"data.max_class_share must be above 0 and at most 1, but got {self.max_class_share}. "
            "mmsegmentation uses 0.75; 1 turns it off.",
        )
        require(
            self.num_prefetch_threads >= 1,
            f"data.num_prefetch_threads must be at least 1, but got {self.num_prefetch_threads}. One is usual.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The network. Every field but `weights`, `backbone_weights` and `freeze_…` is an argument of
    `pspnet.model.PSPNet`."""

    backbone: str = "resnet50"
    """Dilated network that computes the features: resnet18, 34, 50, 101, 152, mobilenet_v2, or timm:NAME for one of
    the library timm, which is an extra."""

    backbone_weights: str = ""
    """Initial backbone weights: empty for random ones, "imagenet" for torchvision's or timm's (downloaded), or a
    file."""

    weights: str = ""
    """Initial weights of the whole network in place of the backbone's: a PSPNet checkpoint of semseg or mmsegmentation,
    or the model.safetensors of a model package; empty for none."""

    deep_stem: bool = False
    """A ResNet begins with three 3x3 convolutions, as those of PSPNet's authors, in place of one 7x7."""

    deep_stem_channels: Literal[128, 64] = 128
    """Channels after the deep stem: 128 as PSPNet's authors, 64 as mmsegmentation's ResNetV1c."""

    contract_dilation: bool = False
    """The first block of a ResNet's dilated stage has half its dilation, as in mmsegmentation and torchvision."""

    dilations: tuple[int, ...] = ()
    """Dilation of each stage of the backbone, four of a ResNet and seven of mobilenet_v2; empty for those that make up
    for the strides which the output stride leaves out. mmsegmentation's d32 networks have 1 1 2 4 at output stride
    32."""

    dilate_first_only: bool = False
    """A block of ResNet-18 or -34 dilates the first of its two convolutions alone, and a stage of mobilenet_v2 the
    first of its blocks, as in mmsegmentation."""

    norm: Literal["auto", "batch", "sync", "group"] = "auto"
    """BatchNorm of each worker's own images (batch), of all workers' on GPUs (sync), or GroupNorm of 32 groups, which
    knows no other image (group); auto is sync on GPUs and batch on CPUs, for which there is no sync."""

    align_corners: bool = True
    """Grids and logits are interpolated with their corners on the corners, as PSPNet's authors do; mmsegmentation only
    does so for crops of 769."""

    output_stride: Literal[8, 16, 32] = 8
    """Input pixels per feature cell; 32 leaves out none of the backbone's strides."""

    bin_sizes: tuple[int, ...] = (1, 2, 3, 6)
    """Grids of the pyramid pooling; empty leaves it out."""

    branch_channels: int = 0
    """Channels of each grid of the pyramid; 0 is the paper's, an equal share of the features'. mmsegmentation has as
    many as head_channels."""

    head_channels: int = 512
    """Channels of the 3x3 convolution of the head."""

    dropout: float = 0.1
    """Dropout before the classifiers."""

    has_aux_head: bool = True
    """Whether an auxiliary classifier is trained on stage 3."""

    aux_channels: int = 0
    """Channels of the auxiliary classifier's 3x3 convolution; 0 is the paper's, a quarter of the features'."""

    freeze_stages: int = 0
    """The first so many of the backbone's stem and stages 1 to 4 keep their initial weights and statistics."""

    freeze_batch_norm: Literal["none", "backbone", "all"] = "none"
    """Where BatchNorm keeps its initial weights and normalises with its initial statistics."""

    def __post_init__(self) -> None:
        require(
            self.backbone in BACKBONES or self.backbone.startswith("timm:"),
            f"model.backbone must be one of {', '.join(BACKBONES)}, timm:NAME, but got {self.backbone!r}.",
        )
        require(
            self.backbone.startswith("resnet") or not (self.deep_stem or self.contract_dilation),
            f"model.deep_stem and model.contract_dilation are of ResNets, but got {self.backbone}. Leave them out.",
        )
        require(
            not (self.backbone.startswith("timm:") and self.dilations),
            f"model.dilations are of {', '.join(BACKBONES)}, but got {self.backbone}, which timm dilates. Leave them "
            "out.",
        )
        num_stages = 7 if self.backbone == "mobilenet_v2" else 4
        require(
            len(self.dilations) in (0, num_stages) and all(1 <= each <= 64 for each in self.dilations),
            f"model.dilations must be {num_stages} numbers of 1 to 64, one for each stage of {self.backbone}, or none, "
            f"but got {shown(self.dilations)}. None takes those of the output stride.",
        )
        require(
            not self.dilate_first_only or self.backbone in ("resnet18", "resnet34", "mobilenet_v2"),
            f"model.dilate_first_only is of resnet18, resnet34 and mobilenet_v2, but got {self.backbone}. Leave it "
            "out.",
        )
        require(
            self.deep_stem or self.deep_stem_channels == 128,
            f"model.deep_stem_channels are of the deep stem, but got {self.deep_stem_channels} for model.deep_stem "
            "False. Leave them out, or set it to True.",
        )
        require(
            not (self.weights and self.backbone_weights),
            f"model.weights are the backbone's, too, but got model.backbone_weights {self.backbone_weights} beside "
            f"{self.weights}. Leave one empty: --model.backbone-weights ''.",
        )
        require(
            self.norm != "group" or self.backbone_weights != "imagenet",
            "model.backbone_weights imagenet were trained with BatchNorm, but got model.norm group. Leave them "
            "empty, or give a file of weights that were trained with GroupNorm.",
        )
        require(
            self.norm != "group" or self.freeze_batch_norm == "none",
            f"model.freeze_batch_norm needs BatchNorm, but got {self.freeze_batch_norm} for model.norm group, which "
            "has none. Leave it out, or use model.norm batch.",
        )
        require(
            all(1 <= size <= 1024 for size in self.bin_sizes),
            f"model.bin_sizes must be 1 to 1024, but got {shown(self.bin_sizes)}. The paper's are 1 2 3 6.",
        )
        require(
            1 <= self.head_channels <= 10**9,
            f"model.head_channels must be 1 to 10**9, but got {self.head_channels}. The paper's is 512.",
        )
        for name, where, has_it in (
            ("branch_channels", "the pyramid", bool(self.bin_sizes)),
            ("aux_channels", "the auxiliary head", self.has_aux_head),
        ):
            channels = getattr(self, name)
            require(
                0 <= channels <= 10**9,
                f"model.{name} must be 0 to 10**9, but got {channels}. 0 takes the paper's share of the features'.",
            )
            require(
                has_it or not channels,
                f"model.{name} are of {where}, but got {channels} where there is none. Leave them out.",
            )
        require(
            0 <= self.dropout < 1, f"model.dropout must be in [0, 1), but got {self.dropout}. Usual: 0.1."
        )
        require(
            0 <= self.freeze_stages <= 5,
            f"model.freeze_stages must be 0 (none) to 5 (stem and all four stages), but got {self.freeze_stages}. "
            "0 trains all of them.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """SGD with momentum, the poly schedule and the weight of the auxiliary loss."""

    base_lr: float = 0.01
    """Learning rate of the backbone at iteration 0."""

    head_lr_factor: float = 10.0
    """The heads learn at base_lr times this."""

    momentum: float = 0.9
    """Momentum of SGD."""

    weight_decay: float = 1e-4
    """L2 penalty on all parameters."""

    power: float = 0.9
    """The learning rate falls as (1 - iteration / max_iterations) ** power."""

    min_lr: float = 0.0
    """It falls to this instead of to 0: (lr - min_lr) * factor + min_lr (mmsegmentation: 1e-4)."""

    aux_loss_weight: float = 0.4
    """Weight of the auxiliary cross-entropy beside the main one."""

    warm_up_iterations: int = 0
    """The first so many iterations raise the learning rate linearly from warm_up_start times the scheduled one up to
    it; 0 turns it off."""

    warm_up_start: float = 1e-6
    """Share of the scheduled learning rate at iteration 0 of a warm-up."""

    max_gradient_norm: float = 0.0
    """Gradients with a larger norm, over all parameters together, are scaled down to it; 0 turns it off."""

    ema_decay: float = 0.0
    """An exponential moving average of weights and BatchNorm's statistics with this decay is evaluated, kept and
    packaged in their place (usual: 0.999 to 0.9999); 0 turns it off."""

    def __post_init__(self) -> None:
        for name, usual in (("base_lr", 0.01), ("head_lr_factor", 10), ("power", 0.9)):
            value = getattr(self, name)
            require(
                0 < value <= LARGEST,
                f"optim.{name} must be a positive number of at most {LARGEST:g}, but got {value}. Usual: {usual}.",
            )
        head_lr = self.base_lr * self.head_lr_factor
        require(
            head_lr <= LARGEST * 10,
            f"optim.base_lr x optim.head_lr_factor, the heads' rate, must be at most {LARGEST * 10:g}, but got "
            f"{head_lr:g}. Usual: 0.1.",
        )
        lowest = f"optim.base_lr {self.base_lr}"
        if self.head_lr_factor < 1:
            lowest = f"the heads' rate {head_lr:g} (optim.base_lr x optim.head_lr_factor)"
        require(
            0 <= self.min_lr < min(self.base_lr, head_lr),
            f"optim.min_lr must be 0 or more and below {lowest}, but got {self.min_lr}. "
            "mmsegmentation uses a hundredth of it.",
        )
        require(
            0 <= self.momentum < 1, f"optim.momentum must be in [0, 1), but got {self.momentum}. Usual: 0.9."
        )
        for name in ("weight_decay", "aux_loss_weight", "max_gradient_norm"):
            value = getattr(self, name)
            require(
                0 <= value <= LARGEST,
                f"optim.{name} must be 0 or a positive number of at most {LARGEST:g}, but got {value}. "
                "0 turns it off.",
            )
        require(
            0 <= self.ema_decay < 1,
            f"optim.ema_decay must be in [0, 1), but got {self.ema_decay}. 0 turns it off; usual: 0.999.",
        )
        require(
            self.warm_up_iterations >= 0,
            f"optim.warm_up_iterations must be 0 or more, but got {self.warm_up_iterations}. 0 turns it off.",
        )
        require(
            0 < self.warm_up_start <= 1,
            f"optim.warm_up_start must be above 0 and at most 1, but got {self.warm_up_start}. "
            "mmsegmentation uses 1e-6.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """Which cross-entropy is minimised: of main and auxiliary classifier, over the valid pixels."""

    label_smoothing: float = 0.0
    """So much of each target is spread evenly over all classes."""

    class_weights: tuple[float, ...] = ()
    """Weight of the pixels of each class, in the order of their train ids; empty weighs all alike."""

    class_balance: Literal["none", "balanced", "median"] = "none"
    """Weights from the training pixels of each class: "balanced" gives every class the same share of the loss, "median"
    weighs by median of the classes' pixels / pixels of the class."""

    ohem_threshold: float = 0.0
    """The main loss takes only pixels whose class the network gives a smaller probability than this, online hard
    example mining (mmsegmentation: 0.7); 0 takes all pixels."""

    ohem_min_kept: int = 100_000
    """Online hard example mining takes at least so many pixels an image, of those in the network at a time."""

    def __post_init__(self) -> None:
        for name in ("label_smoothing", "ohem_threshold"):
            value = getattr(self, name)
            require(0 <= value < 1, f"loss.{name} must be in [0, 1), but got {value}. 0 turns it off.")
        require(
            self.ohem_min_kept >= 1,
            f"loss.ohem_min_kept must be at least 1, but got {self.ohem_min_kept}. mmsegmentation uses 100000.",
        )
        require(
            all(0 <= weight <= LARGEST for weight in self.class_weights)
            and (not self.class_weights or max(self.class_weights) > 0),
            f"loss.class_weights must be 0 or positive numbers of at most {LARGEST:g}, one of them above 0, but got "
            f"{self.class_weights}. 1 is the weight of a class like any other.",
        )
        require(
            not self.class_weights or self.class_balance == "none",
            f"loss.class_balance computes the weights that loss.class_weights gives, but got "
            f"{self.class_balance!r} and {self.class_weights}. Give one of them.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """How long is trained, with which batches, and how often is measured and saved."""

    num_epochs: int = 200
    """Passes over the training split."""

    global_batch_size: int = 16
    """Images per optimizer step, over all workers."""

    accumulation_steps: int = 1
    """Each worker takes its images of an optimizer step through the network in so many equal parts, one after the
    other, which takes less memory. Only BatchNorm sees the difference: a part is normalised by itself."""

    max_iterations_per_epoch: int = 0
    """Ends each epoch after this many iterations; 0 for whole epochs."""

    evaluate_every_epochs: int = 1
    """Evaluate and report after every so many epochs, and after the last."""

    seed: int = 0
    """Everything random follows from it."""

    def __post_init__(self) -> None:
        for name, remedy in (
            ("num_epochs", "1 is a single pass over the training split"),
            ("global_batch_size", "16 is the paper's"),
            ("accumulation_steps", "1 takes all images of a worker at once"),
            ("evaluate_every_epochs", "1 evaluates after each"),
        ):
            value = getattr(self, name)
            require(value >= 1, f"schedule.{name} must be at least 1, but got {value}. {remedy}.")
        require(
            self.max_iterations_per_epoch >= 0,
            f"schedule.max_iterations_per_epoch must be 0 or more, but got {self.max_iterations_per_epoch}. "
            "0 trains whole epochs.",
        )
        require(
            0 <= self.seed < 2**31,
            f"schedule.seed must be between 0 and 2**31 - 1, but got {self.seed}. 0 is as good as any.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkersConfig:
    """The DDP group that Ray Train starts."""

    num_workers: int = 1
    """Processes of the DDP group."""

    min_workers: int = 0
    """With how few of them training goes on when nodes are lost, until there is room for all again; 0 waits for all."""

    use_gpu: bool = False
    """One GPU for each worker (nccl); otherwise CPUs (gloo)."""

    cpus_per_worker: int = 1
    """CPUs reserved for, and threads used by, each worker."""

    precision: Precision = "fp32"
    """Autocast precision of the forward pass."""

    recompute: bool = False
    """Blocks of the backbone keep only their input and compute the rest again in the backward pass (activation
    checkpointing): less memory, a third more arithmetic, the same gradients."""

    compile: bool = False
    """Training steps are compiled by torch.compile, which takes a minute or more at the first one."""

    memory_gib: float = 0.0
    """Memory that a worker may take, in GiB: schedule.accumulation_steps rises until a step is predicted to fit, so
    that the global batch stays, and what cannot fit is refused before it begins; 0 predicts nothing. Training steps
    alone are predicted: not evaluation, which takes whole images."""

    memory_fit: tuple[float, ...] = (1.0, 0.0)
    """A step takes the first times the counted bytes of its tensors and the second in GiB, as jobs/predict_memory.py
    measures it on a GPU: what torch's allocator reserves. CUDA's context and NCCL come beside it: let memory_gib leave
    them about 1 GiB of the GPU."""

    peak_tflops: float = 0.0
    """What a worker's device can do at most in workers.precision, in TFLOP/s without sparsity: MFU is the share of it.
    0 takes it from the table of NVIDIA's GPUs in pspnet/flops.py; for a device that is not there no MFU is told."""

    max_failures: int = 2
    """How often Ray Train restarts the group from the last checkpoint after a worker died."""

    def __post_init__(self) -> None:
        for name, remedy in (
            ("num_workers", "1 trains in one process"),
            ("cpus_per_worker", "1 gives each a thread"),
        ):
            value = getattr(self, name)
            require(value >= 1, f"workers.{name} must be at least 1, but got {value}. {remedy}.")
        require(
            0 <= self.min_workers <= self.num_workers,
            f"workers.min_workers must be between 0 and workers.num_workers ({self.num_workers}), but got "
            f"{self.min_workers}. 0 waits for all.",
        )
        require(
            self.max_failures >= 0,
            f"workers.max_failures must be 0 or more, but got {self.max_failures}. 0 never restarts.",
        )
        require(
            0 <= self.memory_gib <= LARGEST,
            f"workers.memory_gib must be 0 or a positive number of at most {LARGEST:g}, but got {self.memory_gib}. "
            "0 predicts nothing.",
        )
        require(
            len(self.memory_fit) == 2
            and 0 < self.memory_fit[0] <= LARGEST
            and 0 <= self.memory_fit[1] <= LARGEST,
            f"workers.memory_fit must be a factor above 0 and GiB of 0 or more, both at most {LARGEST:g}, but got "
            f"{self.memory_fit}. 1 0 takes the counted bytes as they are.",
        )
        require(
            0 <= self.peak_tflops <= LARGEST,
            f"workers.peak_tflops must be 0 or a positive number of at most {LARGEST:g}, but got "
            f"{self.peak_tflops}. 0 takes the table's.",
        )
        require(
            self.precision != "fp16" or self.use_gpu,
            "workers.precision fp16 needs a GPU, but workers.use_gpu is False. Use bf16 or fp32 on CPUs.",
        )
        require(
            not (self.compile and self.recompute),
            "workers.compile and workers.recompute must not both be True: torch.compile decides itself what it keeps "
            "and cannot leave BatchNorm's statistics alone in a second pass. Set one of them to False.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    """Where results go: MLflow for people, the storage folder for checkpoints and studies."""

    tracking_uri: str = ""
    """MLflow server or database; empty takes MLFLOW_TRACKING_URI, else sqlite:///<storage_dir>/mlflow.db."""

    experiment_name: str = "segfleet"
    """MLflow experiment."""

    run_name: str = ""
    """Name of the run and of its folder; empty derives one from the preset and the configuration's digest."""

    storage_dir: str = "runs"
    """Folder that every node sees: checkpoints, studies, pictures, the spool of the tracking."""

    registered_model_name: str = ""
    """Registers the trained model under this name; empty registers nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """One training: everything that decides its result, and where the result goes."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        if self.model.align_corners:
            _require_sides(
                self.data.crop_size,
                (1,),
                "8k + 1 with model.align_corners",
                "; or set model.align_corners False, for which 8k does, too",
            )
        batch, num_workers = self.schedule.global_batch_size, self.workers.num_workers
        lower = max(1, batch // num_workers) * num_workers
        require(
            batch % num_workers == 0,
            f"schedule.global_batch_size must be a multiple of workers.num_workers, but got {batch} for "
            f"{num_workers} workers. The nearest are {lower} and {lower + num_workers}.",
        )
        steps, share = self.schedule.accumulation_steps, batch // num_workers
        require(
            share % steps == 0,
            f"schedule.accumulation_steps must divide the {share} images that a worker has of a global batch, but got "
            f"{steps}. These do: {', '.join(str(n) for n in range(1, share + 1) if share % n == 0)}.",
        )
        require(
            self.model.norm != "sync" or self.workers.use_gpu or num_workers == 1,
            "model.norm sync needs GPUs, because torch has no SyncBatchNorm on CPUs, but workers.use_gpu is False "
            f"for {num_workers} workers. Use group, which makes workers equal on CPUs, or batch.",
        )
        require(
            not (self.workers.recompute and self.model.backbone.startswith("timm:")),
            f"workers.recompute needs a backbone whose blocks are known, but got {self.model.backbone}. Take one of "
            f"{', '.join(BACKBONES)}, or raise schedule.accumulation_steps.",
        )

    @property
    def per_worker_batch_size(self) -> int:
        """Images per optimizer step of one worker."""
        return self.schedule.global_batch_size // self.workers.num_workers

    @property
    def micro_batch_size(self) -> int:
        """Images that a worker takes through the network at a time."""
        return self.per_worker_batch_size // self.schedule.accumulation_steps

    def accumulation_steps_of(self, num_workers: int) -> int:
        """Return in how many parts each of so many workers, fewer than asked for, takes its share of a global batch.

        No part has more images than with all workers, unless BatchNorm would be left with a single one, or a worker
        with none.
        """
        batch, micro = self.schedule.global_batch_size, self.micro_batch_size
        largest, smallest = -(-batch // num_workers), batch // num_workers
        least = 1
        if not self._may_take_single_images(num_workers):
            least = 2 if self._may_take_single_images(self.workers.num_workers) else min(2, micro)
        return max(1, min(-(-largest // micro), smallest // least))

    def _may_take_single_images(self, num_workers: int) -> bool:
        """Whether, with so many workers, BatchNorm is synchronised or none is trained."""
        if self.model.norm == "group" or self.model.freeze_batch_norm == "all":
            return True
        return self.workers.use_gpu and num_workers > 1 and self.model.norm != "batch"
