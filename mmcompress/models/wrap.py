"""Instance wrappers: callables in a module's `__dict__` that stand before one of its methods, undone exactly. Hooks and class
changes are ignored by compiled models, these are not."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import types
import weakref
from typing import Any

from torch import nn


class Wrapped:
    """Stands in `module.__dict__[name]` and answers with `getattr(owner, handler)(self, *key, args, kwargs)`.

    It holds references only, so that a deep copy or a pickle of the whole model has wrappers of its own, whose owner is the
    copy's; a copy of a part of the model alone is the stock part. The handler runs as it stands under torch.compile: what must
    not be traced says so itself.
    """

    def __init__(self, module: nn.Module, name: str, owner: Any, handler: str, *key: Any):
        self.module, self.name, self.owner, self.handler, self.key = module, name, owner, handler, key
        self.inherited = module.__dict__.get(name)  # another library (accelerate) may have put one there
        self.former: Any = None  # of a copy of a part: a weak reference to the owner of what it was copied from
        self.static = isinstance(inspect.getattr_static(type(module), name, None), staticmethod)
        setattr(module, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.owner is None:
            former = self.former() if self.former is not None else None
            if former is not None and self.handler == "on_core":
                former.refuse_copy(self.module)
            return self.original(*args, **kwargs)
        return getattr(self.owner, self.handler)(self, *self.key, args, kwargs)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """What stood here before."""
        if self.inherited is not None:
            return self.inherited(*args, **kwargs)
        method = getattr(type(self.module), self.name)
        return method(*args, **kwargs) if self.static else method(self.module, *args, **kwargs)

    @property
    def __wrapped__(self) -> Any:  # keeps the signature for Trainer and generate
        return self.inherited if self.inherited is not None else method_of(self.module, self.name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Wrapped:
        twin = memo[id(self)] = object.__new__(type(self))
        state = dict(self.__dict__)
        if self.owner is not None and id(self.owner.model) not in memo:  # a part of the model alone
            state["owner"], state["former"] = None, None
        twin.__dict__.update(copy.deepcopy(state, memo))
        if twin.owner is None:
            twin.former = self.former if self.owner is None else weakref.ref(self.owner)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "former": None}

    def stands(self) -> bool:
        """Whether a call of the method still comes here, as far as can be told: directly, or through what was wrapped
        around."""
        now = self.module.__dict__.get(self.name)
        for _ in range(8):
            if now is self or self.module.__dict__.get(f"_old_{self.name}") is self:
                return True
            if now is None or self.is_stock(now):
                return False
            now = getattr(now, "__wrapped__", None)
            if now is None:
                return True  # something that does not tell what it calls
        return True

    def check(self) -> None:
        """Raise RuntimeError where something else was wrapped around it since: `undo` would take off the wrong layer."""
        now = self.module.__dict__.get(self.name)
        if now is not self and not self.is_stock(now):
            raise RuntimeError(f"{type(self.module).__name__}.{self.name} was wrapped again after compress_; undo that first")

    def is_stock(self, now: Any) -> bool:
        """Whether this is the class's own method, which some libraries (PEFT's prefix tuning) put back on the instance."""
        own = inspect.getattr_static(type(self.module), self.name, None)
        return isinstance(now, types.MethodType) and now.__self__ is self.module and now.__func__ is own

    def undo(self) -> None:
        """Remove it, bit for bit. Raises as `check` does."""
        self.check()
        if self.module.__dict__.get(self.name) is not self:
            return  # the stock method stands there already
        if self.inherited is None:
            delattr(self.module, self.name)
        else:
            setattr(self.module, self.name, self.inherited)


def bound(module: nn.Module, name: str, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `module.name` by name."""
    if not args:
        return kwargs
    out, names = {}, parameters_of(type(module), name)
    for key, value in zip(names, args, strict=False):
        if key in kwargs:
            raise TypeError(f"{type(module).__name__}.{name} got two values for {key}")
        out[key] = value
    if len(args) > len(names):
        raise TypeError(f"{type(module).__name__}.{name} takes at most {len(names)} positional arguments, got {len(args)}")
    return {**out, **kwargs}


@functools.cache
def parameters_of(kind: type, name: str) -> tuple[str, ...]:
    """Names of the arguments of a method that may be given by position, without self."""
    own = [vars(c)[name] for c in kind.__mro__ if name in vars(c)]
    for method in own:  # a method that hands on whatever it gets has the arguments of the one behind it
        parameters = inspect.signature(method.__get__(None, kind)).parameters.values()
        if all(p.kind is not inspect.Parameter.VAR_POSITIONAL for p in parameters):
            break
    static = isinstance(method, staticmethod)
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in parameters if p.kind in positional)[0 if static else 1 :]


def method_of(module: nn.Module, name: str) -> Any:
    """The class's own method, bound to this module."""
    return inspect.getattr_static(type(module), name).__get__(module, type(module))


def first_parameter(module: nn.Module) -> str:
    """The name of the first argument of a module's forward."""
    return parameters_of(type(module), "forward")[0]


def base_model(model: Any) -> Any:
    """The transformers model itself, inside a PEFT wrapper where there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` is on the model or a part of it; cannot see a wrapper that `torch.compile(model)`
    returned elsewhere."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # not loaded: nothing was compiled
    compiled = dynamo.OptimizedModule if dynamo else ()
    return any(
        isinstance(m, compiled) or m._compiled_call_impl is not None or hasattr(m.forward, "_torchdynamo_orig_callable")
        for m in model.modules()
    )
