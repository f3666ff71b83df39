"""A device that any machine has: its tensors are computed on the CPU, but cannot be mixed with those of the CPU.

    with fake_device():
        model.to("cuda")

Within, "cuda" is that device. Like a GPU it refuses a CPU tensor beside its own (one number, or indices, are allowed), and `.numpy()`. So a
tensor that was made without a device, or left on the wrong one, is an error here as it is there.
"""

import contextlib

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("cuda", 0)
INDEXED = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default}


class There(torch.Tensor):
    """A tensor on the device. `inner` has its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        kept = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype, "device": "cpu"}
        return torch.Tensor._make_wrapper_subclass(cls, inner.size(), **kept)

    def __init__(self, inner):
        self.inner = inner

    @property
    def device(self):
        return DEVICE

    @property
    def is_cuda(self):
        return True

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        assert isinstance(value, There), "data of another device"
        self.inner = value.inner

    def data_ptr(self):
        return self.inner.data_ptr()

    def tolist(self):
        return self.inner.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert a tensor of the fake device to numpy")

    def __repr__(self, **kwargs):
        return f"There({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        given = [x for x in tree_flatten((args, kwargs or {}))[0] if isinstance(x, torch.Tensor)]
        here = [x for x in given if not isinstance(x, There) and x.dim() > 0]
        copies = func is torch.ops.aten.copy_.default
        if here and not copies and not (func in INDEXED and isinstance(args[0], There)):
            raise RuntimeError(f"expected all tensors to be on one device: {func} got one of the CPU, {tuple(here[0].shape)}")
        wrappers = {id(x.inner): x for x in given if isinstance(x, There)}
        made = func(*tree_map(_inside, args), **tree_map(_inside, kwargs or {}))
        if copies:
            return args[0]
        with torch.inference_mode(torch.is_inference_mode_enabled() and not (func.is_view and not args[0].is_inference())):
            return tree_map(lambda x: (wrappers[id(x)] if id(x) in wrappers else There(x)) if isinstance(x, torch.Tensor) else x, made)


def _inside(x):
    return x.inner if isinstance(x, There) else x


class _Move(torch.autograd.Function):
    """To the device or from it, with the gradient the other way."""

    @staticmethod
    def forward(ctx, x, there):
        return There(x.detach().clone()) if there else x.inner.detach().clone()

    @staticmethod
    def backward(ctx, dy):
        return (dy.inner if isinstance(dy, There) else There(dy)), None


def _moved(x, there):
    return x if isinstance(x, There) == there else _Move.apply(x, there)


class _Machine(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cpu:
            return _moved(args[0], False)
        if func is torch.Tensor.cuda:
            return _moved(args[0], True)
        if func is torch.Tensor.to:
            return self._to(args, kwargs)
        device = kwargs.get("device")
        if device is None or torch.device(device).type != "cuda":
            if func is torch.as_tensor and device is not None and isinstance(args[0], There):
                return _moved(func(args[0], dtype=kwargs.get("dtype")), False)
            return func(*args, **kwargs)
        del kwargs["device"]
        made = func(*args, **kwargs)
        return made if isinstance(made, There) else There(made.detach()).requires_grad_(made.requires_grad)

    def _to(self, args, kwargs):
        x, *rest = args
        rest += [kwargs.get("device"), kwargs.get("dtype")]
        like = next((one for one in rest if isinstance(one, torch.Tensor)), None)
        device = next((torch.device(one) for one in rest if isinstance(one, str | torch.device)), x.device if like is None else like.device)
        dtype = next((one for one in rest if isinstance(one, torch.dtype)), x.dtype if like is None else like.dtype)
        return _moved(x.to(dtype, copy=kwargs.get("copy", False)), device.type == "cuda")


@contextlib.contextmanager
def fake_device():
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # `module.to` makes new parameters instead of filling the old ones
    try:
        with _Machine():
            yield DEVICE
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
