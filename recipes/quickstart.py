"""The whole pipeline on two cores in a quarter of an hour."""

from mmllm.runs.quickstart import Quickstart

RECIPE = Quickstart()
