"""What fits, how, and with which bytes: before a machine is booked."""

from mezo_scale.distributed.layout import Strategy
from mezo_scale.planner.architecture import Architecture, architecture, architecture_of
from mezo_scale.planner.memory import memory
from mezo_scale.planner.plan import Cluster, device_counts, devices_needed, plan, recommended
from mezo_scale.planner.rates import Rates, forward_flops, seconds
from mezo_scale.planner.report import Report, scaling_table
from mezo_scale.planner.traffic import traffic
from mezo_scale.planner.workload import GIB, Workload

__all__ = [
    "GIB",
    "Architecture",
    "Cluster",
    "Rates",
    "Report",
    "Strategy",
    "Workload",
    "architecture",
    "architecture_of",
    "device_counts",
    "devices_needed",
    "forward_flops",
    "memory",
    "plan",
    "recommended",
    "scaling_table",
    "seconds",
    "traffic",
]
