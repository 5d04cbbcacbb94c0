"""An exponential moving average of the weights, evaluated in their place."""

from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pspnet.model import PSPNet


def new_average(model: PSPNet, decay: float) -> AveragedModel:
    """Return the average of the model's weights and running statistics; its `module` is a network of its own.

    The first update copies them, each further one makes it decay * average + (1 - decay) * weights.
    """
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
