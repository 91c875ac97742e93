"""Counting the floating-point operations of a piece of work without doing them."""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

_aten = torch.ops.aten


def count_flops(work: Callable[[], object]) -> int:
    """The multiplications and additions of all matrix products and attention in `work`, masked halves included.

    All other operations run; a product gives zeros, so that large ones take no time.

    Raises:
        NotImplementedError: `work` has a product whose operations cannot be counted.
    """
    with _ZeroProducts(), FlopCounter() as counter:
        work()
    return int(counter.flops)


class FlopCounter(TorchDispatchMode):
    """Counts while its context lasts, by the formulas of torch and those for what torch does not know.

    It looks at operators alone, and so costs much less time than :class:`torch.utils.flop_counter.FlopCounterMode`,
    which follows modules and takes operators apart.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated.
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = _FORMULAS.get(func.overloadpacket)
        if formula is not None:
            self.flops += int(formula(*args, **kwargs, out_val=out))
        return out


def _product(_accumulator: Any, left: Any, right: Any, *_: object, **__: object) -> int:
    *batch, rows, inner = left
    return int(2 * prod(batch) * rows * inner * right[-1])


def _attention(query: Any, key: Any, value: Any, *_: object, **__: object) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: object, **__: object) -> int:
    count = sdpa_backward_flop_count(gradient, query, key, value)
    return int(count)


_UNKNOWN_TO_TORCH: dict[Any, Any] = {
    # The counter of torch knows no products in place, and no attention on the CPU.
    _aten.addmm_: _product,
    _aten.baddbmm_: _product,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
_FORMULAS = {**flop_registry, **{packet: shape_wrapper(formula) for packet, formula in _UNKNOWN_TO_TORCH.items()}}
_PRODUCTS = {_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, *_UNKNOWN_TO_TORCH}


class _ZeroProducts(TorchDispatchMode):
    """Replaces every product by zeros of its shape."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated.

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name: str = func.overloadpacket.__name__
        if func.overloadpacket not in _PRODUCTS:
            if "mm" in name.split("_") or name.rstrip("_").endswith("mm") or "attention" in name:
                raise NotImplementedError(f"the operations of {name} are not counted")
            return func(*args, **kwargs)
        if "out" in kwargs:
            return kwargs["out"].zero_()
        if name.endswith("_"):
            return args[0].zero_()
        shaped = func(*tree_map(_on_meta, args), **tree_map(_on_meta, kwargs))
        return tree_map(_zeros, shaped)


def _on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def _zeros(value: Any) -> Any:
    return torch.zeros_like(value, device="cpu") if isinstance(value, Tensor) else value
