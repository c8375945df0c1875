"""What fits, how, and with which bytes: before a machine is booked."""

from mezo_scale.distributed.layout import Strategy
from mezo_scale.planner.memory import Memory, memory
from mezo_scale.planner.plan import Cluster, Entry, devices_needed, plan, recommended, strategies, with_dry_run
from mezo_scale.planner.rates import FORMULA, Rates, seconds
from mezo_scale.planner.report import Report
from mezo_scale.planner.traffic import Traffic, traffic
from mezo_scale.planner.workload import GIB, Workload

__all__ = [
    "FORMULA",
    "GIB",
    "Cluster",
    "Entry",
    "Memory",
    "Rates",
    "Report",
    "Strategy",
    "Traffic",
    "Workload",
    "devices_needed",
    "memory",
    "plan",
    "recommended",
    "seconds",
    "strategies",
    "traffic",
    "with_dry_run",
]
