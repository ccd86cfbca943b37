"""fxprune: make a trained network physically smaller.

`compile(model, example_inputs, Budget(macs=0.5))` traces a network, finds which channels hang together across branches
and heads, chooses what stays, and emits a slimmer `GraphModule` that is proved equal to the masked original.
"""

from fxprune import methods
from fxprune.budgets import Budget
from fxprune.calibrating import Calibration, calibrate
from fxprune.combining import CombinationCosts, combination_costs
from fxprune.compensating import compensate
from fxprune.compiling import compile
from fxprune.constraining import Constraints
from fxprune.coupling import Coupling, couple
from fxprune.errors import (
    ArtifactError,
    CouplingError,
    FxPruneError,
    PlanError,
    RewriteError,
    TraceError,
    VerificationError,
)
from fxprune.latencies import LatencyModel
from fxprune.merging import merge
from fxprune.planning import plan
from fxprune.plans import Plan
from fxprune.reporting import Report, report
from fxprune.rewriting import rewrite
from fxprune.saving import load, save
from fxprune.selecting import select_tasks
from fxprune.sweeping import Sweep, sweep
from fxprune.tasks import Task
from fxprune.timing import MeasuredLatency, measure_latency
from fxprune.traced import Traced
from fxprune.tracing import trace
from fxprune.transferring import transfer
from fxprune.verifying import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "ArtifactError",
    "Budget",
    "Calibration",
    "CombinationCosts",
    "Constraints",
    "Coupling",
    "CouplingError",
    "FxPruneError",
    "LatencyModel",
    "MeasuredLatency",
    "Plan",
    "PlanError",
    "Report",
    "RewriteError",
    "Sweep",
    "Task",
    "TraceError",
    "Traced",
    "Verification",
    "VerificationError",
    "calibrate",
    "combination_costs",
    "compensate",
    "compile",
    "couple",
    "load",
    "measure_latency",
    "merge",
    "methods",
    "plan",
    "report",
    "rewrite",
    "save",
    "select_tasks",
    "sweep",
    "trace",
    "transfer",
    "verify",
]
