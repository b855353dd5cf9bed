"""The toy world: procedurally drawn scenes whose truth is known exactly."""

from llmga.toyworld.describe import describe
from llmga.toyworld.parse import parse
from llmga.toyworld.render import render
from llmga.toyworld.scene import sample_scene

__all__ = ["describe", "parse", "render", "sample_scene"]
