"""What wraps models in real runs, without a GPU: replicas in threads, parameters that are released, early steps."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Released", "ReplicasInThreads", "steps_inside"]


class ReplicasInThreads(nn.Module):
    """As nn.DataParallel over two devices: copies that share the model's hooks, a thread and half of the rows each."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Any) -> Any:
        copies, outputs = [_replicate(self.module) for _ in range(2)], dict[int, Any]()
        is_watched = torch.is_grad_enabled()

        def run(place: int) -> None:
            part = {name: value.chunk(2)[place] if _is_batch(value) else value for name, value in inputs.items()}
            try:
                with torch.set_grad_enabled(is_watched):
                    outputs[place] = copies[place](**part)
            except BaseException as error:  # noqa: BLE001  (raised again in the thread that called)
                outputs[place] = error

        threads = [threading.Thread(target=run, args=(place,)) for place in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for output in outputs.values():
            if isinstance(output, BaseException):
                raise output
        first = outputs[0]
        return type(first)(**{
            name: torch.cat([outputs[place][name] for place in range(2)]) if _is_batch(value) else value
            for name, value in first.items()
        })  # fmt: skip


def _is_batch(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _replicate(root: nn.Module) -> nn.Module:
    """A copy as torch makes it for another device: parameters are no leaves, hooks are the same dictionaries."""
    copies = {module: module._replicate_for_data_parallel() for module in root.modules()}  # type: ignore[operator]  # noqa: SLF001
    views = {parameter: parameter.view_as(parameter) for parameter in root.parameters()}
    for module, copy in copies.items():
        copy._former_parameters = {}  # noqa: SLF001
        for name, child in module._modules.items():  # noqa: SLF001
            copy._modules[name] = None if child is None else copies[child]  # noqa: SLF001
        for name, parameter in module._parameters.items():  # noqa: SLF001
            copy._parameters[name] = None  # noqa: SLF001
            if parameter is not None:
                del copy._parameters[name]  # noqa: SLF001
                setattr(copy, name, views[parameter])
                copy._former_parameters[name] = views[parameter]  # noqa: SLF001
    made: nn.Module = copies[root]
    return made


class Released:
    """As ZeRO-3: a model's parameters are empty but while their module runs, forward or backward."""

    def __init__(self, model: nn.Module) -> None:
        self.whole = {parameter: parameter.data for parameter in model.parameters()}
        for number, parameter in enumerate(self.whole):
            parameter.ds_id, parameter.ds_status, parameter.ds_shape = number, "NOT_AVAILABLE", parameter.shape  # type: ignore[attr-defined]
            parameter.data = torch.empty(0, dtype=parameter.dtype)
        for module in model.modules():
            if any(True for _ in module.parameters(recurse=False)):
                module.register_forward_pre_hook(lambda module, args: self._gather(module))
                module.register_forward_hook(lambda module, args, output: self._release(module, output))

    def _gather(self, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = self.whole[parameter]

    def _release(self, module: nn.Module, output: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0, dtype=parameter.dtype)
        if isinstance(output, Tensor) and output.requires_grad:  # the backward of the module is next to come here
            output.register_hook(lambda grad: self._gather(module))


def steps_inside(kind: type) -> type:
    """A trainer's class whose `training_step` makes the optimizer's step too, as under DeepSpeed."""

    class StepsInside(kind):  # type: ignore[misc]
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            if self.accelerator.sync_gradients:
                self.optimizer.optimizer.step()
                self.optimizer.optimizer.zero_grad(set_to_none=True)
            return loss

    return StepsInside
