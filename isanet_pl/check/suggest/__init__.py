"""A config for a data set and a machine: its numbers, and the reasons for them."""

from isanet_pl.check.suggest.config import suggest_config
from isanet_pl.check.suggest.machine import Device, Machine, find_machine

__all__ = ["Device", "Machine", "find_machine", "suggest_config"]
