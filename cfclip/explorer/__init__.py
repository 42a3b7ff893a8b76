"""The explorer: type a prompt, move the strength, see the edit."""

from cfclip.explorer.model import Explorer

__all__ = ["Explorer"]
