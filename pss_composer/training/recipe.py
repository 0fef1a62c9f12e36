"""The typed settings of a recipe: every key of a YAML file, with its default."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from pss_composer.data import Augmentation, StreamingSettings


@dataclass
class ModelSettings:
    """Arguments of a model, and the checkpoint that its weights come from.

    Models: `models.DeiT` (`name: deit`), `models.SimMIMClassifier` (`simmim`), `models.SimMIM` (`simmim_pretrain`).
    """

    name: str = MISSING
    pretrained: str | None = None  # a file that `import-checkpoint` reads
    size: str = "small"
    image_size: int = 224
    patch_size: int = 16
    num_classes: int = 1000
    drop_path: float = 0.1
    is_distilled: bool = False
    relative_position_bias: bool = False
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None


@dataclass
class DataSettings(StreamingSettings):
    """Where the images come from: `digits`, `folder`, `idx`, `streaming` or `synthetic`; and how they are streamed."""

    name: str = MISSING
    path: str | None = None
    num_workers: int = 8
    on_bad_sample: str = "raise"  # or skip
    num_samples: int = 1024  # of `synthetic`, in each split


@dataclass
class OptimizerSettings:
    """torch's AdamW; no weight decay on what timm exempts: biases, norms, position embeddings, class token."""

    lr: float = MISSING
    lr_batch_size: int | None = None  # lr is for this global batch size and scales with it; null: lr as it is
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.05
    layer_decay: float | None = None  # learning rate of a block by that of the next one


@dataclass
class SchedulerSettings:
    """Linear warm-up, then half a cosine or steps; shares of the learning rate, in Composer's words."""

    name: str = "cosine"  # or multistep
    warmup: str = "0ep"
    alpha_i: float = 0.0  # where the warm-up starts
    alpha_f: float = 0.0  # where the cosine ends
    milestones: list[str] = field(default_factory=list)  # of multistep: times at which the rate falls
    gamma: float = 0.1  # of multistep: to this share of what it was


@dataclass
class MixingSettings:
    mixup_alpha: float = 0.8
    cutmix_alpha: float = 1.0
    switch_prob: float = 0.5


@dataclass
class MaskingSettings:
    """Arguments of `PatchMasking`, for `model.name: simmim_pretrain`."""

    unit: int = 32
    ratio: float = 0.6


@dataclass
class EMASettings:
    smoothing: float = MISSING
    update_interval: str = "1ba"


@dataclass
class PSSSettings:
    """Arguments of `PatchSamplingSchedule`; `schedule` is a schedule's name with its arguments."""

    schedule: dict[str, Any] = field(default_factory=lambda: {"name": "cyclic"})
    sampler: str = "magnitude"
    masked_share: float | None = None  # of the sampler `stratified`, for `model.name: simmim_pretrain`
    eval_keep_rate: float = 1.0


@dataclass
class Recipe:
    """Everything that a training run depends on. Batch sizes are global: over all devices."""

    run_name: str = MISSING
    seed: int = 0
    deterministic: bool = False
    max_duration: str = MISSING
    train_batch_size: int = MISSING
    eval_batch_size: int = MISSING
    eval_interval: str = "1ep"

    device: str | None = None
    parallelism: str = "ddp"
    precision: str | None = None
    microbatch_size: int | None = None
    activation_checkpointing: bool = False
    compile: bool = False

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    augmentation: Augmentation = field(default_factory=Augmentation)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)
    masking: MaskingSettings | None = None
    mixing: MixingSettings | None = None
    label_smoothing: float = 0.0
    gradient_clipping: float | None = None
    ema: EMASettings | None = None
    pss: PSSSettings | None = None

    save_folder: str = "runs/${run_name}"
    save_interval: str = "1ep"
    save_num_checkpoints_to_keep: int = 1
    save_overwrite: bool = False
    autoresume: bool = False
    load_path: str | None = None
    load_weights_only: bool = False

    progress_bar: bool = True
    tensorboard: bool = False
