"""Networks whose values come from elsewhere, built without drawing any."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_DRAWS = {
    nn.init.kaiming_uniform_,
    nn.init.kaiming_normal_,
    nn.init.trunc_normal_,
    nn.init.normal_,
    nn.init.uniform_,
    Tensor.normal_,
    Tensor.uniform_,
}


class WithoutDraws(TorchFunctionMode):
    """Within it what modules would draw at random at their beginning is left as the memory has it.

    On the device "meta", where there is nothing to draw, it saves the first network of a process two seconds: to find
    that out torch loads its compiler.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        arguments: Sequence[Any] = (),
        named: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return what the function returns, or its tensor as it is."""
        named = named or {}
        if function in _DRAWS:
            return arguments[0] if arguments else named["tensor"]
        return function(*arguments, **named)
