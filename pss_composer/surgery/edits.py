"""Changes to a model that can be taken back: a module in a slot, and a class that adds to a module's own.

A sampler keeps the list of its changes (`PatchSampler.edits`), so that copies and pickles of a model have theirs.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from pss_composer.errors import InputError
from pss_composer.sampling import PatchSampler


class Missing:
    """Stands for the value of an attribute that was not there."""


def put(sampler: PatchSampler, owner: nn.Module, name: str, value: object) -> None:
    """Set `owner.name`, most often to a module; `undo_edits` sets it back."""
    sampler.edits.append((owner, name, getattr(owner, name, Missing)))
    setattr(owner, name, value)


def extend(sampler: PatchSampler, module: nn.Module, mixin: type[Extension]) -> None:
    """Let a module's class inherit from a mixin first and from its own class second; `undo_edits` takes it back.

    Args:
        sampler: The sampler whose change it is.
        module: A module of the model.
        mixin: Its methods call `super()` for the module's own.

    Raises:
        TypeError: The object has one of these methods itself, which would be called instead of the mixin's.
    """
    for name in vars(mixin).keys() & vars(module).keys():
        raise TypeError(f"cannot drop patch tokens in {type(module).__name__}: this object's {name} was replaced, as "
                        "accelerate's hooks do (device_map, say): call apply_patch_sampling before")
    sampler.edits.append((module, "__class__", type(module)))
    module.__class__ = _extend_class(mixin, type(module))


def sample_output(sampler: PatchSampler, module: nn.Module) -> None:
    """Send a module's output, tokens (B, P + N, C), through the sampler; for ViTs without a slot of their own."""
    extend(sampler, module, SampledOutput)
    put(sampler, module, "patch_sampler", sampler)


def undo_edits(sampler: PatchSampler) -> None:
    """Make the model what it was before the sampler came into it."""
    for owner, name, before in reversed(sampler.edits):
        if before is Missing or (name in owner._modules and not isinstance(before, nn.Module)):
            delattr(owner, name)  # setting it to None, say, would leave its name among the modules
        if name == "__class__":
            before = _without_extension(type(owner), before)
        if before is not Missing:
            setattr(owner, name, before)
    sampler.edits.clear()


class Extension(nn.Module):
    """Base of the mixins for `extend`: a class made at run time that copies and pickles all the same."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _build_extended, type(self).__bases__, self.__dict__


class SampledOutput(Extension):
    """A module whose output goes through its `patch_sampler`."""

    patch_sampler: PatchSampler

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.patch_sampler(super().forward(*args, **kwargs))


class WholeGrid(Extension):
    """A ViT whose `forward_intermediates` puts tokens onto their grid, (B, C, H, W), for which it needs all of them.

    timm's `features_only` models and `get_intermediate_layers` call it, too. With `output_fmt="NLC"` it needs no grid:
    the tokens are then the kept ones, in the order of `PatchSampler.keep_indices`.
    """

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("output_fmt", "NCHW") == "NCHW":
            require_all_tokens(self, "forward_intermediates puts all tokens onto their grid, "
                               'as does features_only (output_fmt="NLC" does not)')
        return super().forward_intermediates(*args, **kwargs)


def require_all_tokens(vit: nn.Module, reason: str) -> None:
    """Refuse what needs every token of a ViT.

    Raises:
        InputError: The ViT's sampler would drop tokens now.
    """
    for sampler in vit.modules():
        if isinstance(sampler, PatchSampler):
            key = "keep_rate" if sampler.training else "eval_keep_rate"
            if sampler.current_keep_rate < 1:
                raise InputError(f"must be 1 here, since {reason}, got {sampler.current_keep_rate}", key=key)


_extended: dict[tuple[Any, Any], Any] = {}


def _extend_class(mixin: Any, base: Any) -> Any:
    if (mixin, base) not in _extended:
        # under the old name: transformers writes a model's into its config.json, and FSDP looks for layers by theirs
        names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
        _extended[mixin, base] = type(base.__name__, (mixin, base), names)
    return _extended[mixin, base]


def _without_extension(current: Any, before: Any) -> Any:
    """What a module's class is without an extension of `before`: torch's FSDP2 puts a class of its own on top."""
    if current in _extended.values() and current.__bases__[1] is before:
        return before
    bases = tuple(_without_extension(base, before) if issubclass(base, before) else base for base in current.__bases__)
    names = {name: value for name, value in vars(current).items() if name not in ("__dict__", "__weakref__")}
    return type(current)(current.__name__, bases, names)


def _build_extended(mixin: Any, base: Any) -> Any:
    extended = _extend_class(mixin, base)
    return extended.__new__(extended)
