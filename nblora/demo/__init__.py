"""The main job of `nblora demo`: adapt a small network to a shifted domain in four ways, and compare."""

from .results import DemoResult, Settings
from .run import run_demo

__all__ = ["DemoResult", "Settings", "run_demo"]
