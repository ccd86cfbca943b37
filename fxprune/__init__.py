"""fxprune: make a trained network physically smaller.

`compile(model, example_inputs, Budget(macs=0.5))` traces a network, finds which channels hang together across branches
and heads, chooses what stays, and emits a slimmer `GraphModule` that is proved equal to the masked original.
"""

from fxprune import methods
from fxprune.budgets import Budget
from fxprune.calibrating import calibrate
from fxprune.calibrations import Calibration
from fxprune.charts import draw_sensitivity, draw_sweep
from fxprune.closeups import draw_group
from fxprune.combining import CombinationCosts, combination_costs
from fxprune.compensating import compensate
from fxprune.compiling import compile
from fxprune.constraining import Constraints
from fxprune.coupling import Coupling, couple
from fxprune.drawing import draw_groups
from fxprune.errors import (
    ArtifactError,
    CouplingError,
    FxPruneError,
    PlanError,
    RewriteError,
    TraceError,
    VerificationError,
)
from fxprune.inspecting import Inspection, inspect
from fxprune.latencies import LatencyModel
from fxprune.merging import merge
from fxprune.planning import plan
from fxprune.plans import Plan
from fxprune.reporting import Report, report
from fxprune.rewriting import rewrite
from fxprune.saving import load, save
from fxprune.selecting import select_tasks
from fxprune.sensing import Sensitivity, sensitivity
from fxprune.sweeping import Sweep, sweep
from fxprune.tasks import Task
from fxprune.timing import MeasuredLatency, measure_latency
from fxprune.traced import Traced
from fxprune.tracing import trace
from fxprune.transferring import transfer
from fxprune.verifying import Verification, verify
from fxprune.widths import draw_plan

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
    "Inspection",
    "LatencyModel",
    "MeasuredLatency",
    "Plan",
    "PlanError",
    "Report",
    "RewriteError",
    "Sensitivity",
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
    "draw_group",
    "draw_groups",
    "draw_plan",
    "draw_sensitivity",
    "draw_sweep",
    "inspect",
    "load",
    "measure_latency",
    "merge",
    "methods",
    "plan",
    "report",
    "rewrite",
    "save",
    "select_tasks",
    "sensitivity",
    "sweep",
    "trace",
    "transfer",
    "verify",
]
