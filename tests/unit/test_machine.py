"""Figures name their machine, so that nobody compares two machines."""

import os
import re

import numpy as np

from llmga.machine import machine_in_words


def test_a_machine_is_named_with_what_matters() -> None:
    words = machine_in_words("numpy", threads=1, note="quiet")
    assert re.fullmatch(r"1 thread of \d+ cores \(.+\), \d+ GB memory, \w+, Python 3\.\d+\.\d+, numpy .+; quiet", words)
    assert f"numpy {np.__version__}" in words
    assert machine_in_words().startswith(f"{os.cpu_count()} cores (")
