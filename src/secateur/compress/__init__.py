"""Smaller networks: physical removal of channels."""

from .channels import Removal, remove_channels

__all__ = ["Removal", "remove_channels"]
