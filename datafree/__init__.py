"""Quantize a trained neural network without any data."""

import datafree.methods  # noqa: F401 - loaded first, so that the name `methods` stays the function
from datafree.api import load, quantize
from datafree.context import Ctx, Event
from datafree.errors import DatafreeError
from datafree.measure.accuracy import Accuracy, evaluate
from datafree.method import Method, methods
from datafree.plan import LayerPlan, Plan, QSpec, Target
from datafree.planning import Frontier, search
from datafree.result import Result, export, verify
from datafree.task import Task

__all__ = [
    "Accuracy",
    "Ctx",
    "DatafreeError",
    "Event",
    "Frontier",
    "LayerPlan",
    "Method",
    "Plan",
    "QSpec",
    "Result",
    "Target",
    "Task",
    "evaluate",
    "export",
    "load",
    "methods",
    "quantize",
    "search",
    "verify",
]
