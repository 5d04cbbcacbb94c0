"""Arithmetic of a training step, counted; and what GPUs can do at most."""

import functools
import json
import re
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from pspnet.freezing import Frozen, freeze, train_mode
from pspnet.inference import Precision
from pspnet.model import PSPNet
from pspnet.sizes import Size, sides
from pspnet.sizes_alone import sizes_alone


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """What a training image costs, and what all workers' devices could do."""

    flops_per_image: int
    """See `training_flops`."""
    peak_flops: float | None
    """Operations per second of all devices together; None where that is not known, as of CPUs."""

    def rates(self, images_per_s: float) -> dict[str, float]:
        """Return tflops_per_s and, where the peak is known, mfu (model FLOPs utilisation), its share of the peak."""
        flops_per_s = self.flops_per_image * images_per_s
        rates = {"tflops_per_s": flops_per_s / 1e12}
        return rates if self.peak_flops is None else rates | {"mfu": flops_per_s / self.peak_flops}


def training_flops(
    model: PSPNet, crop_size: Size, *, num_frozen_stages: int = 0, frozen_batch_norm: Frozen = "none"
) -> int:
    """Return the floating-point operations of one image's forward and backward pass; a multiply-add is two.

    Convolutions and matrix products of our network are counted (the factored head has fewer than the published
    one), not what activation checkpointing computes twice: so defined, the share of the peak is MFU (Chowdhery et
    al., "PaLM", 2022, appendix B). Nothing is computed.
    """
    return _counted(json.dumps(model.architecture), sides(crop_size), num_frozen_stages, frozen_batch_norm)


@functools.cache
def _counted(
    architecture: str, crop_size: tuple[int, int], num_frozen_stages: int, frozen_batch_norm: Frozen
) -> int:
    def build() -> PSPNet:
        model = PSPNet.from_architecture(json.loads(architecture))
        freeze(model, num_stages=num_frozen_stages, batch_norm=frozen_batch_norm)
        return model

    with sizes_alone(build) as fake:
        train_mode(fake)
        images = torch.empty(2, 3, *crop_size)  # BatchNorm refuses a single value
        with FlopCounterMode(display=False) as counter:
            output = fake(images, upsample=False)
            total = output.logits.sum()
            if output.aux_logits is not None:
                total = total + output.aux_logits.sum()
            total.backward()
    return int(counter.get_total_flops()) // 2


def peak_flops(device_name: str, precision: Precision, *, is_tf32: bool = True) -> float | None:
    """Return the dense peak of the GPU in operations per second, None for a device that is not in the table.

    `device_name` is `torch.cuda.get_device_name()`; fp32 takes the tensor cores' TF32 where `is_tf32` allows it. A part
    of a GPU (MIG) has no known peak, nor has bf16 on one that has no units for it.
    """
    if re.search(r"\bMIG\b", device_name):
        return None
    for pattern, (half, tf32, fp32) in _PEAK_TFLOPS.items():
        if re.search(rf"\b{pattern}\b", device_name):
            if precision == "fp32":
                return (tf32 if is_tf32 and tf32 else fp32) * 1e12
            return None if precision == "bf16" and tf32 is None else half * 1e12
    return None


_PEAK_TFLOPS: dict[str, tuple[float, float | None, float]] = {
    "GB200": (2500.0, 1250.0, 80.0),
    "B200": (2250.0, 1100.0, 75.0),
    "H[18]00 PCIe": (756.0, 378.0, 51.0),
    "H100 NVL": (835.0, 417.5, 60.0),
    "H200 NVL": (835.5, 417.5, 60.0),
    "G?H200": (989.4, 494.7, 66.9),
    "H[18]00": (989.4, 494.7, 66.9),
    "H20": (148.0, 74.0, 44.0),
    "A[18]00.*": (312.0, 156.0, 19.5),
    "L40S": (362.0, 183.0, 91.6),
    "L40": (181.0, 90.5, 90.5),
    "L4": (121.0, 60.0, 30.3),
    "A40": (149.7, 74.8, 37.4),
    "A30": (165.0, 82.0, 10.3),
    "A10": (125.0, 62.5, 31.2),
    "A10G": (70.0, 35.0, 35.0),
    "RTX A6000": (154.8, 77.4, 38.7),
    "RTX 5090$": (209.5, 104.8, 104.8),
    "RTX 4090$": (165.2, 82.6, 82.6),
    "RTX 4080$": (97.5, 48.7, 48.7),
    "RTX 3090 Ti$": (80.0, 40.0, 40.0),
    "RTX 3090$": (71.0, 35.6, 35.6),
    "V100-SXM[23]-[0-9]+GB$": (125.0, None, 15.7),
    "V100-PCIE.*": (112.0, None, 14.0),
    "V100S-PCIE.*": (130.0, None, 16.4),
    "TITAN RTX$": (130.5, None, 16.3),
    "RTX 2080 Ti$": (53.8, None, 13.4),
    "T4": (65.0, None, 8.1),
}
"""By name, in the order in which they are tried: bf16 and fp16 added up in fp32, TF32, FP32. Dense; tables of sparse
matrices have twice as much. Before Ampere there was neither bf16 nor TF32: None.

From NVIDIA's data sheets of each, but GeForce, TITAN and RTX A6000 from its white papers on the architecture (Turing,
with the clock of the 2080 Ti's reference card; GA102; Ada; RTX Blackwell), H800 and H20 from those of servers with
them. `$` leaves laptops' GPUs and variants of a name out.
"""
