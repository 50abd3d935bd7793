"""For people who stay with Hugging Face's models: our kernels in them, their lost states mended, their caches kept."""

from linstate.patch.cache import fork_cache, load_cache, save_cache
from linstate.patch.patching import Change, Patch, patch_transformers

__all__ = ["Change", "Patch", "fork_cache", "load_cache", "patch_transformers", "save_cache"]
