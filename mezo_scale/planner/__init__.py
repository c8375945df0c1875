"""What fits, how, and with which bytes: before a machine is booked."""

from mezo_scale.distributed.layout import Strategy
from mezo_scale.planner.architecture import Architecture, architecture, architecture_of
from mezo_scale.planner.memory import Memory, memory
from mezo_scale.planner.plan import (
    Cluster,
    Entry,
    device_counts,
    devices_needed,
    plan,
    recommended,
    strategies,
    with_dry_run,
)
from mezo_scale.planner.rates import FORMULA, Rates, Seconds, seconds
from mezo_scale.planner.report import Report, scaling_table
from mezo_scale.planner.traffic import Traffic, traffic
from mezo_scale.planner.workload import GIB, Workload

__all__ = [
    "FORMULA",
    "GIB",
    "Architecture",
    "Cluster",
    "Entry",
    "Memory",
    "Rates",
    "Report",
    "Seconds",
    "Strategy",
    "Traffic",
    "Workload",
    "architecture",
    "architecture_of",
    "device_counts",
    "devices_needed",
    "memory",
    "plan",
    "recommended",
    "scaling_table",
    "seconds",
    "strategies",
    "traffic",
    "with_dry_run",
]
