"""The fixtures of common.py, for the tests in all folders."""

from common import *  # noqa: F403
