"""Tests of kernels in Triton's interpreter, which Triton chooses when it decorates a kernel: they take a process of their own."""

import os

import pytest

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
interpreter = pytest.mark.skipif(not interpreted, reason="run by test_interpreter.py, in a process of its own")
