"""What a run's request makes of its parts: encoder, objective, optimizer, order, views, rates.

Values that a request leaves open are the published ones of its objective.
"""

from __future__ import annotations

from dataclasses import replace

from synthrep_trainer.augment import AugmentConfig
from synthrep_trainer.batches import HeldOutPlan, ViewPlan
from synthrep_trainer.encoder import EncoderConfig
from synthrep_trainer.learner import LearnerConfig
from synthrep_trainer.objectives import ObjectiveConfig, SynclrConfig, TextConfig
from synthrep_trainer.order import SamplingPlan
from synthrep_trainer.records import RunRecord
from synthrep_trainer.schedules import Rates, cosine, warmup_cosine_lr

# The published head is wide for ViT-S and larger; it would outweigh the small encoder ten times.
_PROJECTION_HIDDEN = {"vit_synthrep_tiny": 1024}
_PUBLISHED_PROJECTION_HIDDEN = 4096
_BETA1 = 0.9
_BETA2 = {"synclr": 0.999}
_PUBLISHED_BETA2 = 0.98
# Small runs of these stay at chance with the rate that suits the others, see docs/experiments.md.
_LR = {"clip": 3e-4, "stablerep+": 3e-4, "synclr": 3e-4}
_USUAL_LR = 1.5e-3
_SYNCLR_EMA_DECAYS = 0.994, 1.0  # as published, in runs of 85,000 steps and more
# Steps of the average's memory that a run is long at least. The average is the teacher and is what
# probes judge: with the published decay, a run of 50 steps ends with 86 % of its first weights.
_SYNCLR_MEMORIES = 20
_HELD_OUT_IMAGES = 4  # of each caption
# A small crop is 96 px where the view is 224.
_CROP_SHARE = 3 / 7
# SynCLR's views: global ones are of two kinds in turn, those of BYOL, and small crops.
_SYNCLR_GLOBAL_SCALE, _SYNCLR_CROP_SCALE = (0.32, 1.0), (0.08, 0.32)
_SYNCLR_SATURATION = 0.2


def learner_config(record: RunRecord, device_type: str) -> LearnerConfig:
    """What the learner is made of, on a device of this type."""
    request = record.request
    encoder = EncoderConfig(
        model=request.model,
        image_size_px=request.image_size,
        drop_path_rate=request.drop_path_rate,
        projection_hidden=_PROJECTION_HIDDEN.get(request.model, _PUBLISHED_PROJECTION_HIDDEN),
    )
    precision = request.precision
    if precision == "auto":
        precision = "bf16" if device_type == "cuda" else "fp32"
    return LearnerConfig(
        encoder=encoder,
        objective=_objective(record),
        seed=request.seed,
        betas=(_BETA1, request.beta2 or _BETA2.get(request.objective, _PUBLISHED_BETA2)),
        max_grad_norm=request.max_grad_norm,
        has_moving_average=_ema_decays(record) is not None,
        micro_batch_images=request.micro_batch_images,
        max_skipped_steps=request.max_skipped_steps if request.non_finite == "skip" else 0,
        precision=precision,
    )


def sampling_plan(record: RunRecord) -> SamplingPlan:
    """The order of the data."""
    request = record.request
    return SamplingPlan(
        seed=request.seed,
        captions_per_batch=request.captions_per_batch,
        images_per_caption=record.images_per_caption,
        min_fill_groups=request.min_fill_groups or request.captions_per_batch,
        max_uses_per_image=request.max_uses_per_image,
        held_out=record.held_out,
        max_age_groups=request.max_age_groups,
        min_generated_per_trained=request.min_generated_per_trained or 0.0,
        views_per_batch=record.views_per_step,
    )


def held_out_plan(record: RunRecord) -> HeldOutPlan | None:
    """When and how held-out captions are looked at, None if none are held out."""
    request = record.request
    if request.knn_every is None:
        return None
    whole = AugmentConfig.whole(request.image_size)
    return HeldOutPlan(request.knn_every, request.knn_captions, _HELD_OUT_IMAGES, whole)


def view_plan(record: RunRecord, *, patch_size_px: int) -> ViewPlan:
    """The views; small crops are tiled by patches of this size.

    Raises ValueError if the small crops of the request are not.
    """
    request = record.request
    views = replace(
        AugmentConfig.for_image_size(request.image_size),
        downsample_probability=request.downsample_probability,
    )
    plan = ViewPlan(request.seed, record.images_per_caption, record.views_per_image, views)
    if record.reads_captions:
        plan = plan._replace(text_context=request.text.context)
    if request.objective != "synclr":
        return plan
    size = request.synclr.crop_size
    size = size or max(1, round(request.image_size * _CROP_SHARE / patch_size_px)) * patch_size_px
    if size % patch_size_px:
        raise ValueError(
            f"crop_size must be a multiple of the patch, {patch_size_px} px, got {size}"
        )
    views = replace(views, crop_scale=_SYNCLR_GLOBAL_SCALE, saturation=_SYNCLR_SATURATION)
    # Where blur is dropped whole for the size, it is dropped from every kind.
    is_blurred = views.blur_probability > 0
    crops = replace(
        AugmentConfig.for_image_size(size),
        crop_scale=_SYNCLR_CROP_SCALE,
        saturation=_SYNCLR_SATURATION,
    )
    return plan._replace(
        augmentation=replace(views, blur_probability=1.0 * is_blurred),
        odd_augmentation=replace(
            views, blur_probability=0.1 * is_blurred, solarise_probability=0.2
        ),
        crops_per_image=record.small_crops_per_image,
        crop_augmentation=crops,
    )


def rates(record: RunRecord, step: int) -> Rates:
    """What the update that is step number `step`, from 1, uses."""
    request, total = record.request, record.max_steps
    lr = warmup_cosine_lr(
        step - 1,
        peak_lr=request.lr or _LR.get(request.objective, _USUAL_LR),
        warmup_steps=int(request.warmup_fraction * total),
        total_steps=total,
    )
    decay, last_decay = request.weight_decay, request.final_weight_decay
    if last_decay is not None:
        decay = cosine(step - 1, start=decay, end=last_decay, num_steps=total)
    ema = _ema_decays(record)
    if ema is None:
        return Rates(lr, decay)
    return Rates(lr, decay, cosine(step - 1, start=ema[0], end=ema[1], num_steps=total))


def _objective(record: RunRecord) -> ObjectiveConfig:
    request = record.request
    text, synclr = request.text, request.synclr
    return ObjectiveConfig(
        name=request.objective,
        rows_per_caption=record.images_per_caption * record.views_per_image,
        temperature=request.temperature,
        text=TextConfig(text.width, text.layers, text.heads, text.context),
        text_dim=text.dim,
        image_weight=request.image_weight,
        text_weight=request.text_weight,
        synclr=SynclrConfig(
            **synclr.model_dump(exclude={"crop_size"}),
        ),
    )


def _ema_decays(record: RunRecord) -> tuple[float, float] | None:
    """First and last decay of the moving average, None without one."""
    request = record.request
    first, last = request.ema_decay, request.ema_final_decay
    if request.objective == "synclr":
        shortest = max(0.0, 1 - _SYNCLR_MEMORIES / record.max_steps)
        first = min(_SYNCLR_EMA_DECAYS[0], shortest) if first is None else first
        last = _SYNCLR_EMA_DECAYS[1] if last is None else last
    return None if first is None else (first, first if last is None else last)
